"""transformers' Trainer with checkpoints that survive, and with what our steps promise.

A step is N samples and its loss the mean over all their trained tokens, however they are cut into micro-batches; logits
are computed at trained positions only; the validation loss is a mean over tokens too, whatever the batch size. For the
Trainer a step is one batch of N samples without accumulation: the loader's item is the list of its micro-batches, of
which packing makes now more, now fewer. A step that does not fit into memory is done again in smaller micro-batches;
one whose loss or gradient is no number changes nothing. `durable_trainer` changes how the Trainer saves and resumes.
"""

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import EvalLoopOutput

from phi3v.data.collate import StepCollator
from phi3v.errors import TrainingError
from phi3v.evaluation.row_scores import Groups
from phi3v.evaluation.validation_loss import ValidationLoss
from phi3v.passthrough import first_line
from phi3v.training.durable_trainer import DurableTrainer
from phi3v.training.in_step import InStep
from phi3v.training.loader_watch import WatchedWorkers, taking_over
from phi3v.training.master_weights import precise_state, shorten_weights, step_masters
from phi3v.training.meter import Meter, contents
from phi3v.training.module_walks import short_walks
from phi3v.training.part_rates import set_part_rates
from phi3v.training.sampling import EvenSamples, WholeSteps, epoch_order
from phi3v.training.shards import keep_sums_precise, shard_on_cpus, whole_number
from phi3v.training.state_files import random_states, set_random_states
from phi3v.training.step_faults import NonFinite, is_out_of_memory, largest, note_halvings

ANEW = "in another output, which begins a new run"
"""Behind settings that a begun run refuses."""
_LESS_MEMORY = "set training.activation_checkpointing: true, a smaller image.max_tokens or data.max_length"
_SMALLER = f"{_LESS_MEMORY}, a smaller training.micro_batch_size, or quantization, {ANEW}"
_OF_A_STREAM = f"the samples of a stream at a time: {_SMALLER}"
MicroBatch = dict[str, Any]
"""Arguments of the model's `forward`."""


