"""`register()`: what the Auto classes know afterwards, also when transformers brings a `phi3_v` of its own."""

import subprocess
import sys
import textwrap

from golden_models import golden_set
from transformers import (
    AutoConfig,
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

import phi3v
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.image_processing_phi3_v import Phi3VImageProcessor
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.processing_phi3_v import Phi3VProcessor
from phi3v.model.register import register


def run(program: str) -> str:
    """Standard output and error of a program in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def snapshot() -> tuple:
    maps = (CONFIG_MAPPING, IMAGE_PROCESSOR_MAPPING, PROCESSOR_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    return tuple(dict(mapping._extra_content) for mapping in (*maps, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING))


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


def test_importing_phi3v_registers_nothing_and_loads_nothing_heavy():
    output = run(
        """
        import sys
        import phi3v
        assert "torch" not in sys.modules and "transformers" not in sys.modules
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        known = CONFIG_MAPPING["phi3_v"] if "phi3_v" in CONFIG_MAPPING else None
        assert known is None or known.__module__.startswith("transformers.")
        phi3v.register()
        assert CONFIG_MAPPING["phi3_v"].__module__.startswith("phi3v.")
        """
    )
    assert output == ""


def test_a_phi3_v_of_transformers_own_gives_way_with_a_word():
    """A later transformers may bring model type `phi3_v`: here by classes in its tables, in a fresh interpreter."""
    output = run(
        """
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
    )
    assert output.count("brings its own phi3_v") == 1, "said once, not again by the second call"
    assert "phi3v uses its own implementation instead" in output


def test_a_lazy_entry_of_transformers_own_gives_way_too():
    """The same with names only, as transformers lists its own models before they are imported."""
    output = run(
        """
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
    )
    assert "brings its own phi3_v (transformers.models.phi3_v.configuration_phi3_v)" in output
