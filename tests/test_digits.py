"""The digits example, on scans that nobody here drew: slow, several minutes."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "digits.py"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tiny_model_learns_to_read_scanned_digits(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(tmp_path)])
    found = runpy.run_path(str(EXAMPLE))["main"]()
    assert found["full"] >= 0.95
    assert found["lora"] >= 0.90
    assert found["nearest neighbour"] > 0.9