class StepTrainer(DurableTrainer):
    """The Trainer of phi3v.

    The labels of all micro-batches of a step are counted (`num_items_in_batch`) and the count is handed to the model,
    whose loss is then a sum divided by it; gradients of micro-batches add up to those of one large batch.

    With `short_dtype` the weights that train compute in it, see `master_weights`.
    """

    is_fsdp_enabled: bool
    label_smoother: Any  # the Trainer's; away while held-out rows are looked at

    def __init__(
        self,
        *,
        step_collator: StepCollator,
        short_dtype: torch.dtype | None = None,
        non_finite: NonFinite | None = None,
        part_rates: Mapping[str, float] | None = None,
        answer: Callable[[Any, int], dict[str, float]] | None = None,
        meter: Meter | None = None,
        held_out_groups: Groups | None = None,
        **arguments: Any,
    ) -> None:
        """A Trainer.

        Args:
            step_collator: makes the micro-batches of a step out of its samples.
            short_dtype: what weights that train compute in; None for their own.
            non_finite: what happens to a step whose loss or gradient is no number; None stops.
            part_rates: learning rates by part of the model, see `part_rates`.
            answer: called with the model and the step at each validation; its scores are validation metrics.
            meter: told of each step's samples, tokens and pictures.
            held_out_groups: which validation rows are about the same images; None where each stands for itself.
            **arguments: the Trainer's own; its `data_collator` makes validation batches.
        """
        super().__init__(**arguments)
        self.in_step = InStep(self.ranks, self.model) if self.is_fsdp_enabled else None
        self.step_collator = step_collator
        self.non_finite = non_finite or NonFinite()
        self.workers, self.eval_workers = (WatchedWorkers(self.args.dataloader_num_workers) for _ in range(2))
        self.short_dtype = short_dtype
        self.part_rates, self.answer, self.meter = part_rates or {}, answer, meter or Meter()
        self.masters: dict[str, torch.nn.Parameter] = {}
        self.held_out_groups, self._validated, self.validating = held_out_groups, ValidationLoss(), False

    def create_accelerator_and_postprocess(self) -> None:
        """accelerate as the arguments ask for it; FSDP2 on CPUs too, which it knows but takes up on GPUs alone."""
        before = os.environ.get("ACCELERATE_USE_FSDP")
        super().create_accelerator_and_postprocess()
        if before is None:  # accelerate says so itself, and would shard the next model of this process by FSDP1
            os.environ.pop("ACCELERATE_USE_FSDP", None)
        if self.args.fsdp and not self.is_fsdp_enabled:
            shard_on_cpus(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled:
            keep_sums_precise(self.accelerator)

    def _get_num_items_in_batch(self, *arguments: Any) -> Any:
        """Trained tokens of a validation batch; of several ranks each has its own mean, see `evaluation_loop`."""
        return None if self.ranks.several else super()._get_num_items_in_batch(*arguments)

    def train(self, *arguments: Any, **named: Any) -> Any:
        """The training, and the end of what watches its loader workers."""
        walks = contextlib.nullcontext() if self.ranks.several else short_walks(self.model)
        with self.workers, self.eval_workers, walks:
            return super().train(*arguments, **named)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """What the Trainer logs, as the meter counts samples, over all steps of a run that went on."""
        mean = getattr(self, "_total_loss_scalar", 0.0) / max(self.state.global_step, 1)
        super().log(self.meter.measured(logs, mean), *args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimiser, over float32 masters where weights compute in a shorter type.

        A checkpoint's weights, which are masters, are in the model by now.
        """
        if self.optimizer is not None:
            return super().create_optimizer(model)
        if self.short_dtype is not None:
            self.masters = shorten_weights(self.model, self.short_dtype)
        optimizer = super().create_optimizer(model)
        if self.part_rates:
            set_part_rates(optimizer, self.model, self.part_rates)
        if self.masters:
            step_masters(optimizer, self.model, self.masters)
        return optimizer

    def _prepare_input(self, data: Any) -> Any:
        """What the Trainer sends to the device; pinned tensors go while the device computes."""
        if isinstance(data, torch.Tensor) and data.is_pinned():
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def precise_state(self) -> dict[str, Any] | None:
        """What to save of the model: its masters where it has some, None to save it as it is."""
        return precise_state(self.model, self.masters)

    def save_weights(self, folder: Path, state_dict: dict | None = None) -> None:
        """Writes the weights in full precision."""
        super().save_weights(folder, self.precise_state() if state_dict is None else state_dict)

    def _get_train_sampler(self, train_dataset: Any = None) -> WholeSteps:
        """Whole steps, in an order that depends on seed and epoch alone; accelerate gives each rank its share of one.

        Example: steps of 4 samples on 2 ranks, order 3, 0, 4, 1, ... -> the first rank has 3 and 0, the second 4 and 1.
        """
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return WholeSteps(len(dataset), self.samples_per_step, self.args.seed)

    @property
    def samples_per_step(self) -> int:
        """Samples of a step, over all ranks."""
        return self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.ranks.count

    def get_train_dataloader(self) -> Any:
        """The Trainer's loader, whose items are steps; that of a stream draws its seed apart from the random state that
        a checkpoint keeps: a resumed run sets that state first, and its loader, made then, would draw from it again."""
        collate: Any = getattr(self, "data_collator")  # noqa: B009 -- set by the class above, unseen by mypy
        samples: Any = getattr(self, "train_dataset")  # noqa: B009 -- the same
        self.data_collator, self.train_dataset = self.step_collator, self.workers.samples(samples)
        try:
            loader: Any = self.workers.over(super().get_train_dataloader())
        finally:
            self.data_collator, self.train_dataset = collate, samples
        loader.device = None  # a micro-batch goes to the device at its turn, not two whole steps of pixels
        if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            inner = getattr(loader, "base_dataloader", loader)  # accelerate puts its own around torch's
            inner.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one step, as the only batch of it, and the number of their trained tokens.

        Raises:
            TrainingError: nothing in the step is to be learned.
        """
        self.workers.wait()
        with taking_over():
            steps, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.workers.got()
        micro_batches = [micro_batch for step in steps for micro_batch in step]
        trained = sum(len(one["trained_positions"]) for one in micro_batches)
        size = sum(one["input_ids"].numel() for one in micro_batches)
        trained, self._size, *seen = (int(it) for it in self.ranks.totals([trained, size, *contents(micro_batches)]))
        with self.ranks.together():
            if micro_batches and not trained:
                step = self.state.global_step + 1
                raise TrainingError(f"step {step} has no trained token: every answer in it is empty, see data.answer")
        self.meter.add(*seen)
        if self.in_step is not None:
            steps = [self.in_step.evened(micro_batches)]
        return steps, trained

    def training_step(self, model: Any, inputs: list[MicroBatch], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of all micro-batches of a step; the sum of their losses, which is the step's.

        A step that does not fit into memory begins again, with the same samples and random numbers, in micro-batches of
        half the size, and so do those behind it.
        Ranks begin again together. Their gradients are averaged behind the last micro-batch, so one may have more of
        them than another, or none with a picture.

        Raises: TrainingError when not even single samples fit.
        """
        self._before = (random_states(), self._tr_loss.clone())
        with contextlib.nullcontext() if self.in_step is not None else self.accelerator.no_sync(model):
            while (loss := self._all(model, inputs, num_items_in_batch)) is None:
                model.zero_grad()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                with taking_over():
                    inputs[:] = self._smaller(len(inputs))
                set_random_states(self._before[0])
        if self.ranks.several:
            if self.in_step is None:
                self.ranks.average([weight for weight in model.parameters() if weight.requires_grad])
            loss = loss.new_tensor(self.ranks.totals([float(loss)])[0] / self.ranks.count)
        self._step_loss = loss
        return loss

    def _all(self, model: Any, inputs: list[MicroBatch], num_items_in_batch: Any) -> torch.Tensor | None:
        """The loss of all micro-batches; None where they do not fit into memory, on this rank or on another."""
        self._reason = ""
        try:
            loss = torch.stack([self._one(model, one, num_items_in_batch) for one in inputs]).sum()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._reason = first_line(error)
        if self.in_step is not None and self._reason:
            raise TrainingError(f"{self._no_memory()}: {_SMALLER} (a model that is sharded cannot begin a step again)")
        # what the error held is free from here on
        if self.in_step is None and self.ranks.any(bool(self._reason)):
            return None
        return loss

    def _one(self, model: Any, micro_batch: MicroBatch, num_items_in_batch: Any) -> torch.Tensor:
        """One micro-batch; between two of them a run can be stopped."""
        self.signals.check()
        if self.in_step is not None:
            self.in_step.next()
        return super().training_step(model, micro_batch, num_items_in_batch)

    def _smaller(self, micro_batches: int) -> list[MicroBatch]:
        """The samples of the step that is being done in micro-batches of half the size, on all ranks."""
        share = self.args.per_device_train_batch_size
        rows = self.rows_of_step(self.state.global_step + 1)[self.ranks.rank * share :][:share]
        samples = [self.train_dataset[row] for row in rows]
        with self.ranks.together():
            if self._reason:
                self._halve(samples, micro_batches)
        halvings = int(self.ranks.most([int(self.step_collator.halvings)])[0])
        self.step_collator.halvings.fill_(halvings)
        note_halvings(self.facts, halvings, self.state.global_step + 1, tell=self.ranks.first)
        return self.step_collator(samples)

    def _halve(self, samples: list[Any], micro_batches: int) -> None:
        """Halves until there are more micro-batches: one that was loaded in advance may be larger than they are now.

        Raises: TrainingError where each sample is one already.
        """
        while not samples or len(self.step_collator(samples)) <= micro_batches:
            if not samples or self.step_collator.is_single(samples):
                what = f"one sample at a time: {_LESS_MEMORY}, or quantization, {ANEW}"
                raise TrainingError(f"{self._no_memory()} with {what if samples else _OF_A_STREAM}")
            self.step_collator.halve()

    def _no_memory(self) -> str:
        """What happened, as the beginning of a line."""
        return f"out of memory at step {self.state.global_step + 1} ({self._reason})"

    def rows_of_step(self, step: int) -> list[int]:
        """Row numbers of the samples of a step, counted from 1; none in a stream, whose rows are not numbered.

        Example: step 4 of 5 rows in steps of 2 is the first one of the second epoch.
        """
        if isinstance(self.train_dataset, torch.utils.data.IterableDataset):
            return []
        count, samples = len(self.train_dataset), self.samples_per_step
        epoch, place = divmod(step - 1, -(-count // samples))
        return epoch_order(count, samples, self.args.seed, epoch)[place * samples : (place + 1) * samples]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The gradient norm, of a step that may be applied. Raises: TrainingError when it or the loss is no number,
        unless such steps are left out, or when weights are none."""
        norm = whole_number(super()._get_grad_norm(model, grad_norm=grad_norm))
        fault = self.non_finite.fault(self._step_loss, norm, self.accelerator.scaler)
        self.optimizer._is_overflow = fault is not None  # accelerate's word for an update that was left out
        if fault is None:
            return norm
        self.check_weights()  # if the update before has spoilt them, these rows have not
        step = self.state.global_step + 1
        weight = self.ranks.most([largest(one for one in model.parameters() if one.requires_grad)])[0]
        with self.ranks.together():  # all of them have found the same
            self.non_finite.judge(fault, step, self.rows_of_step(step), self.saved, weight)
        model.zero_grad()  # the optimiser passes over weights without a gradient
        states, loss = self._before
        set_random_states(states)
        self._tr_loss.copy_(loss)
        self._globalstep_last_logged += 1  # so the mean of the losses is one over the other steps
        return None

    def floating_point_ops(self, inputs: list[MicroBatch]) -> int:
        """Operations of a step, as the Trainer estimates them; of several ranks what one did on average."""
        if self.ranks.several:
            return super().floating_point_ops({"input_ids": torch.empty(self._size, device="meta")}) // self.ranks.count
        return sum(super(StepTrainer, self).floating_point_ops(one) for one in inputs)

    def _track_num_input_tokens(self, inputs: list[MicroBatch]) -> None:
        """Counts the tokens of a step. They have no mask: a pack has no padding, elsewhere it repeats a position."""
        masks = []
        for one in inputs[: len(inputs) - (self.in_step.idle if self.in_step else 0)]:
            mask = torch.ones_like(one["input_ids"])
            if "cu_seqlens" not in one:
                mask[:, 1:] = one["position_ids"].diff(dim=1)
            masks.append(mask.flatten())
        flat = torch.cat(masks)
        super()._track_num_input_tokens({"attention_mask": flat, "input_ids": flat})

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own loss, or the smoothed one."""
        result = self._loss(model, inputs, *args, **kwargs)
        if isinstance(result, tuple):  # with outputs: of a validation batch
            self._validated.see(result[1]["logits"], inputs["labels"])
            return result
        return 0 * result if self.in_step is not None and not self.in_step.counts else result

    def _loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of a micro-batch; one of the caller's needs all logits, the model's own only some."""
        if self.compute_loss_func is None and self.label_smoother is not None:
            return self._smoothed_loss(model, inputs, *args, **kwargs)
        if self.compute_loss_func is not None:
            inputs = {name: value for name, value in inputs.items() if name != "trained_positions"}
        elif "trained_positions" not in inputs:
            inputs = {**inputs, "trained_logits_only": True}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _smoothed_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's label smoother at trained positions, where each logit is beside the token behind it.

        Example: labels [[-100, 7, 8]] -> logits of positions 0 and 1 against 7 and 8.
        """
        positions, labels = inputs.get("trained_positions"), inputs["labels"]
        if positions is None:
            inputs = {**inputs, "trained_logits_only": True}
            targets = labels[:, 1:][labels[:, 1:] != -100]
        else:
            targets = labels.flatten().index_select(0, positions + 1)
        outputs = model(**inputs)
        logits = {"logits": outputs["logits"].float()}
        loss = self.label_smoother(logits, targets, num_items_in_batch=num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.ranks.count  # as the Trainer's own: gradients become means over ranks
        return (loss, outputs) if return_outputs else loss

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The Trainer's loader of validation rows, whose workers are watched too."""
        samples: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.ranks.several:
            samples = EvenSamples(samples, self.args.per_device_eval_batch_size * self.ranks.count)
        return self.eval_workers.over(super().get_eval_dataloader(self.eval_workers.samples(samples)))

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """One validation batch, noted with its number of trained tokens."""
        self.eval_workers.got()
        if self.in_step is not None:
            self.in_step.alone(inputs)
        result = super().prediction_step(model, inputs, *args, **kwargs)
        self._validated.add(float(result[0]), inputs["labels"])
        self.eval_workers.wait()
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The Trainer's loop; its loss, a mean of batch means, becomes the mean over all trained tokens."""
        self._validated, self.validating = ValidationLoss(self.held_out_groups), True
        self.eval_workers.wait()
        smoother, self.label_smoother = self.label_smoother, None  # so held-out losses are on one scale
        with taking_over():
            output = super().evaluation_loop(*args, **kwargs)
        self.label_smoother = smoother
        self.eval_workers.got()
        name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if name in output.metrics:
            output.metrics.update(self._validated.metrics(name, self.ranks))
        if self.in_step is not None:
            self.in_step.leave()
        if self.answer is not None:
            scores = self.answer(self.accelerator.unwrap_model(self.model), self.state.global_step)
            output.metrics.update({f"{name[:-4]}{key}": value for key, value in scores.items()})
        if self.is_in_train:
            self.signals.hold()  # its line, what callbacks count of it and which step is the best belong together
        self.validating = False
        return output
