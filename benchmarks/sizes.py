"""What the programs here measure with: models of a stated size with random weights, and samples of a stated shape.

In come names of sizes and grids of crops; out come configurations, filled models, and examples as `data.encode` makes
them. No file is read and nothing is downloaded. On the meta device nothing is filled.

    full   Phi-3-Vision itself: 32 layers of width 3072, CLIP ViT-L/14 at 336 pixels
    mid    4 layers of width 2048 with the whole vocabulary: some GiB, for memory on a CPU
    cpu    8 layers of width 512; tower, vocabulary and inner width in about the same proportion to them
    tiny   2 layers of width 64: to try the programs
"""

import copy
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Phi3Config, PreTrainedModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.initialization import no_init_weights

from phi3v.image_tokens import CROP_SIZE
from phi3v.model.configuration_phi3_v import CLIP_VIT_LARGE_336, Phi3VConfig

MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
"""Of the three channels of normalised pixels."""

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
"""LoRA of every way here, on the four projections of each decoder layer."""

DECODERS: dict[str, dict[str, int]] = {
    "full": {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "mid": {
        "vocab_size": 32064,
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    },
    "cpu": {
        "vocab_size": 1024,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}
TOWERS: dict[str, dict[str, int]] = {
    "full": {},
    "mid": {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8},
    "cpu": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2},
}


def config_of(size: str, **changes: Any) -> Phi3VConfig:
    """The configuration of a size; `changes` are fields of it."""
    decoder = {**DECODERS[size], **changes}
    half_head = decoder["hidden_size"] // decoder["num_attention_heads"] // 2
    scaling = {
        "type": "su",
        "short_factor": [1.0 + 0.04 * place for place in range(half_head)],
        "long_factor": [1.0 + 1.3 * place for place in range(half_head)],
    }
    vision = {**CLIP_VIT_LARGE_336, **TOWERS[size]}
    return Phi3VConfig(
        **decoder,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_scaling=scaling,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        image_token_id=decoder["vocab_size"] - 20,
        vision_config=vision,
    )


def phi3_config(config: Phi3VConfig) -> Phi3Config:
    """The decoder alone, as transformers' own Phi-3 takes it."""
    names = ("original_max_position_embeddings", "max_position_embeddings", "rms_norm_eps", *DECODERS["full"])
    return Phi3Config(
        **{name: getattr(config, name) for name in names},
        rope_parameters=dict(config.rope_parameters),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def build(kind: type[PreTrainedModel], config: Any, *, device: str, dtype: torch.dtype, attention: str) -> Any:
    """A model on a device, filled by `fill`."""
    with no_init_weights(), torch.device(device):
        model = kind._from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)
    for module in model.modules():  # tables that no file holds stay real under meta: there they count as sizes too
        for name, table in list(module.named_buffers(recurse=False)):
            if table.device.type != torch.device(device).type:
                setattr(module, name, table.to(device))
    fill(model)
    return model


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Random weights that depend on a weight's name and shape alone: equal parts of two models get equal weights.

    Example: "model.layers.0.mlp.down_proj.weight" is the same in Phi3ForCausalLM and in Phi3VForCausalLM.
    """
    for name, weight in model.named_parameters():
        if weight.device.type == "meta" or "lora_" in name:
            continue
        part = next((name.rpartition(cut)[2] for cut in ("layers.", "img_projection.", "model.") if cut in name), name)
        part = part.removeprefix("vision_embed_tokens.")
        dice = torch.Generator(device=weight.device).manual_seed(zlib.crc32(part.encode()))
        if "norm" in name or "layrnorm" in name:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            weight.normal_(0, 0.02, generator=dice)


@torch.no_grad()
def fill_adapters(model: torch.nn.Module) -> None:
    """The first matrix of each LoRA adapter, filled by its name as `fill` does; the second stays zero."""
    for name, weight in model.named_parameters():
        if "lora_A" in name and weight.device.type != "meta":
            dice = torch.Generator(device=weight.device).manual_seed(zlib.crc32(name.rpartition("layers.")[2].encode()))
            weight.normal_(0, 0.02, generator=dice)


def image_tokens(grid: tuple[int, int]) -> int:
    """Tokens of an image of rows x columns crops: (4, 4) is 2509, (2, 2) is 757."""
    rows, columns = grid
    return (rows * columns + 1) * 144 + 1 + (rows + 1) * 12


def make_example(
    config: Phi3VConfig, grids: Sequence[tuple[int, int]], *, text: int = 100, trained: int = 36, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A training sample as `data.encode` makes it: images of such grids, `text` other tokens, the last are trained.

    Example: grids [(2, 2)], text 100, trained 36: 857 tokens, of which 3 stand before the image, 97 behind it and the
    last 36 have labels; pixel_values [1, 5, 3, 336, 336], image_sizes [[672, 672]].
    """
    dice = torch.Generator().manual_seed(seed)
    words = torch.randint(3, config.image_token_id, (text,), generator=dice)
    pieces, images = [words[:3]], []
    for grid in grids:
        pieces.append(torch.full((image_tokens(grid),), config.image_token_id))
        shape = (1, grid[0] * grid[1] + 1, 3, CROP_SIZE, CROP_SIZE)
        levels = torch.randint(0, 256, shape, generator=dice, dtype=torch.uint8)
        images.append((levels / 255 - MEAN) / STD)
    ids = torch.cat([*pieces, words[3:]])
    labels = torch.full_like(ids, -100)
    labels[-trained:] = ids[-trained:]
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if images:
        most = max(image.shape[1] for image in images)
        example["pixel_values"] = torch.cat(
            [torch.nn.functional.pad(image, (0, 0, 0, 0, 0, 0, 0, most - image.shape[1])) for image in images]
        )
        example["image_sizes"] = torch.tensor([[rows * CROP_SIZE, columns * CROP_SIZE] for rows, columns in grids])
    return example


def bytes_of(example: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The example with sub crops as bytes and views of the whole beside them, as `encode(byte_crops=True)` makes it."""
    if "pixel_values" not in example:
        return example
    slots, sizes = example["pixel_values"], example["image_sizes"] // CROP_SIZE
    real = [image[1 : rows * columns + 1] for image, (rows, columns) in zip(slots, sizes.tolist(), strict=True)]
    crops = torch.cat(real)
    levels = ((crops * STD.to(crops.device) + MEAN.to(crops.device)) * 255).round().to(torch.uint8)
    return {**example, "pixel_values": levels, "global_views": slots[:, 0].clone()}
