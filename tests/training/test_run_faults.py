"""What ends a training from outside, as one line, without a training."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from phi3v.errors import DataError, TrainingError
from phi3v.ranks import ALONE
from phi3v.training.run_faults import one_line_at_the_end, one_line_faults
from phi3v.training.step_trainer import StepTrainer


def trainer_of(folder: Path, **more: Any) -> Any:
    """What is asked of a Trainer alone at step 4, which saves into the folder."""
    state = SimpleNamespace(global_step=4)
    return SimpleNamespace(ranks=ALONE, state=state, save_last_step=lambda: folder / "checkpoint-4", **more)


def test_no_memory_for_held_out_rows_names_their_settings(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, validating=True)
    said = "^out of memory in the validation behind step 4 .* evaluation.batch_size or .* goes on from checkpoint-4$"
    with pytest.raises(TrainingError, match=said), one_line_faults(trainer, tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "^out of memory while held-out .* evaluation.batch_size or evaluation.max_new_tokens; .* report$",
        ),
        (
            OSError(28, "No space left on device"),
            "^the disk of .* is full .*: free space there; the run is trained, and",
        ),
    ],
)
def test_what_ends_the_report_of_a_run_is_one_line(tmp_path: Path, error: Exception, said: str) -> None:
    with pytest.raises(TrainingError, match=said), one_line_at_the_end(tmp_path):
        raise error
    with pytest.raises(ValueError, match="another"), one_line_at_the_end(tmp_path):
        raise ValueError("another")


def test_a_worker_that_ends_while_it_hands_a_sample_over_is_one_line(tmp_path: Path) -> None:
    watch = SimpleNamespace(killed=False)
    workers = SimpleNamespace(dataloader_num_workers=2)
    trainer = trainer_of(tmp_path, args=workers, workers=watch, eval_workers=watch)
    said = "a loader worker was ended .* before step 5 .EOFError.: .*; the same command goes on from checkpoint-4"
    with pytest.raises(TrainingError, match=said), one_line_faults(trainer, tmp_path):
        raise EOFError
    trainer.args.dataloader_num_workers = 0
    with pytest.raises(EOFError), one_line_faults(trainer, tmp_path):
        raise EOFError


def test_a_held_out_row_that_a_worker_refuses_is_its_line_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> None:
        raise DataError(
            "Caught DataError in DataLoader worker process 0.\n  raise ...\nphi3v.errors.DataError: row 3: x\n"
        )

    monkeypatch.setattr("transformers.Trainer.evaluation_loop", refused)
    trainer: Any = object.__new__(StepTrainer)
    trainer.held_out_groups, trainer.label_smoother, trainer.eval_workers = None, None, SimpleNamespace(wait=str)
    with pytest.raises(DataError, match="^row 3: x$"):
        trainer.evaluation_loop()


def test_a_rank_that_is_gone_is_one_line_without_the_advice_of_the_link(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(
        validating=False, ranks=SimpleNamespace(several=True), state=SimpleNamespace(global_step=4), saved=None
    )
    said = "another rank is gone at step 5 (Read error [127.0.0.1]:9: Connection reset by peer); the same command"
    with pytest.raises(TrainingError, match=re.escape(said)), one_line_faults(trainer, tmp_path):
        raise RuntimeError(
            "[/a/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:9: Connection reset by peer. This is typically "
            "caused by a remote worker hanging or bugs in the application. GLHF!"
        )
