"""From crops to image features: CLIP tower, 2x2 merge, one grid per image, separators, projection.

In: normalised crops and canvas sizes. Out: one vector per image token, all images one after the other. Knows nothing of
text, padding or batches. Module paths are those of Microsoft's checkpoints below `model.vision_embed_tokens`.

Letters: N images, K crop slots, C real crops, P merged patches of a crop (144), G channels of a merged patch (4 x tower
width), T image tokens, H hidden size of the decoder.
"""

from typing import cast

import torch
from torch import nn
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoder, CLIPPreTrainedModel, CLIPVisionEmbeddings

from .configuration_phi3_v import Phi3VConfig
from .crops_phi3_v import real_crops, seen_twice, to_device


def image_layout(grids: list[tuple[int, int]], side: int = 12) -> tuple[torch.Tensor, list[int]]:
    """Order in which merged patches and separators form the token sequence of each image.

    `grids` holds (rows, columns) of crops per image; `side` is the number of merged patches along a crop's edge. The
    result indexes a table of all patches (global view first, then the sub crops row by row, image after image, `side *
    side` patches each), followed by the line separator and by the separator between sub image and global view.

    Returns the index `[tokens of all images]` and the number of tokens of each image.

    Example: one image of 1 x 2 crops with `side=1` has the patches 0 (global), 1 (left) and 2 (right); 3 is the line
    separator and 4 stands before the global view. `image_layout([(1, 2)], side=1)` gives `[1, 2, 3, 4, 0, 3]` and
    `[6]`.
    """
    per_crop = side * side
    patches = sum(rows * columns + 1 for rows, columns in grids) * per_crop
    line_end, before_global = patches, patches + 1
    pieces: list[torch.Tensor] = []
    counts: list[int] = []
    first = 0
    for rows, columns in grids:
        sub = torch.arange(rows * columns * per_crop).view(rows, columns, side, side) + first + per_crop
        sub = sub.permute(0, 2, 1, 3).reshape(rows * side, columns * side)
        whole = torch.arange(per_crop).view(side, side) + first
        lines = [
            torch.cat([grid, grid.new_full((grid.shape[0], 1), line_end)], dim=1).flatten() for grid in (sub, whole)
        ]
        pieces += [lines[0], torch.tensor([before_global]), lines[1]]
        counts.append(lines[0].numel() + 1 + lines[1].numel())
        first += (rows * columns + 1) * per_crop
    return torch.cat(pieces), counts


