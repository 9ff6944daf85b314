"""What a set calls a picture is not opened by `datasets`, at any depth and in any column, however the set is opened."""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from product_sets import png

from phi3v.data.columns import RowOptions
from phi3v.data.images import open_image
from phi3v.data.opening import narrowed, open_set
from phi3v.data.sources import Reading, load_data, load_rows, stream_data
from phi3v.data.undecoded import undecoded_feature
from phi3v.errors import DataError

OPTIONS = RowOptions(images=None, prompt="?", answer="{title}")
LOOSE = Reading(max_skipped=1.0)


pytestmark = pytest.mark.usefixtures("datasets_cache")


def write(path: Path, features: datasets.Features, rows: list[dict[str, Any]]) -> str:
    """A Parquet file that carries these types."""
    pq.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), path)
    return str(path)


HOSTILE = ("fifo", "secret", "junk", "address")


def cell_of(kind: str, folder: Path) -> dict[str, Any]:
    """A cell that hangs, reads a file elsewhere, fails or asks a host, if anybody decodes it."""
    if kind == "fifo":
        os.mkfifo(folder / "fifo.png")
    if kind == "junk":
        return {"bytes": b"junk", "path": None}
    paths = {"fifo": str(folder / "fifo.png"), "secret": "/etc/hostname", "address": "ftp://127.0.0.1:9/x.png"}
    return {"bytes": None, "path": paths[kind]}


@pytest.mark.timeout(40)
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_column_nobody_named_is_not_opened(kind: str, tmp_path: Path) -> None:
    features = datasets.Features(
        {"title": datasets.Value("string"), "other": {"x": datasets.LargeList(datasets.Image())}}
    )
    records = [{"title": f"t{n}", "other": {"x": [cell_of(kind, tmp_path) if n == 1 else None]}} for n in range(3)]
    source = write(tmp_path / "a.parquet", features, records)
    bare = datasets.Dataset(pq.read_table(source).replace_schema_metadata())
    bare.save_to_disk(tmp_path / "saved")  # a table of images would be opened while it is saved
    info = tmp_path / "saved" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"features": features.to_dict()}))
    for place in (source, str(tmp_path / "saved")):
        rows, problems = load_rows(place, options=OPTIONS)
        assert ([row.answer for row in rows], problems) == (["t0", "t1", "t2"], [])
        opened = open_set(place)["train"].table
        assert opened[1] == records[1] and list(opened) == records
    assert list(open_set(source, streaming=True)["train"].table) == records
    stream = stream_data(source, options=OPTIONS, validation_split=None).train
    found = stream.rows(lambda problem: None, shuffled=False)
    assert [next(found).answer for _ in range(3)] == ["t0", "t1", "t2"]


@pytest.mark.timeout(40)
@pytest.mark.parametrize("kind", HOSTILE)
def test_an_image_part_of_a_conversation_takes_our_way(kind: str, tmp_path: Path) -> None:
    part = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    turn = {"role": datasets.Value("string"), "content": datasets.List(part)}
    (tmp_path / "a.png").write_bytes(png(0))

    def record(cell: dict[str, Any]) -> dict[str, Any]:
        asked = [{"type": "image", "text": None, "image": cell}, {"type": "text", "text": "What?", "image": None}]
        said = [{"type": "text", "text": "A hat.", "image": None}]
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}

    good = [record({"bytes": png(0), "path": None}), record({"bytes": None, "path": "a.png"})]
    features = datasets.Features({"messages": datasets.List(turn)})
    source = write(tmp_path / "a.parquet", features, [*good, record(cell_of(kind, tmp_path))])
    data = load_data(source, options=RowOptions(), validation_split=None, reading=LOOSE)
    assert [open_image(image).size for row in data.train for image in row.images] == [(8, 6), (8, 6)]
    codes = {"fifo": "image_path", "secret": "image_path", "junk": "image_unreadable", "address": "url_scheme"}
    assert [(problem.row, problem.reason_code) for problem in data.problems] == [(2, codes[kind])]


