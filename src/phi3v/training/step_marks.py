"""Where the time of a training step goes: a callback of the Trainer that marks the borders between its parts.

In comes a model at the start of a training; after it, `parts()` tells seconds and memory of each part of the watched
steps. The device is waited for where a step begins and ends, so that parts add up; inside a step marks are events on
the device. Nothing of the model is changed but hooks, which are taken off at the end.

    step ends -> waiting for data -> step begins -> transfer -> tower -> decoder forward -> loss -> decoder backward
    -> tower backward -> (transfer of the next micro-batch ...) -> optimiser -> step ends
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from transformers import TrainerCallback

from phi3v.image_tokens import CROP_SIZE, grid_tokens
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM, Phi3VModel
from phi3v.model.placement_phi3_v import missing_images
from phi3v.training.device_time import DeviceWatch

PARTS = (
    *("waiting for data", "transfer", "tower", "decoder forward", "loss"),
    *("decoder backward", "tower backward", "optimiser", "other"),
)
"""The parts of a step in the order in which they come; the tower's own backward where something of it is trained."""

NEXT = {
    **{"begin": "transfer", "transfer": "tower", "tower": "decoder forward", "decoder forward": "loss"},
    **{"loss": "backward and clipping"},
}
"""What begins where a part ends, by the names that a trace has."""


