"""The only place that loads: base weights, processor, 4-bit options; adapters through `phi3v.adapters`.

In come plain values (names, mappings, paths), out come models. Everything is strict: a checkpoint of another type, a
missing, surplus or misshapen weight, a GPU that is not there is one line, never a warning and random weights. What
trains is chosen in `phi3v.tuning`. Knows nothing about recipes, data or the Trainer.
"""

import contextlib
import importlib.util
import inspect
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from phi3v.adapters import check_adapter, load_adapter
from phi3v.checkpoint_files import PROCESSOR_FILES, check_processor, check_processor_files, config_fault
from phi3v.errors import CheckpointError, ConfigError, DeviceError, MissingPackageError, install
from phi3v.hub_faults import hub_fault
from phi3v.image_tokens import crops_allowed, most_image_tokens
from phi3v.launch import Launch
from phi3v.model.register import register
from phi3v.passthrough import check_names, connection_fault, first_line
from phi3v.targets import (
    Target,
    check_model_folder,
    check_model_type,
    read_json,
    refuse_damaged,
    resolve_target,
)
from phi3v.weight_files import check_second_embedding

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedTarget:
    """A TARGET in memory.

    Attributes:
        model: in evaluation mode; a `peft.PeftModel` when the target has an adapter.
        processor: the target's own processor.
        base_name: folder or hub id of the base weights.
        kind: "run", "adapter", "model" or "hub".
    """

    model: Any
    processor: Any
    base_name: str
    kind: str


def resolve_device(device: str = "auto") -> torch.device:
    """Turns "auto", "cpu", "cuda" or "cuda:1" into a device that is there.

    Raises:
        DeviceError: the GPU that was asked for is not there.
        ConfigError: the text names no device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"model.device {device!r} names no device: use auto, cpu, cuda or cuda:0") from error
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"model.device is {device!r} and torch {torch.__version__} sees no GPU: use model.device=cpu or auto, or "
            "--device cpu for a run that is asked or evaluated"
        )
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"model.device is {device!r} and there are {torch.cuda.device_count()} GPUs: count from cuda:0"
        )
    if wanted.type not in ("cpu", "cuda"):
        found = torch.accelerator.current_accelerator(check_available=True)
        if found is None or found.type != wanted.type:
            raise DeviceError(
                f"model.device is {device!r} and torch {torch.__version__} sees no such device: use model.device=cpu "
                "or auto"
            )
    return wanted


def rank_device(device: str = "auto") -> torch.device:
    """As `resolve_device`; of several processes that a launcher started each takes the GPU of its own number.

    Raises: DeviceError where there is none for it.
    """
    launch, wanted = Launch.here(), resolve_device(device)
    if wanted.type != "cuda" or wanted.index is not None or launch.count == 1:
        return wanted
    if launch.local_rank >= torch.cuda.device_count():
        raise DeviceError(
            f"rank {launch.rank} is number {launch.local_rank} on this machine, which has "
            f"{torch.cuda.device_count()} GPUs: start as many ranks (--nproc-per-node), or set model.device=cpu"
        )
    return torch.device("cuda", launch.local_rank)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Turns "auto" into bfloat16 on GPUs that compute in it, float16 on older ones, float32 on the CPU."""
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ConfigError(f"model.dtype {dtype!r} is not one of auto, {', '.join(_DTYPES)}")
        return _DTYPES[dtype]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_processor(
    target: str | Path,
    *,
    num_crops: int | None = None,
    max_image_tokens: int | None = None,
    fast: bool | None = None,
    revision: str | None = None,
) -> Any:
    """Loads the processor of a TARGET.

    Args:
        target: run, adapter, model folder or hub id.
        num_crops: replaces the number of crops that it was saved with.
        max_image_tokens: replaces it with the most crops at which no image costs more tokens than that: 781 allows 4;
            with `num_crops` too, the smaller number counts.
        fast: replaces what it was saved with: True resizes within one grey level of the exact way, and faster.
        revision: revision of a hub id.

    Raises:
        CheckpointError: a checkpoint of another type, a wrong field in its config.json, a file that is not there.
    """
    register()
    place = resolve_target(target, revision=revision)
    if place.processor == place.base:  # an adapter's own processor lies beside no config
        _read_config(place.base, place.revision)
    check_processor_files(Path(place.processor))
    try:
        processor = AutoProcessor.from_pretrained(
            place.processor, revision=place.revision or "main", trust_remote_code=False
        )
    except Exception as error:  # tokenizers has no class of its own for what it finds wrong
        raise CheckpointError(
            f"cannot load the processor of {target}: {_missing_file(place) or first_line(error)}; it needs "
            f"{', '.join(PROCESSOR_FILES)} as they were published"
        ) from error
    if not hasattr(processor, "image_processor"):
        raise CheckpointError(
            f"{place.processor} holds a {type(processor).__name__} and no processor of Phi-3-V: restore "
            f"{', '.join(PROCESSOR_FILES)} as they were published"
        )
    check_processor(processor, place.processor)
    images = processor.image_processor
    if (allowed := crops_allowed(num_crops, max_image_tokens)) is not None:
        if allowed < 1:
            least = most_image_tokens(1)
            raise ConfigError(f"image.max_tokens is {max_image_tokens}, and no image costs less than {least} tokens")
        images.num_crops = allowed
    if fast is not None:
        images.fast = fast
    return processor


