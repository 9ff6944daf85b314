"""Greedy answers to many prompts at once: a row that ends leaves the batch, and the next one takes its place.

In come examples, encoded questions or whole samples; out comes for each what the model answers, and of a sample the
loss of the answer that it holds, from the same pass through the prompt. The answers are those of the model's own
`generate`, row by row; `ChatModel` asks that where this way does not apply: options of generation that change more than
where an answer ends, and rows that may pass the original context of the rope while they are answered.

The loop is ours because transformers' continuous batching takes token ids alone: neither pixels nor embeddings, and one
row of all prompts, in which rope factors could not be chosen for each.

Letters: R rows, S positions, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache, DynamicCache

from phi3v.adapters import has_adapter
from phi3v.data.collate import Collator
from phi3v.data.encode import IGNORED
from phi3v.evaluation.running_cache import joined_rows, padding_mask
from phi3v.features.collate import CollateFeatures
from phi3v.generate import ChatModel

Way = Literal["together", "generate"]
IMAGE_PARTS = ("pixel_values", "global_views", "image_sizes", "image_features")
"""What an example may hold of its images."""

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


@dataclass
class _Running:
    """A row that is being answered: its name, its tokens so far, cached ones and new ones."""

    name: int
    loss: float
    tokens: int
    cached: int
    new: list[int] = field(default_factory=list)


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
        self.reason = _adapter_reason(model) or settings_reason(base.generation_config)
        unwanted = list(base.generation_config.suppress_tokens or [])
        image = self._config.image_token_id
        named = [*unwanted, image] if image is not None else unwanted
        self._suppressed = torch.tensor(named, dtype=torch.long, device=model.device)
        self._stops = set(chat.processor.stop_token_ids)
        self._collate = CollateFeatures(Collator(chat.processor.tokenizer.pad_token_id))
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
        rows: list[_Running] = []
        state: _State | None = None
        held: tuple[int, Mapping[str, Any]] | None = None
        more = True
        while more or held or rows:
            alive = [place for place, row in enumerate(rows) if not self._has_ended(row)]
            free = self.batch_size - len(alive)
            enter = (more or bool(held)) and (free >= self._least_room or not alive)
            ended = [row for row in rows if self._has_ended(row)]
            if ended and (enter or len(ended) >= self._least_room or not alive):  # before others need their memory
                rows = [rows[place] for place in alive]
                state = _merged(state, rows, alive, [], [], None, self._room)
                yield from ((row.name, self._told(row)) for row in ended)
            if enter:
                group, held, more = self._next_group(waiting, held, free, aside)
                fresh, lengths, cache = self._prefill(group)
                state = _merged(state, rows, range(len(rows)), fresh, lengths, cache, self._room)
                rows = [*rows, *fresh]
            if state is not None:
                self._step(rows, state)

    @property
    def _room(self) -> int:
        """Columns for tokens to come that a cache is made with."""
        return min(self.max_new_tokens, 128)

    def _has_ended(self, row: _Running) -> bool:
        """Whether a row needs no more tokens."""
        return len(row.new) >= self.max_new_tokens or row.new[-1] in self._stops

    def _told(self, row: _Running) -> Answered:
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

    def _prefill(
        self, group: Sequence[tuple[int, Mapping[str, Any]]]
    ) -> tuple[list[_Running], list[int], Cache | None]:
        """Passes some examples through the model: rows with a first token and a loss, all tokens cached.

        Rows begin in column 0 and none looks behind itself, so padding and expected answers need no mask; they are cut
        off the cache. Returns: the rows, the columns of each that are its prompt, the cache.
        """
        if not group:
            return [], [], None
        batch = self._collate([with_a_label(example) for _, example in group])
        lengths = [prompt_length(example) for _, example in group]
        cache = DynamicCache()
        inputs = _placed({name: value for name, value in batch.items() if name != "attention_mask"}, self.chat.model)
        logits = self.chat.model(**inputs, past_key_values=cache, use_cache=True, trained_logits_only=True).logits
        losses, counts = losses_of(logits, batch["labels"])
        firsts = torch.tensor([sum(counts[:row]) for row in range(len(counts))], device=logits.device)
        tokens = self._chosen(logits[firsts])
        rows = []
        for place, (name, example) in enumerate(group):
            loss, count = (losses[place], counts[place]) if has_labels(example) else (0.0, 0)
            rows.append(_Running(name, loss, count, lengths[place], [tokens[place]]))
        return rows, lengths, cache

    def _step(self, rows: Sequence[_Running], state: "_State") -> None:
        """One more token for each row."""
        width = state.width + 1
        if width > state.mask.shape[1]:
            state.mask = torch.nn.functional.pad(state.mask, (0, self._room), value=1)
        last = torch.tensor([[row.new[-1]] for row in rows], device=state.mask.device)
        output = self.chat.model(
            input_ids=last,
            attention_mask=state.mask[:, :width],
            past_key_values=state.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        state.width = width
        for row, token in zip(rows, self._chosen(output.logits[:, -1]), strict=True):
            row.cached += 1
            if not self._has_ended(row):
                row.new.append(token)

    def _chosen(self, logits: torch.Tensor) -> list[int]:
        """The likeliest tokens of logits `[R, V]` that may be answered."""
        return logits.float().index_fill(1, self._suppressed, -math.inf).argmax(-1).tolist()

    def _by_generate(self, group: Sequence[tuple[int, Mapping[str, Any]]]) -> Iterator[tuple[int, Answered]]:
        """One batch through the model's own `generate`, and once more for the loss where there is one to have."""
        prompts = [prompt_of(example) for _, example in group]
        texts = self.chat.answer_encoded(prompts, batch_size=self.batch_size, max_new_tokens=self.max_new_tokens)
        found: list[tuple[float, int]] = [(0.0, 0)] * len(group)
        expecting = [place for place, (_, one) in enumerate(group) if has_labels(one)]
        if expecting:
            batch = _placed(self._collate([dict(group[place][1]) for place in expecting]), self.chat.model)
            logits = self.chat.model(**batch, trained_logits_only=True).logits
            for place, loss, count in zip(expecting, *losses_of(logits, batch["labels"]), strict=True):
                found[place] = loss, count
        for (name, _), text, (loss, tokens) in zip(group, texts, found, strict=True):
            yield name, Answered(text, loss, tokens, "generate")


@dataclass
class _State:
    """What the running batch holds beside its rows: `width` columns of the mask are in use."""

    cache: Cache
    mask: torch.Tensor
    width: int


def _merged(
    state: _State | None,
    kept: Sequence[_Running],
    places: Sequence[int],
    fresh: Sequence[_Running],
    lengths: Sequence[int],
    cache: Cache | None,
    room: int,
) -> _State | None:
    """The batch of the rows that stay and the fresh ones; None without any."""
    if not kept and not fresh:
        return None
    running = state.cache if state is not None else None
    kept_lengths = [row.cached for row in kept]
    joined = joined_rows(running, places, kept_lengths, cache, lengths, room)
    mask = padding_mask([*kept_lengths, *lengths], room, joined.layers[0].keys.device)
    return _State(joined, mask, mask.shape[1] - room)


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


def _adapter_reason(model: Any) -> str | None:
    """Why a model with this adapter is asked by `generate`: it puts more into a prompt than the ids say."""
    for name in model.active_adapters if has_adapter(model) else []:
        config = model.peft_config[name]
        if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
            return f"the adapter is of type {config.peft_type.value}"
    return None


def _placed(batch: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """A batch on the model's device."""
    return {name: value.to(model.device) if hasattr(value, "to") else value for name, value in batch.items()}


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
