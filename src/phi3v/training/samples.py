"""The samples of a run: from a recipe's section `data` to what the Trainer iterates over.

In come a recipe and its run; out come training and validation samples. What encoding leaves out is written into the
run's problems.jsonl, whichever process sees it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch

from phi3v.data.augment import Augmentation, Augmented
from phi3v.data.collate import Collator, PackedCollator, StepCollator
from phi3v.data.encode import EncodedRows, Example, encode
from phi3v.data.encode_seen import encode_seen
from phi3v.data.judging import most_allowed
from phi3v.data.plan import MicroBatches, plan_steps, positions
from phi3v.data.reading import Reading
from phi3v.data.schema import Row
from phi3v.data.sources import LoadedData, StreamedData, stream_data
from phi3v.data.stand_ins import StandIns
from phi3v.data.streamed_examples import StreamedExamples
from phi3v.errors import DataError, TrainingError
from phi3v.features.collate import CollateFeatures
from phi3v.features.store import FeatureStore
from phi3v.features.vision import VisionFeatures, sees_alike_all_the_time
from phi3v.first_look import MeasuredData, Progress, measured_rows, open_data, refuse_bad_stream, row_options
from phi3v.loading import load_config
from phi3v.recipe import Recipe
from phi3v.run_folder import RunFolder
from phi3v.training.failed_rows import FailedRows, RowKey
from phi3v.training.feature_cache import FeatureCache, FeatureReport
from phi3v.training.sampling import epoch_order


def read_data(recipe: Recipe, processor: Any, on_look: Progress) -> LoadedData | StreamedData:
    """Reads what the recipe names, and writes nothing.

    Rows that are not streamed are measured too, so that none that is too long reaches a step. Of a stream rows are
    taken until one can be trained on, so that a model is loaded for no stream that gives none.

    Args:
        recipe: its section data.
        processor: the model's processor.
        on_look: told of what is done, (stage, done, total).
    Raises: DataError in one line.
    """
    context = load_config(recipe.model.name, revision=recipe.model.revision).max_position_embeddings
    if recipe.data.streaming:
        reading = Reading.of(**recipe.data.reading_options)
        stream = stream_data(options=row_options(recipe), reading=reading, **recipe.data.load_options)
        refuse_bad_stream(recipe, stream, processor, context)
        return stream
    return measured_rows(recipe, open_data(recipe, on_progress=on_look), processor, context, on_progress=on_look)


def make_samples(
    recipe: Recipe,
    run: RunFolder,
    data: LoadedData | StreamedData,
    processor: Any,
    model: Any,
    *,
    steps_done: int,
    store: FeatureStore | None = None,
    autocast: torch.dtype | None = None,
    on_features: Callable[[int, int], None] = lambda done, total: None,
    on_kept: Callable[[FeatureReport | str], None] = lambda report: None,
) -> tuple[Any, Any]:
    """Training and validation samples, with features in place of the pixels of images whose features are kept.

    Args:
        recipe: the recipe.
        run: where rows that turn out to be unusable are written down.
        data: the rows.
        processor: the model's processor.
        model: whose vision parts make features.
        steps_done: of a run that goes on; a stream begins behind their samples.
        store: where features are kept; None keeps none.
        autocast: dtype of the training's mixed precision; None for the weights' own.
        on_features: told of features, (rows done, rows in all).
        on_kept: told at the end what is kept and what is not, or why nothing is.
    Raises: TrainingError when the first row has nothing to train; DataError when too many rows fail.
    """
    longest = recipe.data.longest(model.config.max_position_embeddings)
    failed = FailedRows(run)
    held_out = _stand_ins(recipe, failed, data, data.validation or [], processor, longest)
    if isinstance(data, StreamedData):
        return _streamed(recipe, failed, data, processor, longest, steps_done), held_out
    train = _stand_ins(recipe, failed, data, data.train, processor, longest, augmented_images(recipe))
    _refuse_empty(_first(train))
    if store is None:
        return train, held_out
    if not sees_alike_all_the_time(model):
        on_kept(f"vision.cache={store.kind} is not used: parts that see are trained, so features change with each step")
        return train, held_out
    workers = recipe.training.options.get("dataloader_num_workers") or 0
    cache = FeatureCache(VisionFeatures(model, store, autocast=autocast), workers=workers)
    total = len(train) + len(held_out)
    kept = cache.keep(train, lambda row: on_features(row, total))
    kept_out = cache.keep(held_out, lambda row: on_features(len(train) + row, total))
    report = cache.report()
    run.write_features(report.to_dict())
    on_kept(report)
    return kept, kept_out


def make_collators(recipe: Recipe, data: LoadedData | StreamedData, processor: Any) -> tuple[Any, Any]:
    """What makes the micro-batches of a step, and what makes a batch of validation rows, which are padded.

    Args:
        recipe: its section training.
        data: the rows; the longest one of a stream is not known, so there each step counts with its own longest.
        processor: whose tokens pad rows and stand for images.
    """
    image = processor.image_token_id
    padded = CollateFeatures(Collator(processor.tokenizer.pad_token_id, image_token_id=image))
    lengths = data.lengths if isinstance(data, MeasuredData) else []
    micro_batches = micro_batches_of(recipe, max(lengths, default=0))
    return StepCollator(
        CollateFeatures(PackedCollator(image)) if micro_batches.packed else padded, micro_batches
    ), padded


def shortest_sample(data: LoadedData | StreamedData) -> int:
    """Tokens of the shortest training row, 0 where lengths are not known; reads no row."""
    return min(data.lengths, default=0) if isinstance(data, MeasuredData) else 0


def facts_of_samples(data: LoadedData | StreamedData) -> dict[str, int]:
    """What a server of the tuned model wants to know of its samples: {"most_images": 2, "shortest": 312, ...}.

    `most_images` is of any row, held-out ones among them; `shortest` and `longest` are tokens of training rows, which
    are known where they were measured. Nothing is known of a stream. Reads each row once.
    """
    if not isinstance(data, MeasuredData):
        return {}
    rows = chain(data.train, data.validation or ())
    most = max((len(row.images) for row in rows), default=0)
    return {"most_images": most, "shortest": shortest_sample(data), "longest": max(data.lengths, default=0)}


def micro_batches_of(recipe: Recipe, longest: int) -> MicroBatches:
    """How a recipe cuts its steps.

    Args:
        recipe: its section training.
        longest: tokens of the longest sample of the run; 0 where it is not known.
    Example: micro_batch_size 2 and a longest sample of 2,539 tokens make packs of at most 5,078.
    """
    training = recipe.training
    tokens = training.tokens_per_micro_batch or training.micro_batch * longest or None
    return MicroBatches(training.micro_batch, training.packing, tokens)


def augmented_images(recipe: Recipe) -> Augmented | None:
    """How a recipe changes its training images; None for not at all."""
    wanted = recipe.image.augments
    return Augmented(Augmentation(**wanted), recipe.training.seed) if wanted else None


def encoded_rows(
    recipe: Recipe,
    rows: Sequence[Row],
    processor: Any,
    longest: int | None = None,
    augmented: Augmented | None = None,
) -> EncodedRows:
    """Rows as samples of a recipe's training.

    Args:
        recipe: its section data.
        rows: the rows.
        processor: the model's processor.
        longest: tokens of a sample at most; None for what the recipe or the model says.
        augmented: how their images are changed; None for not at all, as where they are held out.
    """
    if longest is None:
        context = load_config(recipe.model.name, revision=recipe.model.revision).max_position_embeddings
        longest = recipe.data.longest(context)
    return EncodedRows(rows, processor, **_encode_options(recipe, processor, longest), augmented=augmented)


def planned_steps(recipe: Recipe, lengths: Sequence[int], epoch: int) -> Iterator[list[tuple[list[int], int]]]:
    """The micro-batches of each step of an epoch: their rows, and the tokens they take, padding among them.

    Args:
        recipe: its section training.
        lengths: tokens of each row, of one at least; those of a stream are the first ones.
        epoch: from 0 on.
    Example: lengths 300, 900 and 500, all in one step, in packs of 900: [[([1], 900), ([0, 2], 800)]].
    """
    training = recipe.training
    how = micro_batches_of(recipe, 0 if recipe.data.streaming else max(lengths))
    order = epoch_order(len(lengths), training.samples_per_step, training.seed, epoch)
    for step in plan_steps(lengths, order, training.samples_per_step, how):
        own = [[lengths[row] for row in group] for group in step]
        yield [(group, positions(it, packed=how.packed)) for group, it in zip(step, own, strict=True)]


def _stand_ins(
    recipe: Recipe,
    failed: FailedRows,
    data: LoadedData | StreamedData,
    rows: Sequence[Row],
    processor: Any,
    longest: int,
    augmented: Augmented | None = None,
) -> StandIns:
    """Samples of rows that are all known."""
    encoded = encoded_rows(recipe, rows, processor, longest, augmented)
    if isinstance(data, LoadedData):
        known, left_out, elsewhere = data.rows_in, len(data.problems), failed.found
    else:  # of a stream held-out rows are all that is known, and what the stream leaves out is judged by itself
        known, left_out = len(rows), 0
        elsewhere = partial(_found_among, failed, frozenset((row.source, row.index) for row in rows))
    return StandIns(
        encoded,
        spare=most_allowed(recipe.data.max_skipped, known) - left_out,
        on_problem=recipe.data.on_problem,
        tell=failed,
        elsewhere=elsewhere,
    )


def _found_among(failed: FailedRows, keys: frozenset[RowKey]) -> frozenset[RowKey]:
    """Those of some rows that have failed; a function of a module, so that loader workers can be given it."""
    return failed.found() & keys


def _streamed(
    recipe: Recipe,
    failed: FailedRows,
    data: StreamedData,
    processor: Any,
    longest: int,
    steps_done: int,
) -> StreamedExamples:
    """Samples of a stream."""
    examples = StreamedExamples(
        data.train,
        partial(_encode, processor=processor, options=_encode_options(recipe, processor, longest)),
        micro_batch=recipe.training.samples_per_step,  # the loader's batch is a step
        start=steps_done * recipe.training.samples_per_step,
        tell=failed,
    )
    if not steps_done:
        _refuse_empty(next(iter(examples)))
    return examples


def _encode_options(recipe: Recipe, processor: Any, longest: int) -> dict[str, Any]:
    """The arguments of `encode` by name."""
    return {
        **recipe.data.encode_options,
        "max_length": longest,
        "max_pixels": recipe.image.max_pixels,
        "byte_crops": processor.image_processor.normalises_as_clip,
    }


def _encode(row: Row, *, processor: Any, options: dict[str, Any]) -> Example:
    """A row as a sample; a function of a module, so that loader workers can be given it."""
    return encode(row, processor, **options)


def _first(samples: StandIns) -> Example:
    """The first sample, without its pixels where that takes no opening."""
    with contextlib.suppress(DataError):  # told when its turn comes
        if (found := encode_seen(samples.encoded, 0)) is not None:
            return found
    return samples[0]


def _refuse_empty(example: Example) -> None:
    """Raises: TrainingError when nothing of a sample is trained."""
    if not any(label != -100 for label in example["labels"].tolist()):
        raise TrainingError("the first row has no trained token: its answer is empty, see data.answer")