def load_config(name: str | Path, *, revision: str | None = None) -> Any:
    """Loads the config of a model folder or hub id, and nothing else of it. Raises: CheckpointError."""
    place = resolve_target(name, revision=revision)
    return _read_config(place.base, place.revision)


def _read_config(base: str, revision: str | None) -> Any:
    """The config of a folder or hub id: its type first, then each field; CheckpointError names file and field."""
    register()
    try:
        if Path(base).is_dir():
            values = read_json(Path(base) / "config.json")
        else:
            values, _ = PreTrainedConfig.get_config_dict(base, revision=revision or "main")
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        if (line := hub_fault(error, base, "model")) is not None:
            raise CheckpointError(line) from None  # what it was raised from may show the token
        reason = connection_fault(error) or first_line(error)
        raise CheckpointError(
            f"{base} is no folder here and could not be read from the hub ({reason}): "
            "check the name, the network, and HF_TOKEN for private models"
        ) from error
    check_model_type(values, base)
    if (fault := config_fault(values)) is not None:
        raise CheckpointError(f"{Path(base) / 'config.json'}: {fault}; restore config.json as it was published")
    try:
        return AutoConfig.from_pretrained(base, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        reason = first_line(error).replace("`rope_parameters`'s", "rope_scaling's")
        raise CheckpointError(
            f"{Path(base) / 'config.json'}: {reason}; restore config.json as it was published"
        ) from error


def _missing_file(place: Target) -> str | None:
    """The first file of a local processor that is not there, as half a sentence."""
    folder = Path(place.processor)
    missing = [name for name in PROCESSOR_FILES if folder.is_dir() and not (folder / name).is_file()]
    return f"{folder} has no {missing[0]}" if missing else None


def load_base(
    name: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str | None = None,
    quantization: Mapping[str, Any] | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """Loads a whole model and checks that every weight came from the file, name by name and shape by shape.

    Args:
        name: model folder or hub id.
        dtype: "auto" (see `resolve_dtype`), "bfloat16", "float32" or "float16".
        device: see `resolve_device`.
        attn_implementation: name of transformers' attention; None is sdpa, whatever the checkpoint's config asks for.
        quantization: arguments of `transformers.BitsAndBytesConfig`, None for off.
        revision: revision on the hub.

    Returns:
        The model in evaluation mode, on the device.
    """
    where = resolve_device(device)
    _read_config(str(name), revision)
    if Path(name).is_dir():
        check_model_folder(Path(name))
        refuse_damaged(Path(name))
    options: dict[str, Any] = {
        "dtype": resolve_dtype(dtype, where),
        "attn_implementation": attn_implementation or "sdpa",
    }
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization, options["dtype"])
    if where.type != "cpu" or quantization is not None:
        options["device_map"] = {"": where}
    try:
        with _quiet("transformers.modeling_utils"):
            model, info = AutoModelForImageTextToText.from_pretrained(
                str(name),
                revision=revision or "main",
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, all of them in one line
                **options,
            )
    except ImportError as error:
        raise MissingPackageError(f"cannot load {name}: {first_line(error)}{_package(attn_implementation)}") from error
    except (OSError, ValueError, RuntimeError, StrictDataclassError) as error:
        if "attn_implementation" in str(error):
            raise ConfigError(
                f"model.attn_implementation {attn_implementation!r} is none that transformers has for this model: "
                "use sdpa or eager, or flash_attention_2 where flash-attn is installed"
            ) from error
        raise CheckpointError(
            f"cannot load {name}: {first_line(error)}; config.json and weights must belong together"
        ) from error
    _refuse_incomplete(str(name), info)
    check_second_embedding(name, revision)
    _keep_layout_in_4_bits(model)
    return model.eval()


def _keep_layout_in_4_bits(model: Any) -> None:
    """No other layout of 4-bit weights on CPUs with AVX512-BF16.

    bitsandbytes 0.50 makes it in the first forward pass without gradients, and never takes it back: a training behind a
    validation would have no gradient through these matrices, and say nothing. It also computes in bfloat16 alone, and
    fails where rows are shorter than a block of 64.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _package(attn_implementation: str | None) -> str:
    """The way out where an attention needs a package that is not installed."""
    if attn_implementation is None or not attn_implementation.startswith("flash_attention"):
        return ""
    install = "pip install flash-attn --no-build-isolation" if attn_implementation == "flash_attention_2" else ""
    return f": {install + ', or ' if install else ''}use model.attn_implementation=sdpa"


def _refuse_incomplete(name: str, info: Mapping[str, Any]) -> None:
    """Raises CheckpointError when the checkpoint and the model differ in any weight."""
    missing, surplus = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    misshapen = sorted(f"{key} {tuple(found)} for {tuple(wanted)}" for key, found, wanted in info["mismatched_keys"])
    misshapen_names = {entry.split(" ", 1)[0] for entry in misshapen}
    missing = [key for key in missing if key not in misshapen_names]
    found = [
        f"{len(names)} {kind} ({names[0]}{', ...' if len(names) > 1 else ''})"
        for kind, names in (("missing", missing), ("surplus", surplus), ("misshapen", misshapen))
        if names
    ]
    if found:
        raise CheckpointError(
            f"the weights in {name} do not fit its config.json: {', '.join(found)}; restore both files"
        )


def load_target(
    target: str | Path,
    *,
    base_only: bool = False,
    num_crops: int | None = None,
    max_image_tokens: int | None = None,
    fast: bool | None = None,
    revision: str | None = None,
    trainable: bool = False,
    **options: Any,
) -> LoadedTarget:
    """Loads a run, an adapter, a model folder or a hub id.

    Args:
        target: what to load, see `phi3v.targets`.
        base_only: leave the adapter off. (`adapters.base_weights` shows most adapters' base without a second load.)
        num_crops: crops of an image at most, None for what the processor was saved with.
        max_image_tokens: see `load_processor`.
        fast: see `load_processor`.
        revision: revision of a hub id.
        trainable: load the adapter for more training.
        **options: dtype, device, attn_implementation and quantization of `load_base`.
    """
    place = resolve_target(target, revision=revision)
    if place.adapter is not None and not base_only:
        check_adapter(place.adapter)  # what is not whole is refused before the base is read
    processor = load_processor(
        target, num_crops=num_crops, max_image_tokens=max_image_tokens, fast=fast, revision=revision
    )
    model: Any = load_base(place.base, revision=place.revision, **options)
    if place.adapter is not None and not base_only:
        model = load_adapter(model, place, trainable=trainable)
    return LoadedTarget(model, processor, place.base, place.kind)


def quantization_config(options: Mapping[str, Any], dtype: torch.dtype) -> BitsAndBytesConfig:
    """Builds `BitsAndBytesConfig`, which computes in `dtype` where the options name no other type.

    Tower, projector with its separators, and head stay out of it unless the options name other modules.
    """
    known = [
        name for name in inspect.signature(BitsAndBytesConfig.__init__).parameters if name not in ("self", "kwargs")
    ]
    check_names("quantization", options, known)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingPackageError(f"quantization needs bitsandbytes: {install('quantization')}")
    try:
        kept = {"llm_int8_skip_modules": ["model.vision_embed_tokens", "lm_head"], "bnb_4bit_compute_dtype": dtype}
        return BitsAndBytesConfig(**{**kept, **options})
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"quantization: {first_line(error)}") from error


@contextlib.contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    """Keeps warnings of one logger back: what they would say is raised as an error."""
    logger = logging.getLogger(logger_name)

    def refuse(record: logging.LogRecord) -> bool:
        return record.levelno > logging.WARNING

    logger.addFilter(refuse)
    try:
        yield
    finally:
        logger.removeFilter(refuse)
