"""Pretraining of the tiny model: from random weights to questions about scenes.

`pretrain(...)` trains the package's own classes and returns the model; `score` asks held-out scenes. Nothing is
specific to the demo's catalogue; its single words are among the tokenizer's pieces. There are three parts: `looking`
teaches the tower to see digits and shapes, `echoing` teaches the decoder to repeat, and `scenes` teach it to answer. A
scene's questions follow each other in one sequence, so that every encoded picture teaches several answers; only answers
are trained on. Half of the sequences end with a few random pieces of the vocabulary to repeat, which gives every entry
of the tables a meaning.
`scripts/pretrain_tiny.py` is the command.

Letters: B rows, S positions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from phi3v.demo import tokenizer as tiny_tokenizer
from phi3v.demo.echoing import echo, phrase
from phi3v.demo.looking import Page, Pages, looking_loss, word_ids
from phi3v.demo.muon import Muon
from phi3v.demo.scenes import scene
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.image_processing_phi3_v import Phi3VImageProcessor
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.model.vision_phi3_v import merge_patches
from phi3v.tuning import freeze

EXPECTED_SCORE = (0.78, 0.93)  # `all` of `score`: 0.888 (packaged, CPU), 0.806 (CPU), 0.858, 0.903 (GPU)
IMAGE_TOKENS = 313  # a square picture at num_crops=1: (1 + 1) * 144 + 1 + (1 + 1) * 12
ONE_VIEW_TOKENS = 157  # its last part, the separator and the view of the whole: 1 + 144 + 12
ENDOFTEXT, ASSISTANT, END, IMAGE = (tiny_tokenizer.BASE_SIZE + offset for offset in (0, 1, 7, 44))


@dataclass(frozen=True)
class Options:
    """Settings of a pretraining run; about an hour on two busy cores without bfloat16 units.

    `pages` and `scenes` are pictures, `batch` of them a step; `echoes` are steps of text, at twice the learning rate.
    The first `one_view_share` of the scenes show the picture once, as the view of the whole. At `num_crops=1` the only
    crop shows the same pixels again; leaving it out makes a step a third cheaper, and what stands at the same distance
    before the text stays the same.
    """

    pages: int = 20_000
    echoes: int = 600
    scenes: int = 30_000
    one_view_share: float = 0.8
    batch: int = 8
    learning_rate: float = 1.5e-3
    warmup_steps: int = 150
    decay_share: float = 0.35
    seed: int = 0
    device: str = "cpu"
    workers: int = 0


def tiny_config() -> Phi3VConfig:
    """The tiny model's shape: Phi-3-V's layout with a tower of 64 channels and a decoder of 128."""
    half = 16
    return Phi3VConfig(
        vocab_size=tiny_tokenizer.EMBEDDING_ROWS,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_scaling={
            "type": "su",
            "short_factor": [1.0] * half,
            "long_factor": [round(32 ** (i / (half - 1)), 6) for i in range(half)],
        },
        sliding_window=131072,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=ENDOFTEXT,
        tie_word_embeddings=False,
        image_token_id=IMAGE,
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "projection_dim": 64,
        },
    )


def grid_positions(channels: int, amplitude: float, side: int = 24) -> torch.Tensor:
    """Sines and cosines of row and column for every patch, `[side * side, channels]`: the start of the position table.

    Wavelengths run from four patches to twice the picture, so that neighbours look alike before anything is learned.
    """
    frequencies = torch.logspace(math.log10(math.pi / side), math.log10(math.pi / 2), channels // 4)
    angles = torch.arange(side).float()[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    both = torch.cat([line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)], dim=-1)
    return amplitude * both.reshape(side * side, channels)


@torch.no_grad()
def new_model(seed: int) -> Phi3VForCausalLM:
    """The tiny model with random weights: variance kept from layer to layer, residual branches damped, positions on a
    grid."""
    torch.manual_seed(seed)
    model = Phi3VForCausalLM(tiny_config())
    for name, parameter in model.named_parameters():
        if name.endswith("position_embedding.weight"):
            parameter[0].zero_()
            parameter[1:] = grid_positions(parameter.shape[1], amplitude=1.4)
        elif name.endswith(("class_embedding", "_GN")):
            parameter.normal_(std=0.02)
        elif name.endswith("embed_tokens.weight"):
            parameter.normal_(std=0.3)
        elif name.endswith("lm_head.weight"):
            parameter.normal_(std=0.02)
        elif parameter.ndim >= 2:
            closes_branch = name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight"))
            parameter.normal_(std=parameter[0].numel() ** -0.5 / (math.sqrt(8) if closes_branch else 1.0))
        elif name.endswith("bias"):
            parameter.zero_()
    return model


def new_processor(folder: Path) -> Phi3VProcessor:
    """The tiny model's processor, one crop an image unless told otherwise; its tokenizer files are written to
    `folder`."""
    tiny_tokenizer.write_tokenizer(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return Phi3VProcessor(image_processor=Phi3VImageProcessor(num_crops=1), tokenizer=tokenizer)


def encode_turns(
    tokenizer: Any, turns: list[tuple[str, str]], image_tokens: int = IMAGE_TOKENS
) -> tuple[list[int], list[int]]:
    """Token ids of a picture with its questions, and for each id the number of the turn it answers (-1 elsewhere).

    The ids are those of the chat that asks all questions in turn: `<s> <|user|> ▁ newline`, the image tokens, `<s>`,
    then the text. An answer's turn includes its `<|end|>`; the last one includes the newline and `<|endoftext|>` too.

    Example: with one turn `("digit?", "7")` the ids end with `<|assistant|> ▁ 7 <|end|> ▁ newline <|endoftext|>`, and
    the last six have turn 0.
    """
    text = "<|user|>\n".join(f"{question}<|end|>\n<|assistant|>\n{answer}<|end|>\n" for question, answer in turns)
    tail = tokenizer("\n" + text + "<|endoftext|>")["input_ids"]
    owners, turn, inside = [], 0, False
    for token in tail:
        owners.append(turn if inside else -1)
        if token == ASSISTANT:
            inside = True
        elif token == END and inside and turn < len(turns) - 1:
            inside, turn = False, turn + 1
    head = [*tokenizer("<|user|>\n")["input_ids"], *[IMAGE] * image_tokens]
    return head + tail, [-1] * len(head) + owners


class Scenes(Dataset):
    """The scenes `0 .. count - 1` of a seed as (ids, owners, image, turns), made when asked for.

    The first `one_view` of them have the tokens of the whole view only.
    """

    def __init__(self, tokenizer: Any, seed: int, count: int, one_view: int = 0) -> None:
        self.tokenizer, self.seed, self.count, self.one_view = tokenizer, seed, count, one_view

    def __len__(self) -> int:
        """How many scenes there are."""
        return self.count

    def __getitem__(self, index: int) -> tuple[list[int], list[int], Any, list[tuple[str, str]]]:
        """One scene; every second one, drawn by lot, ends with pieces of the vocabulary to repeat."""
        made = scene(self.seed, index)
        turns = list(made.turns)
        if (again := phrase(self.tokenizer, self.seed, index)) is not None:
            turns.append((f"Repeat: {again}", again))
        tokens = ONE_VIEW_TOKENS if index < self.one_view else IMAGE_TOKENS
        return *encode_turns(self.tokenizer, turns, tokens), made.image, turns


def collate(rows: list[tuple]) -> dict[str, Any]:
    """Rows of `Scenes` as one batch padded on the right.

    Returns `input_ids`, `labels` and `owners` [B, S], `views` [B, 3, 336, 336] and `turns`.
    """
    length = max(len(row[0]) for row in rows)
    ids = torch.full((len(rows), length), ENDOFTEXT)
    owners = torch.full((len(rows), length), -1)
    for i, (row_ids, row_owners, _, _) in enumerate(rows):
        ids[i, : len(row_ids)] = torch.tensor(row_ids)
        owners[i, : len(row_ids)] = torch.tensor(row_owners)
    return {
        "input_ids": ids,
        "labels": torch.where(owners >= 0, ids, -100),
        "views": as_views([row[2] for row in rows]),
        "owners": owners,
        "turns": [row[3] for row in rows],
    }


def as_views(images: list[Any]) -> torch.Tensor:
    """Square pictures as the tower takes them: `[B, 3, 336, 336]`, normalised."""
    views = torch.stack([torch.from_numpy(np.asarray(image, np.float32)) for image in images]).permute(0, 3, 1, 2) / 255
    return (views - torch.tensor(OPENAI_CLIP_MEAN)[:, None, None]) / torch.tensor(OPENAI_CLIP_STD)[:, None, None]


def collate_pages(rows: list[Page]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of `Pages` as views and cells `[B, 144]`."""
    return as_views([image for image, _ in rows]), torch.tensor([cells for _, cells in rows])


