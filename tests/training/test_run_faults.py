"""What ends a training from outside, as one line, without a training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phi3v.errors import TrainingError
from phi3v.ranks import ALONE
from phi3v.training.run_faults import one_line_faults


def test_a_worker_that_ends_while_it_hands_a_sample_over_is_one_line(tmp_path: Path) -> None:
    watch = SimpleNamespace(killed=False)
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(dataloader_num_workers=2),
        workers=watch,
        eval_workers=watch,
        ranks=ALONE,
        state=SimpleNamespace(global_step=4),
        save_last_step=lambda: tmp_path / "checkpoint-4",
    )
    said = "a loader worker was ended .* before step 5 .EOFError.: .*; the same command goes on from checkpoint-4"
    with pytest.raises(TrainingError, match=said), one_line_faults(trainer, tmp_path):
        raise EOFError
    trainer.args.dataloader_num_workers = 0
    with pytest.raises(EOFError), one_line_faults(trainer, tmp_path):
        raise EOFError
