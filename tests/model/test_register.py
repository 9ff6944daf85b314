"""`register()`: what the Auto classes know afterwards, also when transformers brings a `phi3_v` of its own."""

import builtins
import json
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
from golden_models import FROZEN, golden_set
from tiny_tokenizer import build_tokenizer
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

import phi3v
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.image_processing_phi3_v import Phi3VImageProcessor
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.model.register import register

FRESH = """
import json, os, sys
import phi3v
assert "torch" not in sys.modules and "transformers" not in sys.modules
import phi3v.model.modeling_phi3_v, phi3v.model.processing_phi3_v, transformers.models.auto.video_processing_auto
for program in json.loads(sys.argv[1]):
    if (child := os.fork()) == 0:
        exec(program, {})
        sys.stdout.flush()
        os._exit(0)
    failed = os.waitpid(child, 0)[1]
    print(end="FAILED" if failed else "\\0", flush=True)
"""


def run(*programs: str) -> list[str]:
    """What programs print, errors too; each in a fork of one fresh interpreter that has imported phi3v.model."""
    command = [sys.executable, "-c", FRESH, json.dumps([textwrap.dedent(program) for program in programs])]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    *printed, rest = done.stdout.split("\0")
    assert done.returncode == 0 and rest == "", done.stdout
    return printed


