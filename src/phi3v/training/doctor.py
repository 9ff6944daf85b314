"""`examine(recipe)`: whether a training would teach what the rows say, shown on a real batch before any step.

In comes a recipe, out comes a `Diagnosis`: for each check what was seen, or what is wrong. Rows go through the recipe's
own encoding, collation and model; nothing is written but a copy that is thrown away. `check_first_batch`, `check_base`
and `FirstStepCallback` are its short form, which every training goes through. Prints nothing.
"""

import contextlib
import gc
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from phi3v.adapters import has_adapter, save_tuned
from phi3v.data.encode import encode_prompt
from phi3v.data.schema import Row
from phi3v.errors import TrainingError
from phi3v.first_look import Progress
from phi3v.loading import load_processor, load_target, resolve_device
from phi3v.model.chat_phi3_v import TextGuard
from phi3v.recipe import Recipe
from phi3v.training.batch_checks import Ids, batch_faults
from phi3v.training.disk_space import full_disk
from phi3v.training.memory_plan import settle
from phi3v.training.meter import Meter
from phi3v.training.model_checks import (
    gradient_faults,
    logits_of,
    nudge,
    saved_faults,
    sight_faults,
    to_device,
    weight_faults,
)
from phi3v.training.preflight import check_recipe_alone
from phi3v.training.prepare import Prepared, check_layout, compute_twice, prepare_model
from phi3v.training.samples import encoded_rows, make_collators, read_data

BATCH = 4
"""Samples that are looked at, as many as a step has at most."""

_READ = 10_000
"""Rows whose texts are read for tags."""

_EVERY = 50
"""A training compares each so manieth tensor of its base with the file; `examine` compares all."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: its name, and what is wrong; nothing where it is well."""

    name: str
    faults: list[str]


@dataclass(frozen=True)
class Diagnosis:
    """What was found on a batch of so many rows.

    Attributes:
        rows: how many.
        checks: what was looked at.
        notes: what is not wrong and may not be meant, one line each.
    """

    rows: int
    checks: list[Check]
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not any(check.faults for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "passed": self.passed}


def examine(recipe: Recipe, *, on_progress: Progress = lambda stage, done, total: None) -> Diagnosis:
    """Shows on a real batch that a training would do what it should.

    Args:
        recipe: the run; its folder is not touched.
        on_progress: told as rows are looked at.
    Raises: as `train` before its first step.
    """
    check_recipe_alone(recipe)
    device = resolve_device(recipe.model.device)
    set_seed(recipe.training.seed)
    processor = load_processor(recipe.model.name, revision=recipe.model.revision, **recipe.image.processor_options)
    check_layout(recipe)
    data = read_data(recipe, processor, on_progress)
    recipe = settle(recipe, data, processor, device)
    rows = _some_rows(data, min(BATCH, recipe.training.samples_per_step))
    encoded = encoded_rows(recipe, rows, processor)
    examples = [encoded[number] for number in range(len(rows))]
    collate, _ = make_collators(recipe, data, processor)
    batches = collate(examples)
    ids = Ids.of(processor)
    checks = [
        Check(
            "images and their tokens, labels, form",
            list(dict.fromkeys(fault for batch in batches for fault in batch_faults(batch, ids))),
        ),
        Check("answers and questions are the rows'", row_faults(rows, examples, processor, recipe.data.train_on)),
    ]
    prepared = prepare_model(recipe, device)
    checks += _check_model(recipe, prepared, [to_device(batch, device) for batch in batches], processor)
    readable: Any = data.train if hasattr(data.train, "__len__") else rows
    return Diagnosis(len(rows), checks, tag_notes(islice(readable, _READ), processor.tokenizer))


def _some_rows(data: Any, count: int) -> list[Row]:
    """The first rows; of rows whose lengths are known the longest too."""
    rows = data.train
    if not hasattr(rows, "__len__"):
        return list(islice(rows.rows(lambda problem: None, shuffled=False), count))
    lengths = getattr(data, "lengths", None)
    places = list(range(min(count, len(rows))))
    if lengths and (longest := max(range(len(rows)), key=lambda row: lengths[row])) not in places:
        places[-1] = longest
    return [rows[place] for place in places]


def tag_notes(rows: Iterable[Row], tokenizer: Any) -> list[str]:
    """How many rows have a control token or an image tag as plain text, as what is pasted from a chat has."""
    guard = TextGuard(token.content for token in tokenizer.added_tokens_decoder.values() if not token.normalized)
    count, places = 0, []
    for count, row in enumerate(rows, 1):  # noqa: B007 -- read below
        if shown := guard.found_in("\n".join(message.text for message in row.messages)):
            places.append(f"{row.source}, row {row.index}: {shown[:20]!r}")
    if not places:
        return []
    return [
        f"{len(places)} of {count} rows have the text of a control token or an image tag in them ({places[0]}): it "
        "stays text, opens no turn and shows no picture; take it out where it is not meant"
    ]


