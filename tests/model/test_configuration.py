"""The configuration: windows, arrangements that nobody implements, rope in files and after a change."""

import json

import pytest
import torch
from golden_models import FROZEN, golden_set

from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM
from phi3v.model.rope_phi3_v import Phi3VRotaryEmbedding


def fields_of_a_file(**changes) -> dict:
    """Microsoft's layout with a small tower: 4096 of 131072 tokens."""
    fields = json.loads((FROZEN / "models" / "tiny_phi3v" / "config.json").read_text())
    return {**fields, "vision_config": {"hidden_size": 64, "num_attention_heads": 4}, **changes}


def test_sliding_windows_that_bite_are_kept_and_those_that_do_not_are_set_aside():
    fields = fields_of_a_file()
    wide = Phi3VConfig.from_dict({**fields, "sliding_window": fields["max_position_embeddings"]})
    narrow = Phi3VConfig.from_dict({**fields, "sliding_window": 16})
    assert wide.sliding_window is None and wide.to_dict()["sliding_window"] == fields["max_position_embeddings"]
    assert narrow.sliding_window == narrow.to_dict()["sliding_window"] == 16
    wide.sliding_window = 16
    assert wide.to_dict()["sliding_window"] == 16, "a window that was set after loading is saved"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embd_layer": {"hd_transform_order": "glb_sub"}}, "embd_layer"),
        ({"img_processor": {"image_dim_out": 99}}, "image_dim_out is 99"),
        ({"img_processor": {"type_feature": "cls_patch"}}, "type_feature 'cls_patch'"),
        ({"vision_config": {"image_size": 224}}, "image_size is 224 and patch_size 14, allowed are 336 and 14"),
        ({"vision_config": {"patch_size": 16}}, "image_size is 336 and patch_size 16, allowed are 336 and 14"),
    ],
)
def test_another_arrangement_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        golden_set().config("tiny_phi3v", **change)


def test_yarn_scaling_is_the_originals():
    """Microsoft's code knows a second scaling that no checkpoint uses: cos and sin times 0.1 ln(s) + 1."""
    fields = fields_of_a_file()
    config = golden_set().config("tiny_phi3v", rope_scaling={**fields["rope_scaling"], "type": "yarn"})
    rotary = Phi3VForCausalLM(config).model.rotary_emb
    assert rotary.attention_scaling == pytest.approx(1 + 0.1 * torch.log(torch.tensor(32.0)).item())
    assert config.to_dict()["rope_scaling"]["type"] == "yarn"
    assert Phi3VConfig.from_dict(config.to_dict()).rope_parameters == config.rope_parameters


@pytest.mark.parametrize(
    ("own", "kind"),
    [({}, "su"), ({"factor": 32.0}, "su"), ({"factor": 8.0}, "longrope"), ({"attention_factor": 1.5}, "longrope")],
)
def test_rope_settings_are_saved_whole(own, kind):
    fields = fields_of_a_file()
    config = golden_set().config("tiny_phi3v", rope_scaling={**fields["rope_scaling"], **own})
    more = {"factor": 32.0, **own} if kind == "longrope" else {}
    assert config.to_dict()["rope_scaling"] == {**fields["rope_scaling"], **more, "type": kind}
    assert Phi3VConfig.from_dict(config.to_dict()).rope_parameters == config.rope_parameters


LONGER = {"max_position_embeddings": 262144}  # than the window, which bites then


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
@pytest.mark.parametrize(
    ("change", "ratio"),
    [
        ({"max_position_embeddings": 8192}, 2),
        ({"original_max_position_embeddings": 2048}, 64),
        ({"max_position_embeddings": 8192, "original_max_position_embeddings": 8192}, 1),
        (LONGER, 64),
    ],
)
def test_rope_follows_a_context_that_is_changed_at_or_after_loading(tmp_path, change, ratio, kind):
    scaling = {**fields_of_a_file()["rope_scaling"], "type": kind, **({"factor": 8.0} if kind == "longrope" else {})}
    fields = fields_of_a_file(rope_scaling=scaling, sliding_window=131072)
    edited = Phi3VConfig.from_dict({**fields, **change})
    by_keyword, by_attribute = Phi3VConfig.from_dict(fields, **change), Phi3VConfig.from_dict(fields)
    for name, value in change.items():
        setattr(by_attribute, name, value)
    for config in (by_keyword, by_attribute):
        assert config.to_dict() == edited.to_dict() and config.rope_parameters == edited.rope_parameters
        assert config.sliding_window == edited.sliding_window == (131072 if change is LONGER else None)
    edited.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["rope_scaling"] == scaling
    original = torch.tensor(float(edited.original_max_position_embeddings))
    s = torch.tensor(8.0 if kind == "longrope" else float(ratio))  # a file's own factor stays
    expected = 1 + 0.1 * s.log() if kind == "yarn" else (1 + s.log() / original.log()).sqrt()
    assert Phi3VRotaryEmbedding(by_attribute).attention_scaling == pytest.approx(expected.item())


def test_a_config_names_no_code_whatever_it_is_told():
    """TRL reads the attribute, and takes the class that is registered where it holds nothing."""
    config = Phi3VConfig.from_dict(fields_of_a_file(auto_map={"AutoConfig": "x.Y"}), auto_map={"AutoModel": "x.Y"})
    config.auto_map = {"AutoModelForCausalLM": "x.Y"}
    assert config.auto_map == {} and "auto_map" not in config.to_dict() and "auto_map" not in config.to_diff_dict()
