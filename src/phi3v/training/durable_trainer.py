"""transformers' Trainer, with checkpoints that survive: all that we change of how it saves, resumes and stops.

What the Trainer does: files written one by one into `checkpoint-N` with pickle, the newest one taken unchecked, sums of
the loss since the last line forgotten, random numbers that an evaluation draws. What is done here: folders of
`checkpoints`, written whole, with safetensors and JSON; a resumed run has the undisturbed one's weights, optimiser,
random states and logged losses, bit by bit; a run that is stopped between two updates saves the last whole step.

Tested with transformers 5.23.0. The methods without a public name that are replaced or called here: `_save_checkpoint`,
`_save`, `_load_from_checkpoint`, `_load_best_model`, `_load_optimizer_and_scheduler`, `_load_scaler`,
`_load_rng_state`, `_run_epoch`, `_evaluate`, `_determine_best_metric`, `_maybe_log_save_evaluate`,
`_push_from_checkpoint`; and the attributes `_tr_loss`, `_total_loss_scalar` and `_globalstep_last_logged`. A test
compares their signatures.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from phi3v.adapters import save_tuned
from phi3v.errors import CheckpointError, Interrupted
from phi3v.ranks import ALONE, Ranks
from phi3v.targets import ADAPTER_WEIGHTS
from phi3v.training.best_weights import mend_best
from phi3v.training.checkpoints import (
    STATE,
    checkpoint_step,
    read_manifest,
    rotate,
    save_checkpoint,
)
from phi3v.training.conditions import said_once
from phi3v.training.shards import is_sharded, load_shards, sharded_as, whole, whole_weights
from phi3v.training.state_files import random_states, read_state, set_random_states, write_state
from phi3v.training.step_faults import all_finite, refuse_weights
from phi3v.training.stop_signals import StopSignals

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Moment:
    """What a whole step leaves behind, beside weights, optimiser and schedule, which the next one changes at its end.

    Attributes:
        step: steps done.
        random: states of the random generators.
        loss: sum of the losses since the last line of the log.
        logged: step of that line.
        total_loss: sum of the losses up to it.
        tokens: input tokens seen, where they are counted.
        operations: floating-point operations so far.
    """

    step: int
    random: dict[str, Any]
    loss: torch.Tensor
    logged: int
    total_loss: float
    tokens: int
    operations: float


class DurableTrainer(Trainer):
    """The Trainer with checkpoints of ours."""

    def __init__(
        self,
        *,
        signals: StopSignals | None = None,
        facts: dict[str, Any] | None = None,
        ranks: Ranks | None = None,
        **arguments: Any,
    ) -> None:
        """A Trainer.

        Args:
            signals: by which the run is stopped; None where nothing is caught.
            facts: what the manifests of checkpoints say besides.
            ranks: the processes that train; None for this one alone.
            **arguments: the Trainer's own.
        """
        super().__init__(**arguments)
        self.signals = signals or StopSignals()
        self.ranks = ranks or ALONE
        self.facts = facts or {}
        self.moment: Moment | None = None
        self.updating = False  # an update of the weights has begun whose step is not whole yet
        self.saved: Path | None = None
        self._resumed: Path | None = None
        self.add_callback(_Updates(self))

    def train(self, resume_from_checkpoint: Any = None, **arguments: Any) -> Any:
        """The Trainer's training. Raises: Interrupted after a signal, when the last whole step is saved."""
        self._resumed = self.saved = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if self._resumed is not None and self.is_fsdp_enabled:
            self._load_from_checkpoint(str(self._resumed))  # while weights are whole
        if self.ranks.several:
            self.signals.hold()  # one that stops by itself would leave the others waiting, see `_stop_together`
        try:
            with said_once():
                result = super().train(resume_from_checkpoint=resume_from_checkpoint, **arguments)
        except Interrupted:
            self.save_last_step()
            raise
        self.check_weights()
        self.signals.release()
        return result

    # saving

    def check_weights(self) -> None:
        """Raises: TrainingError where a weight that trains, its master or the optimiser's state is no number."""
        groups, states = self.optimizer.param_groups, self.optimizer.state.values()
        held = [*(one for group in groups for one in group["params"]), *(it for one in states for it in one.values())]
        weights = [one for one in self.model.parameters() if one.requires_grad]
        if self.ranks.any(not all_finite(one for one in [*weights, *held] if isinstance(one, torch.Tensor))):
            with self.ranks.together():  # all of them have found the same
                refuse_weights(self.state.global_step, self.saved)

    def save_last_step(self) -> Path | None:
        """Saves the last whole step, where that is not done yet and no update of the weights was cut off.

        Returns: the checkpoint to go on from; None where there is none.
        """
        if self.moment is not None and not self.updating and not self._is_saved():
            self.signals.hold()
            self._write()
        return self.saved

    def _is_saved(self) -> bool:
        """Whether there is nothing to save: no step was done, or the last one is saved."""
        step = checkpoint_step(self.saved) if self.saved is not None else 0
        return self.state.global_step == step

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint of the step that was just done."""
        self.remember()
        self._note_best()
        if not self._is_saved():
            self._write()

    def _write(self) -> None:
        """Writes the checkpoint of the last whole step and removes those that are too many."""
        self.check_weights()
        self.store_flos()
        folder = Path(self.args.output_dir)
        weights, optimizer = self.whole_weights(), whole(self.optimizer.state_dict())
        fill = partial(self._fill, weights=weights, optimizer=optimizer)
        best = Path(self.state.best_model_checkpoint) if self.state.best_model_checkpoint else None
        facts = {**self.facts, "best": best.name} if best and self.args.load_best_model_at_end else self.facts
        self.saved = saved = save_checkpoint(folder, self.state.global_step, fill, facts, self.ranks)
        if self.args.push_to_hub and self.ranks.first:
            self._push_from_checkpoint(str(self.saved))
        self.ranks.alone(lambda: rotate(folder, saved, self.args.save_total_limit, best))

    def _note_best(self) -> None:
        """Notes the best step's checkpoint, which is the one of now where it is to be loaded at the end."""
        step = self.state.best_global_step
        best = self._path_of(f"checkpoint-{step}")
        if step and (step == self.state.global_step or (not self.args.load_best_model_at_end and Path(best).is_dir())):
            self.state.best_model_checkpoint = best

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """Whether a validation is the best so far, which is saved then, due or not, where the run ends with it."""
        best: bool = super()._determine_best_metric(*args, **kwargs)
        self.control.should_save |= best and self.args.load_best_model_at_end
        return best

    def _path_of(self, checkpoint: str) -> str:
        """Where a checkpoint of this run lies, by its name."""
        return str(Path(self.args.output_dir) / checkpoint)

    def _fill(self, folder: Path, weights: dict | None, optimizer: Any) -> None:
        """Writes the files of a checkpoint, the manifest aside: all of the first rank, of others what is theirs."""
        assert self.moment is not None and self.lr_scheduler is not None
        moment = self.moment
        sums = {"loss": moment.loss, "logged": moment.logged, "total_loss": moment.total_loss}
        write_state(folder, f"rank-{self.ranks.rank}", {"random": moment.random, **sums})
        if not self.ranks.first:
            return
        self.save_weights(folder, weights)
        write_state(folder, "optimizer", optimizer)
        write_state(folder, "scheduler", self.lr_scheduler.state_dict())
        if self.accelerator.scaler is not None:
            write_state(folder, "scaler", self.accelerator.scaler.state_dict())
        self.state.total_flos = moment.operations
        self.state.num_input_tokens_seen = moment.tokens
        exported = [one for one in [*self.callback_handler.callbacks, self.control] if isinstance(one, ExportableState)]
        for one in exported:
            held = self.state.stateful_callbacks[type(one).__name__]
            if isinstance(held, list):
                held.append(one.state())
            else:
                self.state.stateful_callbacks[type(one).__name__] = one.state()
        state = replace(self.state, best_model_checkpoint=None)  # a path, in a run that may be moved: see the manifest
        state.save_to_json(str(folder / STATE))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """What the Trainer calls to save weights."""
        self.save_weights(Path(output_dir or self.args.output_dir), state_dict)

    def save_weights(self, folder: Path, state_dict: dict | None = None) -> None:
        """Writes the weights alone, without the pickled arguments; a given state instead of the model's."""
        save_tuned(self.accelerator.unwrap_model(self.model), folder, state_dict)

    def whole_weights(self, *, float32: bool = False) -> dict[str, Any] | None:
        """What `save_weights` takes of a model that is sharded, whole on the first rank, all ranks have to ask; None
        for one that is not. With `float32` all weights are of that type.
        """
        if self.is_fsdp_enabled:
            return whole_weights(self.model, float32=float32)
        if float32:
            self.model.float()
        return None

    def remember(self) -> None:
        """Notes that a step is whole, with all that belongs to it."""
        self.moment = Moment(
            step=self.state.global_step,
            random=random_states(),
            loss=self._tr_loss.clone(),
            logged=self._globalstep_last_logged,
            total_loss=self._total_loss_scalar,
            tokens=int(self.state.num_input_tokens_seen),
            operations=float(self.state.total_flos + self.current_flos * self.ranks.count),
        )
        self.updating = False

    # resuming

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The weights of a checkpoint, from safetensors alone."""
        folder = Path(resume_from_checkpoint)
        if is_sharded(self.model):
            if model is None:  # else the Trainer's call behind its sharding, before which `train` has loaded it
                load_shards(self.model, folder)
            return
        if (folder / ADAPTER_WEIGHTS).is_file():
            self.model.load_adapter(folder, self.model.active_adapters[0], is_trainable=True)
            return
        found: set[str] = set()
        for shard in sorted(folder.glob("model*.safetensors")):
            state = load_file(shard)
            found |= state.keys()
            self.model.load_state_dict(state, strict=False)
        missing = {name for name, weight in self.model.named_parameters() if weight.requires_grad} - found
        if missing:
            raise CheckpointError(f"{folder} has no {min(missing)}: remove it to go on from the one before it")

    def _load_best_model(self) -> None:
        """The weights of the best checkpoint, at the end of a training."""
        if fault := mend_best(self.state, self.args, self.ranks):
            best = Path(self.state.best_model_checkpoint or "the last step").name
            _log.warning("%s (the best weights of this run); ending with the best that are left, of %s", fault, best)
        if self.state.best_model_checkpoint:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Their states."""
        if checkpoint is not None:
            self.optimizer.load_state_dict(sharded_as(self.optimizer, read_state(Path(checkpoint), "optimizer")))
            self.lr_scheduler.load_state_dict(read_state(Path(checkpoint), "scheduler"))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """The state of float16's gradient scaler."""
        if checkpoint is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(read_state(Path(checkpoint), "scaler"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The random states, right before the first step."""
        if checkpoint is not None:
            kept = self._own_state(Path(checkpoint))
            if kept is not None:
                set_random_states(kept["random"])

    def _own_state(self, checkpoint: Path) -> dict[str, Any] | None:
        """What this rank left behind; None where the checkpoint is one of fewer ranks."""
        name = f"rank-{self.ranks.rank}"
        return read_state(checkpoint, name) if (checkpoint / f"{name}.json").is_file() else None

    def begin(self) -> None:
        """Before the first step: goes on with the sums of the loss and with what callbacks had counted and decided, and
        makes up for an evaluation that was cut off.
        """
        if self._resumed is None:
            return
        self.args.eval_on_start = False  # that was before the first step
        self._take_up_callbacks()
        if best := read_manifest(self._resumed).get("best"):
            self.state.best_model_checkpoint = self._path_of(best)
            mend_best(self.state, self.args, self.ranks)  # was told when this checkpoint was chosen
        kept = self._own_state(self._resumed) or read_state(self._resumed, "rank-0")  # sums are the same on all ranks
        self._tr_loss += kept["loss"].to(self._tr_loss.device)
        self._globalstep_last_logged, self._total_loss_scalar = kept["logged"], kept["total_loss"]
        if self._owes_evaluation():
            self.control.should_evaluate = True
            self.control.should_save = self._is_due(self.args.save_strategy, self.state.save_steps)
            nothing = dict.fromkeys(("grad_norm", "trial", "ignore_keys_for_eval"))
            self._maybe_log_save_evaluate(
                self._tr_loss, model=self.model, epoch=self.state.epoch, start_time=0.0, **nothing
            )

    def _take_up_callbacks(self) -> None:
        """What callbacks had counted, early stopping its validations without a better score, and whether one of them
        has ended the run; what the Trainer itself can restore would also save and log again.
        """
        held = self.state.stateful_callbacks
        for one in self.callback_handler.callbacks:
            if isinstance(one, ExportableState) and isinstance(state := held.get(type(one).__name__), dict):
                vars(one).update(state["attributes"])
        control = held.get(type(self.control).__name__, {}).get("args", {})
        self.control.should_training_stop = control.get("should_training_stop", False)

    def _owes_evaluation(self) -> bool:
        """Whether the step of the checkpoint is one that is evaluated after, and was not."""
        state, args = self.state, self.args
        if any("eval_loss" in line for line in state.log_history if line["step"] == state.global_step):
            return False
        done = state.global_step if args.eval_strategy == IntervalStrategy.STEPS else state.epoch
        return self._is_due(args.eval_strategy, state.eval_steps) and done >= args.eval_delay

    def _is_due(self, strategy: str, every: int) -> bool:
        """Whether something that is done at "steps" or behind an "epoch" is so at this step; at the last one both are.

        Example: steps of 2 -> at steps 2 and 4, and at step 5 of 5.
        """
        state = self.state
        at_steps = every > 0 and state.global_step % every == 0
        whole = at_steps if strategy == "steps" else state.epoch == int(state.epoch)
        return strategy in ("steps", "epoch") and (whole or state.global_step >= state.max_steps)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """One epoch; nothing where all steps are done, of which the Trainer would do one more in a begun epoch,
        and where a callback has ended the run before.
        """
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    # stopping

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """What follows a step, which is whole then."""
        self.signals.hold()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.remember()
        if self.ranks.several:
            self._stop_together()
        else:
            self.signals.release()

    def _stop_together(self) -> None:
        """Raises: Interrupted on all ranks when a signal came to one; between two steps alone ranks can stop alike."""
        received = int(self.ranks.most([self.signals.received or 0])[0])
        if received:
            raise Interrupted(received)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """An evaluation: can be stopped, and draws no random number that the training would draw."""
        self.remember()
        with contextlib.nullcontext() if self.ranks.several else self.signals.open(), _same_random_numbers():
            return super()._evaluate(*args, **kwargs)


class _Updates(TrainerCallback):
    """Tells the trainer of what the Trainer tells callbacks alone."""

    def __init__(self, trainer: DurableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Sums are zero by now, and steps are still to come."""
        self.trainer.begin()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """From here to the end of the step weights, optimiser and counters belong together."""
        self.trainer.signals.hold()
        self.trainer.updating = True


@contextlib.contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Behind this context random generators are where they were before it."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)
