"""Cuts the frozen model cases of this folder out of the full golden set: `python tests/golden/freeze_models.py FULL`.

Kept: every case of the tiny models with its inputs, generated tokens, scores, losses and the norms of all gradients;
of logits, intermediates and large gradients every so many rows (recorded in `cases.json`), a few MB in all.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MODELS = ("tiny_phi3v", "tiny_phi3v_long", "tiny_phi35v_long")
LOGIT_ROWS = 14  # stored positions a case, about
LARGE = 16_000  # elements from which every GRAD_STRIDE-th row of a gradient or an intermediate is kept
GRAD_STRIDE = 16


def thin_logits(case: dict, logits: torch.Tensor, length: int) -> torch.Tensor:
    """Fewer of the stored rows `[B, rows, V]`; `case["logits"]` says afterwards which."""
    stored = case["logits"]
    every = 1 if stored == "full" else stored["stride"]
    last = 0 if stored == "full" else stored["last"]
    rows = sorted(set(range(0, length, every)) | set(range(length - last, length)))
    stride = every * max(1, len(range(0, length, every)) // LOGIT_ROWS)
    keep = sorted(set(range(0, length, stride)) | set(range(length - 4, length)))
    case["logits"] = {"stride": stride, "last": 4}
    return logits[:, [rows.index(row) for row in keep]].contiguous()


def freeze(full: Path, target: Path) -> None:
    """Writes cases, inputs, outputs and models of the subset."""
    cases = [case for case in json.loads((full / "cases.json").read_text()) if case["model"] in MODELS]
    names = {case["name"]: case for case in cases}
    inputs = {k: v for k, v in load_file(full / "case_inputs.safetensors").items() if k.split(".")[0] in names}
    outputs = {}
    for key, value in load_file(full / "case_outputs.safetensors").items():
        name, kind = key.split(".", 1)
        if name not in names:
            continue
        if kind == "logits":
            value = thin_logits(names[name], value, inputs[f"{name}.input_ids"].shape[1])
        elif value.is_floating_point() and value.numel() > LARGE and kind != "scores":
            names[name]["thinned"] = GRAD_STRIDE
            value = (value[:, ::GRAD_STRIDE] if value.ndim == 3 else value[::GRAD_STRIDE]).contiguous()
        outputs[key] = value
    (target / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")
    save_file(inputs, target / "case_inputs.safetensors")
    save_file(outputs, target / "case_outputs.safetensors")
    for model in MODELS:
        (target / "models" / model).mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "vision_config.json", "meta.json"):
            shutil.copyfile(full / "models" / model / file, target / "models" / model / file)
    shutil.copyfile(full / "models" / "tiny.safetensors", target / "models" / "tiny.safetensors")


if __name__ == "__main__":
    freeze(Path(sys.argv[1]), Path(__file__).parent)
