"""Rows that are answered together: prompts come in and rows leave at any time, and a step adds a token to each.

In come encoded prompts and the rows that stand for them; the rows hold what was answered so far. Who comes in when, and
when a row has ended, is the caller's business (`engine`, `serve.lanes`). Knows no texts, files or requests.

Letters: R rows, S positions, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from phi3v.data.collate import Collator
from phi3v.data.encode import IGNORED
from phi3v.evaluation.running_cache import joined_rows, padding_mask
from phi3v.features.collate import CollateFeatures

IMAGE_PARTS = ("pixel_values", "global_views", "image_sizes", "image_features")
"""What an example may hold of its images."""


@dataclass
class RunningRow:
    """A row that is being answered.

    Attributes:
        name: what the caller calls it.
        choose: picks the next token by its logits `[V]`; None takes the likeliest.
        loss: loss summed over the trained tokens of the expected answer, 0.0 without one.
        tokens: how many these are.
        cached: tokens whose keys and values are cached.
        new: tokens that were answered.
        sound: whether the scores of its first token are numbers; of weights with NaN they are not.
    """

    name: int
    choose: Callable[[torch.Tensor], int] | None = None
    loss: float = 0.0
    tokens: int = 0
    cached: int = 0
    new: list[int] = field(default_factory=list)
    sound: bool = True


class RunningBatch:
    """The rows of one model, their cache and their mask.

    Attributes:
        rows: those that are being answered.
    """

    def __init__(self, model: Any, processor: Any, *, room: int, has_ended: Callable[[RunningRow], bool]) -> None:
        """An empty batch.

        Args:
            model: a Phi-3-V, with an adapter or without.
            processor: its processor.
            room: columns for tokens to come that a cache is made with.
            has_ended: whether a row needs no more tokens; it gets none while it waits for its turn to leave.
        """
        self.model, self.room, self._has_ended = model, room, has_ended
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        image = model.config.image_token_id
        unwanted = [*(base.generation_config.suppress_tokens or []), *([] if image is None else [image])]
        self._suppressed = torch.tensor(unwanted, dtype=torch.long, device=model.device)
        self.collate = CollateFeatures(Collator(processor.tokenizer.pad_token_id))
        self.rows: list[RunningRow] = []
        self._cache: Cache | None = None
        self._mask = torch.empty(0)
        self._width = 0  # columns of the mask in use

    def keep(self, places: Sequence[int]) -> None:
        """Lets all rows go but those in these places."""
        self._join(places, [], [], None)

    def enter(
        self, rows: Sequence[RunningRow], examples: Sequence[Mapping[str, Any]], kept: Iterable[int] = ()
    ) -> None:
        """Passes prompts through the model: their rows get a first token and a loss, and join those that stay.

        Args:
            rows: one for each example; what they have in `new` is part of the example.
            examples: on one side of the rope's limit, and shorter than it by a token at least where there are several.
            kept: places of the rows that stay; those that leave make room in the same copy of the cache.
        """
        lengths, cache = self.prefill(rows, examples)
        self._join(list(kept), rows, lengths, cache)

    def _join(
        self, places: Sequence[int], fresh: Sequence[RunningRow], lengths: Sequence[int], cache: Cache | None
    ) -> None:
        """The batch of the rows that stay and the fresh ones."""
        kept = [self.rows[place] for place in places]
        self.rows = [*kept, *fresh]
        if not self.rows:
            self._cache = None
            return
        kept_lengths = [row.cached for row in kept]
        self._cache = joined_rows(self._cache, places, kept_lengths, cache, lengths, self.room)
        self._mask = padding_mask([*kept_lengths, *lengths], self.room, self._cache.layers[0].keys.device)
        self._width = self._mask.shape[1] - self.room

    def prefill(
        self, rows: Sequence[RunningRow], examples: Sequence[Mapping[str, Any]]
    ) -> tuple[list[int], Cache | None]:
        """Passes some examples through the model: the rows get a first token and a loss, and all tokens are cached.

        Rows begin in column 0 and none looks behind itself, so padding and expected answers need no mask; they are cut
        off the cache. Returns: the columns of each row that are its prompt, the cache.
        """
        lengths = [prompt_length(example) for example in examples]
        cache = DynamicCache()
        alone = len(examples) == 1 and not has_labels(examples[0])
        batch = self.collate([prompt_of(one) if alone else with_a_label(one) for one in examples])
        labels = batch.pop("labels", None)
        read = torch.tensor([lengths[0] - 1]) if alone else read_positions(labels)
        given = {name: value for name, value in batch.items() if name != "attention_mask"}
        inputs = placed({**given, "trained_positions": read}, self.model)
        logits = self.model(**inputs, past_key_values=cache, use_cache=True).logits
        losses, counts = ([0.0], [1]) if alone else losses_of(logits, labels)
        firsts = torch.tensor([sum(counts[:row]) for row in range(len(counts))], device=logits.device)
        for row, broken in zip(rows, logits[firsts].isnan().any(-1).tolist(), strict=True):
            row.sound = not broken
        tokens = self._chosen(logits[firsts], rows)
        for place, (row, example) in enumerate(zip(rows, examples, strict=True)):
            row.loss, row.tokens = (losses[place], counts[place]) if has_labels(example) else (0.0, 0)
            row.cached = lengths[place]
            row.new.append(tokens[place])
        return lengths, cache

    def step(self) -> None:
        """One more token for each row; nothing where there is none."""
        if not self.rows:
            return
        width = self._width + 1
        if width > self._mask.shape[1]:
            self._mask = torch.nn.functional.pad(self._mask, (0, self.room), value=1)
        last = torch.tensor([[row.new[-1]] for row in self.rows], device=self._mask.device)
        output = self.model(
            input_ids=last,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **self._visible(width),
        )
        self._width = width
        for row, token in zip(self.rows, self._chosen(output.logits[:, -1], self.rows), strict=True):
            row.cached += 1
            if not self._has_ended(row):
                row.new.append(token)

    def _visible(self, width: int) -> dict[str, torch.Tensor | None]:
        """Which of so many columns a step's tokens see; for sdpa in its own form, which is made anew in each step else.

        Example: lengths [2, 3] with the new token, sdpa -> a mask [2, 1, 1, 3] of [F, T, T] and [T, T, T], positions
        [[1], [2]].
        """
        if self.model.config._attn_implementation != "sdpa":
            return {"attention_mask": self._mask[:, :width]}
        positions = torch.tensor([[row.cached] for row in self.rows], device=self._mask.device)
        padded = any(row.cached + 1 < width for row in self.rows)
        return {
            "attention_mask": self._mask[:, None, None, :width].bool() if padded else None,
            "position_ids": positions,
        }

    def _chosen(self, logits: torch.Tensor, rows: Sequence[RunningRow]) -> list[int]:
        """The next tokens of rows by logits `[R, V]`: of those that may be answered."""
        allowed = logits.float().index_fill(1, self._suppressed, -math.inf)
        tokens = allowed.argmax(-1).tolist()
        for place, row in enumerate(rows):
            if row.choose is not None and row.sound and not self._has_ended(row):
                tokens[place] = row.choose(allowed[place])
        return tokens


def prompt_length(example: Mapping[str, Any]) -> int:
    """Tokens in front of the first trained one: labels [-100, -100, 6, 7] -> 2; all of them without labels."""
    if "labels" not in example:
        return len(example["input_ids"])
    trained = (example["labels"] != IGNORED).nonzero()
    return int(trained[0]) if len(trained) else len(example["labels"])


def prompt_of(example: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt of a training example: everything before the first trained token, images included.

    Example: input_ids [1, 5, 6, 7], labels [-100, -100, 6, 7] -> input_ids [1, 5].
    """
    end = prompt_length(example)
    prompt = {name: example[name][:end] for name in ("input_ids", "attention_mask") if name in example}
    return prompt | {name: example[name] for name in IMAGE_PARTS if name in example}


