"""Which weights train: whole parts of the model, or LoRA on the language model's projections.

In comes a loaded base and plain values, out comes the same model with `requires_grad` set, or a `peft.PeftModel`; and
a count of what trains. A choice that would train nothing of the language model (the guide's `q_proj`, `v_proj`) is
refused in one line. Knows nothing about recipes, data or the Trainer.
"""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from phi3v.adapters import starts_at_random
from phi3v.errors import ConfigError
from phi3v.model.vision_phi3_v import unread_parts
from phi3v.passthrough import check_names, expression_fault, first_line

LORA_PROJECTIONS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
Choice = Literal["frozen", "lora", "train"]
Part = Literal["language model", "projector", "vision tower"]
_VISION = "vision_embed_tokens"
_NO_SERVICE = {
    "alora_invocation_tokens": "needs the places of these tokens in each batch, which nobody looks for here",
    "arrow_config": "chooses among adapters that are trained already",
    "corda_config": "belongs to an init_lora_weights that is refused",
    "eva_config": "belongs to an init_lora_weights that is refused",
    "fan_in_fan_out": "is for layers that keep their weights the other way round, and this model has none",
    "inference_mode": "trains nothing",
    "layer_replication": "makes a model that answers otherwise when it is loaded again",
    "lora_ga_config": "belongs to an init_lora_weights that is refused",
    "megatron_config": "is for Megatron-LM's parallel layers, and this model has none",
    "runtime_config": "is for one that calls peft himself",
    "use_qalora": "is for bases in GPTQ's format, which are not trained here; QLoRA is quantization.load_in_4bit",
}
"""Options of peft.LoraConfig that would do nothing here, or harm, and why."""
_AFTER_A_PASS = ("corda", "eva", "lora_ga")
"""Ways of `init_lora_weights` that look at rows before LoRA is there; peft begins plainly where nobody has."""
_SHORT_NAMES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}
"""What people write -> what PEFT calls it."""
_TOWER_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@dataclass(frozen=True)
class PartCount:
    """Parameters of one part of the model: `trainable` of `total`."""

    trainable: int
    total: int


@dataclass(frozen=True)
class TrainableReport:
    """What trains, per part ("language model", "projector", "vision tower"), as numbers; the command line prints it."""

    parts: dict[str, PartCount]

    @property
    def trainable(self) -> int:
        """Trainable parameters of the whole model."""
        return sum(part.trainable for part in self.parts.values())

    @property
    def total(self) -> int:
        """Parameters of the whole model, adapter included."""
        return sum(part.total for part in self.parts.values())

    @property
    def share(self) -> float:
        """Trainable parameters over all parameters, 0.0 to 1.0."""
        return self.trainable / max(self.total, 1)


def freeze(model: nn.Module, *, language_model: bool, tower: Choice, projector: Choice) -> None:
    """Sets `requires_grad` of every weight by the part it belongs to.

    The projector is the two projection matrices and the two separators. The tower's last layer and its
    post_layernorm stay frozen in any case: nothing reads their output.

    Raises: ConfigError where LoRA is asked for: `attach_lora` is what puts it there.
    """
    if "lora" in (tower, projector):
        raise ConfigError("vision.tower and vision.projector can have LoRA where lora is a mapping: it is null")
    choice = {"language model": language_model, "projector": projector == "train", "vision tower": tower == "train"}
    unread = _unread_weights(model)
    for name, weight in model.named_parameters():
        weight.requires_grad_(choice[part_of(name)] and name not in unread and weight.is_floating_point())


def attach_lora(
    model: PreTrainedModel,
    options: Mapping[str, Any],
    *,
    tower: Choice = "frozen",
    projector: Choice = "frozen",
    revision: str | None = None,
) -> Any:
    """Puts LoRA on the language model's projections, and on the vision parts that ask for it.

    A trained tower or projector is stored in the adapter, whole.

    All trainable weights become float32 masters, whatever the base computes in. Under LoRA a trained projector is its
    two matrices; the two separators stay as they are, since PEFT stores modules, not single vectors.

    Args:
        model: the loaded base; all of its own weights are frozen here.
        options: arguments of `peft.LoraConfig`; `target_modules` defaults to the four projections of a layer.
        tower: "lora" puts LoRA on the layers that are read; "train" keeps a trained copy of it in the adapter.
        projector: the same for the projector.
        revision: revision of a base on the hub, noted in the adapter.

    Returns:
        A `peft.PeftModel` whose saved adapter names the base by its absolute path or hub id.
    """
    from peft import get_peft_model

    config = check_lora(model, options, tower=tower, projector=projector)
    base = model.config.name_or_path
    config.base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
    config.revision = revision
    model.config.name_or_path = config.base_model_name_or_path
    freeze(model, language_model=False, tower="frozen", projector="frozen")
    place = config.base_model_name_or_path
    try:
        tuned = get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora: {first_line(error)}") from error
    tuned.peft_config["default"].base_model_name_or_path = place  # PEFT put the name as it was typed there
    return mark_trained(tuned)


