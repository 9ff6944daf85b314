"""ChatModel: the only object that answers.

In come a model, its processor, and questions as chats or as encoded prompts; out come texts, whole or streamed piece by
piece. It stops where a turn ends (`processor.stop_token_ids`), decodes the new tokens only and takes nothing but
control tokens off the answer. Of a run it takes how the model is loaded, and the system turn. Knows no scores.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from phi3v.data.collate import Collator
from phi3v.data.images import MAX_PIXELS, open_image
from phi3v.data.templates import Template
from phi3v.errors import CheckpointError, ImageError
from phi3v.features.collate import CollateFeatures
from phi3v.image_tokens import resized_size
from phi3v.loading import load_target
from phi3v.passthrough import check_names
from phi3v.targets import run_of, system_template

MAX_NEW_TOKENS = 256
REMEMBERED_TOKENS = 16
"""Of a streamed answer, whose text is made again with each new token."""
_logger = logging.getLogger(__name__)
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
Conversation = list[dict[str, Any]]
Photo = str | Path | Image.Image


class ChatModel:
    """A model and its processor, ready to answer questions about images.

    Example: `ChatModel.from_target("runs/shop").ask("scarf.jpg", "What is shown in this image?")`.

    Attributes:
        model: a Phi-3-V, with an adapter or without.
        processor: its processor.
        system: text of the system turn that `ask` puts in front where it is given none; None for no such turn.
        max_pixels: larger image files are refused by `ask`.
    """

    def __init__(self, model: Any, processor: Any, system: str | None = None, max_pixels: int = MAX_PIXELS) -> None:
        self.model = model
        self.processor = processor
        self.system = system
        self.max_pixels = max_pixels

    @classmethod
    def from_target(cls, target: str | Path, *, max_pixels: int | None = None, **options: Any) -> "ChatModel":
        """Loads a run, an adapter, a model folder or a hub id; `options` are those of `loading.load_target`.

        A run, or a checkpoint of it, is loaded as its recipe says and `evaluate` does: crops, dtype, device, attention,
        4-bit, the largest image (`max_pixels`), and data.system as the system turn of `ask`; another model in the
        run's folder in the number type and bits of its own files. Options that are given win. A data.system that
        names columns cannot be filled here: the turn is left out, with a warning.
        """
        run = run_of(target)
        recipe = None if run is None else run.recipe_for(target)
        held = {} if recipe is None else recipe.loading_options
        if "num_crops" in options:
            held.pop("max_image_tokens", None)  # it would lower the crops that were asked for
        loaded = load_target(target, **{**held, **options})
        system = fixed_system(system_template(target), target)
        largest = MAX_PIXELS if recipe is None else recipe.image.max_pixels
        return cls(loaded.model, loaded.processor, system, max_pixels or largest)

    def ask(
        self,
        images: Photo | Sequence[Photo] | None,
        question: str,
        *,
        system: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        stream: Callable[[str], None] | None = None,
        **generation: Any,
    ) -> str:
        """Answers one question about no, one or several images.

        Args:
            images: photos or their paths.
            question: text of the user; nothing in it can become a control token.
            system: text of a system turn in front; None for the chat's own (`ChatModel.system`), "" for none.
            max_new_tokens: tokens of the answer at most.
            stream: called with each new piece of text; the pieces joined are the answer.
            **generation: options of transformers' GenerationConfig; greedy unless they say otherwise.

        Returns:
            The answer.

        Raises:
            ImageError: an image does not open. ConfigError: an option of generation that does not exist.
        """
        given = _listed(images)
        chat = conversation(given, question, self.system if system is None else system, self.max_pixels)
        photos = [part["image"] for part in chat[-1]["content"][:-1]]
        for path, photo in zip(given, photos, strict=True):
            try:
                resized_size(photo.width, photo.height, self.processor.image_processor.num_crops)
            except ImageError as error:
                name = "" if isinstance(path, Image.Image) else f"{path}: "
                raise ImageError(name + str(error).removesuffix(" or raise num_crops")) from error
        return self.answer_one(self.encode(chat), max_new_tokens=max_new_tokens, stream=stream, **generation)

    def answer_one(
        self,
        example: Mapping[str, Any],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        stream: Callable[[str], None] | None = None,
        **generation: Any,
    ) -> str:
        """Answers one prompt that is encoded already; `stream` and `generation` are those of `ask`.

        What `stream` raises ends the answer and is raised here.
        """
        streamer = PieceStreamer(self.text_of, self.is_byte, stream) if stream is not None else None
        return self._generate([example], max_new_tokens, generation, streamer)[0]

    def answer(
        self,
        conversations: Iterable[Conversation],
        *,
        batch_size: int = 8,
        max_new_tokens: int = MAX_NEW_TOKENS,
        **generation: Any,
    ) -> list[str]:
        """Answers many chats in batches, greedily; answers come in the caller's order.

        Args:
            conversations: chats whose content parts are `{"type": "image", "image": PIL}` and
                `{"type": "text", "text": str}`; taken a few batches at a time, so a generator keeps memory flat.
            batch_size: chats that are answered at once.
            max_new_tokens: tokens of each answer at most.
            **generation: see `ask`.
        """
        examples = (self.encode(chat) for chat in conversations)
        return self.answer_encoded(examples, batch_size=batch_size, max_new_tokens=max_new_tokens, **generation)

    def answer_encoded(
        self,
        examples: Iterable[Mapping[str, Any]],
        *,
        batch_size: int = 8,
        max_new_tokens: int = MAX_NEW_TOKENS,
        **generation: Any,
    ) -> list[str]:
        """The same for prompts that are encoded already, as `data.encode.encode_prompt` makes them.

        An example may hold `image_features` [image tokens, hidden] of all its images instead of pixels.

        Prompts of like length share a batch: they are taken eight batches at a time and sorted among themselves.
        """
        answers: list[str] = []
        for window in _windows(examples, 8 * batch_size):
            order = sorted(range(len(window)), key=lambda index: len(window[index]["input_ids"]))
            found: dict[int, str] = {}
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                texts = self._generate([window[index] for index in batch], max_new_tokens, generation)
                found.update(zip(batch, texts, strict=True))
            answers += [found[index] for index in range(len(window))]
        return answers

    def encode(self, chat: Conversation) -> dict[str, torch.Tensor]:
        """One chat as an encoded prompt: `input_ids` [tokens], and the images' tensors where there are any."""
        batch = self.processor.apply_chat_template(
            chat, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        return {key: value[0] if key in ("input_ids", "attention_mask") else value for key, value in batch.items()}

    @torch.inference_mode()
    def _generate(
        self,
        examples: Sequence[Mapping[str, Any]],
        max_new_tokens: int,
        generation: Mapping[str, Any],
        streamer: BaseStreamer | None = None,
    ) -> list[str]:
        """One batch through `generate`; texts in the order of `examples`."""
        check_names("generation", generation, vars(GenerationConfig()))
        tokenizer = self.processor.tokenizer
        collate = CollateFeatures(Collator(tokenizer.pad_token_id, padding_side="left"))
        batch = collate([dict(example) for example in examples])
        batch = {key: value.to(self.model.device) for key, value in batch.items() if key != "labels"}
        options = {
            "do_sample": False,
            "eos_token_id": sorted(self.stops),
            "pad_token_id": tokenizer.pad_token_id,
            **generation,
        }
        was_training = self.model.training
        self.model.eval()
        try:
            sequences = self.model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                logits_processor=LogitsProcessorList([_FirstScores()]),
                **options,
            )
        finally:
            self.model.train(was_training)
        prompt = batch["input_ids"].shape[1]
        return [self.text_of(ids) for ids in sequences[:, prompt:].tolist()]

    @cached_property
    def stops(self) -> frozenset[int]:
        """Ids of the tokens that end an answer; they are looked up once, and every token of an answer asks for them."""
        return frozenset(self.processor.stop_token_ids)

    def text_of(self, ids: Sequence[int]) -> str:
        """New tokens up to the first stop token as text, without control tokens.

        Example: the ids of "Hat", `<|end|>`, newline and `<|endoftext|>` give "Hat".
        """
        end = next((place for place, token in enumerate(ids) if token in self.stops), len(ids))
        return self.processor.tokenizer.decode(ids[:end], skip_special_tokens=True)

    def is_byte(self, token: int) -> bool:
        """Whether a token stands for one byte of a character, <0xE3> for instance."""
        name = self.processor.tokenizer.convert_ids_to_tokens(token)  # None for rows beyond the vocabulary
        return name is not None and _BYTE.fullmatch(name) is not None


