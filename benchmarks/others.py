"""Phi-3-Vision as one would train it without phi3v: transformers' Phi-3 behind transformers' CLIP, LoRA from PEFT.

In come examples as `sizes.make_example` makes them; out come batches and a loss. transformers has no Phi-3-Vision of
its own, so a user joins the two models; the order of image tokens is taken from phi3v, nothing else. Three ways:

    guide     (a) what Microsoft's guide does: eager attention, checkpointing, every image filled up to 17 crops, all 24
              layers of the tower, fp32 adapters under autocast, fp32 logits at every position. (Kinder than Microsoft's
              code: its rope tables are made once a pass and not once a layer, with a host synchronisation each.)
    peft      (b) the strongest of plain libraries: sdpa, no checkpointing, real crops, 23 layers without autograd,
              logits at every position as transformers makes them; `fp32_adapters=False` keeps adapters in the base's
              number type, which is faster still
    compiled  (c) the same with torch.compile for each layer; `compiled-liger` also with Liger's rope and norm
    liger     (b) with Liger's rope, norm and SwiGLU
"""

import importlib.util
from typing import Any

import torch
from sizes import LORA, build, fill, fill_adapters, phi3_config
from torch import nn
from transformers import CLIPVisionModel, Phi3ForCausalLM

from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.vision_phi3_v import image_layout, merge_patches
from phi3v.tuning import LORA_PROJECTIONS

Example = dict[str, torch.Tensor]
Batch = dict[str, Any]


class JoinedPhi3V(nn.Module):
    """CLIP, projector and Phi-3 in a row; the module names below `language_model` are transformers' own."""

    def __init__(
        self, config: Phi3VConfig, *, device: str, dtype: torch.dtype, guide: bool = False, padded: bool = False
    ) -> None:
        super().__init__()
        attention = "eager" if guide else "sdpa"
        vision = type(config.vision_config)(**config.vision_config.to_dict())
        self.guide, self.padded = guide, padded
        self.image_token_id = config.image_token_id
        merged = 4 * vision.hidden_size
        with torch.device(device):
            self.img_projection = nn.Sequential(
                nn.Linear(merged, config.hidden_size, dtype=dtype),
                nn.GELU(),
                nn.Linear(config.hidden_size, config.hidden_size, dtype=dtype),
            )
            self.sub_GN = nn.Parameter(torch.empty(1, merged, dtype=dtype))
            self.glb_GN = nn.Parameter(torch.empty(1, merged, dtype=dtype))
        fill(self)  # the rest is filled as it is built, by its own names
        if not guide:  # the last layer's output is never read: a user who counts layers leaves it out
            vision.num_hidden_layers -= 1
        self.tower = build(CLIPVisionModel, vision, device=device, dtype=dtype, attention=attention)
        self.language_model: Any = build(
            Phi3ForCausalLM, phi3_config(config), device=device, dtype=dtype, attention=attention
        )
        self.requires_grad_(False)

    def image_features(self, crops: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        """Embeddings of all images; `crops` are [C, 3, 336, 336], those of an image its view of the whole first.

        Padded crops come 17 an image, whatever its grid; all go through the tower.
        """
        crops = crops.to(self.sub_GN.dtype)
        if self.guide:
            states = self.tower(crops, output_hidden_states=True).hidden_states[-2][:, 1:]
        else:
            states = self.tower(crops).last_hidden_state[:, 1:]
        if self.padded:
            slots = len(crops) // len(grids)
            real = [image * slots + crop for image, (h, w) in enumerate(grids) for crop in range(h * w + 1)]
            states = states.index_select(0, torch.tensor(real).to(states.device))
        patches = merge_patches(states).flatten(0, 1).to(self.sub_GN.dtype)
        table = torch.cat([patches, self.sub_GN, self.glb_GN])
        index, _ = image_layout(grids, int(states.shape[1] ** 0.5) // 2)
        return self.img_projection(table[index.to(table.device)])

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor,
        crops: torch.Tensor | None,
        grids: list[tuple[int, int]],
        num_items_in_batch: torch.Tensor | int,
    ) -> torch.Tensor:
        """The loss: summed over labels, divided by `num_items_in_batch`."""
        is_image = input_ids == self.image_token_id
        embeddings = self.language_model.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        if crops is not None:
            with torch.set_grad_enabled(self.guide and torch.is_grad_enabled()):
                features = self.image_features(crops, grids).to(embeddings.dtype)
            embeddings = embeddings.masked_scatter(is_image[..., None], features)
        return self.language_model(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            labels=labels,
            use_cache=False,
            num_items_in_batch=num_items_in_batch,
        ).loss


def joined(
    config: Phi3VConfig,
    way: str,
    *,
    device: str,
    dtype: torch.dtype,
    fp32_adapters: bool = True,
    padded: bool | None = None,
) -> tuple[nn.Module, str]:
    """The model of one of the three ways, ready to train, and a word on what of it could not be had.

    Args:
        config: sizes.
        way: "guide", "peft", "liger", "compiled" or "compiled-liger".
        device: cpu, cuda or meta.
        dtype: of the base.
        fp32_adapters: PEFT's default; False leaves them in `dtype`.
        padded: whether crops come padded; None as the way has them.
    """
    from peft import LoraConfig, get_peft_model

    guide, note = way == "guide", ""
    padded = guide if padded is None else padded
    model = JoinedPhi3V(config, device=device, dtype=dtype, guide=guide, padded=padded)
    if way.endswith("liger"):
        if importlib.util.find_spec("liger_kernel") is None or device != "cuda":
            note = "Liger is not installed, or has no kernels here: without it"
        else:
            from liger_kernel.transformers import apply_liger_kernel_to_phi3

            whole = way == "liger"  # its SwiGLU does not compile
            apply_liger_kernel_to_phi3(model=model.language_model, swiglu=whole)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=list(LORA_PROJECTIONS), **LORA)
    decoder = model.language_model
    with torch.device(device):
        model.language_model = get_peft_model(decoder, lora, autocast_adapter_dtype=fp32_adapters)
    fill_adapters(model.language_model)
    for name, weight in model.language_model.named_parameters():
        if "lora_" in name and not fp32_adapters:
            weight.data = weight.data.to(dtype)  # PEFT leaves those on the meta device as they are
    if guide:
        decoder.gradient_checkpointing_enable({"use_reentrant": False})
    if way.startswith("compiled"):
        for layer in [*decoder.model.layers, *model.tower.encoder.layers]:
            layer.compile()
    return model.train(), note


