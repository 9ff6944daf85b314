"""A tiny Phi-3-V in Microsoft's layout, and a small data set of coloured photos, for tests that load and train.

`write_tiny_model(folder)` makes a folder as the hub has it: config.json, preprocessor_config.json, the small tokenizer
of the demo and random weights. `write_photos(folder, rows)` makes PNG photos and a JSONL file that names their colours.
`write_tiny_recipe(folder)` makes both, and the recipe of a run of two steps.
"""

import functools
import json
import tempfile
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from phi3v.demo.tokenizer import BASE_SIZE, EMBEDDING_ROWS, write_tokenizer
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM

PREPROCESSOR = {
    "image_processor_type": "Phi3VImageProcessor",
    "processor_class": "Phi3VProcessor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "num_crops": 1,
    "num_img_tokens": 144,
}
RECIPE = """
model: {folder}/model
data:
  train: {folder}/photos/rows.jsonl
  prompt: What colour?
  answer: It is {{colour}}.
  split:
    validation: 6
training:
  samples_per_step: 2
  micro_batch_size: 2
  max_steps: 2
evaluation:
  max_new_tokens: 4
report:
  samples: 2
output: {folder}/run
"""
COLOURS = {"red": (220, 30, 30), "green": (20, 160, 60), "blue": (30, 60, 220), "white": (250, 250, 250)}


def tiny_config(**changes) -> Phi3VConfig:
    """Two decoder layers of width 32, a tower of three layers of width 16, ids of the small tokenizer."""
    factors = [1.0 + 0.1 * place for place in range(8)]
    fields = {
        "vocab_size": EMBEDDING_ROWS,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "su", "short_factor": factors, "long_factor": [2 * factor for factor in factors]},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": BASE_SIZE,
        "image_token_id": BASE_SIZE + 44,
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "patch_size": 14,
            "image_size": 336,
        },
    }
    return Phi3VConfig(**{**fields, **changes})


def write_tiny_model(folder: Path, *, seed: int = 0, **changes) -> Path:
    """Writes the model folder; `changes` are fields of its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    Phi3VForCausalLM(tiny_config(**changes)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    write_small_tokenizer(folder)
    return folder


def write_small_tokenizer(folder: Path) -> None:
    """Writes the demo's tokenizer without a chat template: the processor has its own."""
    for name, content in small_tokenizer().items():
        (folder / name).write_bytes(content)


@functools.cache
def small_tokenizer() -> dict[str, bytes]:
    """Its files, which take longer to make than the model: once."""
    with tempfile.TemporaryDirectory() as place:
        write_tokenizer(Path(place))
        files = {path.name: path.read_bytes() for path in Path(place).iterdir()}
    settings = json.loads(files["tokenizer_config.json"])
    settings.pop("chat_template", None)
    return {**files, "tokenizer_config.json": json.dumps(settings).encode()}


def write_photos(folder: Path, rows: int) -> Path:
    """Writes `rows` photos of one colour each, and `rows.jsonl` with the columns image and colour; gives the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in range(rows):
        colour = list(COLOURS)[row % len(COLOURS)]
        note = PngInfo()  # each file has bytes of its own, as copies of a photo would be held out together
        note.add_text("row", str(row))
        Image.new("RGB", (40 + row % 3, 30), COLOURS[colour]).save(folder / f"{row}.png", pnginfo=note)
        lines.append(json.dumps({"image": f"{row}.png", "colour": colour}))
    table = folder / "rows.jsonl"
    table.write_text("\n".join(lines) + "\n")
    return table


def write_tiny_recipe(folder: Path) -> Path:
    """Writes model, photos and recipe.yaml into a folder, which it gives back; the run goes into its folder `run`."""
    write_tiny_model(folder / "model")
    write_photos(folder / "photos", 24)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    return folder
