"""Memory stays flat however many rows go by, measured in a process of its own."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tiny_models import write_tiny_model

import phi3v
from phi3v.recipe import Recipe
from phi3v.training.data_check import check_recipe

TESTS = Path(__file__).resolve().parents[1]


def held(kind: str, rows: int, timeout: float) -> np.ndarray:
    """Kilobytes held after each fiftieth of the rows."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc/self/statm to see the memory of a process")
    source = Path(phi3v.__file__).resolve().parents[1]
    settings = {"PYTHONPATH": f"{source}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, str(TESTS / "measured_memory.py"), kind, str(rows)],
        capture_output=True,
        text=True,
        check=True,
        timeout=timeout,
        env={**os.environ, **settings},
    )
    return np.array(json.loads(done.stdout))


def slope(samples: np.ndarray, rows: int) -> float:
    """Kilobytes a row, the straight line through the later two thirds of the samples."""
    later = samples[len(samples) // 3 :]
    return float(np.polyfit(np.arange(len(later)) * rows / len(samples), later, 1)[0])


@pytest.mark.slow
def test_memory_stays_flat() -> None:
    """A few pages more or less are the allocator's; one kept image alone would be 2.7 MB."""
    samples = held("images", 100, timeout=170)
    assert samples[-1] - samples[10] < 1.0 * 100 + 256


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("kind", "rows"), [("images", 5_000), ("fast", 5_000), ("headers", 200_000), ("text", 200_000)]
)
def test_the_slope_is_under_a_kilobyte_a_row(kind: str, rows: int) -> None:
    assert slope(held(kind, rows, timeout=3500), rows) < 1.0


def traced(rows: int, folder: Path) -> int:
    """The most bytes that Python and numpy held while a set of rows without images was looked at as a whole."""
    lines = (json.dumps({"prompt": f"question {number}", "answer": f"the {number}"}) for number in range(rows))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    data = {"train": str(folder / "rows.jsonl"), "images": None}
    tracemalloc.start()
    try:
        report = check_recipe(Recipe.from_dict({"model": str(folder / "model"), "data": data}))
        assert report.passed and report.usable == rows and report.validation
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_check_keeps_less_than_a_kilobyte_a_row(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "model")
    traced(50, tmp_path)  # what is made once
    few, many = (traced(rows, tmp_path) for rows in (300, 900))
    assert many - few < 1000 * 600


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", ["check text", "check headers"])
def test_a_check_of_many_rows_keeps_less_than_a_kilobyte_a_row(kind: str) -> None:
    few, many = (held(kind, rows, timeout=3500)[-1] for rows in (20_000, 200_000))
    assert many - few < 180_000
