"""transformers' Trainer, with what our steps promise.

A step is N samples and its loss the mean over all their trained tokens, however they are cut into micro-batches; logits
are computed at trained positions only; the validation loss is a mean over tokens too, whatever the batch size. For the
Trainer a step is one batch of N samples without accumulation: the loader's item is the list of its micro-batches, of
which packing makes now more, now fewer. Nothing else of the Trainer is changed.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from phi3v.errors import TrainingError
from phi3v.training.master_weights import precise_state, shorten_weights, step_masters
from phi3v.training.meter import Meter
from phi3v.training.part_rates import set_part_rates
from phi3v.training.sampling import WholeSteps

MicroBatch = dict[str, Any]
"""Arguments of the model's `forward`."""


class StepTrainer(Trainer):
    """The Trainer of phi3v.

    The labels of all micro-batches of a step are counted (`num_items_in_batch`) and the count is handed to the model,
    whose loss is then a sum divided by it; gradients of micro-batches add up to those of one large batch.

    With `short_dtype` the weights that train compute in it, see `master_weights`.
    """

    def __init__(
        self,
        *,
        step_collator: Callable[[list[Any]], list[MicroBatch]],
        short_dtype: torch.dtype | None = None,
        part_rates: Mapping[str, float] | None = None,
        answer: Callable[[Any, int], dict[str, float]] | None = None,
        meter: Meter | None = None,
        **arguments: Any,
    ) -> None:
        """A Trainer.

        Args:
            step_collator: makes the micro-batches of a step out of its samples.
            short_dtype: what weights that train compute in; None for their own.
            part_rates: learning rates by part of the model, see `part_rates`.
            answer: called with the model and the step at each validation; its scores are validation metrics.
            meter: told of each step's samples and tokens.
            **arguments: the Trainer's own; its `data_collator` makes validation batches.
        """
        super().__init__(**arguments)
        self.step_collator: Any = step_collator
        self.short_dtype = short_dtype
        self.part_rates, self.answer, self.meter = part_rates or {}, answer, meter or Meter()
        self.masters: dict[str, torch.nn.Parameter] = {}

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

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """A checkpoint's weights, in full precision."""
        super()._save(output_dir, self.precise_state() if state_dict is None else state_dict)

    def _get_train_sampler(self, train_dataset: Any = None) -> WholeSteps:
        """Whole steps, in an order that depends on seed and epoch alone."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        samples = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return WholeSteps(len(dataset), samples, self.args.seed)

    def get_train_dataloader(self) -> Any:
        """The Trainer's loader, whose items are steps; that of a stream draws its seed apart from the random state
        that a checkpoint keeps: a resumed run sets that state first and makes its loader then, which would draw from it
        once more.
        """
        collate: Any = getattr(self, "data_collator")  # noqa: B009 -- set by the class above, unseen by mypy
        self.data_collator = self.step_collator
        try:
            loader: Any = super().get_train_dataloader()
        finally:
            self.data_collator = collate
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
        steps, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        micro_batches = [micro_batch for step in steps for micro_batch in step]
        if micro_batches and not any(len(one["trained_positions"]) for one in micro_batches):
            raise TrainingError(
                f"step {self.state.global_step + 1} has no trained token: every answer in it is empty, see data.answer"
            )
        self.meter.add(micro_batches)
        if self.args.world_size == 1:  # known here: the device is not asked
            return steps, sum(len(one["trained_positions"]) for one in micro_batches)
        return steps, self._get_num_items_in_batch(micro_batches, device)

    def training_step(self, model: Any, inputs: list[MicroBatch], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward of all micro-batches of a step; the sum of their losses, which is the step's."""
        losses = [super(StepTrainer, self).training_step(model, one, num_items_in_batch) for one in inputs]
        return torch.stack(losses).sum()

    def floating_point_ops(self, inputs: list[MicroBatch]) -> int:
        """Operations of a step, as the Trainer estimates them."""
        return sum(super(StepTrainer, self).floating_point_ops(one) for one in inputs)

    def _track_num_input_tokens(self, inputs: list[MicroBatch]) -> None:
        """Counts the tokens of a step. They have no mask: a pack has no padding, elsewhere it repeats a position."""
        for one in inputs:
            mask = torch.ones_like(one["input_ids"])
            if "cu_seqlens" not in one:
                mask[:, 1:] = one["position_ids"].diff(dim=1)
            super()._track_num_input_tokens({"attention_mask": mask, **one})

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own loss, or the smoothed one; a loss of the caller's needs all logits, these only some."""
        if self.compute_loss_func is None and self.label_smoother is not None:
            return self._smoothed_loss(model, inputs, *args, **kwargs)
        if self.compute_loss_func is not None:
            inputs = {name: value for name, value in inputs.items() if name != "trained_positions"}
        elif "trained_positions" not in inputs:
            inputs = {**inputs, "trained_logits_only": True}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _smoothed_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
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
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """One validation batch, noted with its number of trained tokens."""
        known = inputs.get("trained_positions")
        tokens = int((inputs["labels"][:, 1:] != -100).sum()) if known is None else len(known)
        result = super().prediction_step(model, inputs, *args, **kwargs)
        self._evaluated.append((float(result[0]) * tokens, tokens))
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The Trainer's loop; its loss, a mean of batch means, becomes the mean over all trained tokens."""
        self._evaluated: list[tuple[float, int]] = []
        output = super().evaluation_loop(*args, **kwargs)
        name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if name in output.metrics:
            total = sum(loss for loss, _ in self._evaluated)
            output.metrics[name] = total / max(sum(tokens for _, tokens in self._evaluated), 1)
        if self.answer is not None:
            prefix = name.removesuffix("loss")
            scores = self.answer(self.accelerator.unwrap_model(self.model), self.state.global_step)
            output.metrics.update({f"{prefix}{key}": value for key, value in scores.items()})
        return output