@dataclass
class SeenBatch:
    """What one micro-batch was, for counting its arithmetic; tensors stay on the device until the end.

    Attributes:
        shape: rows and columns of its ids.
        borders: `cu_seqlens` of a pack.
        mask: `attention_mask`, or `position_ids` where there is none.
        labels: [rows, columns].
        image_sizes: canvases in pixels.
        features: what came in place of pixels, as the model takes it, without contents: `[313, 0]` for one image of
            313 tokens, None for an image with pixels; None where all have pixels.
    """

    shape: tuple[int, int]
    borders: torch.Tensor | None
    mask: torch.Tensor | None
    labels: torch.Tensor | None
    image_sizes: Any
    features: list[torch.Tensor | None] | None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample.

        Example: borders [0, 3, 5] are [3, 2], a mask [[1, 1, 0], [1, 1, 1]] is [2, 3], positions [[0, 1, 1]] are [2].
        """
        if self.borders is not None:
            return self.borders.diff().tolist()
        if self.mask is None:
            return [self.shape[1]] * self.shape[0]
        if int(self.mask[0, 0]) == 0:
            return (self.mask.amax(-1) + 1).tolist()
        return self.mask.sum(-1).tolist()

    @property
    def trained(self) -> int:
        """Tokens that are learned."""
        return 0 if self.labels is None else int((self.labels[:, 1:] != -100).sum())

    @property
    def tower_grids(self) -> list[tuple[int, int]]:
        """Crops, as rows and columns, of the images that go through the tower.

        Example: canvases [[336, 336], [672, 336]], the first with its 313 features, are [(2, 1)].
        """
        if self.image_sizes is None:
            return []
        sizes = self.image_sizes.tolist() if isinstance(self.image_sizes, torch.Tensor) else self.image_sizes
        grids = [(int(height) // CROP_SIZE, int(width) // CROP_SIZE) for height, width in sizes]
        if self.features is None:
            return grids
        return [grids[image] for image in missing_images(self.features, [grid_tokens(*grid) for grid in grids])]


@dataclass
class PartUse:
    """Seconds of a part, over all watched steps, and the most memory during it in bytes (0 without a GPU)."""

    seconds: float = 0.0
    peak_bytes: int = 0


@dataclass
class _Mark:
    part: str
    when: Any
    peak: int


class StepMarks(TrainerCallback):
    """Watches the steps behind the first `warm`; `device_watch` sees their kernels.

    Attributes:
        seconds: wall time of the watched steps, waiting for data included.
        steps: how many were watched.
        batches: their micro-batches.
        weights_bytes: of the model as the training begins.
        decode_seconds: what making one sample from its row takes on one core, None where that cannot be told.
    """

    def __init__(self, device: torch.device, warm: int, *, traced: bool = False) -> None:
        """Takes the device that trains, steps to let pass, one at least, and whether a trace is wanted."""
        self.device, self.warm = device, max(warm, 1)
        self.device_watch = DeviceWatch(device, traced=traced)
        self.seconds, self.steps, self.weights_bytes = 0.0, 0, 0
        self.batches: list[SeenBatch] = []
        self.decode_seconds: float | None = None
        self._watching = False
        self._marks: list[_Mark] = []
        self._uses: dict[str, PartUse] = {name: PartUse() for name in PARTS}
        self._hooks: list[Any] = []
        self._step_ended = 0.0
        self._traced = traced
        self._span: Any = None

    def parts(self) -> dict[str, PartUse]:
        """What each part took, in the order of `PARTS`."""
        return self._uses

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Puts hooks on the parts of the model."""
        self.weights_bytes = sum(weight.nbytes for weight in model.parameters())
        self.decode_seconds = time_decoding(kwargs.get("train_dataloader"))
        for module in model.modules():
            if isinstance(module, Phi3VForCausalLM):
                self._before(module, "transfer", self._see)
                self._after(module, "loss")
            elif isinstance(module, Phi3VModel):
                self._after(module.vision_embed_tokens, "tower")
                self._before(module.norm, "decoder forward")
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                part = "tower backward" if ".img_processor." in name else "decoder backward"
                self._hooks.append(weight.register_post_accumulate_grad_hook(partial(self._backward, part)))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step's batches are there."""
        if not self._watching:
            return
        self._uses["waiting for data"].seconds += time.perf_counter() - self._step_ended
        self._marks = []
        self._mark("begin")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are clipped."""
        self._mark("optimiser")
        self._open_span("optimiser" if self._watching else None)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Weights are new."""
        self._mark("optimiser")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is done: its marks become seconds; behind the last step that warms up the watch begins."""
        if self._watching:
            self._mark("other")
            self._open_span(None)
            self._wait()
            for before, after in pairwise(self._marks):
                use = self._uses[after.part]
                use.seconds += _between(before.when, after.when)
                use.peak_bytes = max(use.peak_bytes, after.peak)
            self.steps += 1
        elif state.global_step == self.warm:
            self._watching = True
            self.device_watch.start()
        self._step_ended = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last step is done."""
        if self._watching:
            self.device_watch.stop()
            self._watching = False
        self.seconds = sum(use.seconds for use in self._uses.values())
        for hook in self._hooks:
            hook.remove()

    def _before(self, module: torch.nn.Module, part: str, see: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Marks the end of `part` where a module begins."""

        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if see is not None:
                see(kwargs)
            self._mark(part)

        self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module: torch.nn.Module, part: str) -> None:
        """Marks the end of `part` where a module ends."""
        self._hooks.append(module.register_forward_hook(lambda *seen: self._mark(part)))

    def _see(self, kwargs: dict[str, Any]) -> None:
        """Keeps what a micro-batch was."""
        if not self._watching:
            return
        ids = kwargs["input_ids"]
        mask = kwargs.get("attention_mask")
        self.batches.append(
            SeenBatch(
                (ids.shape[0], ids.shape[1]),
                kwargs.get("cu_seqlens"),
                kwargs.get("position_ids") if mask is None else mask,
                kwargs.get("labels"),
                kwargs.get("image_sizes"),
                _without_contents(kwargs.get("image_features")),
            )
        )

    def _backward(self, part: str, weight: torch.Tensor) -> None:
        """A gradient is there: its part of the backward pass lasts at least until now."""
        if not self._watching:
            return
        earlier = self._marks.pop().peak if self._marks[-1].part == part else 0
        self._mark(part)
        self._marks[-1].peak = max(self._marks[-1].peak, earlier)

    def _mark(self, part: str) -> None:
        """The part that ends now."""
        if not self._watching:
            return
        if not part.endswith("backward"):  # its marks come from autograd's own thread, a span stays in one
            self._open_span(NEXT.get(part))
        if self.device.type != "cuda":
            self._marks.append(_Mark(part, time.perf_counter(), 0))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(_Mark(part, event, torch.cuda.max_memory_allocated(self.device)))
        torch.cuda.reset_peak_memory_stats(self.device)

    def _open_span(self, name: str | None) -> None:
        """Closes what a trace shows as the present part, and opens another, or none."""
        if self._span is not None:
            self._span.__exit__(None, None, None)
        self._span = torch.profiler.record_function(name) if name and self._traced else None
        if self._span is not None:
            self._span.__enter__()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _without_contents(features: Any) -> list[torch.Tensor | None] | None:
    """Features of a micro-batch with their rows alone, so that none is held until the end."""
    if features is None:
        return None
    pieces = features if isinstance(features, list) else [features]
    return [None if piece is None else torch.empty(piece.shape[0], 0) for piece in pieces]


def _between(before: Any, after: Any) -> float:
    """Seconds between two marks."""
    return after - before if isinstance(after, float) else before.elapsed_time(after) / 1000


def time_decoding(loader: Any, rows: int = 4) -> float | None:
    """Seconds that one sample takes from its row to tensors, in this process; None for a stream."""
    dataset = getattr(getattr(loader, "base_dataloader", loader), "dataset", None)
    if dataset is None or isinstance(dataset, torch.utils.data.IterableDataset):
        return None
    rows = min(rows, len(dataset))
    began = time.perf_counter()
    for row in range(rows):
        dataset[row]
    return (time.perf_counter() - began) / max(rows, 1)