def has_labels(example: Mapping[str, Any]) -> bool:
    """Whether an example holds an expected answer."""
    return "labels" in example and bool((example["labels"][1:] != IGNORED).any())


def with_a_label(example: Mapping[str, Any]) -> dict[str, Any]:
    """An example in which the last token of the prompt has something to predict, so that its logits are computed.

    Example: input_ids [5, 6] without labels -> input_ids [5, 6, 0], labels [-100, -100, 0].
    """
    if has_labels(example):
        return dict(example)
    prompt = prompt_of(example)
    ids = prompt["input_ids"]
    labels = torch.cat([torch.full_like(ids, IGNORED), ids.new_zeros(1)])
    mask = {"attention_mask": ids.new_ones(len(ids) + 1)} if "attention_mask" in prompt else {}
    return prompt | mask | {"input_ids": torch.cat([ids, ids.new_zeros(1)]), "labels": labels}


def read_positions(labels: torch.Tensor) -> torch.Tensor:
    """Flat positions `row * S + column` of the logits that labels `[R, S]` ask for.

    Example: labels [[-100, -100, 6], [-100, 5, 4]] -> [1, 3, 4].
    """
    return torch.nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1)).flatten().nonzero()[:, 0]


def losses_of(logits: torch.Tensor, labels: torch.Tensor) -> tuple[list[float], list[int]]:
    """Of each row the loss summed over its trained tokens, and how many these are.

    Args:
        logits: `[trained tokens, V]` of all rows, as `trained_logits_only` gives them.
        labels: `[R, S]`, -100 where nothing is trained.
    Example: two rows with 1 and 2 trained tokens of losses 0.5, 0.25 and 0.75 -> [0.5, 1.0], [1, 2].
    """
    wanted = labels[:, 1:]
    trained = wanted != IGNORED
    counts = trained.sum(-1).tolist()
    targets = wanted[trained].to(logits.device)
    each = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return torch.stack([part.sum() for part in each.split(counts)]).tolist(), counts


def placed(batch: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """A batch on the model's device."""
    return {name: value.to(model.device) if hasattr(value, "to") else value for name, value in batch.items()}
