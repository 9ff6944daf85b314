"""`train(recipe)`: from a recipe to a run with tuned weights, in about ten calls in time order.

In comes a `Recipe`, out comes a `RunResult`; all files go through `RunFolder`. The same call again goes on from the
newest complete checkpoint, or says that the run is finished. What there is to show goes to `on_event`.
"""

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from phi3v.data.plan import MicroBatches
from phi3v.data.sources import LoadedData, StreamedData
from phi3v.errors import TrainingError
from phi3v.evaluation.image_groups import image_groups
from phi3v.evaluation.report_run import write_curve, write_report
from phi3v.evaluation.run import evaluate, feature_store, held_out_rows
from phi3v.features.store import FeatureStore
from phi3v.first_look import RowUse
from phi3v.kernels.lora_layer import FastLoraState, fast_lora_state
from phi3v.loading import load_processor, resolve_dtype
from phi3v.machine import most_memory
from phi3v.ranks import ALONE, Ranks
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder
from phi3v.targets import resolve_target
from phi3v.training.arguments import library_errors, training_arguments
from phi3v.training.best_weights import has_whole_weights, kept_weights
from phi3v.training.callbacks import TrainingEvent, Watcher
from phi3v.training.checkpoints import checkpoint_step, newest_checkpoint
from phi3v.training.conditions import conditions_of, facts_of, keep_metrics, note_begun
from phi3v.training.disk_space import full_disk, warn_of_space
from phi3v.training.doctor import check_base, check_first_batch
from phi3v.training.faster_layers import check_faster_layers, step_line, use_faster_layers, without_effect
from phi3v.training.memory_plan import adopt, settle
from phi3v.training.meter import Meter
from phi3v.training.optimiser_checks import check_optimiser
from phi3v.training.preflight import check_recipe_alone, check_upload
from phi3v.training.prepare import Prepared, check_layout, join_ranks, prepare_model, training_device
from phi3v.training.run_faults import one_line_at_the_end, one_line_faults
from phi3v.training.run_result import RunResult, last_losses
from phi3v.training.samples import facts_of_samples, make_collators, make_samples, read_data, shortest_sample
from phi3v.training.step_faults import refuse_untrained
from phi3v.training.step_trainer import StepTrainer
from phi3v.training.stop_signals import StopSignals
from phi3v.training.trackers import log_predictions
from phi3v.training.watching import kept_event, non_finite, run_callbacks, run_trackers, sample_answers, steps_left_out
from phi3v.tuning import TrainableReport, trainable_report