def test_every_type_that_opens_files_is_turned_off_or_refused() -> None:
    kinds = datasets.features.features._FEATURE_TYPES.values()
    opening = [kind for kind in kinds if hasattr(kind, "decode_example")]
    assert {datasets.Image, datasets.Audio, datasets.Video, datasets.Json} <= set(opening)
    for kind in opening:
        plain = undecoded_feature({"a": [kind()], "b": datasets.List({"c": kind()}, length=2)}, "x")
        assert plain == {"a": [kind(decode=False)], "b": datasets.List({"c": kind(decode=False)}, length=2)}
    assert undecoded_feature(datasets.Value("string"), "x") == datasets.Value("string")

    class Reads:
        def decode_example(self, value: Any) -> Any:
            return open(value)

    with pytest.raises(DataError, match="column 'x' is of the type Reads, which reads files on its own: save the set"):
        undecoded_feature({"a": datasets.LargeList(Reads())}, "x")


@pytest.mark.parametrize("streaming", [False, True])
def test_tables_of_the_hub_are_opened_no_further_either(streaming: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features({"other": {"x": datasets.Image()}})
    record = {"other": {"x": {"bytes": b"junk", "path": "/etc/hostname"}}}
    table = datasets.Dataset(pa.Table.from_pylist([record], schema=features.arrow_schema))
    answer = table.to_iterable_dataset() if streaming else table
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: {"train": answer})
    assert list(open_set("owner/name", streaming=streaming)["train"].table) == [record]


JSON_CELLS = [
    '["a", {"b": 12345678901234567890}]',
    '"007"',
    "null",
    None,
    "2",
    '"2024-05-01"',
    "{broken",
    "[" * 100_000,
]
PARSED = [["a", {"b": 12345678901234567890}], "007", None, None, 2, "2024-05-01", None, None]


def json_table() -> datasets.Dataset:
    """Columns of the type Json, one of them two levels down; `datasets` looks at the first five texts and no more."""
    cells = pa.ExtensionArray.from_storage(pa.json_(), pa.array(JSON_CELLS))
    nested = pa.StructArray.from_arrays([pa.ListArray.from_arrays(range(len(cells) + 1), cells)], ["x"])
    features = datasets.Features({"title": datasets.Json(), "other": {"x": datasets.List(datasets.Json())}})
    return datasets.Dataset(pa.table({"title": cells, "other": nested}).cast(features.arrow_schema))


@pytest.mark.parametrize("way", ["parquet", "saved", "hub", "stream", "hub stream"])
def test_json_is_parsed_cell_by_cell_and_a_bad_text_is_an_empty_cell(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = json_table()
    with pytest.raises(ValueError):
        list(table)  # what `datasets` makes of it by itself
    source = "owner/name"
    if way in ("parquet", "stream"):
        source = str(tmp_path / "a.parquet")
        pq.write_table(table.data.table, source)
    elif way == "saved":
        source = str(tmp_path / "saved")
        table.save_to_disk(source)
    else:
        answer = table.to_iterable_dataset() if "stream" in way else table
        monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: {"train": answer})
    opened = open_set(source, streaming="stream" in way)["train"].table
    assert list(opened) == [{"title": cell, "other": {"x": [cell]}} for cell in PARSED]
    assert list(narrowed(opened, ["title"])) == [{"title": cell} for cell in PARSED]
    if "stream" not in way:
        assert opened[4] == {"title": 2, "other": {"x": [2]}} and len(opened) == len(PARSED)
        data = load_data(source, options=OPTIONS, validation_split=None, reading=LOOSE)
        assert [row.answer for row in data.train] == ["007", "2", "2024-05-01"]
        codes = {0: "value_type"} | dict.fromkeys((2, 3, 6, 7), "missing_value")
        assert {problem.row: problem.reason_code for problem in data.problems} == codes
