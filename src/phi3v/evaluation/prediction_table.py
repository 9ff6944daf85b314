"""Predictions as one flat table, for predictions.parquet and for trackers: dicts in, columns and rows out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def prediction_table(predictions: Sequence[Mapping[str, Any]]) -> tuple[dict[str, type], list[dict[str, Any]]]:
    """Columns with their types, and the rows; what a line has below a name stands in a column of its own.

    Example: {"row": 3, ..., "fields": {"title": {"expected": "Scarf", "base": null, "tuned": "Cap"}}, "scores":
    {"tuned": {"exact_match": 0.0}, "base": null}} -> {"row": 3, ..., "fields.title.expected": "Scarf",
    "fields.title.base": None, "fields.title.tuned": "Cap", "scores.tuned.exact_match": 0.0}.
    """
    columns: dict[str, type] = {"row": int, "source": str, "images": list, "image_group": int, "question": str}
    columns |= {"expected": str, "base": str, "tuned": str, "right": bool}
    plain = list(columns)
    rows = []
    for prediction in predictions:
        row = {name: prediction.get(name) for name in plain}
        for field, texts in prediction["fields"].items():
            row |= {f"fields.{field}.{side}": text for side, text in texts.items()}
        for side, scores in prediction["scores"].items():
            row |= {f"scores.{side}.{name}": score for name, score in (scores or {}).items()}
        rows.append(row)
        columns |= {name: float if name.startswith("scores.") else str for name in row if name not in columns}
    return columns, [{name: row.get(name) for name in columns} for row in rows]
