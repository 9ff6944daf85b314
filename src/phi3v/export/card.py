"""The model card of an export, written from what the run's files say.

In comes a target, the format and its facts, out comes README.md for people and for the hub: data, recipe, scores with
their intervals, what the checks found, the base's licence, and how to use the export. Texts of the run stand in it as
texts: they are escaped for Markdown and HTML, and no path of the machine is named. Knows nothing about weights.
"""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from phi3v import __version__
from phi3v.data.templates import Template
from phi3v.errors import CheckpointError, ConfigError
from phi3v.evaluation import figures
from phi3v.evaluation.headline import in_words
from phi3v.evaluation.report_run import NEEDED
from phi3v.export.vllm import OTHER_TOWER, READ, Serving
from phi3v.recipe import Recipe
from phi3v.recipe_yaml import write_yaml
from phi3v.run_folder import RunFolder
from phi3v.targets import Target, resolve_target

MICROSOFT = ("microsoft/Phi-3-vision-128k-instruct", "microsoft/Phi-3.5-vision-instruct")
"""The published models, whose licence is MIT."""
QUESTION = "What is shown in this image?"
_SNAPSHOT = re.compile(r"models--([\w.-]+)--([\w.-]+)")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_ENDS = {"merged": "", "adapter": "-lora", "onnx": "-onnx"}
"""Of the names that cards give their folders, so that those of one run can lie side by side. What the folder is called
here is in no card: two exports are the same bytes."""
_MARKS = re.compile(r"([\\`*_{}\[\]()#+!|~<>&$-])")


@dataclass(frozen=True)
class Card:
    """What a card says.

    Attributes:
        title: name of the run, or of what else was exported.
        to: "merged", "adapter" or "onnx".
        base: hub id of the base; None where it is not known.
        facts: of the format: dtype, precision, ...
        recipe: of the run; None for a target that is none.
        system: template of the system turn that it was tuned with, of the run or of the exported folder.
        summary: of the finished run, `finished.json`.
        evaluation: `evaluation.json`, None where nothing was evaluated.
        versions: of the packages that trained it.
        repo: where it is pushed to.
        serving: how vLLM serves merged weights; None where it cannot.
    """

    title: str
    to: str
    base: str | None
    facts: Mapping[str, Any]
    recipe: Recipe | None = None
    system: str | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None
    versions: Mapping[str, Any] = field(default_factory=dict)
    repo: str | None = None
    serving: Serving | None = None


def base_id(place: Target, given: str | None = None) -> str | None:
    """The hub id of a target's base: as given, as the target names it, or as its folder says.

    Example: base ".../models--microsoft--Phi-3.5-vision-instruct/snapshots/4a0d683" or ".../Phi-3.5-vision-instruct" ->
    "microsoft/Phi-3.5-vision-instruct"; "/data/our-model" -> None.
    Raises: ConfigError for a `given` that is neither OWNER/NAME nor a folder, whose id is what its name says then.
    """
    if given is not None and Path(given).is_dir():
        return base_id(resolve_target(given))
    if given is not None:
        if not _HUB_ID.fullmatch(given):
            raise ConfigError(
                f"--base {given!r} is neither a hub id (OWNER/NAME, {MICROSOFT[1]} for instance) nor a folder that is "
                "there"
            )
        return given
    if place.kind == "run" and place.adapter is None:  # its base in the sense of a target is what was trained
        return base_id(resolve_target(RunFolder(place.name).read_recipe().model.name))
    if not Path(place.base).is_dir():
        return place.base
    if found := _SNAPSHOT.search(str(Path(place.base).absolute())):
        return "/".join(found.groups())
    return next((name for name in MICROSOFT if name.rpartition("/")[2] == Path(place.base).absolute().name), None)


def read_card(
    run: RunFolder | None,
    *,
    title: str,
    to: str,
    base: str | None,
    facts: Mapping[str, Any],
    system: str | None = None,
    repo: str | None = None,
    finished: bool = True,
    serving: Serving | None = None,
) -> Card:
    """A card of what lies in a run's folder; of the format alone where the target is no run.

    Scores, steps and time are those of the finished run: `finished` is false of its checkpoints, which have none.
    """
    if run is None:
        return Card(title, to, base, facts, system=system, repo=repo, serving=serving)
    evaluation = run.read_evaluation(needed=NEEDED) if finished and run.evaluation.is_file() else None
    summary = run.read_summary() if finished and run.state() == "finished" else {}
    recipe, versions = run.read_recipe(), run.read_versions()
    return Card(title, to, base, facts, recipe, system, summary, evaluation, versions, repo, serving)


