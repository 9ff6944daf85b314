"""Images behind web addresses and in cells: downloaded once, every row is a row or a problem with its reason."""

import base64
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from image_server import image_server, picture

from phi3v.data.columns import RowOptions
from phi3v.data.images import open_image
from phi3v.data.schema import ImageRef
from phi3v.data.sources import Reading, load_data, load_rows
from phi3v.errors import DataError

OPTIONS = RowOptions(prompt="What is it?", answer="{title}")
URI = "data:image/png;base64," + base64.b64encode(picture(1)).decode()


pytestmark = pytest.mark.usefixtures("datasets_cache")


def reading(folder: Path, **more: Any) -> Reading:
    return Reading.of(image_cache=str(folder / "cache"), allow_hosts=["127.0.0.1"], **more)


def jsonl(folder: Path, images: list[Any]) -> str:
    rows = [{"image": image, "title": f"Scarf {number}"} for number, image in enumerate(images)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def test_addresses_are_downloaded_once(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with image_server() as server:
        urls = [server.url(f"/good/{number}.png") for number in (1, 2, 1)]
        source = jsonl(tmp_path, urls)
        for _ in range(2):
            how = reading(tmp_path, on_fetch=lambda done, total: told.append((done, total)))
            data = load_data(source, options=OPTIONS, validation_split=None, reading=how)
            assert (data.problems, data.not_cached, data.rows_in) == ([], [], 3)
        assert [server.count(f"/good/{number}.png") for number in (1, 2)] == [1, 1]
    assert told == [(0, 2), (1, 2), (2, 2)]
    folder = str(tmp_path / "cache")
    for row, url, number in zip(data.train, urls, (1, 2, 1), strict=True):
        image = row.images[0]
        assert image == ImageRef(image.path, None, folder, True, url)
        assert Path(image.path or "").read_bytes() == picture(number)
        assert open_image(image).size == (16, 12)


def test_without_downloading_the_missing_addresses_are_listed(tmp_path: Path) -> None:
    with image_server() as server:
        urls = [server.url(path) for path in ("/good/1.png", "/404/2.png", "/good/3.png")]
        source = jsonl(tmp_path, urls)
        untouched = load_data(source, options=OPTIONS, validation_split=None, reading=reading(tmp_path, download=False))
        assert server.connections == 0
        assert (untouched.not_cached, untouched.problems, len(untouched.train)) == (urls, [], 3)
        assert untouched.train[0].images == (ImageRef(None, None, str(tmp_path / "cache"), True, urls[0]),)
        fetched = load_data(source, options=OPTIONS, validation_split=1, reading=reading(tmp_path, max_skipped=0.5))
        assert [(problem.row, problem.reason_code) for problem in fetched.problems] == [(1, "url_not_found")]
    known = load_data(
        source, options=OPTIONS, validation_split=1, reading=reading(tmp_path, download=False, max_skipped=1.0)
    )
    assert (known.not_cached, [problem.row for problem in known.problems]) == ([], [1])


def test_rows_with_the_same_downloaded_image_stay_on_one_side(tmp_path: Path) -> None:
    with image_server() as server:
        source = jsonl(tmp_path, [server.url(f"/good/{number % 4}.png?{number}") for number in range(20)])
        for seed in range(3):
            sides = []
            for download in (True, False):  # the side does not depend on when it was downloaded
                data = load_data(
                    source,
                    options=OPTIONS,
                    validation_split=0.3,
                    split_seed=seed,
                    reading=reading(tmp_path / str(seed), download=download),
                )
                assert data.validation is not None
                sides.append([row.index for row in data.validation])
            assert sides[0] == sides[1]
            assert not {row % 4 for row in sides[0]} & {row.index % 4 for row in data.train}


def test_rows_in_are_rows_out_and_rows_skipped(tmp_path: Path) -> None:
    """2,000 rows, 25 % failing downloads, 2 % files that break off: each one is named with its reason."""
    broken = picture(0, "JPEG", (64, 48))
    (tmp_path / "broken.jpg").write_bytes(broken[: len(broken) // 2])
    kinds = ["/404", "/html", "/empty", "/403"]
    codes = ["url_not_found", "url_html", "url_empty", "url_refused"]
    with image_server() as server:
        images, expected = [], {}
        for number in range(2000):
            if number % 4 == 1:
                images.append(server.url(f"{kinds[number % 16 // 4]}/{number}.png"))
                expected[number] = codes[number % 16 // 4]
            elif number % 50 == 0:
                images.append("broken.jpg")
                expected[number] = "image_unreadable"
            else:
                images.append(server.url(f"/good/{number % 40}.png"))
        data = load_data(
            jsonl(tmp_path, images), options=OPTIONS, validation_split=0.1, reading=reading(tmp_path, max_skipped=0.3)
        )
    assert Counter(expected.values())["image_unreadable"] == 40 and len(expected) == 540
    assert {problem.row: problem.reason_code for problem in data.problems} == expected
    assert len(data.problems) == len(expected)
    assert data.validation is not None
    used = sorted(row.index for side in (data.train, data.validation) for row in side)
    assert used == [number for number in range(2000) if number not in expected]
    assert data.rows_in == 2000 == len(data.train) + len(data.validation) + len(data.problems)


def test_more_problems_than_the_recipe_allows_stop(tmp_path: Path) -> None:
    images = ["a.png"] * 9 + ["gone.png"]
    (tmp_path / "a.png").write_bytes(picture(1))
    source = jsonl(tmp_path, images)
    assert len(load_rows(source, options=OPTIONS, reading=Reading(max_skipped=0.1))[0]) == 9
    with pytest.raises(DataError, match=r"1 of 10 rows .*; at most 9% may be left out \(data.max_skipped\)"):
        load_rows(source, options=OPTIONS, reading=Reading(max_skipped=0.09))
    with pytest.raises(DataError, match=r"1 of 10 rows .* row 9: .*; data.on_problem is stop: mend them, or set it to"):
        load_rows(source, options=OPTIONS, reading=Reading(max_skipped=1.0, on_problem="stop"))


CELLS: dict[str, tuple[Any, str | None]] = {
    "a data URI": (URI, None),
    "a data URI in capitals, with spaces": ("DATA:image/png;charset=x;BASE64," + URI[22:40] + " \n" + URI[40:], None),
    "a list of frames": ([URI, "a.png"], None),
    "no base64": ("data:image/png;base64,@@@@", "data_uri"),
    "cut off": ("data:image/png;base64,abc", "data_uri"),
    "not marked as base64": ("data:image/svg+xml,<svg/>", "data_uri"),
    "too long": ("data:image/png;base64," + "A" * 27_000_000, "data_uri"),
    "no image inside": ("data:image/png;base64,AAAA", "image_unreadable"),
    "a file address": ("file:///etc/hostname", "url_scheme"),
    "a hub address": ("hf://datasets/a/b/c.png", "url_scheme"),
    "a private host": ("http://10.0.0.1/a.png", "url_private"),
    "the metadata service": ("http://169.254.169.254/latest", "url_private"),
    "no address": ("http://", "url_invalid"),
    "a user and a password": ("http://ann:s3cret@shop.example/a.png", "url_invalid"),
    "a short address": ("http://127.1/a.png", "url_invalid"),
    "no host": ("http:///a.png", "url_invalid"),
    "a host with a space": ("http://exa mple.com/a.png", "url_invalid"),
    "a private host of IPv6": ("http://[::1]/a.png", "url_private"),
    "a link out": ("link.png", "image_path"),
    "a sibling with the same beginning": ("../set-b/a.png", "image_path"),
    "a pipe": ("pipe", "image_path"),
    "a device": ("/dev/zero", "image_path"),
    "a folder": (".", "image_path"),
    "a zero byte": ("a\0.png", "image_path"),
    "a frame that is missing": (["a.png", None], "image_missing"),
    "base64 as bytes": ({"bytes": URI[22:], "path": "a.png"}, "image_type"),
    "base64 alone": (URI[22:], "image_type"),
    "base64 cut off, with lines": (URI[22:90] + "\n" + URI[90:101], "image_type"),
    "a data URI behind a blank": (" " + URI, None),
    "an address behind a blank": ("  http://10.0.0.1/a.png", "url_private"),
    "lists as text": ("['a.png', 'b.png']", "image_type"),
    "no image as text": ("[]", "image_type"),
    "another mapping": ({"url": "a.png"}, "image_type"),
    "a list in a list": ([["a.png"]], "image_type"),
}


@pytest.mark.parametrize("name", CELLS)
def test_what_a_cell_may_hold(name: str, tmp_path: Path) -> None:
    import os

    for folder in ("set", "set-b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(picture(1))
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "set-b" / "a.png")
    os.mkfifo(tmp_path / "set" / "pipe")
    cell, code = CELLS[name]
    how = Reading.of(image_cache=str(tmp_path / "cache"), max_skipped=1.0, download=False)
    data = load_data(jsonl(tmp_path / "set", [cell]), options=OPTIONS, validation_split=None, reading=how)
    assert [problem.reason_code for problem in data.problems] == ([] if code is None else [code])
    assert data.not_cached == [] and not any("s3cret" in problem.message for problem in data.problems)
    assert [open_image(image).size for row in data.train for image in row.images] == [(16, 12)] * (
        0 if code else 2 if isinstance(cell, list) else 1
    )
    conversation = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "images": cell,
    }
    (tmp_path / "set" / "chat.jsonl").write_text(json.dumps(conversation) + "\n")
    chat = load_data(str(tmp_path / "set" / "chat.jsonl"), options=RowOptions(), validation_split=None, reading=how)
    assert [problem.reason_code for problem in chat.problems] == ([] if code is None else [code])


def test_files_that_break_off_are_found_before_training(tmp_path: Path) -> None:
    """The end of a file tells that it may be cut off; then it is decoded, whatever its header says."""
    images = []
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        whole = picture(3, kind, (64, 48))
        for name, data in ((f"{kind}-whole", whole), (f"{kind}-cut", whole[: len(whole) * 2 // 3])):
            (tmp_path / name).write_bytes(data)
            images.append(name)
    trailing = picture(3, "JPEG", (64, 48)) + b"something behind it"
    (tmp_path / "trailing").write_bytes(trailing)
    data = load_data(
        jsonl(tmp_path, [*images, "trailing"]),
        options=OPTIONS,
        validation_split=None,
        reading=Reading(max_skipped=1.0),
    )
    assert {images[problem.row]: problem.reason_code for problem in data.problems} == {
        name: "image_unreadable" for name in images if name.endswith("-cut")
    }


def test_messages_leave_out_what_stands_behind_an_address(tmp_path: Path) -> None:
    """A signed address is a secret; and a problem is named by its address, not by its file in the cache."""
    with image_server() as server:
        urls = [server.url(f"/{kind}/1.png?signature=s3cret") for kind in ("good", "404")]
        source = jsonl(tmp_path, [*urls, "ftp://host/a.png?signature=s3cret"])
        options = RowOptions(prompt="?", answer="{title}", max_pixels=100)
        data = load_data(source, options=options, validation_split=None, reading=reading(tmp_path, max_skipped=1.0))
        known = reading(tmp_path, max_skipped=1.0, download=False)
        assert load_data(source, options=options, validation_split=None, reading=known).problems == data.problems
    codes = ["image_unreadable", "url_not_found", "url_scheme"]
    assert [problem.reason_code for problem in data.problems] == codes
    assert data.problems[0].message.startswith(f"image {server.url('/good/1.png')}?... has 16x12 pixels")
    assert not [problem for problem in data.problems if "s3cret" in problem.message]
