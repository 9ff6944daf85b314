"""Greedy answers to many prompts at once: a row that ends leaves the batch, and the next one takes its place.

In come examples, encoded questions or whole samples; out comes for each what the model answers, and of a sample the
loss of the answer that it holds, from the same pass through the prompt. The answers are those of the model's own
`generate`, row by row; `ChatModel` asks that where this way does not apply: options of generation that change more than
where an answer ends, and rows that may pass the original context of the rope while they are answered.

The loop is ours because transformers' continuous batching takes token ids alone: neither pixels nor embeddings, and one
row of all prompts, in which rope factors could not be chosen for each.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from phi3v.adapters import has_adapter, works_on_prompts
from phi3v.evaluation.running_batch import (
    RunningBatch,
    RunningRow,
    has_labels,
    losses_of,
    placed,
    prompt_length,
    prompt_of,
)
from phi3v.evaluation.running_cache import fewest_moves
from phi3v.generate import ChatModel

Way = Literal["together", "generate"]

_ENDS = {"eos_token_id", "pad_token_id", "bos_token_id", "max_length", "max_new_tokens", "suppress_tokens"}
_OF_SAMPLING = {"do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff"}
_WITHOUT_EFFECT = {"eta_cutoff", "transformers_version", "_from_model_config"} | _OF_SAMPLING
"""Settings of generation that play no part, since answers are greedy."""


@dataclass(frozen=True)
class Answered:
    """What became of one example.

    Attributes:
        text: the answer.
        loss: loss summed over the trained tokens of the expected answer; 0.0 where none was given.
        tokens: how many these are.
        way: "together", in the running batch; "generate", through the model's own `generate`.
        ended: whether the model ended it, and not the limit of new tokens; None where that is not known.
    """

    text: str
    loss: float
    tokens: int
    way: Way
    ended: bool | None = None


class Engine:
    """A model that answers prompts as they come, `batch_size` at a time.

    Attributes:
        reason: why all prompts go through `generate`; None where they are answered together.
    """

    def __init__(self, chat: ChatModel, *, batch_size: int, max_new_tokens: int) -> None:
        """Look at the model.

        Args:
            chat: model and processor.
            batch_size: rows that are answered at once.
            max_new_tokens: tokens of each answer at most.
        """
        self.chat, self.batch_size, self.max_new_tokens = chat, batch_size, max_new_tokens
        model = chat.model
        self._config = model.config
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.reason = adapter_reason(model) or settings_reason(base.generation_config)
        self._stops = chat.stops
        self._least_room = max(1, batch_size // 4)

    @torch.inference_mode()
    def answer(self, examples: Iterable[tuple[int, Mapping[str, Any]]]) -> Iterator[tuple[int, Answered]]:
        """Answers examples as they come; best are neighbours of like length, the longest first.

        Args:
            examples: names, and examples of `data.encode` (samples, whose expected answers get their loss) or of
                `data.encode.encode_prompt`; an image may have features instead of pixels. Taken when there is room.
        Yields: names and answers, each as soon as it is known.
        """
        waiting = iter(examples)
        with _evaluating(self.chat.model):
            if self.reason is None:
                aside: list[tuple[int, Mapping[str, Any]]] = []
                yield from self._together(waiting, aside)
                waiting = iter(aside)
            while group := _some(waiting, self.batch_size):
                yield from self._by_generate(group)

    def _together(
        self, waiting: Iterator[tuple[int, Mapping[str, Any]]], aside: list[tuple[int, Mapping[str, Any]]]
    ) -> Iterator[tuple[int, Answered]]:
        """Answers in one running batch; examples that are for `generate` are put aside."""
        batch = self.running()
        held: tuple[int, Mapping[str, Any]] | None = None
        more = True
        while more or held or batch.rows:
            alive = fewest_moves([place for place, row in enumerate(batch.rows) if not self._has_ended(row)])
            free = self.batch_size - len(alive)
            enter = (more or bool(held)) and (free >= self._least_room or not alive)
            ended = [row for row in batch.rows if self._has_ended(row)]
            if ended and (enter or len(ended) >= self._least_room or not alive):  # before others need their memory
                batch.keep(alive)
                yield from ((row.name, self._told(row)) for row in ended)
            if enter:
                group, held, more = self._next_group(waiting, held, free, aside)
                if group:
                    fresh = [RunningRow(name) for name, _ in group]
                    batch.enter(fresh, [example for _, example in group], range(len(batch.rows)))
            batch.step()

    def running(self) -> RunningBatch:
        """An empty batch of this model."""
        return RunningBatch(self.chat.model, self.chat.processor, room=self._room, has_ended=self._has_ended)

    @property
    def _room(self) -> int:
        """Columns for tokens to come that a cache is made with."""
        return min(self.max_new_tokens, 128)

    def _has_ended(self, row: RunningRow) -> bool:
        """Whether a row needs no more tokens."""
        return len(row.new) >= self.max_new_tokens or row.new[-1] in self._stops

    def _told(self, row: RunningRow) -> Answered:
        """The answer of a row that ended; behind its end others may have waited for their turn to leave."""
        new = row.new[: self.max_new_tokens]
        return Answered(self.chat.text_of(new), row.loss, row.tokens, "together", not self._stops.isdisjoint(new))

    def _next_group(
        self,
        waiting: Iterator[tuple[int, Mapping[str, Any]]],
        held: tuple[int, Mapping[str, Any]] | None,
        most: int,
        aside: list[tuple[int, Mapping[str, Any]]],
    ) -> tuple[list[tuple[int, Mapping[str, Any]]], tuple[int, Mapping[str, Any]] | None, bool]:
        """Examples that go through the prompt together: up to `most`, on one side of the rope's limit.

        Returns: the group, an example that is for the next one, and whether there may be more.
        """
        group: list[tuple[int, Mapping[str, Any]]] = []
        while len(group) < most:
            one = held or next(waiting, None)
            held = None
            if one is None:
                return group, None, False
            if not self._stays_on_its_side(one[1]):
                aside.append(one)
            elif group and self._is_long(group[0][1]) != self._is_long(one[1]):
                return group, one, True
            else:
                group.append(one)
        return group, held, True

    @property
    def _limit(self) -> float:
        """Tokens up to which a sequence is short for the rope."""
        if self._config.rope_parameters["rope_type"] == "default":
            return math.inf
        return int(self._config.original_max_position_embeddings)

    def _is_long(self, example: Mapping[str, Any]) -> bool:
        return prompt_length(example) > self._limit

    def _stays_on_its_side(self, example: Mapping[str, Any]) -> bool:
        """Whether neither the answer nor the expected one can lead past the rope's limit or a sliding window."""
        prompt = prompt_length(example)
        longest = max(len(example["input_ids"]), prompt + self.max_new_tokens)
        window = self._config.sliding_window
        return (prompt > self._limit or longest <= self._limit) and (window is None or longest < window)

    def _by_generate(self, group: Sequence[tuple[int, Mapping[str, Any]]]) -> Iterator[tuple[int, Answered]]:
        """One batch through the model's own `generate`, and once more for the loss where there is one to have."""
        prompts = [prompt_of(example) for _, example in group]
        texts = self.chat.answer_encoded(prompts, batch_size=self.batch_size, max_new_tokens=self.max_new_tokens)
        found: list[tuple[float, int]] = [(0.0, 0)] * len(group)
        expecting = [place for place, (_, one) in enumerate(group) if has_labels(one)]
        if expecting:
            examples = [dict(group[place][1]) for place in expecting]
            batch = placed(self.running().collate(examples), self.chat.model)
            logits = self.chat.model(**batch, trained_logits_only=True).logits
            for place, loss, count in zip(expecting, *losses_of(logits, batch["labels"]), strict=True):
                found[place] = loss, count
        for (name, _), text, (loss, tokens) in zip(group, texts, found, strict=True):
            yield name, Answered(text, loss, tokens, "generate")


def settings_reason(settings: GenerationConfig) -> str | None:
    """The first setting of a model's own generation that only `generate` knows what to do with; None without one.

    Example: settings with repetition_penalty 1.1 -> "repetition_penalty is 1.1"; the published ones -> None.
    """
    plain = GenerationConfig._get_default_generation_params()
    for name, value in settings.to_diff_dict().items():
        if name in _ENDS | _WITHOUT_EFFECT or value is None or value == plain.get(name, False):
            continue
        return f"{name} is {value!r}"
    return None


def adapter_reason(model: Any) -> str | None:
    """Why a model with this adapter is asked by `generate`: it puts more into a prompt than the ids say."""
    for name in model.active_adapters if has_adapter(model) else []:
        config = model.peft_config[name]
        if works_on_prompts(config):
            return f"the adapter is of type {config.peft_type.value}"
    return None


def _some(items: Iterator[Any], most: int) -> list[Any]:
    """The next items, up to `most`."""
    return [one for _, one in zip(range(most), items, strict=False)]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Has a model in evaluation mode meanwhile."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
