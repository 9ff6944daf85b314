"""What a server answers with: one base in memory, and any number of adapters on it, each by its name.

In come a TARGET and more adapters as name -> place; out come the names and, behind each, the model, its own processor
and its own system turn, so that a name answers as `phi3v ask` does with the same target. Knows no requests.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phi3v.adapters import check_adapter, has_adapter, holds_base, load_adapter, select_adapter
from phi3v.errors import ConfigError
from phi3v.evaluation.answers import RecentImages
from phi3v.evaluation.engine import adapter_reason, settings_reason
from phi3v.features.vision import sees_plainly
from phi3v.generate import ChatModel, fixed_system
from phi3v.loading import load_base, load_processor
from phi3v.machine import spare_cores
from phi3v.serve.names import named_targets
from phi3v.targets import Target, resolve_target, run_of, system_template

_IMAGE_OPTIONS = ("num_crops", "max_image_tokens", "fast")


@dataclass
class Served:
    """One name that can be asked.

    Attributes:
        chat: the model with its processor and system turn.
        adapter: PEFT's name of its adapter; None for the base, and for a model without adapters.
        seen: features of the images that came last.
        sees_ahead: whether images go through the tower while others are answered, in the thread that prepares: on a
            CPU that has more cores than the model has threads, and where no adapter on the vision parts is switched
            meanwhile. (With a thread of the model on every core the two would wait for each other in every layer.)
    """

    chat: ChatModel
    adapter: str | None
    seen: RecentImages | None = None
    sees_ahead: bool = False

    def select(self) -> None:
        """From now on the model answers as this one."""
        if has_adapter(self.chat.model):
            select_adapter(self.chat.model, self.adapter)


def load_served(
    target: str, adapters: Mapping[str, str], *, device: str | None = None, dtype: str | None = None
) -> dict[str, Served]:
    """Loads the base of a TARGET once, its adapter and the others: name -> what answers, the TARGET's own first.

    Example: the run `runs/shop`, tuned on `models/tiny`, and adapters {"hats": "runs/hats"} give the names shop, tiny
    and hats; where an adapter took its first values out of the base, it is alone.

    Args:
        target: run, adapter, model folder or hub id.
        adapters: names of more adapters, and the runs or folders that they lie in.
        device: see `loading.load_base`; None as the TARGET's recipe says.
        dtype: the same.

    Raises:
        ConfigError: two things of one name, an adapter of another base, a model that cannot be batched.
        CheckpointError: as `loading.load_target`.
    """
    place = resolve_target(target)
    wanted = named_targets(place, adapters)
    for found in wanted.values():
        if found.adapter is not None:
            check_adapter(found.adapter)
    how = {"dtype": dtype, "device": device}
    options = {**_recipe_options(place), **{key: value for key, value in how.items() if value is not None}}
    seeing = {key: options.pop(key) for key in _IMAGE_OPTIONS if key in options}
    model: Any = load_base(place.base, revision=place.revision, **options)
    served: dict[str, Served] = {}
    for number, (name, found) in enumerate(wanted.items()):
        inner = None
        if found.adapter is not None:
            inner = f"adapter{number}"  # PEFT allows no dots in a name
            model = load_adapter(model, found, name=inner)
        same = found is place or found.adapter is None
        sees = seeing if same else {k: v for k, v in _recipe_options(found).items() if k in _IMAGE_OPTIONS}
        processor = load_processor((place if same else found).name, **sees)
        served[name] = Served(ChatModel(model, processor, _system(found, place)), inner)
    for one in served.values():
        one.chat.model = model
    _check(served, model)
    _remember_images(served, model)
    return served


def _recipe_options(place: Target) -> dict[str, Any]:
    """How the run of a target loads; nothing where it is no run."""
    run = run_of(place.name)
    return {} if run is None else dict(run.recipe_for(place.name).loading_options)


def _system(found: Target, place: Target) -> str | None:
    """The system turn of a run's recipe, as `ask` puts it in front; the base has none."""
    if found.adapter is None and found is not place:
        return None
    return fixed_system(system_template(found.name), found.name)


def _check(served: dict[str, Served], model: Any) -> None:
    """Takes the names away that the model cannot answer exactly. Raises: ConfigError where none is left."""
    plain = model.get_base_model() if has_adapter(model) else model
    reason = settings_reason(plain.generation_config)
    if reason is not None:
        raise ConfigError(f"generation_config.json of this model cannot be served: {reason}; take it out of that file")
    changed = None
    for name, one in served.items():
        one.select()
        if one.adapter is not None:
            if (reason := adapter_reason(model)) is not None:
                raise ConfigError(f"{name} cannot be served: {reason}")
            changed = changed or (None if holds_base(model) else name)
    if changed is None:
        return
    if sum(one.adapter is not None for one in served.values()) > 1:
        raise ConfigError(f"{changed} changes the base below it, so that nothing else can be served beside it")
    for name in [name for name, one in served.items() if one.adapter is None]:
        del served[name]


def _remember_images(served: dict[str, Served], model: Any) -> None:
    """One memory for all that see alike: the same crops, and no adapter on the vision parts."""
    plain = sees_plainly(model)
    memories: dict[Any, RecentImages] = {}
    for name, one in served.items():
        images = one.chat.processor.image_processor
        way = (images.num_crops, images.fast, None if plain else name)
        one.seen = memories.setdefault(way, RecentImages(model))
        one.sees_ahead = plain and model.device.type == "cpu" and spare_cores() > 0