def render_card(card: Card) -> str:
    """README.md."""
    environment = Environment(
        loader=PackageLoader("phi3v.export", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        plain=plain,
        fenced=fenced,
        shell=shlex.quote,
        string=partial(json.dumps, ensure_ascii=False),
        figure=figures.figure,
        ends=figures.ends,
        duration=figures.duration,
    )
    name = card.repo or folder_name(card.title, card.to)
    text = environment.get_template("card.md.j2").render(
        card=card,
        header=write_yaml(header(card)),
        settings=settings(card.recipe) if card.recipe else {},
        scores=card.evaluation["metrics"].values() if card.evaluation else (),
        in_words=_in_words(card.evaluation),
        sources=sources(card.recipe) if card.recipe else [],
        name=name,
        microsoft=card.base in MICROSOFT,
        version=__version__,
        vllm=READ,
        serve="" if card.serving is None else card.serving.command(name),
        other_tower=OTHER_TOWER,
        question=question(card.recipe),
        system=fixed_text(card.system, "system"),
    )
    return re.sub(r"\n{3,}", "\n\n", text)


def folder_name(title: str, to: str) -> str:
    """What a card calls its folder: of "shop" it is "shop", "shop-lora" or "shop-onnx"; of "shop-lora" the same."""
    stem = re.sub(r"[^\w.-]", "-", title)
    for end in filter(None, _ENDS.values()):
        stem = stem.removesuffix(end) or stem
    return stem + _ENDS[to]


def header(card: Card) -> dict[str, Any]:
    """What the hub reads: {"library_name": "transformers", "pipeline_tag": "image-text-to-text", ...}.

    Of weights that no run here tuned nothing is said of how they come from the base, but that an adapter is one.
    """
    library = {"merged": "transformers", "adapter": "peft", "onnx": "onnxruntime-genai"}[card.to]
    relation = "adapter" if card.to == "adapter" else "finetune" if card.recipe else None
    if card.facts.get("precision") == "int4":
        relation = "quantized"
    found: dict[str, Any] = {"library_name": library, "pipeline_tag": "image-text-to-text"}
    if card.base in MICROSOFT:
        found["license"] = "mit"
    if card.base:
        found |= {"base_model": card.base} | ({"base_model_relation": relation} if relation else {})
    return {**found, "tags": ["phi3_v", "phi3v"]}


def settings(recipe: Recipe) -> dict[str, str]:
    """The recipe in a few lines: {"tuned": "LoRA, r 16, alpha 32, on qkv_proj, o_proj", "epochs": "3", ...}."""
    training, lora = recipe.training, recipe.lora
    found = {"tuned": "the whole language model"}
    if lora is not None:
        on = lora.get("target_modules", [])
        kind = "DoRA" if lora.get("use_dora") else "LoRA"
        on = on if isinstance(on, str) else ", ".join(on)
        found["tuned"] = f"{kind}, r {lora.get('r')}, alpha {lora.get('lora_alpha')}, on {on}"
    if recipe.model.adapter:
        found["went on from"] = _without_folders(recipe.model.adapter)
    found |= {"tower": recipe.vision.tower, "projector": recipe.vision.projector}
    if recipe.quantization:
        found["base in training"] = "4-bit" if recipe.quantization.get("load_in_4bit") else "quantised"
    length = "steps at most" if training.max_steps is not None else "epochs"
    found[length] = f"{training.epochs:g}" if training.max_steps is None else str(training.max_steps)
    found |= {"samples per step": str(training.samples_per_step), "peak learning rate": f"{training.learning_rate:g}"}
    return {**found, "seed": str(training.seed)}


def question(recipe: Recipe | None) -> str:
    """What the card's commands ask: the run's own question where it is one line and the same for every row."""
    asked = (fixed_text(recipe.data.prompt, "prompt") or "").strip() if recipe else ""
    is_plain = asked.isprintable() and "<|" not in asked
    return asked if is_plain and 0 < len(asked) <= 200 else QUESTION


def fixed_text(template: str | None, name: str) -> str | None:
    """What a template says whatever the row; None where it names columns: "Be {{brief}}." -> "Be {brief}."."""
    parsed = None if template is None else Template(template, name)
    return None if parsed is None or parsed.columns else parsed.render({})


def sources(recipe: Recipe) -> list[str]:
    """The sets of a run by the names of their files: "/home/me/shop/products.csv" -> "products.csv"."""
    train = recipe.data.train
    names = [train] if isinstance(train, str) else [one.source for one in train]
    return [_without_folders(name) for name in names]


def _without_folders(name: str) -> str:
    """The last part of a path or web address; a hub id as it is: "owner/set" -> "owner/set"."""
    is_path = Path(name).is_absolute() or Path(name).exists() or "://" in name or name.startswith((".", "~"))
    return re.split(r"[?#]", name.rstrip("/\\"))[0].replace("\\", "/").rpartition("/")[2] if is_path else name


def _in_words(evaluation: Mapping[str, Any] | None) -> str:
    """The primary score beside the base's as a sentence; "" without a base."""
    if not evaluation or not evaluation["base"]:
        return ""
    try:
        return in_words(evaluation["metrics"][evaluation["primary"]]).replace("\u00a0", " ")
    except KeyError as error:
        raise CheckpointError(f"evaluation.json lacks {error}: evaluate the run again with `phi3v evaluate`") from error


def plain(text: Any) -> str:
    """A text as Markdown that shows it and does nothing else: "a *b*\\n<i>" -> "a \\\\*b\\\\* \\\\<i\\\\>"."""
    return _MARKS.sub(r"\\\1", " ".join(str(text).split()))


def fenced(text: Any) -> str:
    """A text of several lines as a block that nothing in it ends: its fence is longer than any row of backticks."""
    longest = max((len(row) for row in re.findall(r"`+", str(text))), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
