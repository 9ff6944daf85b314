"""How fast image files become tensors, on one core: the plain way, phi3v's exact way, and `image.fast`.

`python benchmarks/preprocess.py --out preprocess` writes preprocess.json and preprocess.png and prints a table. The
images are generated, 1200x1600 JPEGs of smooth noise and grain as photos have, and read from files that the system has
in its cache. Seconds are the processor's, so other programs on the machine take little part; the ways take turns image
by image, so a machine that is slow for a while is slow for all. What counts is the ratio of medians. The floor of each
way is its JPEG decoder alone.

The plain way is what the model's original code does, step by step: Pillow decodes, portrait images are transposed,
resized, padded with white, transposed back, made floats, normalised; torch's bicubic makes the view of the whole; the
canvas is split into crops. It does not fill up with empty crops, which nobody needs.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

from results import to_write

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import PIL
import torch
from PIL import Image

from phi3v.data.images import open_image, open_pixels
from phi3v.model.image_processing_phi3_v import Phi3VImageProcessor

WIDTH, HEIGHT = 1200, 1600
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def draw_photo(seed: int) -> Image.Image:
    """Smooth noise at four scales, and grain: a JPEG of it is about as large as one of a photo (430 kB)."""
    dice = np.random.default_rng(seed)
    total = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for cells, strength in ((8, 60), (32, 40), (128, 20), (400, 8)):
        shape = (cells, max(2, cells * WIDTH // HEIGHT), 3)
        noise = Image.fromarray(dice.integers(0, 256, shape, dtype=np.uint8))
        total += (
            (np.asarray(noise.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32) - 128) / 128 * strength
        )
    total += dice.normal(0, 4, (HEIGHT, WIDTH, 1))
    return Image.fromarray((total + 128).clip(0, 255).astype(np.uint8))


def plain(path: Path, num_crops: int) -> torch.Tensor:
    """View of the whole and crops, [1 + crops, 3, 336, 336], as the original code makes them."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    transposed = width < height
    if transposed:
        image = image.transpose(Image.Transpose.TRANSPOSE)
        width, height = image.size
    ratio, scale = width / height, 1
    while scale * math.ceil(scale / ratio) <= num_crops:
        scale += 1
    scale -= 1
    new_width = scale * 336
    image = image.resize((new_width, int(new_width / ratio)), Image.Resampling.BILINEAR)
    rows = math.ceil(image.height / 336)
    canvas = Image.new("RGB", (new_width, rows * 336), (255, 255, 255))
    canvas.paste(image, (0, (rows * 336 - image.height) // 2))
    if transposed:
        canvas = canvas.transpose(Image.Transpose.TRANSPOSE)
    pixels = torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    pixels = (pixels - MEAN) / STD
    whole = torch.nn.functional.interpolate(pixels[None], size=(336, 336), mode="bicubic")
    down, across = pixels.shape[1] // 336, pixels.shape[2] // 336
    crops = pixels.reshape(3, down, 336, across, 336).permute(1, 3, 0, 2, 4).reshape(-1, 3, 336, 336)
    return torch.cat([whole, crops])


def ways(num_crops: int) -> dict[str, Callable[[Path], object]]:
    """Name -> what makes tensors, or decodes alone."""
    exact = Phi3VImageProcessor(num_crops=num_crops, pad_crops=False)
    fast = Phi3VImageProcessor(num_crops=num_crops, pad_crops=False, fast=True)
    return {
        "plain": lambda path: plain(path, num_crops),
        "exact": lambda path: exact(open_image(path), return_tensors="pt")["pixel_values"][0],
        "fast": lambda path: fast(open_pixels(path), return_tensors="pt")["pixel_values"][0],
        "floor of exact: decode": open_image,
        "floor of fast: decode": open_pixels,
    }


def compare(paths: list[Path], num_crops: int) -> None:
    """Stops when the ways do not make the same pixels: crops exactly, or within one grey level when fast."""
    ready = ways(num_crops)
    grey = float(1 / 255 / STD.min())
    for path in paths[:2]:
        wanted, exact, fast = (ready[name](path) for name in ("plain", "exact", "fast"))
        assert torch.equal(wanted[1:], exact[1:]) and (wanted[0] - exact[0]).abs().max() <= 1e-6
        assert (wanted - fast).abs().max() <= 1.01 * grey * 2, "two grey levels in the view of the whole at most"
        assert (wanted[1:] - fast[1:]).abs().max() <= 1.001 * grey, "one grey level in the crops at most"


def measure(paths: list[Path], num_crops: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every image, way by way in turn."""
    ready = ways(num_crops)
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(rounds + 1):
        for path in paths:
            for name, make in ready.items():
                began = time.process_time()
                make(path)
                if turn:  # the first round warms up
                    seconds[name].append(time.process_time() - began)
    return seconds


def machine() -> dict[str, str]:
    """What the figures belong to."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    jpeg = "simplejpeg" if importlib.util.find_spec("simplejpeg") else "Pillow (simplejpeg is not installed)"
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "processor": processor,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "decoder of fast": jpeg,
    }


def draw(result: dict, file: Path) -> None:
    """Bars of images per second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 2.8), layout="constrained")
    names = list(result["images_per_second"])
    bars = axes.barh(names, list(result["images_per_second"].values()), color=["0.6", "C0", "C1", "0.85", "0.85"])
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"images/s on one core, {WIDTH}x{HEIGHT} JPEG, num_crops {result['num_crops']}")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--num-crops", type=int, default=16)
    parser.add_argument("--out", type=to_write, default=Path("preprocess"), help="name of the .json and the .png")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{seed}.jpg" for seed in range(given.images)]
        for seed, path in enumerate(paths):
            draw_photo(seed).save(path, quality=88)
        compare(paths, given.num_crops)
        seconds = measure(paths, given.num_crops, given.rounds)
        size = statistics.mean(path.stat().st_size for path in paths)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        **machine(),
        "num_crops": given.num_crops,
        "bytes_per_file": round(size),
        "milliseconds": {name: round(1000 * median, 2) for name, median in medians.items()},
        "images_per_second": {name: round(1 / median, 1) for name, median in medians.items()},
        "times_the_plain_way": {name: round(medians["plain"] / medians[name], 2) for name in ("exact", "fast")},
    }
    given.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    draw(result, given.out.with_suffix(".png"))
    print("| way | ms | images/s | times the plain way |\n|---|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {1000 * median:.1f} | {1 / median:.1f} | {medians['plain'] / median:.2f} |")


if __name__ == "__main__":
    main()
