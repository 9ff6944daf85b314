"""Ranks whose model is sharded by FSDP2, kept in step: each pass through the model is one that all of them make.

A sharded model is gathered from all ranks while it computes, so a rank with fewer micro-batches, or with a micro-batch
without pictures, would leave the others waiting. In come a rank's micro-batches, out come as many as the rank with the
most has: those that are too many are done once more and count for nothing. Where another rank looks at pictures and
this one has none, its vision parts look at a black one, which counts for nothing either.
"""

from typing import Any

import torch

from phi3v.image_tokens import CROP_SIZE
from phi3v.ranks import Ranks


class InStep:
    """What one rank does so that the others need not wait."""

    def __init__(self, ranks: Ranks, model: Any) -> None:
        """Keep the ranks and the model, with or without an adapter, which is sharded before its first step."""
        self.ranks, self._model = ranks, model
        self._vision: Any = None
        self.idle = 0  # micro-batches at the end that count for nothing
        self.counts = True  # whether the one that goes through the model does
        self._pretended: list[bool] = []
        self._pretends = False

    def evened(self, micro_batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A step's micro-batches, as many as on any rank.

        Example: three here and two there -> the second one there comes twice, and `idle` is 1 there.
        """
        self._watch()
        most = int(self.ranks.most([len(micro_batches)])[0])
        self.idle = most - len(micro_batches)
        evened = [*micro_batches, *(dict(micro_batches[-1]) for _ in range(self.idle))]
        sees = ["pixel_values" in one for one in evened]
        self._pretended = [there > here for here, there in zip(sees, self.ranks.most(sees), strict=True)]
        return evened

    def next(self) -> None:
        """The next micro-batch of the step is about to go through the model."""
        self._pretends = self._pretended.pop(0)
        self.counts = len(self._pretended) >= self.idle

    def alone(self, batch: dict[str, Any]) -> None:
        """A batch of its own, of a validation, is next on all ranks."""
        self._watch()
        self.counts = True
        sees = "pixel_values" in batch
        self._pretends = self.ranks.any(sees) and not sees

    def leave(self) -> None:
        """What goes through the model from here on does so on all ranks alike."""
        self.counts, self._pretends = True, False

    def _watch(self) -> None:
        """Begins to look where text is embedded, right before pictures are. FSDP's own look at the end of that comes
        first: it notes the order in which it gathers weights again, which has to be that of other ranks.
        """
        if self._vision is None:
            modules = self._model.named_modules()
            self._vision = next(one for name, one in modules if name.endswith("vision_embed_tokens"))
            self._model.get_input_embeddings().register_forward_hook(self._look)

    def _look(self, module: Any, inputs: Any, embeddings: torch.Tensor) -> torch.Tensor:
        """Embeddings as they are; they depend on all weights that see, with the factor zero."""
        if not self._pretends:
            return embeddings
        device = embeddings.device
        pixels = torch.zeros(2, 3, CROP_SIZE, CROP_SIZE, device=device)  # a view of the whole image and its one crop
        features, _ = self._vision(pixels, torch.tensor([[CROP_SIZE, CROP_SIZE]], device=device))
        return embeddings + 0 * features.sum().to(embeddings.dtype)
