"""A run exported as ONNX graphs: they run here, on the CPU, and give what PyTorch gives from the same pixels."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from onnx_prompts import compare, encoded, photo
from tiny_models import write_photos, write_tiny_model
from tiny_runs import make_recipe, make_run
from typer.testing import CliRunner

from phi3v import cli_session
from phi3v.cli import app
from phi3v.errors import CheckpointError, ConfigError, MissingPackageError, TooLongError
from phi3v.export import folder as export_folder
from phi3v.export import onnx, onnx_decoder
from phi3v.export.onnx_runtime import OnnxChatModel, genai_inputs
from phi3v.export.onnx_vision import layout_by_arithmetic
from phi3v.export.run import export
from phi3v.generate import ChatModel
from phi3v.model.vision_phi3_v import image_layout

SYSTEM = "Answer in one word."
LIMIT = 4096


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a random adapter, at 4 crops and with a system turn, and its graphs in the run's folder `onnx`."""
    pytest.importorskip("onnxruntime_genai")
    folder = tmp_path_factory.mktemp("onnx")
    write_tiny_model(folder / "model")
    write_photos(folder / "photos", 8)
    data = {"train": str(folder / "photos" / "rows.jsonl"), "prompt": "What colour?", "answer": "{colour}."}
    split = {"split": {"validation": 2}}
    recipe = make_recipe(folder, data={**data, **split, "system": SYSTEM}, image={"num_crops": 4})
    run = make_run(folder, recipe)
    found = export(run.path, run.path / "onnx", to="onnx")
    assert found.facts == {"precision": "fp32"}
    return run.path


@pytest.fixture(scope="module")
def torch_chat(run):
    return ChatModel.from_target(run, device="cpu")


@pytest.fixture(scope="module")
def onnx_chat(run):
    return OnnxChatModel.from_target(run)


@pytest.mark.parametrize("grids", [[(1, 1)], [(2, 2), (1, 1), (1, 4)], [(16, 1)], [(4, 4), (3, 5)]])
def test_the_layout_by_arithmetic_is_the_models(grids):
    rows, columns = torch.tensor(grids).unbind(1)
    index, counts = image_layout(grids)
    for padding in (0, 3):
        slots = 1 + padding + max(height * width for height, width in grids)
        assert torch.equal(layout_by_arithmetic(rows, columns, slots, 12), index)
    assert len(index) == sum(counts)
    assert layout_by_arithmetic(torch.tensor([1]), torch.tensor([2]), 3, 1).tolist() == [1, 2, 3, 4, 0, 3]


def test_ids_of_images_are_negative_in_their_order():
    example = {"input_ids": torch.tensor([5] + [9] * 313 + [7] + [9] * 457), "pixel_values": torch.zeros(2, 3, 1, 1, 1)}
    ids, images = genai_inputs({**example, "image_sizes": torch.tensor([[336, 336], [336, 672]])}, 9)
    assert ids.dtype == np.int32 and ids.tolist() == [5] + [-1] * 313 + [7] + [-2] * 457
    assert images["num_image_tokens"].tolist() == [[313], [457]]
    assert genai_inputs({"input_ids": torch.tensor([5, 9])}, 9)[1] == {}


@pytest.mark.parametrize(
    "sizes, words",
    [
        pytest.param([(300, 200)], 3, id="one image"),
        pytest.param([(900, 300), (100, 400), (500, 500)], 20, id="three images of other sizes"),
        pytest.param([], 12, id="text alone"),
        pytest.param([(700, 700)], LIMIT, id="beyond the original context"),
    ],
)
def test_logits_and_answers_are_pytorchs(torch_chat, onnx_chat, sizes, words):
    assert onnx_chat.processor.image_processor.num_crops == 4
    found = compare(torch_chat, onnx_chat, sizes, words, max_new_tokens=8)
    assert found.furthest < 1e-4, found  # float32; logits spread over about 1
    assert found.tokens == found.expected and len(found.tokens) == 8
    if words == LIMIT:
        assert found.prompt > LIMIT


