"""Opening images: every decision of the table in `images`, and nothing but ImageError for what is no image."""

import io
import os
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from phi3v.data.images import image_size, look_at, open_image, resolve_path
from phi3v.data.schema import ImageRef
from phi3v.errors import ImageError

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")  # what PIL says about damaged tags


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    """The file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture() -> Image.Image:
    """Nothing about it is symmetric: 6 x 4 pixels, all different."""
    return Image.fromarray(np.arange(72, dtype=np.uint8).reshape(4, 6, 3) * 3)


def pixels(image: Image.Image) -> list:
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_give_the_pixels(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    assert pixels(open_image(encoded(picture(), kind, **options))) == pixels(picture())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("digest", [False, True])
def test_a_look_at_a_file_tells_it_from_one_that_was_touched_up(kind: str, digest: bool) -> None:
    """Of 200x200 pixels of noise a small square in the middle, far from both ends of the file, is inverted."""
    values = np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)
    other = values.copy()
    other[90:110, 90:110] ^= 255
    options = {"quality": 75} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    files = [encoded(Image.fromarray(pixels), kind, **options) for pixels in (values, values.copy(), other)]
    looks = [look_at(ImageRef(data=file), digest=digest) for file in files]
    assert looks[0] == looks[1]
    assert looks[0].fingerprint != looks[2].fingerprint
    assert [bool(look.digest) for look in looks] == [digest] * 3


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "PCX", "JPEG2000"])
def test_other_formats_are_refused_whatever_their_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(picture(), kind))
    with pytest.raises(ImageError, match=r"photo\.png is not a readable JPEG, PNG"):
        open_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_out_upright(kind: str, orientation: int) -> None:
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    upright = np.zeros((16, 24, 3), dtype=np.uint8)
    upright[:8, :8], upright[8:, :8] = (250, 0, 0), (0, 250, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict = (
        {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    )
    data = encoded(Image.fromarray(np.ascontiguousarray(turned(upright))), kind, exif=exif, **options)
    found = np.asarray(open_image(data)).astype(int)
    assert found.shape == upright.shape and np.abs(found - upright).max() < 12
    assert image_size(data) == (24, 16)


def test_a_damaged_exif_block_means_upright() -> None:
    good = encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert open_image(good).size == (6, 4)


def test_alpha_is_composited_over_white() -> None:
    image = Image.new("RGBA", (3, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (200, 0, 0, 0))
    image.putpixel((2, 0), (200, 0, 0, 51))
    assert pixels(open_image(encoded(image))) == [[[200, 0, 0], [255, 255, 255], [244, 204, 204]]]
    grey = Image.new("LA", (1, 1), (100, 0))
    assert pixels(open_image(encoded(grey))) == [[[255, 255, 255]]]


def test_palette_grey_and_bits_become_rgb() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert pixels(open_image(encoded(palette))) == [[[10, 20, 30], [40, 50, 60]]]
    assert pixels(open_image(encoded(palette, transparency=1))) == [[[10, 20, 30], [255, 255, 255]]]
    assert pixels(open_image(encoded(Image.new("L", (1, 1), 77)))) == [[[77, 77, 77]]]
    assert pixels(open_image(encoded(Image.new("L", (1, 1), 77), transparency=77))) == [[[255, 255, 255]]]
    assert pixels(open_image(encoded(Image.new("1", (1, 1), 1)))) == [[[255, 255, 255]]]


def test_a_transparent_colour_of_few_or_many_bits() -> None:
    """PIL writes no such PNGs: depth, colour type, the line of pixels, the transparent colour."""

    def grey(depth: int, colour_type: int, line: bytes, transparent: bytes, width: int) -> list[int]:
        header = struct.pack(">IIBBBBB", width, 1, depth, colour_type, 0, 0, 0)
        chunks = [b"IHDR" + header, b"tRNS" + transparent, b"IDAT" + zlib.compress(b"\0" + line), b"IEND"]
        body = [struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in chunks]
        return [pixel[0] for pixel in pixels(open_image(b"\x89PNG\r\n\x1a\n" + b"".join(body)))[0]]

    assert grey(2, 0, b"\x1b", b"\0\1", 4) == [0, 255, 170, 255]
    assert grey(4, 0, b"\x3f\x40", b"\0\3", 3) == [255, 255, 68]
    wide = bytes.fromhex("0102 0000 0000  0105 0000 0000  0909 0000 0000")  # the first is the one, the second near it
    assert grey(16, 2, wide, wide[:6], 3) == [1, 1, 9]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(kind: str) -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    found = pixels(open_image(encoded(Image.fromarray(values), kind)))
    assert [triple[0] for triple in found[0]] == [0, 0, 1, 1, 128, 255]


def test_floats_are_refused_and_cmyk_is_converted() -> None:
    with pytest.raises(ImageError, match="floats"):
        open_image(encoded(Image.new("F", (2, 2), 0.5), "TIFF"))
    red = pixels(open_image(encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF")))
    assert red == [[[255, 0, 0]]]


def test_only_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert pixels(open_image(data))[0][0] == [255, 0, 0]


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    data = encoded(Image.new("1", (6000, 4000)))  # 24 million
    began = time.perf_counter()
    with pytest.raises(ImageError, match="6000x4000 pixels, more than the limit of 20000000.*image.max_pixels"):
        open_image(data)
    with pytest.raises(ImageError, match="6000x4000"):
        image_size(data)
    assert time.perf_counter() - began < 0.1
    small = encoded(Image.new("L", (1, 1)))
    header = b"IHDR" + struct.pack(">II", 30_000, 30_000) + small[24:29]
    vast = small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]
    with pytest.raises(ImageError, match="it has more pixels than the limit of 20000000; replace it"):
        image_size(vast)  # beyond Pillow's own limit, whose words are not told
    assert image_size(data, max_pixels=24_000_000) == (6000, 4000)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_cut_files_are_refused(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    for share in (0.0, 0.1, 0.5, 0.9):
        with pytest.raises(ImageError) as caught:
            open_image(ImageRef("photos/a.jpg", data=data[: int(len(data) * share)]))
        assert "photos/a.jpg" in str(caught.value) and "\n" not in str(caught.value)


def test_random_bytes_never_raise_anything_else() -> None:
    dice = np.random.default_rng(1)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        data = bytearray(encoded(picture(), kind))
        for _ in range(60):
            broken = bytearray(data)
            for place in dice.integers(0, len(data), 4):
                broken[place] = dice.integers(0, 256)
            try:
                assert open_image(bytes(broken), max_pixels=10_000).mode == "RGB"
            except ImageError as error:
                assert "\n" not in str(error)


def test_confined_paths_stay_below_their_root(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "photos2").mkdir()
    for place in (root / "sub" / "a.png", tmp_path / "secret.png", tmp_path / "photos2" / "b.png"):
        place.write_bytes(encoded(picture()))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "inner.png").symlink_to(root / "sub" / "a.png")
    for path in ("sub/a.png", "sub/../sub/a.png", "inner.png", str(root / "sub" / "a.png")):
        assert resolve_path(ImageRef(path, root=str(root), confined=True)) == (root / "sub" / "a.png").resolve()
    for path in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "../photos2/b.png", "sub/../../secret.png"):
        with pytest.raises(ImageError, match="lies outside .*data.allow_outside_root: true"):
            open_image(ImageRef(path, root=str(root), confined=True))
        assert open_image(ImageRef(path, root=str(root))).size == (6, 4)


def test_what_is_no_file_is_refused_without_being_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path, reason in [
        ("pipe.png", "is no regular file"),
        (".", "is no regular file"),
        ("gone.png", "does not exist"),
        ("http:/host/a.png", "is a web address, which is not fetched here: download it"),
        ("nul\0.png", "cannot be reached"),
        ("x" * 5000, "cannot be reached"),
    ]:
        with pytest.raises(ImageError, match=reason) as caught:
            open_image(ImageRef(path, root=str(tmp_path), confined=True))
        assert len(str(caught.value)) < 600


def test_the_image_holds_no_open_file(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture()))
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    images = [open_image(path) for _ in range(5)]
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
    path.unlink()
    assert all(image.copy().size == (6, 4) for image in images)
