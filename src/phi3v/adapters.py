"""Adapters on a loaded base: put there from their folder, and taken off again to see the base.

In come a base and the places of an adapter, out comes a `peft.PeftModel` in which every tensor of the file found its
place. Knows which adapters leave their base as it was. Knows nothing about recipes, data or the Trainer.
"""

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from phi3v.adapter_faults import fault_of, refuse_prompts, refuse_wrong_numbers, said_of
from phi3v.errors import CheckpointError
from phi3v.model.vision_phi3_v import unread_parts
from phi3v.targets import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Target, read_json, refuse_damaged, tensor_shapes

_KEEP_THE_BASE = ("gaussian", "eva", "orthogonal")
"""Ways of `init_lora_weights`, true and false aside, that leave the weights below the adapter alone. The others (pissa,
olora, corda, loftq, ...) take what the adapter begins with out of them."""

_PICKLE = "adapter_model.bin"
"""What peft wrote by default before 0.7."""


def check_adapter(folder: Path) -> None:
    """Refuses an adapter whose files are not whole or are of no kind that peft has, before its base is read.

    Where digests lie beside them (a run's own, an export's, a checkpoint's) each file is what was written.
    """
    from peft import PeftType

    if not (folder / ADAPTER_WEIGHTS).exists() and (folder / _PICKLE).is_file():
        raise CheckpointError(
            f"{folder} has no {ADAPTER_WEIGHTS}, only {_PICKLE}, a pickle, which is never opened here: if you trust "
            "it, load it with peft elsewhere and write it by save_pretrained(FOLDER, safe_serialization=True)"
        )
    tensor_shapes(folder / ADAPTER_WEIGHTS)
    values = read_json(folder / ADAPTER_CONFIG)
    kind, begun = values.get("peft_type"), values.get("init_lora_weights")
    if kind not in [known.value for known in PeftType]:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: peft_type is {kind!r}, which is no kind of adapter that peft has (LORA for "
            "instance): copy the file again"
        )
    refuse_wrong_numbers(folder, values)
    if starts_at_random(begun):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: init_lora_weights is {begun!r}, a random decomposition that cannot be made "
            "again, so the weights below this adapter are not known: tune with pissa, or save it with peft's "
            "path_initial_model_for_weight_conversion"
        )
    refuse_damaged(folder)


def starts_at_random(way: Any) -> bool:
    """Whether `init_lora_weights` splits the base's weights at random: a second time the parts would be others.

    PEFT stores the adapter's part alone and makes the other again when it is loaded. Example: "pissa_niter_4", a
    randomised SVD -> True; "pissa", a whole one -> False.
    """
    return isinstance(way, str) and way.startswith("pissa_niter_")


def load_adapter(
    model: PreTrainedModel, place: Target, *, trainable: bool = False, on_meta: bool = False, name: str = "default"
) -> Any:
    """Puts the adapter of `place` on its base and checks that every tensor of the file found its place.

    The file may lack tensors of the tower that no output depends on: Microsoft's own script trains without them. A base
    that has adapters already gets one more, with a name of its own; `select_adapter` chooses among them.

    On the meta device the adapter is made as its configuration says, and nothing is read into it.

    Returns:
        A `peft.PeftModel`.
    """
    from peft import PeftConfig, PeftModel, get_peft_model

    assert place.adapter is not None
    if trainable:
        refuse_prompts(place)
    stored = tensor_shapes(place.adapter / ADAPTER_WEIGHTS)
    with said_of(place, stored), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it would say about the tensors is checked below
        if on_meta:
            config = PeftConfig.from_pretrained(str(place.adapter))
            config.inference_mode, config.init_lora_weights = not trainable, True
            return get_peft_model(model, config)
        if has_adapter(model):
            tuned: Any = model
            tuned.load_adapter(str(place.adapter), adapter_name=name, is_trainable=trainable)
        else:
            tuned = PeftModel.from_pretrained(model, str(place.adapter), name, is_trainable=trainable)
    check_fit(tuned, place, stored, name)
    return tuned if trainable else tuned.eval()


