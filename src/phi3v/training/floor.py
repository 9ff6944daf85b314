"""The least arithmetic that a training step under LoRA needs: the floor that its time is compared with.

Counted are the products that no way of computing the same gradients can leave out: forward and the activations'
gradient of the frozen matrices, three products of each LoRA matrix, causal attention (backward 2.5 times forward),
the head at trained positions, the tower's forward over real crops. Not needed, and not counted: any recomputation,
the last layer's output and feed-forward matrices at positions that are not trained, the gradient below the first
layer's qkv. In come sizes, out come numbers; nothing is loaded.
"""

from typing import Any

_PATCHES = 577  # of one crop in the tower: 24 x 24 and a class token


TOWER_PASSES = {"frozen": 1, "lora": 2, "train": 3}
"""How a tower is tuned -> passes over its matrices: forward, the activations' gradient, the weights'."""


def useful_operations(config: Any, *, tokens: int, image: int, crops: int, trained: int, rank: int = 16) -> float:
    """Floating-point operations of one sample in one step; a multiplication and its addition are two.

    Args:
        config: a Phi3VConfig.
        tokens: all tokens of the sample.
        image: the image tokens among them.
        crops: crops that go through the tower, views of the whole included; 0 where features are kept.
        trained: tokens with a label.
        rank: of LoRA on the four projections.
    Example: Phi-3-Vision, 2609 tokens, 2509 of an image of 17 crops, 40 trained: 48.2e12, 61 ms at 788e12 a second.
    """
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    matrices = 4 * width * width + 3 * width * inner
    adapters = rank * ((width + 3 * width) + 2 * width + (width + 2 * inner) + (inner + width))
    linear, lora = 2 * matrices * layers * tokens, 2 * adapters * layers * tokens
    attention = 2 * tokens**2 * width * layers
    head = 2 * width * config.vocab_size * trained
    left_out = 2 * 2 * (width * width + 3 * width * inner) * (tokens - trained) + 2 * 3 * width * width * tokens
    return 2 * linear + 3 * lora + 3.5 * attention + 2 * head - left_out + vision_operations(config, image, crops)


def vision_operations(config: Any, image: int, crops: int) -> float:
    """Operations of the tower's forward over so many crops, and of the projector over so many image tokens."""
    if not crops:
        return 0.0
    tower = config.vision_config
    layers = tower.num_hidden_layers + 1 + config.vision_feature_layer
    narrow, patches = tower.hidden_size, crops * _PATCHES
    matrices = 2 * (4 * narrow**2 + 2 * narrow * tower.intermediate_size) * layers * patches
    attention = 4 * _PATCHES * patches * narrow * layers
    patching = 2 * 3 * tower.patch_size**2 * narrow * crops * (_PATCHES - 1)
    projector = 2 * (4 * narrow * config.hidden_size + config.hidden_size**2) * image
    return matrices + attention + patching + projector
