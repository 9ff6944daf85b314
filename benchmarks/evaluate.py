"""How many rows a second are answered on a CPU: one by one, in batches of `generate`, and as `phi3v evaluate` does it.

    python benchmarks/evaluate.py --out benchmarks/evaluate [--rows 128] [--batch 8] [--rounds 3] [--threads 1]

The tiny model that comes with phi3v answers questions about scenes of the kind that it was pretrained on: of each scene
the question with the longest answer, two to forty tokens, as the fields of a product would take; `--short` asks them in
turn. The shorter answers are, the less there is to gain: tower and prompt take a row the same arithmetic in any batch.
All ways begin with rows and end with texts, so decoding and resizing of the pictures count:

    one by one    each row through the model's own `generate`
    generate      `ChatModel.answer_encoded`: batches of rows of like length, each until its longest answer ends
    ours          `evaluation.answers.answer_rows`: rows that end make room for others
    the ceiling   what batching can give where nothing is ragged: as many rows, each prompt as long as the others, each
                  answer exactly as many tokens as the mean of the real ones, in full batches; the faster of `generate`
                  and our own loop. Tower and prompts are included.

The ways take turns, so that a machine that is slow for a while is slow for all; medians are compared. Answers have to
be the same: where two differ, the margin between the two likeliest tokens at the first difference is listed, and the
program ends with an error where one is above 1e-4.
"""

import argparse
import io
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from results import draw_bars, machine, to_write, write

import phi3v.demo
from phi3v.data.encode import encode_prompt
from phi3v.data.schema import ImagePart, ImageRef, Message, Row, TextPart
from phi3v.demo.scenes import scene
from phi3v.evaluation.answers import answer_rows
from phi3v.generate import ChatModel

TINY = Path(phi3v.demo.__file__).parent / "tiny"
SEED = 77
"""Of the scenes; those of the pretraining have others."""
TIE = 1e-4


def make_rows(count: int, question: str | None = None, short: bool = False) -> list[Row]:
    """Rows of one scene each, with the question that has the longest answer, one in turn, or all with the same."""
    rows = []
    for index in range(count):
        found = scene(SEED, index)
        buffer = io.BytesIO()
        found.image.save(buffer, format="PNG")
        turns = sorted(found.turns, key=lambda turn: -len(turn[1]))
        asked = question or (found.turns[index % len(turns)] if short else turns[0])[0]
        message = Message("user", (ImagePart(0), TextPart(asked)))
        rows.append(Row((message,), (ImageRef(f"{index}.png", data=buffer.getvalue()),), {}, "scenes", index))
    return rows


def alone(chat: ChatModel, rows: list[Row], tokens: int) -> list[str]:
    """One row after the other."""
    return [
        text
        for row in rows
        for text in chat.answer_encoded([encode_prompt(row, chat.processor)], batch_size=1, max_new_tokens=tokens)
    ]


def batches(chat: ChatModel, rows: list[Row], tokens: int, batch: int, **options: Any) -> list[str]:
    """Batches of rows of like length."""
    prompts = (encode_prompt(row, chat.processor) for row in rows)
    return chat.answer_encoded(prompts, batch_size=batch, max_new_tokens=tokens, **options)


def ours(chat: ChatModel, rows: list[Row], tokens: int, batch: int) -> list[str]:
    """The running batch; its way is checked."""
    found = answer_rows(chat.model, chat.processor, rows, batch_size=batch, max_new_tokens=tokens, expected=False)
    assert found.ways == {"together": len(rows)}, found.ways
    return found.texts


def without_ends(chat: ChatModel, rows: list[Row], tokens: int, batch: int) -> list[str]:
    """The running batch where no answer ends before its last token."""
    with patch.object(type(chat.processor), "stop_token_ids", []):
        return ours(chat, rows, tokens, batch)


def margin_of(chat: ChatModel, row: Row, other: str, tokens: int) -> float:
    """Margin between the two likeliest tokens where the answer of one by one begins to differ from another."""
    batch = dict(encode_prompt(row, chat.processor))
    batch |= {name: batch[name][None] for name in ("input_ids", "attention_mask")}
    options = {"do_sample": False, "eos_token_id": list(chat.processor.stop_token_ids), "max_new_tokens": tokens}
    found = chat.model.generate(**batch, **options, output_logits=True, return_dict_in_generate=True)
    ids = found.sequences[0, batch["input_ids"].shape[1] :].tolist()
    same = [other.startswith(chat.text_of(ids[: step + 1])) for step in range(len(ids))]
    step = same.index(False) if False in same else len(ids) - 1
    best = found.logits[step][0].float().topk(2).values
    return float(best[0] - best[1])


def compare(chat: ChatModel, rows: list[Row], texts: list[str], expected: list[str], tokens: int) -> list[dict]:
    """The rows whose answers differ, each with its margin. Raises: SystemExit where one is no tie."""
    ties = [
        {"row": row.index, "alone": wanted, "ours": text, "margin": margin_of(chat, row, text, tokens)}
        for row, text, wanted in zip(rows, texts, expected, strict=True)
        if text != wanted
    ]
    if any(tie["margin"] > TIE for tie in ties):
        raise SystemExit(f"answers differ: {ties}")
    return ties


def clocked(ways: dict[str, Callable[[], list[str]]], rounds: int) -> dict[str, float]:
    """Median seconds of the ways, which take turns; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
        print(f"round {turn}:", {name: round(times[-1], 2) for name, times in seconds.items()}, flush=True)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="ask for short answers too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=to_write, default=Path("evaluate"), help="name of the .json and the .png")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    chat = ChatModel.from_target(TINY, device="cpu", dtype="float32")
    rows = make_rows(given.rows, short=given.short)
    expected = alone(chat, rows, given.tokens)
    lengths = [len(chat.processor.tokenizer(text, add_special_tokens=False).input_ids) + 1 for text in expected]
    mean = round(statistics.mean(lengths))
    ties = compare(chat, rows, ours(chat, rows, given.tokens, given.batch), expected, given.tokens)
    even = make_rows(given.rows, "What is shown in this image?")
    seconds = clocked(
        {
            "one by one": lambda: alone(chat, rows, given.tokens),
            "generate": lambda: batches(chat, rows, given.tokens, given.batch),
            "ours": lambda: ours(chat, rows, given.tokens, given.batch),
            "even rows, generate": lambda: batches(chat, even, mean, given.batch, min_new_tokens=mean),
            "even rows, our loop": lambda: without_ends(chat, even, mean, given.batch),
        },
        given.rounds,
    )
    rates = {name: given.rows / time_taken for name, time_taken in seconds.items()}
    ceiling = max(rate for name, rate in rates.items() if name.startswith("even"))
    result = {
        **machine(),
        "rows": given.rows,
        "batch": given.batch,
        "short": given.short,
        "answer_tokens": {"mean": mean, "least": min(lengths), "most": max(lengths)},
        "rows_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "times_one_by_one": round(rates["ours"] / rates["one by one"], 2),
        "of_the_ceiling": round(rates["ours"] / ceiling, 3),
        "ties": ties,
    }
    write(result, given.out)
    draw_bars({"rows/s": {**rates, "the ceiling": ceiling}}, f"rows/s, tiny model, batch {given.batch}", given.out)
    print({name: result[name] for name in ("answer_tokens", "rows_per_second", "times_one_by_one", "of_the_ceiling")})
    print(f"{len(ties)} of {given.rows} answers differ, by ties under {TIE:g}:", ties)


if __name__ == "__main__":
    main()
