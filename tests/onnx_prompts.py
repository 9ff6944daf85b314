"""Prompts for exported graphs, and the comparison of both runtimes on one of them."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from phi3v.export.onnx_runtime import OnnxChatModel, genai_inputs
from phi3v.generate import ChatModel, conversation


@dataclass(frozen=True)
class Compared:
    """One prompt by both runtimes.

    Attributes:
        prompt: its tokens.
        furthest: largest difference of two logits at any of its positions.
        same_top: share of its positions at which both hold the same token for the likeliest.
        tokens, expected: answers of the graphs and of PyTorch.
        whole: the prompt with the answer of PyTorch behind it.
    """

    prompt: int
    furthest: float
    same_top: float
    tokens: list[int]
    expected: list[int]
    whole: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.prompt} tokens, {self.furthest:.1e}, {self.same_top:.4f}, {self.tokens}, {self.expected}"


@functools.cache
def photo(width: int, height: int) -> Image.Image:
    """A picture of large random patches with noise over them."""
    random = np.random.default_rng(width * 10_000 + height)
    patches = Image.fromarray(random.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height))
    noise = random.integers(-20, 21, (height, width, 3))
    return Image.fromarray((np.asarray(patches).astype(int) + noise).clip(0, 255).astype(np.uint8))


def encoded(chat: ChatModel, sizes: list[tuple[int, int]], words: int = 3, tokens: int | None = None) -> dict[str, Any]:
    """A question of so many words about photos of these sizes, encoded; or of exactly so many tokens."""
    question = " ".join(["What", "colour", "is", "it?"][number % 4] for number in range(words))
    example = chat.encode(conversation([photo(*size) for size in sizes], question))
    if tokens is not None:
        ids = example["input_ids"]
        filling = ids[-8:].repeat(tokens)[: tokens - len(ids)]
        example["input_ids"] = torch.cat([ids[:-4], filling, ids[-4:]])
        example["attention_mask"] = torch.ones_like(example["input_ids"])
    return example


def compare(
    expected: ChatModel,
    found: OnnxChatModel,
    sizes: list[tuple[int, int]] | None = None,
    words: int = 3,
    *,
    example: dict[str, Any] | None = None,
    max_new_tokens: int,
) -> Compared:
    """The logits of a whole prompt and a greedy answer, from the same pixels by both."""
    example = encoded(expected, sizes or [], words) if example is None else example
    batch = {key: value[None] if key in ("input_ids", "attention_mask") else value for key, value in example.items()}
    stops = expected.processor.stop_token_ids
    with torch.inference_mode():
        wanted = expected.model(**batch).logits[0].numpy()
        settings = {"do_sample": False, "eos_token_id": stops, "pad_token_id": stops[0]}
        answered = expected.model.generate(**batch, max_new_tokens=max_new_tokens, **settings)[0]
    prompt = len(example["input_ids"])
    ids, images = genai_inputs(example, found.image_token_id)
    logits = found.start(ids, images, prompt + 1).get_output("logits")[0].astype(np.float32)
    assert logits.shape == wanted.shape
    return Compared(
        prompt,
        float(np.abs(logits - wanted).max()),
        float((logits.argmax(-1) == wanted.argmax(-1)).mean()),
        found.answer_tokens(example, max_new_tokens),
        answered[prompt:].tolist(),
        {**example, "input_ids": answered},
    )
