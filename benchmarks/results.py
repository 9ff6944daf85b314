"""What a program here leaves behind: the machine it ran on, a JSON file, bars."""

import argparse
import importlib.util
import json
import platform
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, str]:
    """What figures belong to: date, command, device and versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "device": device,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("transformers", "peft")},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def to_write(name: str) -> Path:
    """The place of `--out`, before anything is measured. Raises: ArgumentTypeError for one in no folder."""
    place = Path(name)
    if not place.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{place.parent} is no folder: make it, or name a file in one that is there")
    return place


def write(result: dict[str, Any], out: Path) -> None:
    """Writes `out`.json."""
    out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def draw_bars(groups: dict[str, dict[str, float]], title: str, out: Path, number: str = "%.2f") -> None:
    """Writes `out`.png: a panel for each group, a bar for each of its names; says so where matplotlib is missing.

    Example: {"2509+100": {"ours": 8.0, "peft": 5.0}} is one panel of two bars.
    """
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no plot")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = {name: bars for name, bars in groups.items() if bars}
    if not groups:
        return
    height = 0.8 + 0.33 * sum(len(bars) + 1 for bars in groups.values())
    figure, panels = pyplot.subplots(
        len(groups),
        figsize=(8, height),
        layout="constrained",
        squeeze=False,
        height_ratios=[len(bars) for bars in groups.values()],
    )
    for axes, (name, bars) in zip(panels[:, 0], groups.items(), strict=True):
        colours = ["C0" if bar.startswith("ours") else "0.65" for bar in bars]
        axes.bar_label(axes.barh(list(bars), list(bars.values()), color=colours), fmt=number, padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.14)
        axes.set_title(name, fontsize=9, loc="left")
    panels[-1, 0].set_xlabel(title)
    figure.savefig(out.with_suffix(".png"), dpi=120)
    pyplot.close(figure)