def joined_batches(examples: list[Example], micro_batch: int, *, crop_slots: int | None) -> list[Batch]:
    """Micro-batches padded to their longest sample.

    Args:
        examples: samples.
        micro_batch: samples in each.
        crop_slots: crops that every image is filled up to with zeros, 17 in the guide; None for real crops alone.
    Example: crops of grids (1, 1) and (2, 2) are [7, 3, 336, 336], with 17 slots [34, 3, 336, 336].
    """
    batches = []
    for start in range(0, len(examples), micro_batch):
        part = examples[start : start + micro_batch]
        longest = max(len(example["input_ids"]) for example in part)
        batch: Batch = {}
        for name, empty in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            rows = [nn.functional.pad(row := one[name], (0, longest - len(row)), value=empty) for one in part]
            batch[name] = torch.stack(rows)
        sizes = [size for one in part if "image_sizes" in one for size in one["image_sizes"].tolist()]
        side = part[0]["pixel_values"].shape[-1] if "pixel_values" in part[0] else 336
        batch["grids"] = [(height // side, width // side) for height, width in sizes]
        images = [image for one in part if "pixel_values" in one for image in one["pixel_values"]]
        batch["crops"] = _join(images, batch["grids"], crop_slots) if images else None
        batches.append(batch)
    return batches


def _join(images: list[torch.Tensor], grids: list[tuple[int, int]], slots: int | None) -> torch.Tensor:
    """All crops one behind the other, each image filled up to `slots`."""
    real = [image[: rows * columns + 1] for image, (rows, columns) in zip(images, grids, strict=True)]
    if slots is None:
        return torch.cat(real)
    return torch.cat([nn.functional.pad(crops, (0, 0, 0, 0, 0, 0, 0, slots - len(crops))) for crops in real])