def train(
    recipe: Recipe | str | Path,
    *,
    on_event: Watcher | None = None,
    features: FeatureStore | None = None,
    report: bool = True,
) -> RunResult:
    """Tunes a model as the recipe says.

    At the end held-out rows are answered by base and tuned model, and the run's report is written. A run that is
    trained and then called with another `evaluation` or `report` does that part again, and trains nothing. A finished
    run whose tuned weights are gone or damaged goes on from its newest checkpoint.

    Args:
        recipe: everything about the run, or the path of a recipe file.
        on_event: called with a `TrainingEvent` at the start, after each step, and when losses are known.
        features: where the features of frozen vision parts are kept if the recipe keeps them (vision.cache), for
            several runs in this process to share; None opens what the recipe names.
        report: False answers no held-out rows at the end and writes no report; the same call with True does it later.

    Returns:
        What was done; the tuned weights are in `adapter/` of the run, or in `model/` when the whole model was tuned.

    Raises:
        ConfigError, DataError, CheckpointError, DeviceError, MissingPackageError: before the first step, in one line;
            the run's folder is made when all of it has been checked.
        TrainingError: there is nothing to train, a loss is not finite, disk or memory are full.
        Interrupted: SIGTERM or Ctrl-C came; the last whole step is saved, and the same call goes on behind it.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    ranks = join_ranks(recipe)
    watch = on_event if on_event and ranks.first else lambda event: None
    with ranks.together():
        recipe = adopt(recipe, run := RunFolder(recipe.output))
        check_recipe_alone(recipe)
        store = feature_store(recipe, features)
    with StopSignals(patient=ranks.several) as signals, _locked(run, ranks):
        if ranks.told(lambda: run.look(recipe) == "finished" and has_whole_weights(run)):
            ranks.alone(lambda: run.start(recipe))
            result = RunResult.of_finished(run)
        else:
            ranks.alone(lambda: check_upload(recipe))
            result = _tune(recipe, run, watch, store, ranks, signals=signals)
            ranks.alone(lambda: run.mark_finished({**result.to_dict(), "memory_gib": most_memory() / 2**30}))
        ranks.leave()
        with one_line_at_the_end(run.path):
            _report(run, result, watch, store) if ranks.first and report else None
    return result


@contextlib.contextmanager
def _locked(run: RunFolder, ranks: Ranks) -> Iterator[None]:
    """Locks a run that is there, one that is new when its folder is made; nothing is locked behind this context."""
    try:
        ranks.alone(lambda: run.lock.take() if RunFolder.is_run(run.path) else None)
        yield
    finally:
        run.lock.give_back()


def _report(run: RunFolder, result: RunResult, watch: Watcher, store: FeatureStore | None) -> None:
    """Answers and scores the held-out rows and writes the report, whatever of it is not there."""
    answered = not result.held_out or (run.evaluation.is_file() and run.predictions.is_file())
    if run.report.is_file() and answered:
        write_curve(run)
        return
    if answered:
        write_report(run, held_out_rows(resolve_target(run.path), None, None).rows if result.held_out else [])
    else:
        release_memory()
        evaluate(
            run.path,
            against=run.read_recipe().evaluation.against,
            on_progress=lambda stage, done, total: watch(TrainingEvent("answers", done, total, stage=stage)),
            features=store,
            ranks=ALONE,
            lock=False,  # which this process holds
        )
    log_predictions(run)


def train_watched(
    recipe: Recipe, callbacks: Sequence[TrainerCallback], *, on_event: Watcher | None = None
) -> RunResult:
    """Trains as `train` does in a new folder, with callbacks of the Trainer beside ours, and writes no report."""
    check_recipe_alone(recipe)
    store, run = feature_store(recipe, None), RunFolder(recipe.output)
    with _locked(run, Ranks()):
        return _tune(recipe, run, on_event or (lambda event: None), store, Ranks(), callbacks)


def _tune(
    recipe: Recipe,
    run: RunFolder,
    watch: Watcher,
    store: FeatureStore | None,
    ranks: Ranks,
    callbacks: Sequence[TrainerCallback] = (),
    signals: StopSignals | None = None,
) -> RunResult:
    """Trains from the start or from the newest checkpoint, and writes the tuned weights."""
    device = training_device(recipe.model.device)
    newest = ranks.told(lambda: str(newest_checkpoint(run.checkpoints) or ""))
    checkpoint = Path(newest) if newest else None
    done = checkpoint_step(checkpoint) if checkpoint else None
    with ranks.together():  # what is wrong with options is told before rows are read
        training_arguments(recipe, run, device=device, autocast=None, validated=True, ranks=ranks.count)
        check_faster_layers(recipe, device)
        set_seed(recipe.training.seed)
        processor = load_processor(recipe.model.name, revision=recipe.model.revision, **recipe.image.processor_options)
        check_layout(recipe)
        data = _usable_data(recipe, processor, watch)
    if recipe.automatic:
        recipe = Recipe.from_dict(ranks.told(lambda: settle(recipe, data, processor, device).model_dump()))
    with ranks.together():
        prepared = prepare_model(recipe, device, checkpoint)
        model = prepared.model
        check_base(model, recipe)
        _refuse_idle_training(report := trainable_report(model))
        written = fast_lora_state(model)  # of a layer that is compiled no other reason is known
        dtype = resolve_dtype(recipe.model.dtype, device)
        validated, autocast = bool(data.validation), prepared.autocast
        arguments = training_arguments(
            recipe, run, device=device, autocast=autocast, validated=validated, ranks=ranks.count
        )
        conditions = conditions_of(data, recipe, prepared.base, device, dtype, arguments.metric_for_best_model)
        facts = facts_of(checkpoint, conditions, ranks.count)
        check_optimiser(arguments, model, recipe, data.train)
    ranks.alone(
        lambda: _begin(run, recipe, data, None if checkpoint else facts["conditions"])
    )  # nothing was written so far
    with ranks.together():
        trainer = _trainer(
            recipe, run, data, processor, prepared, arguments, report, store, watch, ranks, done, facts, signals
        )
        for callback in callbacks:
            trainer.add_callback(callback)
    if ranks.first:
        warn_of_space(run, report.trainable, arguments.save_total_limit, best=bool(arguments.load_best_model_at_end))
        keep_metrics(run, checkpoint)
    began = time.monotonic()
    with one_line_faults(trainer, run.path):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        ranks.alone(lambda: refuse_untrained(steps_left_out(run), trainer.state.global_step))
        _save(run, recipe, trainer, processor)
    seconds = time.monotonic() - began
    known = {"held_out": len(data.validation or []), "samples": facts_of_samples(data)}
    known["kept"] = kept_weights(trainer.state, arguments, recipe.training.early_stopping)
    return _result(run, trainer, report, written, seconds, resumed_from=done, **known)


def _begin(run: RunFolder, recipe: Recipe, data: LoadedData | StreamedData, conditions: dict[str, Any] | None) -> None:
    """Makes the run's folder, or opens it, with the rows that are left out; conditions are of a run that begins."""
    with full_disk(run.path):
        run.start(recipe)
        run.write_problems((asdict(problem) for problem in data.problems), anew=conditions is not None)
        if conditions is not None:
            note_begun(run, conditions)


