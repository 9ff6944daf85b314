"""No image of a stranger stops a run: what odd, broken and costly files take, measured in processes of their own."""

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from odd_images import costly_images, encoded, odd_images
from PIL import Image

import phi3v
from phi3v.data.image_limits import check_size
from phi3v.data.images import image_size, open_image
from phi3v.data.schema import ImageRef
from phi3v.errors import ImageError

MEGABYTES, SECONDS = 64, 1.0
TESTS = Path(__file__).resolve().parents[1]


def measured(paths: list[Path]) -> dict[str, list]:
    """File name -> [verdict, width, height, seconds, megabytes]."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork to measure each file by itself")
    source = Path(phi3v.__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, str(TESTS / "measured_opening.py")],
        input="\n".join(map(str, paths)),
        capture_output=True,
        text=True,
        check=True,
        timeout=150,
        env={**os.environ, "PYTHONPATH": str(source)},
    )
    assert "Warning" not in done.stderr
    return {Path(path).name: rest for path, *rest in json.loads(done.stdout)}


def over(found: dict[str, list]) -> dict[str, list]:
    """The files that took too much."""
    return {name: rest for name, rest in found.items() if rest[3] > SECONDS or rest[4] > MEGABYTES}


def test_small_odd_images_are_opened(tmp_path: Path) -> None:
    files = odd_images()
    for name, (data, _) in files.items():
        (tmp_path / name).write_bytes(data)
    found = measured([tmp_path / name for name in files])
    wanted = {name: ["opened", *size] for name, (_, size) in files.items()}
    assert {name: rest[:3] for name, rest in found.items()} == wanted and over(found) == {}


def test_costly_files_cost_little(tmp_path: Path) -> None:
    """Some are small pictures with a large cellar, which open; none takes the time or memory that it asks for."""
    files = costly_images()
    for name, make in files.items():
        (tmp_path / name).write_bytes(make())
    found = measured([tmp_path / name for name in files])
    opened = {name for name, rest in found.items() if rest[0] == "opened"}
    tags = {"exif of 60,000 tags.png", "raw exif of 30,000 tags.png"}
    assert {rest[0] for rest in found.values()} == {"opened", "refused"} and over(found) == {}
    assert opened == {"40 texts of 1 MB.png", "texts behind.png", "strip of 50 MB.tif", *tags}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("1,000 scans.jpg", r"its pixels are spread over \d+ scans or more"),
        ("exif of 2 MB.jpg", "its EXIF block has more than 1000000 bytes"),
        ("profile of 12 MB.jpg", "it holds more than 8000000 bytes in front of its pixels"),
        ("segments.jpg", "so many pieces that reading them takes over 200000 steps"),
        ("exif of 60,000 tags.jpg", r"its tags name \d+ bytes, far more than the \d+ that hold them"),
        ("index of 5,000 tags.mpo", "its tags name 25000000 bytes, far more than the 65010 that hold them"),
        ("60,000 tags.tif", "its tags name 6000000000 bytes, far more than the 820010 that hold them"),
        ("150,000 strips.tif", "it is cut into 150000 strips or tiles, more than 100000"),
        ("tile of 16,384.tif", "its tiles have 16384x16384 pixels, more than the limit of 20000000"),
    ],
)
def test_the_reason_is_named(name: str, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        open_image(ImageRef(name, data=costly_images()[name]()))


def test_the_collection_of_odd_and_broken_files(shared: Path) -> None:
    """Each file that its manifest marks `decode` opens, every other one is refused, whatever its name says."""
    files = json.loads((shared / "badimages" / "manifest.json").read_text())["files"]
    found = measured([shared / "badimages" / "files" / file["name"] for file in files])
    wanted = {file["name"]: "opened" if file["expect"] == "decode" else "refused" for file in files}
    assert len(wanted) == 616 and {name: rest[0] for name, rest in found.items()} == wanted
    assert over(found) == {}


def test_the_name_of_a_refused_format_decides_nothing(shared: Path) -> None:
    files = json.loads((shared / "badimages" / "manifest.json").read_text())["files"]
    foreign = [file["name"] for file in files if not file["in_allow_list"]]
    for name in foreign:
        data = (shared / "badimages" / "files" / name).read_bytes()
        with pytest.raises(ImageError):
            open_image(ImageRef("photo.jpg", data=data))
    assert len(foreign) == 238


@pytest.mark.parametrize("kind", ["Landscape", "Portrait"])
def test_the_exif_examples_are_one_upright_picture(kind: str, shared: Path) -> None:
    """The examples are scans of their own, so they differ by what JPEG loses, not by a turn."""
    paths = sorted((shared / "badimages" / "files").glob(f"exif__{kind}_*.jpg"))
    pictures = [np.asarray(open_image(path).resize((90, 60) if kind == "Landscape" else (60, 90))) for path in paths]
    assert len(pictures) >= 3
    for picture in pictures[1:]:
        assert np.abs(picture.astype(int) - pictures[0]).mean() <= 2
        assert np.abs(picture[::-1, ::-1].astype(int) - pictures[0]).mean() > 20


def test_too_large_files_and_empty_ones_are_refused(tmp_path: Path) -> None:
    check_size(176_000_000, 20_000_000)
    with pytest.raises(ValueError, match="176000001 bytes are more than the 176000000 that image.max_pixels: 20000000"):
        check_size(176_000_001, 20_000_000)
    for empty in (ImageRef(data=b""), ImageRef(str(tmp_path / "empty.png"))):
        (tmp_path / "empty.png").touch()
        with pytest.raises(ImageError, match="does not decode: it is empty"):
            open_image(empty)
    sparse = tmp_path / "sparse.png"
    with sparse.open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(ImageError, match="8589934592 bytes are more than"):
        image_size(sparse)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_path_that_changes_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the opening the file becomes a pipe, then a link to a file outside: refused at once."""
    root = tmp_path / "photos"
    root.mkdir()
    photo, secret = root / "a.png", tmp_path / "secret.png"
    secret.write_bytes(encoded(Image.new("RGB", (2, 2)), "PNG"))
    really_open = os.open

    def opened_after(change: object) -> None:
        def swapped(path: object, flags: int, *rest: object) -> int:
            if Path(str(path)) == photo:
                photo.unlink(missing_ok=True)
                change()  # type: ignore[operator]
            return really_open(path, flags, *rest)  # type: ignore[arg-type]

        photo.unlink(missing_ok=True)
        photo.write_bytes(secret.read_bytes())
        monkeypatch.setattr(os, "open", swapped)

    ref = ImageRef("a.png", root=str(root), confined=True)
    opened_after(lambda: os.mkfifo(photo))
    answers: list[str] = []

    def attempt() -> None:
        with pytest.raises(ImageError) as caught:
            open_image(ref)
        answers.append(str(caught.value))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(5)
    assert answers == ["image a.png is no regular file"]
    opened_after(lambda: photo.symlink_to(secret))
    with pytest.raises(ImageError, match="lies outside"):
        open_image(ref)


@pytest.mark.parametrize("place", ["/dev/zero", "/dev/null", "/dev/tty", "/proc/self/environ", "/proc/version"])
def test_devices_and_kernel_files_are_refused(place: str) -> None:
    if not Path(place).exists():
        pytest.skip(f"there is no {place} here")
    name = os.path.relpath(place, "/tmp")
    for path in (place, name):
        with pytest.raises(ImageError, match="lies outside"):
            open_image(ImageRef(path, root="/tmp", confined=True))
    reason = "no regular file" if not stat.S_ISREG(os.stat(place).st_mode) else "does not decode: it is empty"
    with pytest.raises(ImageError, match=reason):
        open_image(ImageRef(place))


def test_links_that_go_round_and_names_too_long_are_refused(tmp_path: Path) -> None:
    (tmp_path / "round.png").symlink_to(tmp_path / "again.png")
    (tmp_path / "again.png").symlink_to(tmp_path / "round.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "photo.png").write_bytes(b"x")
    for name in ("round.png", "folder.png", "photo.png/a.png", "a" * 300, "a/" * 3000, "\ud800.png"):
        with pytest.raises(ImageError) as caught:
            open_image(ImageRef(name, root=str(tmp_path), confined=True))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
