"""One export from start to end: what is refused, the folder put in place whole, its digests, its card, the hub.

In comes a TARGET and a format, out comes a folder that is there whole or not at all. What is in it is the business of
the format's own module, which fills a folder that nobody sees yet and says what it put there: `layout`, `adapter`,
`onnx`. Knows nothing about the command line.
"""

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from phi3v.digests import write_digests
from phi3v.errors import ConfigError
from phi3v.export.card import MICROSOFT, base_id, read_card, render_card
from phi3v.export.folder import fill_whole, refuse_used
from phi3v.export.vllm import Serving
from phi3v.run_folder import RunFolder
from phi3v.targets import EXPORT_ABOUT, Target, read_json, resolve_target, run_of, system_template
from phi3v.whole_files import held_back

Format = Literal["merged", "adapter", "onnx"]
SHARD_BYTES = 2 * 10**9
"""Bytes of a file of weights at most where nothing is said, and so about what merging takes of memory."""


@dataclass(frozen=True)
class Exported:
    """What an export put where.

    Attributes:
        target: what was exported, as it was typed.
        to: the format.
        out: the folder.
        bytes: all its files together.
        base: hub id of the base, None where it is not known.
        facts: what the format says of itself: dtype, number of files, precision, ...
        pushed: address of the commit on the hub, None where nothing was pushed.
        vllm: how vLLM serves it; None where it cannot: other formats, another tower than vLLM's own.
        notes: what its owner has to know of its answers, one line each.
    """

    target: str
    to: Format
    out: Path
    bytes: int
    base: str | None
    facts: dict[str, Any] = field(default_factory=dict)
    pushed: str | None = None
    vllm: Serving | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "out": str(self.out)}


def export(
    target: str | Path,
    out: Path,
    *,
    to: Format,
    dtype: Literal["bfloat16", "float32", "float16"] | None = None,
    shard_bytes: int = SHARD_BYTES,
    precision: Literal["fp32", "fp16", "int4"] = "fp32",
    base: str | None = None,
    push: str | None = None,
    public: bool = False,
    api: Any = None,
) -> Exported:
    """Writes a target in one of the formats into `out`, a folder that is new or empty.

    Args:
        target: a run, an adapter, a model folder or a hub id.
        out: the folder.
        to: the format.
        dtype: of merged weights; None for that of the base.
        shard_bytes: of a file of merged weights at most.
        precision: of ONNX graphs.
        base: hub id of the base, or its folder, for card and adapter; None where the target's own words will do.
        push: repository on the hub that it is sent to; private, unless `public`.
        public: see `push`.
        api: a `huggingface_hub.HfApi`; None makes one.

    Raises: ConfigError for a folder that holds something; CheckpointError for a target that is not there or not whole.
    """
    place, run = resolve_target(target), run_of(target)
    refuse_used(out)
    named = base_id(place, base)
    if push is not None:
        from phi3v.export.hub import check_push

        if to == "adapter" and named is None:
            raise ConfigError(f"--push {push}: the base is a folder here, {place.base}: name its hub id with --base")
        check_push(push, public=public, api=api)
    facts: dict[str, Any] = {}

    def fill(folder: Path) -> None:
        images = run.read_recipe().image.processor_options if run else {}
        if to == "merged":
            facts.update(_merged(place, folder, dtype, shard_bytes, images, named))
        elif to == "adapter":
            facts.update(_adapter(place, folder, images, named or base))
        else:
            from phi3v.export.onnx import export_onnx

            facts.update(export_onnx(place, folder, precision=precision))
        if (system := system_template(target)) is not None:
            about = json.dumps({"system": system}, ensure_ascii=False, indent=2) + "\n"
            (folder / EXPORT_ABOUT).write_text(about, encoding="utf-8")
        card = read_card(
            run,
            title=_title(place, run),
            to=to,
            base=named,
            facts=facts,
            system=system,
            repo=push,
            finished=Path(target).absolute().parent.name != "checkpoints",
            serving=_serving(to, held_back(folder / "config.json"), run),
        )
        (folder / "README.md").write_text(render_card(card), encoding="utf-8")
        write_digests(folder)

    fill_whole(out, fill)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    sent = None
    if push is not None:
        from phi3v.export.hub import push as send

        sent = send(out, push, public=public, api=api)
    serving = _serving(to, out / "config.json", run)
    return Exported(str(target), to, out, size, named, facts, sent, serving, _notes(to, out, facts, run, serving))


def _serving(to: Format, config: Path, run: RunFolder | None) -> Serving | None:
    """How vLLM serves merged weights, by the samples of the run that they are of; None of all others."""
    if to != "merged":
        return None
    samples = run.read_summary().get("samples") if run is not None and run.state() == "finished" else None
    return Serving.of(read_json(config), samples if isinstance(samples, dict) else {})


def _notes(
    to: Format, out: Path, facts: Mapping[str, Any], run: RunFolder | None, serving: Serving | None
) -> tuple[str, ...]:
    """Where an export answers otherwise than its run, and what to do about it."""
    notes, place = [], shlex.quote(str(out))
    quantised = run is not None and run.read_recipe().quantization
    if quantised and to == "adapter":
        notes.append(
            "the run was trained on a quantised base, and this adapter is for the base as its files have it where "
            "nothing else is said: answers differ from the run's as the two bases do; "
            f"`phi3v evaluate {place} --data RECIPE` scores it on the quantised base, with `quantization=null` behind "
            "it on the whole one"
        )
    elif quantised:
        score = f"; `phi3v evaluate {place} --data RECIPE quantization=null` scores it" if to == "merged" else ""
        notes.append(
            "the run was trained on a quantised base, and this is merged into the base as its files have it: answers "
            f"differ from the run's as the two bases do{score}"
        )
    if to == "adapter" and "base" in facts and Path(facts["base"]).is_dir():
        notes.append(
            f"the base is a folder here ({facts['base']}), whose path stands in adapter_config.json: for others "
            "export with --base OWNER/NAME, its hub id"
        )
    if facts.get("precision") == "int4":
        notes.append(
            "int4 answers otherwise than the run, whose scores were not measured with it; `phi3v evaluate` reads no "
            f"graphs: ask your held-out questions with `phi3v ask {place} PHOTO QUESTION --runtime onnx`"
        )
    if serving is not None and serving.caveat:
        notes.append(serving.caveat)
    return tuple(notes)


def _title(place: Target, run: RunFolder | None) -> str:
    """The name of a run's folder, or of a target that is none: of runs/shop and of runs/shop/adapter it is "shop"."""
    return run.path.resolve().name if run else place.name.rstrip("/").rpartition("/")[2]


def _merged(
    place: Target, folder: Path, dtype: str | None, shard_bytes: int, images: Mapping[str, Any], base: str | None
) -> dict[str, Any]:
    """Fills the folder of merged weights."""
    from phi3v.export.layout import write_merged

    code = base if base in MICROSOFT else None
    return write_merged(place, folder, dtype=dtype, shard_bytes=shard_bytes, images=images, code=code)


def _adapter(place: Target, folder: Path, images: Mapping[str, Any], base: str | None) -> dict[str, Any]:
    """Fills the folder of an adapter."""
    from phi3v.export.adapter import write_adapter

    return write_adapter(place, folder, base=base, images=images)
