"""Rows of a recipe looked at before anything is trained: each once, however often weights repeat it."""

import io
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from tiny_tokenizer import build_tokenizer

from phi3v.cli_screen import rows_line
from phi3v.data.known_sizes import KnownSizes
from phi3v.data.lengths import row_lengths
from phi3v.data.mixing import SetUse
from phi3v.data.schema import Message, Row, TextPart
from phi3v.data.survey import SurveyOptions
from phi3v.first_look import RowUse, measured_rows, open_data, survey_rows
from phi3v.model.image_processing_phi3_v import Phi3VImageProcessor
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.recipe import Recipe


def row(index: int, text: str, source: str = "a.csv") -> Row:
    return Row((Message("user", (TextPart("?"),)), Message("assistant", (TextPart(text),))), (), {}, source, index)


def test_repeated_rows_are_looked_at_once_and_left_out_everywhere() -> None:
    good, bad = row(0, "yes"), Row((Message("user", (TextPart("?"),)),), (), {}, "a.csv", 1)
    told: list[tuple[str, int, int]] = []
    found = survey_rows(
        [good, bad, good, row(0, "yes", "b.csv"), bad],
        Phi3VProcessor(Phi3VImageProcessor(num_crops=1), build_tokenizer()),
        SurveyOptions(),
        on_progress=lambda *words: told.append(words),
    )
    assert found.kept == [0, 2, 3]
    assert [(fact.source, fact.row) for fact in found.facts] == [("a.csv", 0), ("b.csv", 0)]
    assert [(problem.row, problem.reason_code) for problem in found.problems] == [(1, "no_answer")]
    assert told[-1] == ("looking at the rows", 3, 3)


def photo(number: int, kind: str, turned: bool = False) -> bytes:
    """An image file whose content tells its number."""
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6 if turned else 1
    Image.new("RGB", (40 + number, 30), (number * 7, 0, 0)).save(buffer, kind, exif=exif)
    return buffer.getvalue()


def test_a_whole_look_opens_each_image_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Path, header, end, content and length: also of turned photos, of doubtful ends, and of a row with two images."""
    for number in range(12):
        (tmp_path / f"{number}.jpg").write_bytes(photo(number, "JPEG", turned=number % 2 == 1))
    (tmp_path / "doubtful.jpg").write_bytes(photo(20, "JPEG") + b"behind its end")
    (tmp_path / "a.tif").write_bytes(photo(21, "TIFF"))
    (tmp_path / "cut.jpg").write_bytes(photo(22, "JPEG")[:-200])
    names = [[f"{number}.jpg"] for number in range(11)] + [["11.jpg", "doubtful.jpg"], ["a.tif"], ["cut.jpg"]]
    lines = [json.dumps({"image": listed, "prompt": "What?", "answer": f"a{n}"}) for n, listed in enumerate(names)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    recipe = Recipe.from_dict(
        {"model": "no/model", "data": {"train": str(tmp_path / "rows.jsonl"), "max_skipped": 0.5}}
    )
    processor = Phi3VProcessor(Phi3VImageProcessor(num_crops=4), build_tokenizer())
    opened: Counter[str] = Counter()

    def counting(really: Any) -> Any:
        def count(path: Any, *rest: Any, **options: Any) -> Any:
            opened[Path(str(path)).name] += str(path).endswith(("jpg", "tif"))
            return really(path, *rest, **options)

        return count

    with monkeypatch.context() as counted:
        counted.setattr(os, "open", counting(os.open))
        counted.setattr(io, "open", counting(io.open))
        data = measured_rows(recipe, open_data(recipe), processor, 8192)
        rows = [*data.train, *(data.validation or ())]
        lengths = list(row_lengths(rows, processor))
    assert {name: count for name, count in opened.items() if count} == {name: 1 for row in names for name in row}
    assert [(problem.row, problem.reason_code) for problem in data.problems] == [(13, "image_unreadable")]
    assert data.origin == "split" and sorted(row.index for row in rows) == list(range(13))
    unseen = [replace(row, images=tuple(replace(image, size=None) for image in row.images)) for row in rows]
    assert unseen == rows and lengths == list(row_lengths(unseen, processor))


def test_sizes_are_kept_by_number_of_record() -> None:
    first, second = KnownSizes(), KnownSizes()
    first.add(0, [((40, 30), 17), ((8, 6), 4)])
    first.add(5, [((1, 2), 2**64 - 1)])
    second.add(3, [((70_000, 100_000), 0)])
    both = first.merged(second)
    assert [both.of(number) for number in range(7)] == [
        (((40, 30), 17), ((8, 6), 4)),
        (),
        (),
        (((70_000, 100_000), 0),),
        (),
        (((1, 2), 2**64 - 1),),
        (),
    ]
    with pytest.raises(AssertionError):
        both.add(5, [((1, 1), 0)])


def test_good_rows_that_no_epoch_has_are_told() -> None:
    """Sets of 9 and 3 rows, each with half of an epoch: three of the nine never come."""
    sets = [SetUse("a", rows=9, epoch=6, left_out=3), SetUse("b", rows=3, epoch=6, left_out=0)]
    rows = RowUse.of(SimpleNamespace(train=[0] * 12, validation=None, problems=[], sets=sets), 4)
    assert rows.not_drawn == 3
    assert rows_line(rows).startswith("12 rows to train on, 0 held out; 3 good rows in no epoch (weights")
