"""Commands of the README and docs/data.md, run in their order on a small shop with a tiny model for Microsoft's."""

import csv
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers
from test_documents import ROOT, words_of
from tiny_models import write_photos, write_tiny_model
from typer.testing import CliRunner

from phi3v import cli_session
from phi3v.cli import app

MODEL = "model: microsoft/Phi-3.5-vision-instruct"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README's recipe names: products/products.csv with image, title and price; the recipe itself."""
    folder = tmp_path_factory.mktemp("documents")
    write_tiny_model(folder / "model")
    rows = [json.loads(line) for line in write_photos(folder / "products", 20).read_text().splitlines()]
    (folder / "products" / "rows.jsonl").unlink()
    with open(folder / "products" / "products.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "title", "price"])
        table.writerows([row["image"], f"{row['colour']} scarf", 100 + place] for place, row in enumerate(rows))
    shutil.copy(folder / "products" / rows[0]["image"], folder / "scarf.jpg")
    text = block("README.md", "yaml", "products/products.csv")
    assert MODEL in text
    text = text.replace(MODEL, f"model: {folder / 'model'}")
    short = ["evaluation: {max_new_tokens: 4}", "sweep: {trials: 1, search: {training.learning_rate: [1.0e-3]}}"]
    (folder / "shop.yaml").write_text("\n".join([text, *short, ""]))  # an untrained model goes on for ever
    return folder


@pytest.fixture
def typed(shop: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Runs a line as it is typed in the shop's folder, in this process."""
    monkeypatch.setattr(cli_session, "hush", lambda debug, as_json: None)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", shop / "cache")
    monkeypatch.chdir(shop)
    transformers.utils.logging.disable_progress_bar()
    return lambda line: CliRunner().invoke(app, words_of(line))


def block(document: str, language: str, holding: str) -> str:
    """The first block of code of a document that holds some text."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return next(found for found in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL) if holding in found)


def test_the_readmes_commands_and_program(shop: Path, typed: Callable[[str], Any]) -> None:
    lines = block("README.md", "bash", "shop.yaml").splitlines()
    # chat and serve go on until they are stopped, graphs take an export: tests/serve and tests/export have these.
    lines = [line for line in lines if not line.startswith(("phi3v chat", "phi3v serve", "phi3v ask shop-onnx"))]
    assert [words_of(line)[0] for line in lines] == [
        "data",
        "data",
        "plan",
        "doctor",
        "profile",
        "train",
        "sweep",
        "evaluate",
        "compare",
        "predict",
        "ask",
        "export",
    ]
    said = {}
    for line in lines:
        if "runs/other" in line:
            shutil.copytree(shop / "runs" / "shop", shop / "runs" / "other")
        done = typed(line)
        assert done.exit_code == 0, (line, done.output)
        said[words_of(line)[0]] = done.stdout.strip()
    assert (shop / "runs" / "shop" / "report.html").is_file() and said["ask"]
    assert (shop / "shop" / "model.safetensors").is_file()
    printed: list[str] = []
    program = block("README.md", "python", 'phi3v.ask("runs/shop"')
    exec(compile(program, "README.md", "exec"), {"print": printed.append})  # the run is finished by now
    assert printed == [said["ask"]]


def test_the_commands_of_the_data_page(shop: Path, typed: Callable[[str], Any]) -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    lines = re.findall(r"(?:^|`)(phi3v data [^`\n]*shop\.yaml[^`\n]*)", text, re.MULTILINE)
    assert len(lines) >= 7
    for line in lines:
        done = typed(line)
        assert done.exit_code == 0, (line, done.output)
        if "--json" in shlex.split(line):
            listed = re.search(r"--json` \| [^|]*?((?:`\w+`, )+`\w+`)", text)
            assert set(re.findall(r"`(\w+)`", listed[1])) <= set(json.loads(done.stdout))
    assert (shop / "shop-rows.html").is_file()
