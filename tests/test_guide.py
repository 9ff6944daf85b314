"""examples/guide.py, run as it is on the embedded default, with few steps."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file

from phi3v.demo import tiny_model_path
from phi3v.demo.catalogue import write_catalogue

GUIDE = Path(__file__).resolve().parents[1] / "examples" / "guide.py"


@pytest.fixture
def guide() -> ModuleType:
    pytest.importorskip("trl", reason="the guide uses trl, an optional package")
    spec = importlib.util.spec_from_file_location("guide", GUIDE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_guide_trains_and_answers_both_ways(guide: ModuleType, tmp_path: Path, capsys) -> None:
    table = write_catalogue(tmp_path / "products", train=40, test=1)["train"]
    guide.main(tmp_path, str(tiny_model_path()), table, max_steps=2)
    printed = capsys.readouterr().out
    assert "the guide's way:" in printed and "with phi3v:" in printed and "exact match" in printed
    for folder in (tmp_path / "adapter", tmp_path / "run" / "adapter"):
        weights = load_file(folder / "adapter_model.safetensors")
        trained = [name for name, tensor in weights.items() if "lora_B" in name and tensor.any()]
        assert trained and len(trained) == sum("lora_B" in name for name in weights)
        assert not any("img_processor" in name for name in weights)
    assert (tmp_path / "run" / "report.html").is_file()
