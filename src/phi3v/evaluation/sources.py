"""Digests of what an evaluation's figures depend on, for evaluation.json and all that is made of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from phi3v.data.schema import Row
from phi3v.evaluation.headline import column_names
from phi3v.evaluation.result import Evaluation, HeldOut
from phi3v.fingerprints import name_rows
from phi3v.run_folder import RunFolder


def fingerprints(run: RunFolder | None, evaluation: Evaluation, held_out: HeldOut) -> dict[str, str]:
    """Those of a run's own evaluation, or of one apart: {"rows": "9f2c...", "weights of shop": "77ab..."}.

    Args:
        run: the run whose own evaluation it is; None for one of other rows, or beside another target.
        evaluation: with the names of the weights that answered, where there are some.
        held_out: the rows.
    """
    if run is not None:
        return run_fingerprints(run, held_out.rows)
    names = column_names(evaluation.to_dict())
    sides = {"base": "base", "tuned": "tuned", "other": "base"}
    named = {f"weights of {names[sides[side]]}": name for side, name in evaluation.weights.items() if side in sides}
    return {"rows": name_rows(held_out.rows), **named}


def run_fingerprints(run: RunFolder, rows: Sequence[Row]) -> dict[str, str]:
    """Short names for what the figures depend on, where they are known: {"held-out rows": "9f2c...", ...}."""
    conditions = run.read_conditions()
    named = {
        "held-out rows": name_rows(rows) if rows else None,
        "training rows": conditions.get("rows"),
        "their photos": conditions.get("photos"),
        "weights of the base": conditions.get("base"),
        "recipe.yaml": hashlib.sha256(run.recipe.read_bytes()).hexdigest()[:32],
        "trained on": conditions.get("device"),
        "computed in": conditions.get("dtype"),
        "processes": conditions.get("ranks"),
    }
    return {name: str(value) for name, value in named.items() if value is not None}
