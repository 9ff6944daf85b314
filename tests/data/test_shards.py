"""Webdataset shards as img2dataset writes them, photo folders with metadata, hub sets with splits and token."""

import io
import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from image_server import picture

from phi3v.data import tar_table
from phi3v.data.columns import RowOptions
from phi3v.data.images import open_image
from phi3v.data.not_read import NotRead
from phi3v.data.sources import Reading, load_data, load_rows
from phi3v.errors import DataError

OPTIONS = RowOptions(prompt="What is it?", answer="{txt}")
LOOSE = Reading(max_skipped=1.0)


pytestmark = pytest.mark.usefixtures("datasets_cache")


def shard(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    """A tar file; a text as content makes a symbolic link to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def sample(key: str, number: int, **more: Any) -> list[tuple[str, bytes | str]]:
    """What img2dataset writes of one image."""
    told = {"url": f"https://shop.example/{number}.jpg", "width": 16, "caption": f"scarf {number}", **more}
    return [
        (f"{key}.jpg", picture(number, "JPEG")),
        (f"{key}.txt", f"scarf {number}".encode() + (b"", b"\n", b"\r\n")[number % 3]),
        (f"{key}.json", json.dumps(told).encode()),
    ]


@pytest.mark.parametrize("named", ["", "*.tar", "{00000..00001}.tar", "00000.tar"])
def test_shards_are_read_as_they_are(named: str, tmp_path: Path) -> None:
    for number in range(2):
        members = [member for n in range(3) for member in sample(f"{number:05d}{n:04d}", 3 * number + n)]
        shard(tmp_path / f"0000{number}.tar", members)
    (tmp_path / "00000_stats.json").write_text("{}")  # img2dataset leaves such files beside them
    options = RowOptions(prompt="Size {json.width}?", answer="{txt}: {json.url}")
    rows, problems = load_rows(str(tmp_path / named), options=options)
    places = [(str(tmp_path / f"0000{n // 3}.tar"), n % 3) for n in range(3 if named == "00000.tar" else 6)]
    assert problems == [] and [(row.source, row.index) for row in rows] == places
    for number, row in enumerate(rows):
        assert row.answer == f"scarf {number}: https://shop.example/{number}.jpg" and row.question == "Size 16?"
        assert row.images[0].data == picture(number, "JPEG")
        assert row.images[0].path == f"0000{number // 3}.tar/0000{number // 3}{number % 3:04d}.jpg"
        assert open_image(row.images[0]).size == (16, 12)
    assert not [path for path in tmp_path.rglob("*") if path.suffix not in (".tar", ".json")]


def test_members_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(picture(9, "JPEG"))
    members: list[tuple[str, bytes | str]] = [
        *sample("../../up", 1),
        *sample("/etc/abs", 2),
        ("link.jpg", "../secret.jpg"),
        ("link.txt", b"a link"),
        ("links.txt", "/etc/hostname"),
        ("links.jpg", picture(3, "JPEG")),
        (".hidden", b"x"),
        ("noending", b"x"),
    ]
    data = load_data(
        str(shard(tmp_path / "set" / "a.tar", members)), options=OPTIONS, validation_split=None, reading=LOOSE
    )
    assert [row.answer for row in data.train] == ["scarf 1", "scarf 2"]
    assert [row.images[0].data for row in data.train] == [picture(1, "JPEG"), picture(2, "JPEG")]
    assert [(problem.row, problem.reason_code) for problem in data.problems] == [
        (2, "image_missing"),
        (3, "missing_value"),
    ]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "secret.jpg", "set"]
    link = "a link, a device or a sparse file, which leads out of the shard or is not all there"
    ending = "its name has no ending, or nothing before it"
    assert {one.file.removeprefix(f"{tmp_path}/set/a.tar/"): one.reason for one in data.not_read} == {
        "link.jpg": link,
        "links.txt": link,
        ".hidden": ending,
        "noending": ending,
    }


def test_folders_of_shards_are_splits_and_images_are_told_by_content(tmp_path: Path) -> None:
    shard(tmp_path / "train" / "0.tar", [("a.jfif", picture(1, "JPEG")), ("a.txt", b"one"), *sample("b", 2)])
    shard(tmp_path / "val" / "0.tar", [*sample("c", 3), *[(f"more{n}", b"x") for n in range(25)]])
    data = load_data(str(tmp_path), options=OPTIONS)
    assert data.validation is not None and [row.answer for row in data.train] == ["one", "scarf 2"]
    assert [row.answer for row in data.validation] == ["scarf 3"] and data.origin == "validation"
    assert data.train[0].images[0].data == picture(1, "JPEG")
    assert sum(one.files for one in data.not_read) == 25 and data.not_read[0].file == f"{tmp_path}/val/0.tar/more0"
    assert data.not_read[-1] == NotRead(f"more members of {tmp_path}/val/0.tar", "as those that are named", files=5)


def test_samples_may_differ_and_members_that_do_not_read_are_named(tmp_path: Path) -> None:
    """A sample with other members, two images, broken JSON or broken text is a row or a problem of its own."""
    members = [
        *sample("a", 1, similarity=None),
        *[("b.0.png", picture(2)), ("b.1.png", picture(3)), ("b.txt", b"two"), ("b.json", b'{"width": 1}')],
        *[("c.jpg", picture(4, "JPEG")[:200]), ("c.txt", b"cut"), ("c.json", b'{"width": 1}')],
        *[("d.jpg", picture(5, "JPEG")), ("d.txt", b"\xff\xfe"), ("d.json", b'{"width": 1}')],
        *[("e.jpg", picture(6, "JPEG")), ("e.txt", b"no json"), ("e.json", b'{"width":\n}')],
        *sample("f", 7, similarity=0.5, width="wide"),
        *[*sample("g", 8), ("g.txt", b"again")],
        *[*sample("h", 9), ("h.jpg", picture(10, "JPEG"))],
        *[*sample("i", 11), ("i.json", b"{}")],
        *[("j.jpg", picture(6, "JPEG")), ("j.txt", b"a list"), ("j.json", b"[1]")],
        *sample("l", 12)[:2],
        ("l.json", b'{"width": 1, "width": 2}'),
        *[("k.jpg", picture(6, "JPEG")), ("k.txt", b"bytes"), ("k.json", b'{"width": "\xff"}')],
    ]
    source = str(shard(tmp_path / "a.tar", members))
    data = load_data(source, options=OPTIONS, validation_split=None, reading=LOOSE)
    assert [(row.answer, len(row.images)) for row in data.train[:4]] == [
        ("scarf 1", 1),
        ("two", 2),
        ("no json", 1),
        ("scarf 7", 1),
    ]
    twice = "which its shard holds twice"
    assert [(one.row, one.reason_code) for one in data.problems[:1]] == [(2, "image_unreadable")]
    assert [(one.row, one.reason_code, one.message) for one in data.problems[1:]] == [
        (3, "value_type", "column 'txt' is in d.txt, which is not UTF-8 text"),
        (6, "value_type", f"column 'txt' is in g.txt, {twice}"),
        (7, "value_type", f"image 1 of column 'image' is in h.jpg, {twice}"),
    ]
    options = RowOptions(prompt="Size {json.width}?", answer="a {json.width}")
    data = load_data(source, options=options, validation_split=None, reading=LOOSE)
    assert [(one.row, one.message) for one in data.problems if one.reason_code == "value_type"] == [
        (4, "column 'json.width' is in e.json, which is not JSON (Expecting value, line 2, column 1)"),
        (7, f"image 1 of column 'image' is in h.jpg, {twice}"),
        (8, f"column 'json.width' is in i.json, {twice}"),
        (9, "column 'json.width' is in j.json, which holds no mapping"),
        (10, "column 'json.width' is in l.json, in which an object names the key 'width' twice"),
        (11, "column 'json.width' is in k.json, which is not UTF-8 text"),
    ]


def test_members_apart_and_columns_of_later_rows_are_told_with_the_way_out(tmp_path: Path) -> None:
    """Photos first and texts behind them, as `tar cf a.tar *.jpg *.txt` packs; a sample that is there twice is good."""
    a, b, c = (sample(key, number)[:2] for number, key in enumerate("abc"))
    shard(tmp_path / "x.tar", [*a, b[0], c[0], b[1], c[1], *a])
    shard(tmp_path / "y.tar", b)  # the same name, and nothing wrong with it
    data = load_data(str(tmp_path / "*.tar"), options=OPTIONS, validation_split=None, reading=LOOSE)
    assert [(Path(row.source).name, row.index, row.answer) for row in data.train] == [
        ("x.tar", 0, "scarf 0"),
        ("x.tar", 5, "scarf 0"),
        ("y.tar", 0, "scarf 1"),
    ]
    way = "pack it again with the members of a row side by side (tar --sort=name)"
    way = f"members of 'b' have others between them: {way}"
    assert [(one.row, one.reason_code) for one in data.problems] == [(row, "value_type") for row in (1, 2, 3, 4)]
    assert data.problems[0].message == f"column 'txt' is in another place of the shard: {way}"
    assert data.problems[2].message == f"column 'image' is in another place of the shard: {way}"
    many = [(f"{n:03}.jpg", picture(1, "JPEG")) for n in range(101)]
    for last, hint in (
        (("000.txt", b"one"), "members of '000' have others between them: pack it again with the members"),
        (("100.txt", b"one"), "columns of shards are those of their first 100 rows: put a row that has it among them"),
    ):
        shard(tmp_path / "many.tar", [*many, last])
        with pytest.raises(DataError, match=r"the column 'txt', which .*many.tar does not have") as caught:
            load_rows(str(tmp_path / "many.tar"), options=OPTIONS)
        assert hint in str(caught.value)


def test_members_with_the_names_of_made_columns_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_table, "_MAX_MEMBER_BYTES", 1000)
    members: list[tuple[str, bytes | str]] = [
        *[*sample("a", 1), ("a.image", b"text"), ("a.__key__", b"text")],
        *[("b.image", picture(2, "JPEG")), ("b.txt", b"two"), ("b.json", b'{"width": 5}'), ("b.json.width", b"6")],
        *[("c.image", b"text"), ("c.txt", b"three"), ("c.json.width", b"7")],
        *[*sample("d", 4)[::2], ("d.txt", b"x" * 1001)],
    ]
    source = str(shard(tmp_path / "a.tar", members))
    data = load_data(source, options=OPTIONS, validation_split=None, reading=LOOSE)
    assert [(row.answer, row.images[0].path) for row in data.train] == [
        ("scarf 1", "a.tar/a.jpg"),
        ("two", "a.tar/b.image"),
    ]
    assert [one.message for one in data.problems] == [
        "column 'image' is empty",
        "column 'txt' is in d.txt, which has 1001 bytes, and 1000 may be read",
    ]
    told = (
        "no image by its content, and its name is that of the column {!r}, which is made here: give it another ending"
    )
    assert data.not_read == [
        NotRead(f"{source}/*.image", told.format("image"), files=2),
        NotRead(f"{source}/*.__key__", told.format("__key__"), files=1),
    ]
    data = load_data(
        source,
        options=RowOptions(images=None, prompt="?", answer="{__key__} {json.width}"),
        validation_split=None,
        reading=LOOSE,
    )
    assert [row.answer for row in data.train] == ["a 16", "c 7", "d 16"]
    assert [one.message for one in data.problems] == [
        "column 'json.width' is in b.json and in b.json.width: rename one of them"
    ]


def test_conversations_in_json_members(tmp_path: Path) -> None:
    spoken = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A hat."}]
    path = shard(tmp_path / "a.tar", [*sample("a", 1, conversations=spoken), ("b.json", b"{"), *sample("c", 1)])
    rows, problems = load_rows(str(path), options=RowOptions(), reading=LOOSE)
    assert [(one.row, one.reason_code) for one in problems] == [(1, "value_type"), (2, "missing_value")]
    row = rows[0]
    assert (row.question, row.answer, row.images[0].data) == ("What?", "A hat.", picture(1, "JPEG"))


def long_name() -> bytes:
    """A GNU header that says the next member's name."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2
    return info.tobuf(format=tarfile.GNU_FORMAT) + b"x\0".ljust(512, b"\0")


def sized(size: int, kind: bytes = tarfile.REGTYPE, pax: str | None = None) -> bytes:
    """The header of a member b.png that says any size, in its own field or in a pax header."""
    info = tarfile.TarInfo("b.png")
    info.type, info.size = kind, size
    if pax is not None:
        info.size, info.pax_headers = 0, {"size": pax}
        return info.tobuf(format=tarfile.PAX_FORMAT)
    return info.tobuf(format=tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "header",
    [
        sized(2**62),
        sized(2**70),
        sized(2**33),
        sized(-512),
        sized(-2000),
        sized(2**40, tarfile.GNUTYPE_LONGNAME),
        sized(2**40, tarfile.XHDTYPE),
        sized(-512, tarfile.XHDTYPE),
        sized(2**50, b"V"),
        sized(0, pax=str(2**62)),
        sized(0, pax="-512"),
    ],
)
def test_sizes_that_no_shard_holds_are_one_line_that_names_the_member(header: bytes, tmp_path: Path) -> None:
    path = shard(tmp_path / "00000.tar", [*sample("a", 1), *sample("c", 2)])
    whole = path.read_bytes()
    at = whole.index(b"c.jpg")
    path.write_bytes(whole[:at] + header + whole[at:])
    line = (
        r"^shard .*00000.tar is damaged after a \(the header of its member 'b.png' says -?\d+ bytes, and \d+ follow\): "
    )
    with pytest.raises(DataError, match=f"{line}copy it again$"):
        load_rows(str(path), options=OPTIONS)


@pytest.mark.parametrize(
    "change",
    ["cut in a member", "cut in a header", "cut between", "noise in a header", "empty", "text", "names"],
)
def test_damaged_shards_are_one_line(change: str, tmp_path: Path) -> None:
    path = shard(tmp_path / "00000.tar", [*sample("a", 1), *sample("b", 2)])
    whole = path.read_bytes()
    header = whole.index(b"b.txt")
    changed = {
        "cut in a member": whole[: header - 400],
        "cut in a header": whole[: header + 100],
        "cut between": whole[:header],
        "noise in a header": whole[:header] + bytes(range(1, 101)) * 5 + whole[header + 500 :],
        "empty": b"",
        "text": b"image,title\n" * 200,
        "names": long_name() * 3000 + whole,
    }
    path.write_bytes(changed[change])
    with pytest.raises(DataError, match=r"^shard .*00000.tar is damaged.*: copy it again$") as caught:
        load_rows(str(tmp_path), options=OPTIONS)
    place = {"cut in a member": "after a (the header of its member 'b.jpg' says ", "names": "", "empty": "", "text": ""}
    assert place.get(change, "after b ") in str(caught.value) and ("after" in str(caught.value)) == bool(
        place.get(change, "b")
    )
    assert "\n" not in str(caught.value)


def test_rows_behind_the_end_of_a_shard_are_not_left_out_without_a_word(tmp_path: Path) -> None:
    first, second = (shard(tmp_path / name, sample(name[0], 1)) for name in ("a.tar", "b.tar"))
    for end in (bytes(512), bytes(2**21)):  # some writers end with one block, some fill up
        last = first.read_bytes().rstrip(b"\0")
        (tmp_path / "ended.tar").write_bytes(last + bytes(-len(last) % 512) + end)
        assert len(load_rows(str(tmp_path / "ended.tar"), options=OPTIONS)[0]) == 1
    (tmp_path / "both.tar").write_bytes(first.read_bytes() + second.read_bytes())
    line = (
        r"^shard .*both.tar goes on behind its end at byte \d+, as joined shards do: keep shards as files of their own"
    )
    with pytest.raises(DataError, match=line):
        load_rows(str(tmp_path / "both.tar"), options=OPTIONS)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_photo_folder_names_its_bad_rows(kind: str, tmp_path: Path) -> None:
    """One bad row of a photo folder's metadata is a problem of its own, and its cells are the text of the file."""
    (tmp_path / "out.png").write_bytes(picture(9))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture(1))
    names = ["a.png", "gone.png", "../out.png", str(tmp_path / "out.png"), "file:///etc/hostname", "a.png"]
    if kind == "csv":
        lines = ["file_name,txt", *(f"{name},007" for name in names)]
        (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    else:
        lines = [json.dumps({"file_name": name, "txt": "007"}) for name in names]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    data = load_data(str(folder), options=OPTIONS, validation_split=None, reading=LOOSE)
    assert [(row.index, row.answer, row.images[0].path) for row in data.train] == [
        (0, "007", "a.png"),
        (5, "007", "a.png"),
    ]
    codes = ["image_path", "image_path", "image_path", "url_scheme"]
    assert [(problem.row, problem.reason_code) for problem in data.problems] == list(enumerate(codes, start=1))


def test_a_photo_folder_may_list_several_photos_or_conversations(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(picture(ord(name)))
    spoken = [{"from": "human", "value": "<image><image>Which?"}, {"from": "gpt", "value": "Both."}]
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_names": ["a.png", "b.png"], "conversations": spoken}))
    row = load_rows(str(tmp_path), options=RowOptions())[0][0]
    assert [image.path for image in row.images] == ["a.png", "b.png"] and row.question == "Which?"
    (tmp_path / "metadata.csv").write_text("file_name\na.png\n")
    with pytest.raises(DataError, match=r"has metadata.csv and metadata.jsonl: keep one of them"):
        load_rows(str(tmp_path), options=RowOptions())
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file,title\na.png,b\n")
    with pytest.raises(DataError, match=r"metadata.csv has no column file_name, which names the photo of a row"):
        load_rows(str(tmp_path), options=RowOptions())


def test_hub_sets_by_subset_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = datasets.DatasetDict(
        {name: datasets.Dataset.from_list([{"txt": name}]) for name in ("train_sft", "test_sft")}
    )
    asked: list[Any] = []

    def hub(path: str, **options: Any) -> datasets.DatasetDict:
        asked.append((path, options))
        return tables

    monkeypatch.setattr(datasets, "load_dataset", hub)
    options = RowOptions(images=None, prompt="?", answer="{txt}")
    data = load_data(
        [{"source": "owner/name:train_sft", "subset": "en", "revision": "abc"}],
        options=options,
        validation="owner/name:test_sft",
    )
    assert data.validation is not None
    assert [row.answer for row in data.train] == ["train_sft"] and data.validation[0].answer == "test_sft"
    assert asked[0] == ("owner/name", {"name": "en", "revision": "abc"})
    with pytest.raises(DataError, match="owner/name has no split tset; its splits are train_sft, test_sft"):
        load_rows("owner/name:tset", options=options)
    with pytest.raises(
        DataError, match="has the splits train_sft, test_sft and no train; name one: owner/name:train_sft"
    ):
        load_data("owner/name", options=options)


def test_the_users_token_is_in_no_error(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    token = "hf_" + "aB3" * 11
    monkeypatch.setenv("HF_TOKEN", token)

    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError(f"401 for https://user:{token}@huggingface.co, Authorization: Bearer {token}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with caplog.at_level(logging.DEBUG), pytest.raises(DataError, match=r"401 for .*Bearer") as caught:
        load_rows("someone/private", options=OPTIONS)
    chain, seen = caught.value, ""
    while chain is not None:
        seen += repr(chain)
        chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)
    assert token not in seen + caplog.text and "***" in seen