def row_faults(rows: Sequence[Row], examples: Sequence[Any], processor: Any, train_on: str) -> list[str]:
    """Whether what is trained is the row's answer, behind the very ids that the model is asked with later."""
    faults = []
    for row, example in zip(rows, examples, strict=True):
        trained = example["labels"][example["labels"] != -100].tolist()
        said = " ".join(processor.tokenizer.decode(trained, skip_special_tokens=True).split())
        turns = [message for message in row.messages if message.role == "assistant"]
        wanted = " ".join(turn.text for turn in (turns if train_on == "all_assistant" else turns[-1:]) if turn.trained)
        if "".join(said.split()) != "".join(wanted.split()):
            faults.append(f"{row.source}, row {row.index}: trained is {said[:60]!r}, its answer is {wanted[:60]!r}")
        if train_on == "last_assistant":
            first = int((example["labels"] != -100).nonzero()[0])
            asked = encode_prompt(row, processor)["input_ids"].tolist()
            own = example["input_ids"][:first].tolist()
            if len(own) == len(asked) and own != asked:  # one that was made to fit has another length
                place = next(place for place, pair in enumerate(zip(own, asked, strict=True)) if pair[0] != pair[1])
                faults.append(
                    f"{row.source}, row {row.index}: the question differs at token {place} from what is asked"
                )
    return faults


def _check_model(recipe: Recipe, prepared: Prepared, batches: list[Any], processor: Any) -> list[Check]:
    """Base, sight, gradients and a saved copy."""
    model = prepared.model
    name = recipe.model.name
    checks = [Check(f"weights are those of {name}", weight_faults(model, name, recipe.model.revision))]
    checks.append(Check("the model looks at its pictures", sight_faults(model, batches[0])))
    compute_twice(model, recipe.training.options)
    model.train()
    device = batches[0]["input_ids"].device.type
    for batch in batches:
        with torch.autocast(device, prepared.autocast, enabled=prepared.autocast is not None):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
    faults = gradient_faults(
        model,
        pictures=any("image_sizes" in batch for batch in batches),
        scaled=prepared.autocast == torch.float16,
    )
    checks.append(Check("everything that trains gets a gradient", faults))
    model.zero_grad(set_to_none=True)
    with _thrown_away() as folder:
        checks.append(
            Check("a saved copy gives equal answers", _reload(recipe, prepared, batches[0], processor, folder))
        )
    return checks


def _reload(recipe: Recipe, prepared: Prepared, batch: Any, processor: Any, folder: Path) -> list[str]:
    """Moves what trains, saves it as a run does, loads it as `phi3v ask` does, and compares logits."""
    model: Any = prepared.model
    nudge(weight for weight in model.parameters() if weight.requires_grad)
    if recipe.lora is None:
        model.float()
    save_tuned(model, folder)
    processor.save_pretrained(folder)
    faults = saved_faults(model, folder) if has_adapter(model) else []
    wanted = logits_of(model, batch).cpu()
    options = recipe.loading_options | ({"dtype": "float32"} if recipe.lora is None else {})
    prepared.model.to("cpu") if recipe.quantization is None and batch["input_ids"].is_cuda else None
    gc.collect()
    again = load_target(folder, **options)
    found = logits_of(again.model, batch).cpu()
    limit = 1e-5 if wanted.dtype == torch.float32 and recipe.model.dtype == "float32" else 2e-2
    apart = float((found - wanted).abs().max())
    if apart > limit * float(wanted.abs().max()):
        faults.append(f"logits of the loaded copy are up to {apart:.3g} away")
    return faults


@contextlib.contextmanager
def _thrown_away() -> Iterator[Path]:
    """A folder for a copy that is loaded again; it is not on the run's disk, so a full one names its own place."""
    place = Path(tempfile.gettempdir())
    with (
        full_disk(place, instead="set TMPDIR to a folder that has some"),
        tempfile.TemporaryDirectory(prefix="phi3v_") as folder,
    ):
        yield Path(folder)


def check_first_batch(samples: Any, collate: Callable[[list[Any]], list[Any]], processor: Any) -> None:
    """The short form's look at the first samples of a training, collated as steps are.

    Raises: TrainingError in one line.
    """
    first = [samples[0]] if hasattr(samples, "__len__") else list(islice(iter(samples), 1))
    if faults := [fault for batch in collate(first) for fault in batch_faults(batch, Ids.of(processor), tags=False)]:
        raise TrainingError(f"the first sample would teach something else: {'; '.join(faults[:3])}; see phi3v doctor")


def check_base(model: Any, recipe: Recipe) -> None:
    """The short form's look at the base and, under LoRA, at a saved copy of the adapter.

    Raises: TrainingError in one line.
    """
    faults = weight_faults(model, recipe.model.name, recipe.model.revision, every=_EVERY)
    if has_adapter(model):
        with _thrown_away() as folder:
            save_tuned(model, folder)
            faults += saved_faults(model, folder)
    if faults:
        raise TrainingError(f"{'; '.join(faults)}; copy the model's files again")


class FirstStepCallback(TrainerCallback):
    """Looks at the gradients of a session's first step, and of its first one with pictures, before the optimiser does.

    Without pictures parts that see have no gradient.
    """

    def __init__(self, meter: Meter) -> None:
        """`meter` knows how many pictures the step has, on all ranks."""
        self._meter, self._looked, self._seen = meter, False, False

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Raises: TrainingError where something that trains has no gradient; the step changed nothing then."""
        pictures = self._meter.pictures > 0
        if self._seen or (self._looked and not pictures):
            return
        if getattr(optimizer, "_is_overflow", False):  # a step that is left out has none
            return
        self._looked, self._seen = True, pictures
        if faults := gradient_faults(model, pictures=pictures, finite=False, scaled=bool(args.fp16)):
            raise TrainingError(
                f"step {state.global_step + 1}: {'; '.join(faults)}; it changed nothing, see phi3v doctor"
            )
