"""The guide's recipe as it is, on a Parquet file of the set's schema whose addresses a server here answers."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from image_server import image_server
from tiny_models import write_tiny_model

import phi3v
from phi3v.demo.catalogue import products
from phi3v.run_folder import RunFolder

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "burberry_lora.yaml"
COLUMNS = (
    "website_name competence_date country_code currency_code brand category1_code category2_code category3_code "
    "product_code title itemurl imageurl full_price price full_price_eur price_eur flg_discount"
).split()
"""The columns of the set, in its order."""


pytestmark = pytest.mark.usefixtures("datasets_cache")


def guide_set(addresses: list[str]) -> datasets.DatasetDict:
    """Rows of the guide's schema: one split, prices as numbers, a category that can be "N.A."."""
    rows: list[dict[str, Any]] = []
    for product, address in zip(products("train", len(addresses)), addresses, strict=True):
        row: dict[str, Any] = {**product.row(), "imageurl": address}
        row |= {name: float(row[name]) for name in ("full_price", "price", "full_price_eur", "price_eur")}
        rows.append({**row, "flg_discount": int(row["flg_discount"])})
    rows[3]["category3_code"] = "N.A."
    return datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)})


@pytest.mark.parametrize("place", ["file", "hub"])
def test_the_guides_recipe_trains_from_addresses_to_scores(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "hf_" + "Zq7" * 11
    monkeypatch.setenv("HF_TOKEN", token)
    write_tiny_model(tmp_path / "model")
    changes = [
        f"model.name={tmp_path / 'model'}",
        "model.dtype=float32",
        "data.allow_hosts=['127.0.0.1']",
        f"data.image_cache={tmp_path / 'cache'}",
        "data.split.validation=4",
        "image.num_crops=1",
        "lora.r=4",
        "training.max_steps=2",
        "training.samples_per_step=4",
        "training.warmup_steps=0",
        "evaluation.rows=3",
        "evaluation.max_new_tokens=4",
        f"output={tmp_path / 'run'}",
    ]
    with image_server() as server:
        paths = [f"/404/{number}.jpg" if number in (5, 17) else f"/good/{number}.jpg" for number in range(24)]
        table = guide_set([server.url(path) for path in paths])
        if place == "file":
            table["train"].to_parquet(tmp_path / "guide.parquet")
            changes.append(f"data.train={tmp_path / 'guide.parquet'}")
        else:
            monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: table)
        recipe = phi3v.Recipe.load(RECIPE, changes)
        assert set(COLUMNS) == set(table["train"].column_names)
        result = phi3v.train(recipe)
        assert all(server.count(path) == 1 for path in paths)
    assert (result.status, result.steps) == ("trained", 2)
    run = RunFolder(tmp_path / "run")
    assert [(line["row"], line["reason_code"]) for line in run.read_problems()] == [
        (5, "url_not_found"),
        (17, "url_not_found"),
    ]
    predictions = run.read_predictions()
    assert len(predictions) == 3 and run.report.is_file()
    for line in predictions:
        product = table["train"][line["row"]]
        assert line["expected"] == (
            f"Product: {product['title']}, Category: {product['category3_code']}, "
            f"Full Price: {product['full_price']:.0f}"
        )
        assert line["question"] == "What is shown in this image?"
    assert json.loads(run.evaluation.read_text())["problems"][0].startswith(f"{recipe.data.train}, row 5: image http")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 50 and not [path for path in files if token.encode() in path.read_bytes()]