def picture_features(model: Phi3VForCausalLM, views: torch.Tensor, image_tokens: int = IMAGE_TOKENS) -> torch.Tensor:
    """What `model.get_image_features` returns for square pictures of 336 pixels, at half the price.

    At `num_crops=1` the only crop of such a picture and the view of the whole are the same pixels, so the tower looks
    once and its features are laid out twice: crop, separator, whole. `[B, 3, 336, 336]` to `[B * 313, hidden size]`;
    with 157 image tokens separator and whole alone.
    """
    embedding = model.model.vision_embed_tokens
    side, count = embedding.side, len(views)
    grid = merge_patches(embedding.img_processor(views)).view(count, side, side, -1)
    line_ends = embedding.sub_GN.view(1, 1, 1, -1).expand(count, side, 1, -1)
    lines = embedding.img_projection(torch.cat([grid, line_ends], dim=2).flatten(1, 2))
    between = embedding.img_projection(embedding.glb_GN).expand(count, 1, -1)
    whole = [between, lines] if image_tokens == ONE_VIEW_TOKENS else [lines, between, lines]
    return torch.cat(whole, dim=1).flatten(0, 1)


def batches(
    processor: Phi3VProcessor, seed: int, count: int, batch: int, workers: int = 0, one_view: int = 0
) -> Iterator[dict[str, Any]]:
    """The scenes of a seed in order, `batch` at a time; the pictures of the first `one_view` are laid out once."""
    data = Scenes(processor.tokenizer, seed, count, one_view)
    yield from DataLoader(data, batch, collate_fn=collate, num_workers=workers)