def _trainer(
    recipe: Recipe,
    run: RunFolder,
    data: LoadedData | StreamedData,
    processor: Any,
    prepared: Prepared,
    arguments: TrainingArguments,
    report: TrainableReport,
    store: FeatureStore | None,
    watch: Watcher,
    ranks: Ranks,
    done: int | None,
    facts: dict[str, Any],
    signals: StopSignals | None,
) -> StepTrainer:
    """The Trainer of a run with its samples, ready for its first step."""
    model, device = prepared.model, training_device(recipe.model.device)
    train_samples, eval_samples = _samples(recipe, run, data, processor, prepared, done or 0, store, watch)
    step_collator, eval_collator = make_collators(recipe, data, processor)
    step_collator.halvings.fill_(facts["halvings"])
    _use_faster_layers(model, recipe, device, step_collator.micro_batches, data, watch)
    check_first_batch(train_samples, step_collator, processor)
    meter, trackers = Meter(), run_trackers(recipe, run, ranks, done or 0)
    trainer = _make_trainer(
        model=model,
        args=arguments,
        step_collator=step_collator,
        data_collator=eval_collator,
        train_dataset=train_samples,
        eval_dataset=eval_samples if data.validation else None,
        callbacks=[*run_callbacks(recipe, run, report, watch, meter, ranks), *trackers],
        short_dtype=prepared.short,
        part_rates=recipe.vision.learning_rates,
        answer=sample_answers(recipe, run, data, processor, prepared.autocast, watch, trackers, ranks),
        meter=meter,
        held_out_groups=image_groups(data.validation or []),
        non_finite=non_finite(recipe, run, data, meter, ranks),
        signals=signals,
        facts=facts,
        ranks=ranks,
    )
    if ranks.rank:
        set_seed(recipe.training.seed + ranks.rank)  # dropout of its own; weights were made alike
    return trainer


def _samples(
    recipe: Recipe,
    run: RunFolder,
    data: LoadedData | StreamedData,
    processor: Any,
    prepared: Prepared,
    done: int,
    store: FeatureStore | None,
    watch: Watcher,
) -> tuple[Any, Any]:
    """Training and validation samples; what is kept of their images is told."""
    return make_samples(
        recipe,
        run,
        data,
        processor,
        prepared.model,
        steps_done=done,
        store=store,
        autocast=prepared.autocast,
        on_features=lambda done, total: watch(TrainingEvent("features", done, total)),
        on_kept=lambda kept: watch(kept_event(kept)),
    )


def _result(
    run: RunFolder, trainer: StepTrainer, report: TrainableReport, written: FastLoraState, seconds: float, **known: Any
) -> RunResult:
    """What a training did; `written` are its decoder layers as they were before any was compiled."""
    calls = fast_lora_state(trainer.accelerator.unwrap_model(trainer.model)).calls
    return RunResult(
        status="trained" if known["resumed_from"] is None else "resumed",
        folder=run.path,
        steps=trainer.state.global_step,
        planned=trainer.state.max_steps,
        seconds=seconds,
        metrics=last_losses(run),
        trainable={part: asdict(count) for part, count in report.parts.items()},
        left_out=steps_left_out(run),
        fast_lora=asdict(replace(written, calls=calls)),
        **known,
    )


def _use_faster_layers(
    model: Any, recipe: Recipe, device: torch.device, micro_batches: MicroBatches, data: Any, watch: Watcher
) -> None:
    """Compiles layers and the like, and tells which way steps go."""
    state, layers = fast_lora_state(model), use_faster_layers(model, recipe, device)
    line = step_line(model.config._attn_implementation, micro_batches, state, layers)
    idle = without_effect(recipe.training, shortest_sample(data), state.layers)
    watch(TrainingEvent("way", 0, 0, line="; ".join([line, *idle])))


def _make_trainer(**arguments: Any) -> StepTrainer:
    """The Trainer, which prints nothing by itself."""
    with library_errors():
        trainer = StepTrainer(**arguments)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _usable_data(recipe: Recipe, processor: Any, watch: Watcher) -> LoadedData | StreamedData:
    """The rows of the run, and those that are left out, each with its reason."""

    def tell(stage: str, done: int, total: int) -> None:
        watch(TrainingEvent("look", done, total, stage=stage))

    data = read_data(recipe, processor, tell)
    if isinstance(data, LoadedData):
        watch(TrainingEvent("rows", 0, 0, rows=RowUse.of(data, recipe.training.samples_per_step)))
    return data


def release_memory() -> None:
    """Gives back what the training held, before the evaluation loads the tuned model from its folder."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _refuse_idle_training(report: TrainableReport) -> None:
    """TrainingError when there is nothing to train; that there are rows to train on is known by now."""
    if report.trainable == 0:
        raise TrainingError("nothing trains: the recipe's lora and vision sections leave no weight to tune")


def _save(run: RunFolder, recipe: Recipe, trainer: StepTrainer, processor: Any) -> None:
    """Writes the tuned weights with the processor that belongs to them."""
    weights = trainer.whole_weights(float32=recipe.lora is None)  # a frozen tower may have been shortened

    def save(folder: Path) -> None:
        trainer.save_weights(folder, weights)
        processor.save_pretrained(folder)

    trainer.ranks.alone(lambda: run.write_model(save) if recipe.lora is None else run.write_adapter(save))
