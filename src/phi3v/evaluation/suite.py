"""A TARGET as a model of lm-evaluation-harness (lm-eval), so that its tasks, public or one's own, can ask it.

`python -m phi3v.evaluation.suite` is lm-eval's own command line in which `--model phi3v` is known; from Python a
`SuiteModel` goes to `lm_eval.simple_evaluate`. In come lm-eval's requests, out come texts and log-likelihoods: prompts
are the processor's and answers the running batch's, so a task that asks what rows ask gets the answers of
`phi3v evaluate`. Tasks, metrics, caches and files are lm-eval's business.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from phi3v.data.collate import Collator
from phi3v.data.encode import IGNORED
from phi3v.data.images import open_image
from phi3v.data.turns import spoken_turn
from phi3v.errors import ConfigError, MissingPackageError, Phi3VError, install
from phi3v.evaluation.engine import Engine, losses_of
from phi3v.generate import MAX_NEW_TOKENS, ChatModel, Conversation
from phi3v.passthrough import check_names

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    line = f"tasks of lm-eval need the package lm_eval, which is not installed: {install('suite')}"
    if __name__ == "__main__":
        sys.exit(f"phi3v: {line}")
    raise MissingPackageError(line) from error

LOADING = ("device", "dtype", "attn_implementation", "num_crops", "max_image_tokens", "fast", "revision")
"""What `--model_args` may hold beside `pretrained`: options of `loading.load_target`."""
Example = dict[str, torch.Tensor]


class SuiteModel(LM):
    """A run, an adapter, a model folder or a hub id that answers lm-eval's requests, in one process.

    Example: `lm_eval.simple_evaluate(SuiteModel("runs/shop"), tasks=["mmmu_val"], apply_chat_template=True)`.

    Attributes:
        chat: the loaded target; a run is loaded, and its system turn put in front, as `ask` does it.
        batch_size: rows that are answered at once.
    """

    MULTIMODAL = True
    """Read by lm-eval, which gives tasks with images to no other model."""

    def __init__(
        self, pretrained: str, batch_size: int | str = 8, max_batch_size: int | None = None, **options: Any
    ) -> None:
        """Load the target; these are the arguments that lm-eval's command line hands over.

        Args:
            pretrained: the TARGET, under the name that lm-eval's other models have for it.
            batch_size: `--batch_size`.
            max_batch_size: of lm-eval's automatic batch size, which is not offered.
            options: see `LOADING`.

        Raises: ConfigError for an option that does not exist; CheckpointError and others of `load_target`.
        """
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ConfigError(f"--batch_size is {batch_size!r}: say how many rows are answered at once, 8 for instance")
        check_names("model_args", options, LOADING)
        self.chat, self.batch_size = ChatModel.from_target(pretrained, **options), int(batch_size)
        self._device = self.chat.model.device

    @property
    def tokenizer_name(self) -> str:
        """What prompts depend on, for lm-eval's cache of them."""
        return f"{self.chat.processor.tokenizer.name_or_path}, {self.chat.system}".replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template of chats, which lm-eval writes beside its results."""
        return self.chat.processor.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        r"""A chat as a prompt, with a tag for each `<image>` of the user's turns.

        Example: `[{"role": "user", "content": "<image>\nWhat?"}]` gives
        `<|user|>\n<|image_1|>\nWhat?<|end|>\n<|assistant|>\n`, with the system turn of a run in front.
        """
        chat: Conversation = []
        for role, parts in (spoken_turn(turn, tagged=True) for turn in chat_history):
            content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
            chat.append({"role": role, "content": content})
        if self.chat.system and chat[0]["role"] != "system":
            chat.insert(0, {"role": "system", "content": self.chat.system})
        how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.chat.processor.apply_chat_template(chat, **how)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, each cut at the first of the task's `until`.

        Greedy ones come from the running batch; other options of generation (do_sample, num_beams, ...) go to the
        model's own `generate`.
        """
        texts = [""] * len(requests)
        with logging.tqdm(total=len(requests), disable=disable_tqdm, desc="answers") as bar:
            for settings, places in _alike(requests):
                for place, text in self._answers(requests, places, settings):
                    texts[place] = text
                    self.cache_hook.add_partial("generate_until", requests[place].args, text)
                    bar.update()
        return texts

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each continuation its log-probability, and whether each of its tokens is the likeliest."""
        found: dict[int, tuple[float, bool]] = {}
        order = self._longest_first(requests, range(len(requests)))
        with logging.tqdm(total=len(requests), disable=disable_tqdm, desc="log-likelihoods") as bar:
            for start in range(0, len(order), self.batch_size):
                places = order[start : start + self.batch_size]
                found |= zip(places, self._likelihoods([requests[place].args for place in places]), strict=True)
                for place in places:
                    self.cache_hook.add_partial("loglikelihood", requests[place].args, found[place])
                bar.update(len(places))
        return [found[place] for place in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Not offered. Raises: ConfigError."""
        raise ConfigError("the task asks how likely running text is, which --model phi3v does not say: take another")

    def _answers(
        self, requests: Sequence[Instance], places: Sequence[int], settings: Mapping[str, Any]
    ) -> Iterator[tuple[int, str]]:
        """Answers to requests with the same settings as they become known, each with its place."""
        how = dict(normalize_gen_kwargs(dict(settings), MAX_NEW_TOKENS))
        until, most = how.pop("until", []), how.pop("max_gen_toks")
        if not how["do_sample"]:
            how = {name: value for name, value in how.items() if name not in ("do_sample", "temperature")}
        order = self._longest_first(requests, places)
        examples = ((place, self._encoded(requests[place].args)) for place in order)
        if how:
            prompts = (example for _, example in examples)
            texts = self.chat.answer_encoded(prompts, batch_size=self.batch_size, max_new_tokens=most, **how)
            yield from ((place, _cut(text, until)) for place, text in zip(order, texts, strict=True))
        else:
            engine = Engine(self.chat, batch_size=self.batch_size, max_new_tokens=most)
            yield from ((place, _cut(found.text, until)) for place, found in engine.answer(examples))

    def _encoded(self, arguments: Sequence[Any]) -> Example:
        """The prompt of a request, with its images."""
        prompt, images = arguments[0], _images_of(arguments)
        if images and "<|user|>" not in prompt:
            raise ConfigError("the task has images, and its prompts are no chats: add --apply_chat_template")
        opened = [open_image(image) if isinstance(image, (str, Path)) else image for image in images]
        visual = {"images": [opened], "pad_crops": False} if opened else {}
        batch = self.chat.processor(text=[prompt], return_tensors="pt", **visual)
        return {name: value[0] if name in ("input_ids", "attention_mask") else value for name, value in batch.items()}

    def _continued(self, arguments: Sequence[Any]) -> Example:
        """A prompt and its continuation, whose tokens are the labels; white space between them is the continuation's.

        Example: a prompt of the ids [1, 5], and [1, 5, 7] with its continuation -> input_ids [1, 5, 7], labels [-100,
        -100, 7].
        """
        prompt, continuation, *visual = arguments
        example = self._encoded([prompt + continuation, None, *visual])
        before = len(self._encoded([prompt.rstrip(), None, *visual])["input_ids"])
        labels = example["input_ids"].clone()
        labels[:before] = IGNORED
        return example | {"labels": labels}

    @torch.inference_mode()
    def _likelihoods(self, several: Sequence[Sequence[Any]]) -> list[tuple[float, bool]]:
        """What `loglikelihood` says of requests with these arguments, in one batch."""
        batch = Collator(self.chat.processor.tokenizer.pad_token_id)([self._continued(each) for each in several])
        inputs = {name: value.to(self.device) for name, value in batch.items()}
        logits = self.chat.model(**inputs, trained_logits_only=True).logits
        losses, counts = losses_of(logits, batch["labels"])
        wanted = inputs["labels"][:, 1:]
        right = (logits.argmax(-1) == wanted[wanted != IGNORED]).split(counts)
        return [(-loss, bool(its.all())) for loss, its in zip(losses, right, strict=True)]

    def _longest_first(self, requests: Sequence[Instance], places: Sequence[int]) -> list[int]:
        """Places in the order in which neighbours have about the same length: image tokens, and characters of text."""
        count = self.chat.processor.calc_num_image_tokens_from_image_size

        def length(place: int) -> int:
            sizes = [image.size for image in _images_of(requests[place].args) if hasattr(image, "size")]
            return sum(count(*size) for size in sizes) + len(requests[place].args[0])

        return sorted(places, key=length, reverse=True)


def _images_of(arguments: Sequence[Any]) -> list[Any]:
    """The images of a request: ("What?", {...}, {"visual": [photo]}) -> [photo]; none where there is no third part."""
    return list(arguments[2].get("visual") or []) if len(arguments) > 2 else []


def _alike(requests: Sequence[Instance]) -> list[tuple[Mapping[str, Any], list[int]]]:
    """Settings of generation, and the places of the requests that have them."""
    groups: dict[str, tuple[Mapping[str, Any], list[int]]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(repr(request.args[1]), (request.args[1], []))[1].append(place)
    return list(groups.values())


def _cut(text: str, until: Sequence[str]) -> str:
    r"""A text up to the first of some ends: "a\nb. c", ["\n", "."] -> "a"."""
    return text[: min((text.find(end) for end in until if end and end in text), default=len(text))]


def main() -> None:
    """lm-eval's command line, with `--model phi3v`."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    model_registry.register("phi3v", target="phi3v.evaluation.suite:SuiteModel")
    try:
        cli_evaluate()
    except Phi3VError as error:
        sys.exit(f"phi3v: {error}")


if __name__ == "__main__":
    main()