def snapshot() -> tuple:
    maps = (CONFIG_MAPPING, IMAGE_PROCESSOR_MAPPING, PROCESSOR_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    autos = (AutoImageProcessor, AutoProcessor, AutoTokenizer)
    return tuple(auto.from_pretrained.__func__ for auto in autos), tuple(
        dict(mapping._extra_content) for mapping in (*maps, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    )


def test_it_can_be_called_again(caplog):
    phi3v.register()
    first = snapshot()
    register()
    phi3v.register()
    assert snapshot() == first
    assert not caplog.records


def test_every_auto_class_knows_it(tmp_path):
    register()
    config = golden_set().config("tiny_phi3v")
    assert type(AutoConfig.for_model("phi3_v")) is Phi3VConfig
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        assert type(auto.from_config(config)) is Phi3VForCausalLM
    assert PROCESSOR_MAPPING[Phi3VConfig] is Phi3VProcessor
    assert Phi3VImageProcessor in IMAGE_PROCESSOR_MAPPING[Phi3VConfig].values()


def test_the_real_files_through_every_auto_class(shared):
    register()
    folder = shared / "phi3v" / "hub" / "Phi-3.5-vision-instruct"
    assert type(AutoConfig.from_pretrained(folder)) is Phi3VConfig
    assert type(AutoImageProcessor.from_pretrained(folder)) is Phi3VImageProcessor
    assert type(AutoProcessor.from_pretrained(folder)) is Phi3VProcessor
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|image|>") == 32044


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder's small files, and code beside them that fails when it is imported."""
    register()
    config = json.loads((FROZEN / "models" / "tiny_phi3v" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    build_tokenizer().save_pretrained(tmp_path)
    for name in ("processing_phi3_v", "image_processing_phi3_v"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('remote code was run')\n")
    return tmp_path


@pytest.mark.parametrize("trust", [None, False, True])
@pytest.mark.parametrize("foreign", ["TheirImageProcessor", "CLIPImageProcessor", "Qwen2VLImageProcessor"])
def test_classes_that_the_files_name_play_no_part(folder, monkeypatch, trust, foreign):
    """Neither one that nobody knows, for which the folder's code would be asked for, nor another model's."""
    code = {f"Auto{kind}": f"image_processing_phi3_v.Their{kind}" for kind in ("ImageProcessor", "FeatureExtractor")}
    preprocessor = {"image_processor_type": foreign, "num_crops": 4, "auto_map": code}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    theirs = {"processor_class": "TheirProcessor", "auto_map": {"AutoProcessor": "processing_phi3_v.TheirProcessor"}}
    (folder / "processor_config.json").write_text(json.dumps(theirs))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    code = {"AutoTokenizer": ["processing_phi3_v.Their", "processing_phi3_v.Their"]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "tokenizer_class": "TheirTokenizer", "auto_map": code})
    )
    monkeypatch.setattr(builtins, "input", lambda *args: pytest.fail("the user was asked"))
    options = {} if trust is None else {"trust_remote_code": trust}
    for place in (folder, str(folder), folder / "preprocessor_config.json"):
        images = AutoImageProcessor.from_pretrained(place, **options)
        assert type(images) is Phi3VImageProcessor and images.num_crops == 4
    processor = AutoProcessor.from_pretrained(folder, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    assert type(processor) is Phi3VProcessor and type(processor.image_processor) is Phi3VImageProcessor
    assert tokenizer("what is  this?")["input_ids"] == build_tokenizer()("what is  this?")["input_ids"]
    for auto, kind in ((AutoVideoProcessor, "video processor"), (AutoFeatureExtractor, "feature extractor")):
        with pytest.raises(ValueError, match=f"it has no {kind}$"):
            auto.from_pretrained(folder, **options)


def test_the_processor_beside_an_adapter_is_ours_also_when_transformers_has_one(tmp_path, monkeypatch):
    """There is no config.json there, and the Auto class goes by the name, which is also that of the other one."""
    from transformers.models.auto import processing_auto

    theirs = types.ModuleType("transformers.models.phi3_v")
    theirs.Phi3VProcessor = type("Phi3VProcessor", (), {"__module__": "transformers.models.phi3_v"})
    monkeypatch.setitem(sys.modules, "transformers.models.phi3_v", theirs)
    monkeypatch.setitem(processing_auto.PROCESSOR_MAPPING_NAMES, "phi3_v", "Phi3VProcessor")
    assert processing_auto.processor_class_from_name("Phi3VProcessor") is theirs.Phi3VProcessor
    Phi3VProcessor.from_pretrained(Path(phi3v.__file__).parent / "demo" / "tiny").save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()
    register()
    assert type(AutoProcessor.from_pretrained(tmp_path)) is Phi3VProcessor


def test_other_models_folders_are_asked_about_as_before(folder, monkeypatch):
    """The same files beside a config of another type, or none: transformers asks, and our no is kept."""
    asked: list[tuple] = []
    monkeypatch.setattr(builtins, "input", lambda *args: asked.append(args) or "n")
    preprocessor = {
        "image_processor_type": "TheirImageProcessor",
        "auto_map": {"AutoImageProcessor": "image_processing_phi3_v.Their"},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    for config in ('{"model_type": "clip"}', "[]", None):
        (folder / "config.json").unlink() if config is None else (folder / "config.json").write_text(config)
        with pytest.raises(ValueError, match="contains custom code"):
            AutoImageProcessor.from_pretrained(folder)
    assert len(asked) == 3
    preprocessor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 28}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    assert AutoImageProcessor.from_pretrained(folder).size["shortest_edge"] == 28
    with pytest.raises(OSError, match="nowhere"):
        AutoImageProcessor.from_pretrained(folder / "nowhere")


NOTHING_YET = """
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
known = CONFIG_MAPPING["phi3_v"] if "phi3_v" in CONFIG_MAPPING else None
assert known is None or known.__module__.startswith("transformers.")
import phi3v
phi3v.register()
assert CONFIG_MAPPING["phi3_v"].__module__.startswith("phi3v.")
"""
# A later transformers may bring model type `phi3_v`: here by classes in its tables.
THEIR_CLASSES = """
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers import Phi3ForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

class Phi3VConfig(PreTrainedConfig):
    model_type = "phi3_v"

class Phi3VForCausalLM(Phi3ForCausalLM):
    config_class = Phi3VConfig

Phi3VConfig.__module__ = "transformers.models.phi3_v.configuration_phi3_v"
Phi3VForCausalLM.__module__ = "transformers.models.phi3_v.modeling_phi3_v"
CONFIG_MAPPING._extra_content["phi3_v"] = Phi3VConfig
MODEL_FOR_CAUSAL_LM_MAPPING._extra_content[Phi3VConfig] = Phi3VForCausalLM

import phi3v
phi3v.register()
ours = AutoConfig.for_model("phi3_v")
assert type(ours).__module__ == "phi3v.model.configuration_phi3_v"
import torch
with torch.device("meta"):
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        assert type(auto.from_config(ours)).__module__ == "phi3v.model.modeling_phi3_v"
phi3v.register()
"""
# The same with names only, as transformers lists its own models before they are imported.
THEIR_NAMES = """
import sys, types
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import configuration_auto

class Phi3VConfig(PreTrainedConfig):
    model_type = "phi3_v"

Phi3VConfig.__module__ = "transformers.models.phi3_v.configuration_phi3_v"
module = types.ModuleType("transformers.models.phi3_v")
module.Phi3VConfig = Phi3VConfig
sys.modules["transformers.models.phi3_v"] = module
configuration_auto.CONFIG_MAPPING._mapping["phi3_v"] = "Phi3VConfig"
configuration_auto.CONFIG_MAPPING._modules["phi3_v"] = module

import phi3v
phi3v.register()
assert type(AutoConfig.for_model("phi3_v")).__module__ == "phi3v.model.configuration_phi3_v"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a fresh interpreter")
def test_importing_registers_nothing_and_a_phi3_v_of_transformers_own_gives_way_with_a_word():
    nothing, classes, names = run(NOTHING_YET, THEIR_CLASSES, THEIR_NAMES)
    assert nothing == ""
    assert classes.count("brings its own phi3_v") == 1, "said once, not again by the second call"
    assert "phi3v uses its own implementation instead" in classes
    assert "brings its own phi3_v (transformers.models.phi3_v.configuration_phi3_v)" in names