def check_lora(
    model: PreTrainedModel, options: Mapping[str, Any], *, tower: Choice = "frozen", projector: Choice = "frozen"
) -> Any:
    """The `peft.LoraConfig` of a recipe's mapping for a model, whose modules alone are looked at: it may be on meta.

    Arguments as `attach_lora`. Raises: ConfigError for what hits nothing, or the vision part beside what was meant.
    """
    config = lora_config(options, tower=tower, projector=projector)
    _name_modules(model, config, options.get("modules_to_save") or [])
    _refuse_wrong_layers(model, config)
    _refuse_wrong_targets(model, config)
    if vision := _vision_targets(model, tower, projector):
        config.target_modules = {*_hits(model, config), *vision}
        config.layers_to_transform = config.layers_pattern = None  # those names say it now
    _refuse_idle_patterns(config, _hits(model, config))
    return config


def mark_trained(tuned: Any) -> Any:
    """Makes the weights of a PEFT model that train float32 masters, and leaves out what nobody reads."""
    unread = _unread_weights(tuned)
    for name, weight in tuned.named_parameters():
        if name in unread:
            weight.requires_grad_(False)
        if weight.requires_grad:
            weight.data = weight.data.float()
    return tuned


def vision_choices(tuned: nn.Module) -> dict[str, Choice]:
    """What an adapter does to tower and projector: {"tower": "lora", "projector": "frozen"} for instance."""
    found: dict[str, Choice] = {"tower": "frozen", "projector": "frozen"}
    for name, _ in tuned.named_parameters():
        part = {"vision tower": "tower", "projector": "projector"}.get(part_of(name))
        if part and (".lora_" in name or ".modules_to_save." in name):
            found[part] = "lora" if ".lora_" in name else "train"
    return found


def _vision_targets(model: nn.Module, tower: Choice, projector: Choice) -> list[str]:
    """Full names of the vision parts' matrices that get LoRA: of the tower in the layers whose output is read."""
    unread = {name.rpartition(".")[0] for name in _unread_weights(model)}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name not in unread
        and (
            (tower == "lora" and part_of(name) == "vision tower" and name.endswith(_TOWER_PROJECTIONS))
            or (projector == "lora" and part_of(name) == "projector")
        )
    ]


def _hits(model: nn.Module, config: Any) -> list[str]:
    """Full names of the modules that a configuration's targets hit."""
    from peft.tuners.tuners_utils import check_target_module_exists

    return [name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)]


