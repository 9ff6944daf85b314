"""What tests start under torchrun: trains recipes one after the other, as one rank of several.

    torchrun --nproc-per-node=2 tests/rank_worker.py jobs.json

`jobs.json` is a list of recipes as plain values. Each is trained; what came of it is written to `rank-N.json` beside
the file: {"status": "trained"} or {"error": "the line"}.
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

import phi3v
from phi3v.errors import Phi3VError


def main(jobs: Path) -> None:
    """Trains all jobs."""
    dist.init_process_group("gloo")  # stays between jobs
    told = []
    for values in json.loads(jobs.read_text()):
        try:
            result = phi3v.train(phi3v.Recipe.from_dict(values))
            told.append({"status": result.status, "steps": result.steps})
        except Phi3VError as error:
            told.append({"error": f"{type(error).__name__}: {error}"})
        dist.barrier()
    (jobs.parent / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
