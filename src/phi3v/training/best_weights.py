"""Which checkpoint has the best weights of a run, where those that were the best are damaged; which weights are kept;
and whether a finished run's own are whole.

In come the Trainer's state and the run's checkpoints; the state is set to the best of those that are whole, so nothing
that it names is missing.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3v.errors import CheckpointError
from phi3v.ranks import Ranks
from phi3v.run_folder import RunFolder
from phi3v.targets import weights_fault
from phi3v.training.checkpoints import checkpoint_step, find_fault, newest_checkpoint

_log = logging.getLogger(__name__)


def has_whole_weights(run: RunFolder) -> bool:
    """Whether a run's tuned weights are there and whole; of damaged ones a warning says what makes them again.

    Raises: CheckpointError for damaged ones that no checkpoint is there for.
    """
    if not run.has_weights() or (fault := weights_fault(run)) is None:
        return run.has_weights()
    newest = newest_checkpoint(run.checkpoints)
    if newest is None:
        raise CheckpointError(f"{fault}, or remove it to train from the start: the run has no checkpoint any more")
    _log.warning("%s; the tuned weights are written again, from %s", fault.removesuffix(": copy it again"), newest.name)
    return False


def mend_best(state: Any, args: Any, ranks: Ranks) -> str:
    """What is wrong with the best weights, "" for nothing.

    Where something is, the best of the checkpoints that are whole are in their place from here on; where none of those
    has a score, the next ones that are validated.

    Args:
        state: the Trainer's.
        args: the Trainer's.
        ranks: which call it together; the first reads.
    """
    best = Path(state.best_model_checkpoint or "")
    fault: str = ranks.told(lambda: find_fault(best, weights=True) or "")
    if fault:
        name = _score_name(args)
        scores = {line["step"]: line[name] for line in state.log_history if name in line}
        left = ranks.told(lambda: str(best_whole(best.parent, scores, bool(args.greater_is_better)) or ""))
        step = checkpoint_step(Path(left)) if left else None
        state.best_model_checkpoint = left or None
        state.best_global_step, state.best_metric = step, None if step is None else scores[step]
    return fault


def kept_weights(state: Any, args: Any, patience: int | None) -> dict[str, Any]:
    """Whose weights a training ends with, see `RunResult.kept`; the same after a stop, by the Trainer's state alone.

    Args:
        state: the Trainer's, when all is done.
        args: the Trainer's.
        patience: validations without a better score that end the run.
    """
    if not args.load_best_model_at_end:
        return {"step": state.global_step}
    best, name = state.best_model_checkpoint, _score_name(args)
    scores = [line[name] for line in state.log_history if name in line]
    return {
        "step": checkpoint_step(Path(best)) if best else state.global_step,
        "metric": name,
        "score": state.best_metric if best else None,
        "last_score": scores[-1] if scores else None,
        **({"patience": patience} if patience is not None and state.global_step < state.max_steps else {}),
    }


def _score_name(args: Any) -> str:
    """What the score by which weights are the best is called in the log: "eval_loss"."""
    return f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"


def best_whole(folder: Path, scores: Mapping[int, float], greater: bool) -> Path | None:
    """The checkpoint with the best score whose weights are whole, the earlier of equal ones; None where none has one.

    Args:
        folder: of all checkpoints of a run.
        scores: of validations, by their steps.
        greater: whether greater scores are better.
    """
    for step in sorted(scores, key=lambda step: (-scores[step] if greater else scores[step], step)):
        path = folder / f"checkpoint-{step}"
        if path.is_dir() and find_fault(path, weights=True) is None:
            return path
    return None