def lora_config(options: Mapping[str, Any], *, tower: Choice = "frozen", projector: Choice = "frozen") -> Any:
    """Builds `peft.LoraConfig` from a recipe's mapping; an unknown name is refused with the nearest valid one."""
    from peft import LoraConfig

    check_names("lora", options, [field.name for field in fields(LoraConfig)], near_by=_SHORT_NAMES)
    for name, reason in _NO_SERVICE.items():
        if options.get(name):
            raise ConfigError(f"lora.{name} {reason}: take it out")
    if isinstance(rows := options.get("trainable_token_indices"), Mapping) and "embed_tokens" in rows:
        raise ConfigError(
            "lora.trainable_token_indices.embed_tokens ends the name of the image embedding too (vision_embed_tokens): "
            "write model.embed_tokens"
        )
    for name, rank in {"r": options.get("r", 1), **_pattern(options, "rank_pattern")}.items():
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            where = "lora.r" if name == "r" else f"lora.rank_pattern: that of {name!r}"
            raise ConfigError(
                f"{where} is {rank!r}, allowed is a whole number, 1 or more; lora: null tunes without LoRA"
            )
    for name, alpha in {"lora_alpha": options.get("lora_alpha", 1), **_pattern(options, "alpha_pattern")}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            where = "lora.lora_alpha" if name == "lora_alpha" else f"lora.alpha_pattern: that of {name!r}"
            raise ConfigError(f"{where} is {alpha!r}, allowed is a number above 0: with 0 nothing trains")
    if options.get("lora_dropout") == 1:
        raise ConfigError("lora.lora_dropout is 1, which drops all and trains nothing: allowed is 0 or more, below 1")
    if (bias := options.get("bias", "none")) != "none":
        raise ConfigError(
            f"lora.bias is {bias!r}, and the language model has no bias: all would train those of the vision part; "
            "take it out, or train that part with vision.tower or vision.projector"
        )
    if starts_at_random(begun := options.get("init_lora_weights")):
        raise ConfigError(
            f"lora.init_lora_weights is {begun!r}: its random decomposition of the base comes out otherwise when the "
            "run is loaded again; use pissa, which does not"
        )
    if str(begun).lower() in _AFTER_A_PASS:
        raise ConfigError(
            f"lora.init_lora_weights is {begun!r}, which needs a pass over the rows before LoRA is there, and none is "
            "made here: use pissa, olora or orthogonal, or take it out"
        )
    values = {"task_type": "CAUSAL_LM", "target_modules": list(LORA_PROJECTIONS), **options}
    if values["target_modules"] == "all-linear":  # PEFT's own reading of it would hit the tower too
        values["target_modules"] = list(LORA_PROJECTIONS)
    if not isinstance(saved := values.get("modules_to_save") or [], list | tuple):
        raise ConfigError(f"lora.modules_to_save is {saved!r}, allowed is a list of names, [lm_head] for instance")
    whole = ["img_processor"] if tower == "train" else []
    whole += ["img_projection.0", "img_projection.2"] if projector == "train" else []
    if whole:
        values["modules_to_save"] = [*saved, *whole]
    try:
        return LoraConfig(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora: {first_line(error)}") from error


def _pattern(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A mapping of ends of names to values, {"o_proj": 8} for instance."""
    if not isinstance(pattern := options.get(name) or {}, Mapping):
        raise ConfigError(f"lora.{name} is {pattern!r}, allowed is a mapping of names of modules, {{o_proj: 8}}")
    for key in pattern:
        if (fault := expression_fault(str(key))) is not None:
            raise ConfigError(f"lora.{name}: {key!r} is no regular expression ({fault}); names of modules")
    return dict(pattern)


def _refuse_idle_patterns(config: Any, names: Iterable[str]) -> None:
    """Refuses an entry of rank_pattern or alpha_pattern that no module with LoRA takes: the first one that fits counts.

    Example: ["qkv_proj", "layers.0.self_attn.qkv_proj"] -> the second one is for nothing.
    """
    from peft.utils.other import get_pattern_key

    if config.target_parameters:
        return  # which of them PEFT finds is known to PEFT alone
    places = list(names)
    for option in ("rank_pattern", "alpha_pattern"):
        keys = list(getattr(config, option))
        taken = {get_pattern_key(keys, name) for name in places}
        if key := next((key for key in keys if key not in taken), None):
            alone = {get_pattern_key([key], name) for name in places}
            left = " that an entry before it leaves" if key in alone else ""
            ends = ", ".join(sorted({name.rpartition(".")[2] for name in places}))
            raise ConfigError(f"lora.{option}: {key!r} fits no module{left}; LoRA is on {ends}")


def _refuse_wrong_layers(model: Any, config: Any) -> None:
    """Refuses numbers of layers that the language model does not have, and another name for its list of layers."""
    wanted, count = config.layers_to_transform, model.config.num_hidden_layers
    for layer in wanted if isinstance(wanted, list | tuple) else [] if wanted is None else [wanted]:
        if isinstance(layer, bool) or layer not in range(count):
            raise ConfigError(
                f"lora.layers_to_transform: {layer!r} is no layer of the language model, which has {count}: from 0 to "
                f"{count - 1}"
            )
    patterns = config.layers_pattern or []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not any(re.match(rf"(?:.*\.)?{pattern}\.\d+\.", name) for name, _ in model.named_modules()):
            raise ConfigError(f"lora.layers_pattern: {pattern!r} is no list of layers; take it out, or write layers")


def _refuse_wrong_targets(model: nn.Module, config: Any) -> None:
    """Refuses LoRA targets that hit nothing, or the vision part, where the language model was meant."""
    if config.target_modules is None:
        return  # target_parameters alone: PEFT itself refuses what it does not find
    whole, is_pattern = config.target_modules, isinstance(config.target_modules, str)
    real = f"the projections of the language model are {', '.join(LORA_PROJECTIONS)}"
    wrong: dict[str, list[str]] = {}
    modules = 0
    for single in [whole] if is_pattern else sorted(whole):
        config.target_modules = single if is_pattern else {single}
        hits = _hits(model, config)
        vision = [name for name in hits if _VISION in name]
        config.target_modules = whole
        if not hits and config.exclude_modules:
            raise ConfigError(
                f"lora.target_modules: {single!r} hits no module that lora.exclude_modules leaves: take it out of one "
                f"of them; {real}"
            )
        modules += len(vision)
        if not hits or vision:
            which = "no module" if not hits else "only" if len(vision) == len(hits) else "also"
            wrong.setdefault(which, []).append(repr(single))
    if wrong:
        told = [
            f"{' and '.join(names)} {'hits' if len(names) == 1 else 'hit'} {which}"
            + ("" if which == "no module" else " the vision part")
            for which, names in wrong.items()
        ]
        count = f" ({modules} modules)" if modules else ""
        raise ConfigError(f"lora.target_modules: {', '.join(told)}{count}; {real}")


def _name_modules(model: nn.Module, config: Any, wanted: Sequence[Any]) -> None:
    """Puts full names of the language model's modules in place of the ends of names that a recipe has.

    PEFT goes by ends alone and would train modules of the vision part with them; what hits nothing it would pass over.
    Example: modules_to_save ["embed_tokens"] -> ["model.embed_tokens"], without "model.vision_embed_tokens";
    ["lm_haed"] -> "... 'lm_haed' hits no module: did you mean lm_head?".
    """
    names = [name for name, _ in model.named_modules() if name]
    around = tuple(name for name in names if any(_VISION in one and one.startswith(f"{name}.") for one in names))
    full: list[str] = []
    for end in wanted:
        hits = [name for name in names if end and isinstance(end, str) and name.endswith(end)]
        if not hits:
            near = difflib.get_close_matches(str(end), {name.split(".")[-1] for name in names}, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "take it out, or name one such as lm_head"
            raise ConfigError(f"lora.modules_to_save: {end!r} hits no module: {hint}")
        own = [name for name in hits if _VISION not in name and name not in around]
        if not own:
            raise ConfigError(
                f"lora.modules_to_save: {end!r} hits no module of the language model alone: the vision part trains by "
                "vision.tower=train and vision.projector=train"
            )
        full += [name for name in own if name not in full]
    if wanted:
        config.modules_to_save = [*full, *config.modules_to_save[len(wanted) :]]


def trainable_report(model: nn.Module) -> TrainableReport:
    """Counts weights, trainable and in total, per part of the model; LoRA counts for the part it sits on.

    Example: the real model under LoRA r=16 gives `{"language model": PartCount(25165824, ...), "projector":
    PartCount(0, 22034432), "vision tower": PartCount(0, 303507456)}`.
    """
    parts = {"language model": [0, 0], "projector": [0, 0], "vision tower": [0, 0]}
    for name, weight in model.named_parameters():
        if ".original_module." in name:
            continue  # PEFT keeps what it trains as a whole twice: the base's weights beside the trained copy
        # bitsandbytes stores two 4-bit numbers in a byte
        count = weight.numel() * (2 * weight.element_size() if type(weight).__name__ == "Params4bit" else 1)
        parts[part_of(name)][0] += count if weight.requires_grad else 0
        parts[part_of(name)][1] += count
    return TrainableReport({part: PartCount(*counts) for part, counts in parts.items()})


def part_of(name: str) -> Literal["language model", "projector", "vision tower"]:
    """The part that a parameter belongs to, by its name.

    Example: "model.vision_embed_tokens.sub_GN" -> "projector"; "lm_head.weight" -> "language model".
    """
    if f"{_VISION}.img_processor" in name:
        return "vision tower"
    return "projector" if _VISION in name else "language model"


def _unread_weights(model: nn.Module) -> set[str]:
    """Names of the tower's weights that no output depends on, see `unread_parts`."""
    unread = unread_parts(model)
    return {name for name, _ in model.named_parameters() if name.startswith(unread)}
