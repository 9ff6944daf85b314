"""What may end a running training from outside, as one line: no space, no memory, a loader worker that is gone, rows.

In come errors of the system, of torch and of the data, out comes one that says from which checkpoint the same command
goes on. Where no update of the weights was cut off, the last whole step is saved before.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed import DistError

from phi3v.errors import DataError, TrainingError
from phi3v.passthrough import first_line
from phi3v.training.disk_space import full_line, is_full
from phi3v.training.step_faults import GatheringError, is_out_of_memory
from phi3v.training.step_trainer import ANEW, StepTrainer


@contextlib.contextmanager
def one_line_faults(trainer: StepTrainer, folder: Path) -> Iterator[None]:
    """Turns what ends the training in this context into one line.

    Args:
        trainer: which trains.
        folder: of the run.
    """
    try:
        yield
    except DataError as error:  # a row too many that cannot be used
        raise type(error)(f"{error}; then {_again(_save(trainer))}") from error
    except (OSError, SafetensorError, EOFError) as error:
        if trainer.args.dataloader_num_workers and isinstance(error, (EOFError, ConnectionError)):
            raise _of_a_worker(trainer, error) from error  # it ended while it handed a sample over
        if not is_full(error):
            raise
        raise TrainingError(full_line(error, folder, _again(trainer.saved))) from error
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, TrainingError):
            raise
        step = trainer.state.global_step + 1
        if is_out_of_memory(error) and trainer.validating:
            line = (
                f"out of memory in the validation behind step {step - 1} ({first_line(error)}): set a smaller "
                f"evaluation.batch_size or evaluation.max_new_tokens, or image.max_tokens {ANEW}"
            )
        elif isinstance(error, GatheringError):
            workers = "a smaller training.dataloader_num_workers, which a begun run takes, or "
            line = (
                f"out of memory before step {step}, while samples are put together ({first_line(error)}): set "
                f"{workers if trainer.args.dataloader_num_workers else ''}a smaller training.samples_per_step, "
                f"image.num_crops or image.max_tokens {ANEW}"
            )
        elif is_out_of_memory(error):
            line = (
                f"out of memory at step {step}, outside of its micro-batches ({first_line(error)}): set "
                f"training.optim: adamw_8bit, or a smaller lora.r, {ANEW}"
            )
        elif trainer.ranks.several and is_of_ranks(error):
            raise TrainingError(
                f"another rank is gone at step {step} ({_of_link(error)}); {_again(trainer.saved)}"
            ) from error
        elif "DataLoader worker" in str(error) and not str(error).startswith("Caught"):
            raise _of_a_worker(trainer, error) from error
        else:
            raise
        raise TrainingError(f"{line}; {_again(_save(trainer))}") from error


@contextlib.contextmanager
def one_line_at_the_end(folder: Path) -> Iterator[None]:
    """Turns what ends the answers and the report of a run that is trained into one line; `folder` is the run's."""
    again = "the run is trained, and the same command goes on with its report"
    try:
        yield
    except TrainingError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        if is_full(error):
            raise TrainingError(full_line(error, folder, again)) from error
        if is_out_of_memory(error):
            raise TrainingError(
                f"out of memory while held-out rows are answered ({first_line(error)}): set a smaller "
                f"evaluation.batch_size or evaluation.max_new_tokens; {again}"
            ) from error
        raise


def _of_a_worker(trainer: StepTrainer, error: Exception) -> TrainingError:
    """What is said of a loader worker that is gone."""
    stuck = trainer.workers.killed or trainer.eval_workers.killed
    what = "gave no sample any more and was ended" if stuck else "was ended from outside, for its memory perhaps"
    told = f"before step {trainer.state.global_step + 1} ({first_line(error)})"
    return TrainingError(f"a loader worker {what} {told}: {worker_advice(stuck)}; {_again(_save(trainer))}")


def worker_advice(stuck: bool) -> str:
    """What to do about a loader worker that is gone: memory explains one that was killed, and none that is stuck."""
    if stuck:
        return (
            "a disk or network that does not answer holds a worker up, see whether the photos can be read; "
            "training.dataloader_num_workers=0, which a begun run takes, reads them without workers"
        )
    return "where memory is short, set a smaller training.dataloader_num_workers, which a begun run takes"


def _save(trainer: StepTrainer) -> Path | None:
    """The newest checkpoint, of the last step where this process may save alone: ranks save together or not at all."""
    return trainer.saved if trainer.ranks.several else trainer.save_last_step()


def is_of_ranks(error: Exception) -> bool:
    """Whether an error is one of what ranks send to each other."""
    return isinstance(error, DistError) or "gloo" in str(error)


def _of_link(error: Exception) -> str:
    """What gloo says of a lost connection, without its source line and its advice.

    Example: "[/a/pair.cc:537] Read error [127.0.0.1]:19125: Connection reset by peer. This is typically ..." ->
    "Read error [127.0.0.1]:19125: Connection reset by peer".
    """
    return re.sub(r"^\[[^\]]*:\d+\] ", "", first_line(error)).partition(". ")[0]


def _again(saved: Path | None) -> str:
    """What the same command does next."""
    return f"the same command goes on from {saved.name if saved else 'the start: no checkpoint was written yet'}"
