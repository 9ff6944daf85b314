"""The golden model cases, and the tiny models they were made with, as fixtures of the model tests.

A golden folder holds `cases.json`, `case_inputs.safetensors`, `case_outputs.safetensors` and `models/`. Two exist: the
frozen subset in `tests/golden`, always there, and the full set of the shared reference data. This class reads both.
"""

import functools
import json
from pathlib import Path

import torch
from golden_inputs import digest, draw_pixels
from safetensors.torch import load_file

from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM

FROZEN = Path(__file__).parent / "golden"


class GoldenSet:
    """Cases, inputs, outputs and models below one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.cases = {case["name"]: case for case in json.loads((folder / "cases.json").read_text())}
        self.inputs = load_file(folder / "case_inputs.safetensors")
        self.outputs = load_file(folder / "case_outputs.safetensors")

    def config(self, name: str, attn: str | None = None, **changes) -> Phi3VConfig:
        """Configuration of the tiny model `name`, its vision tower included; attention is not a file's choice."""
        fields = json.loads((self.folder / "models" / name / "config.json").read_text())
        fields["vision_config"] = json.loads((self.folder / "models" / name / "vision_config.json").read_text())
        return Phi3VConfig.from_dict({**fields, **changes}, **({} if attn is None else {"attn_implementation": attn}))

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """The file's tensors in Microsoft's names, bfloat16."""
        meta = json.loads((self.folder / "models" / name / "meta.json").read_text())
        return load_file(self.folder / "models" / meta["weights"])

    def model(self, name: str, attn: str = "sdpa", **changes) -> Phi3VForCausalLM:
        """A fresh float32 model in eval mode; `changes` are fields of its configuration."""
        model = Phi3VForCausalLM(self.config(name, attn, **changes)).eval()
        model.load_state_dict({key: value.float() for key, value in self.weights(name).items()}, strict=True)
        return model

    def batch(self, name: str) -> dict[str, torch.Tensor]:
        """Arguments of `forward` or `generate` for a case; pixels are drawn again and checked by their sha256."""
        keys = ("input_ids", "attention_mask", "position_ids", "labels")
        batch = {key: self.inputs[f"{name}.{key}"].clone() for key in keys if f"{name}.{key}" in self.inputs}
        case = self.cases[name]
        if "pixels" in case:
            drawn = case["pixels"]
            pixels = draw_pixels(drawn["seed"], drawn["n"], drawn["crops"], drawn["used"])
            assert digest(pixels) == drawn["sha256"], f"{name}: the drawn pixels are not those of the golden case"
            batch |= {"pixel_values": torch.from_numpy(pixels), "image_sizes": torch.tensor(case["image_sizes"])}
        return batch

    def rows(self, name: str, length: int) -> list[int]:
        """Positions whose logits are stored: `{"stride": 16, "last": 2}` and length 40 give `[0, 16, 32, 38, 39]`."""
        stored = self.cases[name]["logits"]
        if stored == "full":
            return list(range(length))
        return sorted(set(range(0, length, stored["stride"])) | set(range(length - stored["last"], length)))


@functools.cache
def golden_set(folder: Path = FROZEN) -> GoldenSet:
    """The golden folder, read once."""
    return GoldenSet(folder)


def tiny_model(name: str = "tiny_phi3v", attn: str = "sdpa", **changes) -> Phi3VForCausalLM:
    """A tiny model with the golden weights: vocabulary 512, head size 96, 3 layers, tower of 3 layers.

    `tiny_phi3v` has the real context lengths, `tiny_phi3v_long` and `tiny_phi35v_long` an original context of 64.
    """
    return golden_set().model(name, attn, **changes)