def test_an_answer_that_crosses_the_original_context_begins_its_cache_again(torch_chat, onnx_chat, monkeypatch):
    started, start = [], onnx_chat.start
    monkeypatch.setattr(onnx_chat, "start", lambda ids, *rest: (started.append(len(ids)), start(ids, *rest))[1])
    example = encoded(torch_chat, [(300, 200)], tokens=LIMIT - 3)
    found = compare(torch_chat, onnx_chat, example=example, max_new_tokens=8)
    assert found.tokens == found.expected and len(found.tokens) == 8
    assert started == [LIMIT - 3, LIMIT - 3, LIMIT + 1]  # the first is for the prompt's logits
    # Without it the graph turns to the long factors in the middle of a cache of the short ones.
    ids, images = genai_inputs(found.whole, onnx_chat.image_token_id)
    mixed, fresh = onnx_chat.start(ids[:LIMIT], images, LIMIT + 8), onnx_chat.start(ids, images, LIMIT + 8)
    mixed.append_tokens(ids[None, LIMIT:])
    assert np.abs(mixed.get_logits() - fresh.get_logits()).max() > 1e-3


def test_the_image_token_is_never_an_answer(torch_chat, onnx_chat):
    """PyTorch's generation suppresses it; the graph's logits are what they are, and the loop does."""
    example = encoded(torch_chat, [], words=6)
    tokens = onnx_chat.answer_tokens(example, 1)
    onnx_chat.image_token_id, image = tokens[0], onnx_chat.image_token_id
    try:
        assert onnx_chat.answer_tokens(example, 1) != tokens
    finally:
        onnx_chat.image_token_id = image


def test_scores_that_are_no_numbers_are_no_answer(torch_chat, onnx_chat, monkeypatch):
    start = onnx_chat.start

    def overflowing(*given):
        generator = start(*given)
        logits = np.full_like(generator.get_logits(), np.nan)
        return SimpleNamespace(get_logits=lambda: logits)

    monkeypatch.setattr(onnx_chat, "start", overflowing)
    with pytest.raises(CheckpointError, match="the model's scores are no numbers"):
        onnx_chat.answer_tokens(encoded(torch_chat, [], words=6), 3)


def test_the_context_ends_where_the_models_does(onnx_chat):
    example = {"input_ids": torch.full((onnx_chat.context,), 5)}
    assert onnx_chat.context == 8192
    with pytest.raises(TooLongError, match="the prompt has 8192 tokens, and the graphs' context ends at 8192"):
        onnx_chat.answer_tokens(example, 1)
    almost = {"input_ids": torch.full((onnx_chat.context - 2,), 5)}
    assert len(onnx_chat.answer_tokens(almost, 8)) == 2


def test_ask_answers_from_a_run_and_from_its_graphs_as_pytorch_does(run, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_session, "hush", lambda debug, as_json: None)
    photo(640, 350).save(tmp_path / "a.png")
    photo(90, 350).save(tmp_path / "b.png")
    words = [str(tmp_path / "a.png"), str(tmp_path / "b.png"), "What colour?"]
    said = {}
    for name, *target in (["torch", run], ["run", run, "--runtime", "onnx"], ["folder", run / "onnx"]):
        done = CliRunner().invoke(app, ["ask", *map(str, target[:1]), *words, *target[1:]])
        assert done.exit_code == 0, done.output
        said[name] = done.stdout
    assert said["torch"] == said["run"] == said["folder"] and said["torch"].strip()
    assert OnnxChatModel.from_target(run).system == SYSTEM


def test_streamed_pieces_are_the_answer(onnx_chat):
    pieces: list[str] = []
    answer = onnx_chat.ask(photo(200, 100), "What?", max_new_tokens=12, stream=pieces.append)
    assert len(pieces) > 1 and "".join(pieces) == answer
    assert onnx_chat.answer([], max_new_tokens=3) == []
    with pytest.raises(ConfigError, match="generation.do_sample: ONNX graphs answer greedily"):
        onnx_chat.ask(photo(200, 100), "What?", do_sample=True)