def optimisers(model: nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for tables, convolution, norms and biases.

    Muon found the way from pixels to words in a fraction of the steps that AdamW took.
    """
    tables = ("position_embedding.weight", "embed_tokens.weight", "lm_head.weight")
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and not name.endswith(tables) else rest).append(parameter)
    return [
        Muon(matrices, lr=learning_rate, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def rate_factor(step: int, steps: int, options: Options) -> float:
    """Share of the learning rate at a step: warm-up, constant, then a straight line to zero over the last part.

    Example: with 1000 steps, 100 of warm-up and a decay share of 0.5 it is 0.01 at step 0, 1 from 99 to 500, 0.5 at
    750.
    """
    return min(1.0, (step + 1) / options.warmup_steps) * min(1.0, (1 - step / steps) / options.decay_share)


def pretrain(
    options: Options, processor: Phi3VProcessor, log: Callable[[int, int, float], None] | None = None
) -> Phi3VForCausalLM:
    """Train a new tiny model: on pages, then on echoes, then on scenes.

    `log` is called after every step with its number, the number of steps and the loss.
    """
    model = new_model(options.seed).to(options.device).train()
    freeze(model, language_model=True, tower="train", projector="train")
    groups = optimisers(model, options.learning_rate)
    step, steps = 0, sum(_phases(options))
    for length, factor, losses in zip(
        _phases(options), (1.0, 2.0, 1.0), _phase_losses(model, processor, options), strict=True
    ):
        for place, loss in enumerate(losses):
            for optimiser in groups:
                for group in optimiser.param_groups:
                    group["lr"] = factor * options.learning_rate * rate_factor(place, length, options)
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            for optimiser in groups:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            step += 1
            if log is not None:
                log(step, steps, loss.item())
    return model.eval().requires_grad_(True)


def _phases(options: Options) -> tuple[int, int, int]:
    """Steps of pages, of echoes and of scenes."""
    return options.pages // options.batch, options.echoes, options.scenes // options.batch


def _phase_losses(
    model: Phi3VForCausalLM, processor: Phi3VProcessor, options: Options
) -> tuple[Iterator[torch.Tensor], Iterator[torch.Tensor], Iterator[torch.Tensor]]:
    """The loss of each step of each part; the caller steps between two of them."""
    looking, echoes, steps = _phases(options)

    def pages() -> Iterator[torch.Tensor]:
        names, data = word_ids(processor.tokenizer), Pages(options.seed, looking * options.batch)
        for views, cells in DataLoader(data, options.batch, collate_fn=collate_pages, num_workers=options.workers):
            yield looking_loss(model, views.to(options.device), cells.to(options.device), names)

    def texts() -> Iterator[torch.Tensor]:
        for index in range(echoes):
            ids, labels = (part.to(options.device) for part in echo(processor.tokenizer, options.seed, index))
            yield model(input_ids=ids, labels=labels, trained_logits_only=True, use_cache=False).loss

    def scenes() -> Iterator[torch.Tensor]:
        one_view = int(steps * options.one_view_share) * options.batch
        for batch in batches(processor, options.seed, steps * options.batch, options.batch, options.workers, one_view):
            labels = batch["labels"].to(options.device)
            yield model(**_inputs(model, batch), labels=labels, trained_logits_only=True, use_cache=False).loss

    return pages(), texts(), scenes()


def _inputs(model: Phi3VForCausalLM, batch: dict[str, Any]) -> dict[str, Any]:
    """Forward's arguments. Rows are padded on the right and causal, so real positions never see padding: no mask is
    needed."""
    views = batch["views"].to(model.device, non_blocking=True)
    image_tokens = int((batch["input_ids"][0] == IMAGE).sum())
    return {
        "input_ids": batch["input_ids"].to(model.device),
        "image_features": picture_features(model, views, image_tokens),
        "image_sizes": [[336, 336]] * len(views),
    }


@torch.no_grad()
def score(
    model: Phi3VForCausalLM,
    processor: Phi3VProcessor,
    count: int = 512,
    seed: int = 1_000_003,
    device: str = "cpu",
    workers: int = 0,
) -> dict[str, float]:
    """Share of exactly right answers on held-out scenes, by question, and over all of them as `all`.

    An answer counts when every one of its tokens, `<|end|>` included, is the most likely one after the right tokens
    before it; that is the case exactly when greedy generation gives the answer.
    """
    model.to(device)
    right: dict[str, list[bool]] = defaultdict(list)
    for batch in batches(processor, seed, count, 32, workers):
        best = model(**_inputs(model, batch), use_cache=False).logits[:, :-1].argmax(-1)
        hits = best.cpu() == batch["labels"][:, 1:]
        owners = batch["owners"][:, 1:]
        for row, turns in enumerate(batch["turns"]):
            for turn, (question, _) in enumerate(turns):
                is_right = bool(hits[row][owners[row] == turn].all())
                right["all"].append(is_right)
                right["Repeat" if question.startswith("Repeat") else question].append(is_right)
    return {question: sum(values) / len(values) for question, values in sorted(right.items())}


def save(model: Phi3VForCausalLM, processor: Phi3VProcessor, folder: Path) -> None:
    """Write weights (float32), configuration and processor in the layout of Microsoft's checkpoints.

    The generation configuration names all three ends, as Microsoft trained them: plain `generate` stops by itself.
    """
    model.generation_config.eos_token_id = [2, ENDOFTEXT, END]
    model.cpu().save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    tiny_tokenizer.write_tokenizer(folder)
