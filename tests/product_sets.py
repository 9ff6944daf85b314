"""A few products with their photos, as data sets of any kind: what tests of the data path read."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
from PIL import Image


def png(number: int) -> bytes:
    """A photo whose width and colour tell its number: 0 is 8x6 and black."""
    buffer = io.BytesIO()
    Image.new("RGB", (8 + number, 6), (number * 20, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def records(count: int = 5) -> list[dict[str, Any]]:
    """Products by number, their photos named in the column image."""
    return [{"image": f"photos/{n}.png", "title": f"Scarf {n}", "price": 400 + n} for n in range(count)]


def write_photos(folder: Path, count: int = 5) -> None:
    """The photos that `records` names."""
    (folder / "photos").mkdir(parents=True)
    for number in range(count):
        (folder / "photos" / f"{number}.png").write_bytes(png(number))


def write(folder: Path, name: str, rows: list[dict[str, Any]], features: datasets.Features | None = None) -> str:
    """Writes a data file of the kind that its name says."""
    path = folder / name
    if path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join("" if v is None else str(v) for v in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".tsv":
        path.write_text("\n".join("\t".join(map(str, line)) for line in [rows[0], *(r.values() for r in rows)]) + "\n")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    return str(path)