def merge_patches(features: torch.Tensor) -> torch.Tensor:
    """Joins 2x2 neighbouring patches: `[C, S*S, D]` to `[C, S/2 * S/2, 4*D]`.

    Channels come in the order upper left, upper right, lower left, lower right. Example: the patches `[[0, 1], [2, 3]]`
    of a crop with one channel become the single vector `[0, 1, 2, 3]`.
    """
    crops, patches, width = features.shape
    side = int(patches**0.5)
    grid = features.view(crops, side // 2, 2, side // 2, 2, width)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(crops, patches // 4, 4 * width)


class Phi3VVisionTransformer(CLIPPreTrainedModel):
    """CLIP's vision transformer up to the hidden state that Phi-3-V reads.

    A pretrained model of its own, so that transformers chooses its attention and initialises it as CLIP.

    `post_layernorm` and the layers behind that state exist because the checkpoints hold them; they are never run.
    """

    config: CLIPVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: CLIPVisionConfig, layer_idx: int):
        super().__init__(config)
        self.embeddings = CLIPVisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(
            config.hidden_size, eps=config.layer_norm_eps
        )  # sic: the name in the checkpoints
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers_read = layer_idx if layer_idx >= 0 else config.num_hidden_layers + 1 + layer_idx
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[C, 3, 336, 336]` to patch features `[C, 576, D]`, class token dropped."""
        hidden_states = self.pre_layrnorm(self.embeddings(pixel_values))
        for layer in self.encoder.layers[: self.layers_read]:
            hidden_states = layer(hidden_states, None)
            hidden_states = hidden_states[0] if isinstance(hidden_states, tuple) else hidden_states
        return hidden_states[:, 1:]


def unread_parts(model: nn.Module) -> tuple[str, ...]:
    """How names begin of the tower's weights that no output depends on: post_layernorm, and the layers behind the one
    that is read.

    Example: of a base whose tower has three layers and is read behind the second, below "model.vision_embed_tokens.":
    ("img_processor.vision_model.post_layernorm.", "img_processor.vision_model.encoder.layers.2.").
    """
    unread: list[str] = []
    for prefix, module in model.named_modules():
        if isinstance(module, Phi3VVisionTransformer):
            behind = range(module.layers_read, len(module.encoder.layers))
            unread += [f"{prefix}.post_layernorm.", *(f"{prefix}.encoder.layers.{index}." for index in behind)]
    return tuple(unread)


class Phi3VImageProcessorTower(nn.Module):
    """Holder that gives the tower its path in the checkpoints, `img_processor.vision_model`."""

    def __init__(self, config: CLIPVisionConfig, layer_idx: int):
        super().__init__()
        self.vision_model = Phi3VVisionTransformer(config, layer_idx)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """See `Phi3VVisionTransformer.forward`."""
        return self.vision_model(pixel_values)


class Phi3VImageEmbedding(nn.Module):
    """Turns the images of a batch into embeddings for the decoder."""

    def __init__(self, config: Phi3VConfig):
        super().__init__()
        vision = cast(CLIPVisionConfig, config.vision_config)
        merged = 4 * vision.hidden_size
        self.crop_size = vision.image_size
        self.side = vision.image_size // vision.patch_size // 2
        self.img_processor = Phi3VImageProcessorTower(vision, config.vision_feature_layer)
        self.glb_GN = nn.Parameter(torch.empty(1, 1, merged))
        self.sub_GN = nn.Parameter(torch.empty(1, 1, 1, merged))
        self.img_projection = nn.Sequential(
            nn.Linear(merged, config.hidden_size), nn.GELU(), nn.Linear(config.hidden_size, config.hidden_size)
        )
        self.drop = nn.Dropout(config.embd_pdrop)

    @property
    def projection_dtype(self) -> torch.dtype:
        """Of the projector's first matrix. By its name: PEFT's copy of a whole projector has no places to index."""
        return cast(torch.Tensor, getattr(self.img_projection, "0").weight).dtype

    def grids(self, image_sizes: torch.Tensor | list) -> list[tuple[int, int]]:
        """Crops (rows, columns) of each image from canvas sizes in pixels: `[[672, 1008]]` is `[(2, 3)]`."""
        sizes = image_sizes.tolist() if isinstance(image_sizes, torch.Tensor) else image_sizes
        return [(int(height) // self.crop_size, int(width) // self.crop_size) for height, width in sizes]

    def token_counts(self, image_sizes: torch.Tensor | list) -> list[int]:
        """Image tokens of each image: `(rows * columns + 1) * 144 + 1 + (rows + 1) * 12` for 336-pixel crops."""
        side = self.side
        return [(h * w + 1) * side * side + 1 + (h + 1) * side for h, w in self.grids(image_sizes)]

    def forward(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | list,
        global_views: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[int]]:
        """Embeddings of all images, one after the other; a frozen tower leaves no trace for a backward pass.

        Args:
            pixel_values: `[N, K, 3, 336, 336]`, slot 0 the global view, then the sub crops, then padding that is never
                looked at; or one of the other forms of `crops_phi3_v`.
            image_sizes: `[N, 2]`, canvas height and width in pixels.
            global_views: `[N, 3, 336, 336]`, where `pixel_values` are bytes.

        Returns the embeddings `[T, H]` and the number of tokens of each image.

        Raises: ValueError if sizes and pixels do not belong together.
        """
        grids = self.grids(image_sizes)
        crops = real_crops(pixel_values, global_views, grids, self.crop_size)
        crops = crops.to(self.img_processor.vision_model.embeddings.patch_embedding.weight.dtype)
        # Said, not left to requires_grad: checkpointing makes the outputs of all embeddings ask for a gradient.
        wanted = crops.requires_grad or any(weight.requires_grad for weight in self.img_processor.parameters())
        with torch.set_grad_enabled(wanted and torch.is_grad_enabled()):
            features = merge_patches(self._tower_features(crops, grids))
        features = features.to(self.projection_dtype).flatten(0, 1)
        table = torch.cat([features, self.sub_GN.view(1, -1), self.glb_GN.view(1, -1)])
        index, counts = image_layout(grids, self.side)
        return self.img_projection(table[to_device(index, table.device)]), counts

    def _tower_features(self, crops: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        """The tower's features `[C, 576, D]` of all crops; on a CPU an image of one crop goes through it once.

        A GPU would have to be waited for to compare its pixels, and has the time.
        """
        compared = crops.device.type == "cpu" and not crops.requires_grad  # each crop has a gradient of its own
        again = seen_twice(crops, grids) if compared else []
        if not again:
            return self.img_processor(crops)
        kept = torch.ones(len(crops), dtype=torch.bool)
        kept[again] = False
        return self.img_processor(crops[kept])[kept.cumsum(0) - 1]  # one that is left out has the row before it
