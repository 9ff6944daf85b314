"""Two gloo ranks on the CPU share the rows of a prediction and of an evaluation, as one process would answer them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tiny_models import write_photos, write_tiny_model
from tiny_runs import make_run

import phi3v
from phi3v.evaluation.answer_files import journal_of, lock_of
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder

WORKER = Path(__file__).resolve().parents[1] / "rank_worker.py"


def on_two(folder: Path, jobs: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What came of each job on each rank; the processes are told of each other as torchrun does it."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder / "jobs.json")],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, err = rank.communicate(timeout=240)
            assert rank.returncode == 0, err[-3000:]
    finally:
        for rank in ranks:
            rank.kill()
    first, second = (json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2))
    return list(zip(first, second, strict=True))


def test_ranks_share_rows_and_the_first_writes_what_one_process_would(tmp_path: Path) -> None:
    model, table = write_tiny_model(tmp_path / "model"), write_photos(tmp_path / "photos", 19)
    table.write_text(table.read_text() + json.dumps({"image": "nowhere.png", "colour": "red"}) + "\n")
    asked = {"target": str(model), "data": str(table), "prompt": "Which?", "batch_size": 1, "device": "cpu"}
    two = {**asked, "out": str(tmp_path / "two.jsonl"), "max_new_tokens": 3}
    sections = {"data": {"train": "none", "validation": str(table), "prompt": "?", "answer": "It is {colour}."}}
    recipe = Recipe.from_dict({"model": str(model), **sections, "evaluation": {"batch_size": 1, "max_new_tokens": 2}})
    recipe = recipe.with_overrides([f"data.train={table}", "data.max_skipped=1.0", f"output={tmp_path / 'run'}"])
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    make_run(tmp_path, recipe)
    scored = {"target": str(tmp_path / "run"), "data": str(tmp_path / "recipe.yaml"), "rows": 17, "device": "cpu"}
    scored |= {"checks": ["overlap", "form", "images"]}
    held = lock_of(tmp_path / "held.jsonl")
    jobs = [{"predict": two}, {"predict": {**two, "max_new_tokens": 2}}]
    jobs.append({"predict": {**two, "out": str(tmp_path / "held.jsonl")}})
    jobs.append({"evaluate": {**scored, "out": str(tmp_path / "two")}})
    held.take()
    try:
        answered, refused, locked, evaluated = on_two(tmp_path, jobs)
    finally:
        held.give_back()

    assert [told["status"] for told in answered] == ["answered", "answered"]
    alone = phi3v.predict(**asked, out=tmp_path / "one.jsonl", max_new_tokens=3)
    assert (tmp_path / "two.jsonl").read_bytes() == alone.out.read_bytes()
    assert [told["told"] for told in answered] == [alone.problems] * 2 and len(alone.problems) == 1
    assert not journal_of(tmp_path / "two.jsonl").exists()
    assert "holds answers of other settings" in refused[0]["error"]
    assert refused[1]["error"] == "OtherRankError: rank 0 failed"
    assert f"held.jsonl is being written by process {os.getpid()} on " in locked[0]["error"]
    assert locked[1]["error"] == "OtherRankError: rank 0 failed" and not (tmp_path / "held.jsonl").exists()
    wanted = phi3v.evaluate(**scored, out=tmp_path / "one")
    assert [told["told"] for told in evaluated] == [json.loads(json.dumps(wanted.predictions))] * 2
    one, both = (RunFolder(tmp_path / name).read_evaluation() for name in ("one", "two"))
    clock = {"seconds": None, "created": None, "memory_gib": None}
    assert both | clock == one | clock and both["checks"].keys() == {"overlap", "form", "images"}
    assert both["checks"]["images"]["rows"] == 17 and "skipped" not in [
        one["verdict"] for one in both["checks"].values()
    ]
    assert (tmp_path / "two" / "predictions.jsonl").read_bytes() == (
        tmp_path / "one" / "predictions.jsonl"
    ).read_bytes()