def test_the_folder_is_laid_out_for_the_runtimes_own_programs(run, onnx_chat):
    import onnxruntime_genai as genai

    folder = run / "onnx"
    names = {path.name for path in folder.iterdir()}
    here = str(Path(onnx.__file__).parents[3]).encode()
    assert not [
        file for file in folder.iterdir() for text in (here, b"site-packages") if text in file.read_bytes()
    ]  # torch writes down what it traced
    assert names >= {"vision.onnx", "embedding.onnx", "model.onnx", "processor_config.json", "chat_template.jinja"}
    assert "merged" not in names
    settings = json.loads((folder / "genai_config.json").read_text())["model"]
    assert settings["type"] == onnx_chat.model.type == "phi3v"
    assert settings["eos_token_id"] == onnx_chat.processor.stop_token_ids
    words = "What colour is it?"
    assert genai.Tokenizer(onnx_chat.model).encode(words).tolist() == onnx_chat.processor.tokenizer.encode(
        words, add_special_tokens=False
    )
    photo(700, 400).save(run.parent / "wide.png")
    seen = onnx_chat.model.create_multimodal_processor()(
        "<|user|>\n<|image_1|>\nWhat?<|end|>\n<|assistant|>\n", images=genai.Images.open(str(run.parent / "wide.png"))
    )
    assert list(seen["pixel_values"].shape()) == [1, 17, 3, 336, 336]  # 16 crops, though the run has 4


def test_what_cannot_be_answered_or_exported_is_one_line(run, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"onnx holds ONNX graphs and no weights: only `phi3v ask` answers"):
        ChatModel.from_target(run / "onnx")
    settings = run / "onnx" / "genai_config.json"
    before = settings.read_text()
    settings.write_text(before + " ")
    with pytest.raises(
        CheckpointError, match=r"genai_config.json is damaged .*: copy it again, or export it again; if"
    ):
        OnnxChatModel.from_target(run)
    settings.write_text(before)
    model = run.parent / "model"
    with pytest.raises(CheckpointError, match=r"--to onnx --out FOLDER`\) and ask FOLDER"):
        OnnxChatModel.from_target(model)
    odd = write_tiny_model(tmp_path / "odd", hidden_size=48, rope_scaling=None)
    with pytest.raises(ConfigError, match="heads are 24 wide .* takes multiples of 16: export it as --to merged"):
        export(odd, tmp_path / "out", to="onnx")
    settings = model / "generation_config.json"
    before = settings.read_text() if settings.exists() else None
    settings.write_text(json.dumps({"repetition_penalty": 1.5}))
    with pytest.raises(ConfigError, match=r"cannot follow its generation_config\.json \(repetition_penalty is 1\.5\)"):
        export(model, tmp_path / "out", to="onnx")
    settings.unlink() if before is None else settings.write_text(before)
    weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    with (
        monkeypatch.context() as here,
        pytest.raises(ConfigError, match=r"the export needs .* GB, and .* GB are free in"),
    ):
        room = weights * 3 // 2 + 64 * 2**20  # for the merged weights, not for the graphs beside them
        here.setattr(export_folder.shutil, "disk_usage", lambda place: type("Room", (), {"free": room}))
        export(model, tmp_path / "out", to="onnx")
    with monkeypatch.context() as here:
        here.setattr(onnx.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else "there")
        with pytest.raises(MissingPackageError, match=r'^ONNX needs onnxscript: pip install "phi3v\[onnx\]"$'):
            export(model, tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()


def test_a_builder_that_fails_leaves_no_folder(run, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, stdout="Traceback\nKeyError: 'type'\n")
    monkeypatch.setattr(onnx_decoder, "run_beside", lambda *words, **options: failed)
    for name in ("write_vision", "write_embedding"):
        monkeypatch.setattr(onnx, name, lambda *arguments: None)
    with pytest.raises(ConfigError, match=r"could not make the decoder \(exit code 1\): KeyError: 'type'"):
        export(run.parent / "model", tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()


def test_a_graph_forgets_the_users_commit_and_keeps_its_weights_beside(run, tmp_path):
    import onnx as graphs

    made = run / "onnx" / "model.onnx"
    model = graphs.load(made, load_external_data=False)
    assert model.producer_version.partition("+") == (model.producer_version, "", "") != ("", "", "")
    model.producer_version += "+275d393"
    graphs.save(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() != made.read_bytes()
    onnx_decoder.forget_commit(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == made.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_graphs_that_are_older_than_the_run_are_refused(run):
    about = run / "onnx" / "phi3v_onnx.json"
    written = about.stat().st_mtime
    os.utime(about, (0, 0))
    try:
        with pytest.raises(CheckpointError, match="is older than the weights of .* remove it and export again"):
            OnnxChatModel.from_target(run)
    finally:
        os.utime(about, (written, written))