NO_NUMBERS = (
    "the model's scores are no numbers (NaN): its weights, or the adapter's, are damaged, or too large for "
    "their number type; copy them again, or make them again (train, export)"
)


class _FirstScores(LogitsProcessor):
    """Refuses scores that are no numbers, of an answer's first token: with NaN in its weights a model says nothing."""

    def __init__(self) -> None:
        self._seen = False

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not self._seen and bool(scores.isnan().any()):
            raise CheckpointError(NO_NUMBERS)
        self._seen = True
        return scores


class PieceStreamer(BaseStreamer):
    """Hands on what each new token adds to the text.

    Characters spelt out in single bytes wait until their run of bytes is over: only then is it known what they are. A
    run that is no UTF-8 turns into replacement characters as a whole, letters in it included. What was handed on long
    ago is not decoded again, so that a token costs the same however long the answer is.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], is_byte: Callable[[int], bool], receive: Callable[[str], None]
    ) -> None:
        self._decode = decode
        self._is_byte = is_byte
        self._receive = receive
        self._ids: list[int] = []  # the last ones
        self._sent = 0  # characters of their text
        self._in_bytes = False
        self._prompt_passed = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt first, then one token at a time."""
        if not self._prompt_passed:
            self._prompt_passed = True
            return
        self._ids += value.flatten().tolist()
        text = self._decode(self._ids)
        if self._is_byte(self._ids[-1]):
            self._in_bytes = True
        elif self._in_bytes and self._decode(self._ids[-1:]):  # a control token shows nothing and ends no run
            self._in_bytes = False
        if not self._in_bytes and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._send(text)
            self._forget()

    def end(self) -> None:
        """Hands on what still waits."""
        self._send(self._decode(self._ids))

    def _send(self, text: str) -> None:
        if len(text) > self._sent:
            self._receive(text[self._sent :])
            self._sent = len(text)

    def _forget(self) -> None:
        """Keeps the last token alone, whose text has been handed on: the first of a text loses a space in front of it.

        One without text (a control token) would pass that loss on to its follower, and is not kept alone.
        """
        if len(self._ids) >= REMEMBERED_TOKENS and (last := self._decode(self._ids[-1:])):
            self._ids, self._sent = self._ids[-1:], len(last)