def check_fit(tuned: Any, place: Target, stored: Mapping[str, tuple[int, ...]], name: str = "default") -> None:
    """Refuses an adapter whose stored tensors, by name and shape, are not those of the adapter on the model."""
    wanted = {key: tuple(tensor.shape) for key, tensor in adapter_state(tuned, name).items()}
    wrong = {key for key in wanted.keys() | stored.keys() if wanted.get(key) != stored.get(key)}
    unread = unread_parts(tuned)
    if key := min((key for key in wrong if key in stored or not key.startswith(unread)), default=""):
        why = fault_of(place, stored, wrong) or (
            f"does not fit {place.base}: {key} is {stored.get(key, 'missing')} in the file and "
            f"{wanted.get(key, 'unknown')} in the model; tune again or name the right base"
        )
        raise CheckpointError(f"adapter {place.adapter} {why}")


def adapter_state(model: Any, name: str = "default") -> dict[str, Any]:
    """The tensors that an adapter's file holds, by their names there."""
    from peft import get_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a word that embeddings under LoRA are saved too
        state: dict[str, Any] = get_peft_model_state_dict(model, adapter_name=name)
    return state


def select_adapter(model: Any, name: str | None) -> None:
    """From now on a model with several adapters answers with this one, or as its base does (None)."""
    if name is None:
        model.base_model.disable_adapter_layers()
    else:
        model.base_model.enable_adapter_layers()
        model.set_adapter(name, inference_mode=True)


@contextlib.contextmanager
def base_weights(model: Any) -> Iterator[Any]:
    """Inside this context a model with an adapter answers as its base does; one load serves both.

    Raises:
        CheckpointError: the model does not hold its base, see `holds_base`.
    """
    if not holds_base(model):
        kind = "model with this kind of adapter" if has_adapter(model) else "fully tuned model"
        raise CheckpointError(f"a {kind} does not hold its base: load the base beside it")
    with model.disable_adapter():
        yield model


def works_on_prompts(config: Any) -> bool:
    """Whether an adapter of this configuration does more to a prompt than weights can: learned prompts, aLoRA."""
    return bool(config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None))


def has_adapter(model: Any) -> bool:
    """Whether an adapter sits on the model."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def holds_base(model: Any) -> bool:
    """Whether the base is in memory below the adapter, weight by weight.

    It is not where the whole model was tuned, where the adapter brings biases of its own for the base's layers, and
    where it was begun with parts of the base's weights: `init_lora_weights` true -> True, "pissa" -> False.
    """
    if not has_adapter(model):
        return False
    configs = [model.peft_config[name] for name in model.active_adapters]
    begun = [getattr(config, "init_lora_weights", True) for config in configs]
    own_biases = any(getattr(config, "bias", "none") != "none" for config in configs)
    return not own_biases and all(isinstance(way, bool) or way in _KEEP_THE_BASE for way in begun)


def save_tuned(model: Any, folder: Path, state_dict: dict[str, Any] | None = None) -> None:
    """Writes what was tuned, or a given state of it, without PEFT's README.md, a form with every field left open.

    Equal models give equal files in each process.
    """
    if has_adapter(model):
        model.create_or_update_model_card = _no_card
    with warnings.catch_warnings():
        # PEFT takes a bias of LoRA, which has one dimension, for a part of a matrix that was not gathered
        warnings.filterwarnings("ignore", message=r"Adapter .* invalid shape: \S+\.lora_B\.bias:")
        model.save_pretrained(folder, state_dict=state_dict)
    if (folder / ADAPTER_CONFIG).is_file() and has_adapter(model):
        _sort_sets(folder / ADAPTER_CONFIG, model.peft_config[model.active_adapters[0]].to_dict())


def _sort_sets(file: Path, config: Mapping[str, Any]) -> None:
    """Sorts what PEFT keeps as a set, target_modules say: of texts its order is another one in each process."""
    values = json.loads(file.read_text(encoding="utf-8"))
    values |= {name: sorted(value) for name, value in config.items() if isinstance(value, set)}
    file.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def _no_card(folder: str) -> None:
    """Writes none."""