def ask(
    target: str | Path,
    images: Photo | Sequence[Photo] | None,
    question: str,
    *,
    device: str | None = None,
    max_pixels: int | None = None,
    **options: Any,
) -> str:
    """Loads `target` and answers one question.

    For more than one question, keep the model: `ChatModel.from_target(target)`.

    Args:
        target: run, adapter, model folder or hub id.
        images: photos or their paths.
        question: text of the user.
        device: "auto", "cpu" or "cuda"; None as the run's recipe says, else "auto".
        max_pixels: larger image files are refused; None as the run's recipe says, else 20 million.
        options: those of `ChatModel.ask`.
    """
    loading = {} if device is None else {"device": device}
    return ChatModel.from_target(target, max_pixels=max_pixels, **loading).ask(images, question, **options)


def fixed_system(template: str | None, target: str | Path) -> str | None:
    """The text of a system template without columns: "Be {{brief}}." -> "Be {brief}."; None, and a warning, with."""
    if template is None:
        return None
    system = Template(template, "system")
    if system.columns:
        _logger.warning(
            "%s was tuned with a system turn that names the columns %s: it is left out, pass system=... to give one",
            target,
            ", ".join(system.columns),
        )
        return None
    return system.render({})


def conversation(
    images: Photo | Sequence[Photo] | None, question: str, system: str | None = None, max_pixels: int = MAX_PIXELS
) -> Conversation:
    """A chat with one question: the images first, then the text, in one user turn.

    Example: `conversation(photo, "What is it?")` is `[{"role": "user", "content": [{"type": "image", "image": photo},
    {"type": "text", "text": "What is it?"}]}]`.

    Raises:
        ImageError: a path that does not open as an image.
    """
    parts = [{"type": "image", "image": _photo(photo, max_pixels)} for photo in _listed(images)]
    turns: Conversation = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system else []
    return [*turns, {"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def _listed(images: Photo | Sequence[Photo] | None) -> list[Photo]:
    """No, one or several photos as a list."""
    return [] if images is None else [images] if isinstance(images, (str, Path, Image.Image)) else list(images)


def _photo(photo: Photo, max_pixels: int) -> Image.Image:
    """An opened photo as it is, a path opened as rows of data are."""
    return photo if isinstance(photo, Image.Image) else open_image(photo, max_pixels=max_pixels)


def _windows(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Consecutive lists of `size` items: `_windows("abcde", 2)` gives [a, b], [c, d], [e]."""
    iterator = iter(items)
    while window := list(islice(iterator, size)):
        yield window
