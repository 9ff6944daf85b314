"""The folder of an export: what is refused, that it is there whole or not at all, digests, adapters, the command."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_logits import logits
from peft import PeftModel
from rich.console import Console
from tiny_models import write_photos, write_tiny_model
from tiny_runs import make_recipe, make_run
from typer.testing import CliRunner

from phi3v import cli_session
from phi3v.cli import app
from phi3v.cli_export import show_export
from phi3v.errors import CheckpointError, ConfigError
from phi3v.export import folder as folders
from phi3v.export import vllm
from phi3v.export.adapter import plain_config
from phi3v.export.folder import check_digests, check_space
from phi3v.export.run import Exported, export
from phi3v.export.run import _notes as notes_of
from phi3v.export.run import _serving as serving_of
from phi3v.generate import ChatModel
from phi3v.loading import load_base, load_target
from phi3v.run_folder import RunFolder
from phi3v.targets import resolve_target
from phi3v.whole_files import is_unfinished

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    folder = tmp_path_factory.mktemp("export")
    write_tiny_model(folder / "model")
    return make_run(folder, make_recipe(folder))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("to", ["merged", "adapter"])
def test_two_exports_are_the_same_bytes_and_digests_hold_them(to: str, run: RunFolder, tmp_path: Path) -> None:
    for name in ("one", "other"):
        export(run.path, tmp_path / name, to=to, shard_bytes=100_000)
    one = files_of(tmp_path / "one")
    assert one == files_of(tmp_path / "other") and "README.md" in one
    (tmp_path / "one" / ".gitattributes").touch()  # as the hub adds
    check_digests(tmp_path / "one")
    assert len({file.stat().st_mode for file in (tmp_path / "one").iterdir()}) == 1  # who may read one may read all
    weights = min((tmp_path / "one").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match=f"{weights.name} is changed"):
        check_digests(tmp_path / "one")
    with pytest.raises(
        CheckpointError, match=f"{weights.name} is damaged .*: copy it again, or export it again; if you"
    ):
        load_target(tmp_path / "one")
    weights.unlink()
    with pytest.raises(CheckpointError, match=f"{weights.name} is missing"):
        check_digests(tmp_path / "one")
    (tmp_path / "other" / "new.py").touch()
    with pytest.raises(CheckpointError, match=r"new\.py is no file of the export"):
        check_digests(tmp_path / "other")


def test_an_adapter_goes_to_peft_in_microsofts_names(run: RunFolder, tmp_path: Path, shared: Path) -> None:
    """Each name in the file is one of the published index with PEFT's words around it; PEFT computes the same."""
    found = export(run.path, tmp_path / "adapter", to="adapter", base="microsoft/Phi-3.5-vision-instruct")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == found.base == "microsoft/Phi-3.5-vision-instruct"
    index = shared / "phi3v" / "hub" / "Phi-3-vision-128k-instruct" / "model.safetensors.index.json"
    published = json.loads(index.read_text())["weight_map"]
    for name in load_target(run.path, device="cpu").model.state_dict():
        if ".lora_" in name:
            module = name.removeprefix("base_model.model.").partition(".lora_")[0]
            assert f"{module}.weight" in published, name
    tuned = load_target(run.path, device="cpu")
    loaded = PeftModel.from_pretrained(load_base(run.path.parent / "model", device="cpu"), str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded.eval(), tuned.processor), logits(tuned.model, tuned.processor))


def test_an_adapters_configuration_says_what_is_not_plain() -> None:
    values = {"peft_type": "LORA", "r": 8, "use_dora": False, "use_rslora": True, "peft_version": "0.21.2"}
    assert plain_config({**values, "target_modules": ["qkv_proj", "o_proj"]}, "owner/base") == {
        "peft_type": "LORA",
        "r": 8,
        "use_rslora": True,
        "base_model_name_or_path": "owner/base",
        "inference_mode": True,
        "target_modules": ["o_proj", "qkv_proj"],
    }


def test_what_is_in_the_way_is_refused_before_anything_is_written(run: RunFolder, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").touch()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for out, says in (
        ("used", r"used holds notes\.txt: name a folder that is new or empty"),
        ("file", "file is a file"),
        ("file/below", "file is a file"),
    ):
        with pytest.raises(ConfigError, match=says):
            export(run.path, tmp_path / out, to="merged")
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    for to in ("merged", "adapter"):
        with pytest.raises(ConfigError, match=rf"needs 0\.07 GB, and 0\.00 GB are free in {tmp_path}: free"):
            export(run.path, tmp_path / "empty", to=to)
    with pytest.raises(CheckpointError, match="does not exist"):
        export(tmp_path / "nowhere", tmp_path / "empty", to="merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "used"]
    assert not any((tmp_path / "empty").iterdir())
    monkeypatch.undo()
    export(run.path, tmp_path / "empty", to="adapter")


def test_space_is_that_of_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    check_space(tmp_path / "a" / "b", 1000)
    with pytest.raises(ConfigError, match=rf"needs 1000000000\.07 GB, .* are free in {tmp_path}/a:"):
        check_space(tmp_path / "a" / "b", 10**18)


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_of_an_export_that_fails_nothing_stays(
    fault: BaseException, run: RunFolder, tmp_path: Path, monkeypatch
) -> None:
    """Neither at the first shard nor when all but the digests are written."""
    expected = CheckpointError if isinstance(fault, OSError) else KeyboardInterrupt

    def fail(*args: object, **options: object) -> None:
        raise fault

    for place in ("phi3v.export.layout.save_file", "phi3v.export.run.write_digests"):
        monkeypatch.setattr(place, fail)
        with pytest.raises(expected, match="the disk is full" if expected is CheckpointError else None):
            export(run.path, tmp_path / "out", to="merged")
        assert not [*tmp_path.iterdir()]
        monkeypatch.undo()


LOADS = ("config.json", "adapter_config.json", "genai_config.json")
"""Without the one of its format no program loads an export."""
PROGRAM = """
import sys, time
from pathlib import Path
from phi3v.export import layout, run
def slowly(save):
    def saved(*args, **options):
        save(*args, **options); print(save.__name__, flush=True); time.sleep(0.1)
    return saved
layout.save_file = slowly(layout.save_file)
run.write_digests = slowly(run.write_digests)
run.export(sys.argv[1], Path(sys.argv[2]), to="merged", shard_bytes=50_000)
"""


def test_what_is_half_made_does_not_load(run: RunFolder, tmp_path: Path) -> None:
    """Killed when all files are there, and not yet in their place."""
    half = shutil.copytree(run.adapter, tmp_path / ".shop.new.tmp")
    shutil.copytree(run.adapter, half / "merged")
    for place in (half, half / "merged"):
        with pytest.raises(CheckpointError, match=r"\.shop\.new\.tmp.* was never completed"):
            resolve_target(place)
    done = half.rename(tmp_path / "shop")
    assert resolve_target(done).adapter == done
    (done / "config.json.unfinished").touch()
    with pytest.raises(CheckpointError, match="shop was never completed"):
        resolve_target(done)
    with pytest.raises(ConfigError, match="shop was never completed, whatever wrote it was killed: remove it"):
        export(run.path, done, to="adapter")


@pytest.mark.parametrize("to", ["merged", "adapter"])
def test_what_makes_an_export_load_is_there_last(to: str, run: RunFolder, tmp_path: Path, monkeypatch) -> None:
    """At no step on the way, whoever looks: killed at any of them, nothing stays that another program would load."""
    steps: dict[str, int] = {}

    def watched(place: str) -> None:
        module, _, name = place.rpartition(".")
        do = getattr(sys.modules[module], name)

        def watching(*args: object, **options: object) -> object:
            found = [file for name in LOADS for file in tmp_path.rglob(name)]
            assert not found, (place, found)
            steps[name] = steps.get(name, 0) + 1
            return do(*args, **options)

        monkeypatch.setattr(place, watching)

    for place in ("phi3v.export.run.render_card", "phi3v.export.run.write_digests", "phi3v.whole_files.sync_file"):
        watched(place)
    watched("os.replace")
    export(run.path, tmp_path / "out", to=to)
    assert steps.pop("sync_file") > 5 and steps == {"render_card": 1, "write_digests": 1, "replace": 2}
    assert sum((tmp_path / "out" / name).is_file() for name in LOADS) == 1
    assert not is_unfinished(tmp_path / "out")
    check_digests(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("step, times", [("save_file", 1), ("save_file", 5), ("write_digests", 1)])
def test_a_killed_export_leaves_nothing_that_loads(step: str, times: int, run: RunFolder, tmp_path: Path) -> None:
    """By a signal that no program can catch, at a shard or when all is written and the folder not yet in its place; the
    next export to the same folder removes what lies beside it."""
    words = [sys.executable, "-c", PROGRAM, str(run.path), str(tmp_path / "out")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        for _ in range(times):
            assert process.stdout and f"{step}\n" in iter(process.stdout.readline, "")
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    left = [*tmp_path.iterdir()]
    assert left and not [file for name in LOADS for file in tmp_path.rglob(name)]
    for place in left:
        with pytest.raises(CheckpointError, match="was never completed"):
            resolve_target(place)
    export(run.path, tmp_path / "out", to="merged")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    check_digests(tmp_path / "out")


MEASURE = """
import sys
from pathlib import Path
import torch, transformers, peft
from phi3v.export import layout, run
most = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
run.export(sys.argv[1], Path(sys.argv[2] + "/out_small"), to="merged", shard_bytes=10**6)
before = most()
run.export(sys.argv[3], Path(sys.argv[2] + "/out_large"), to="merged", shard_bytes=16_000_000)
print(most() - before)
"""


@pytest.mark.slow
def test_memory_is_that_of_a_shard_and_a_module(tmp_path: Path) -> None:
    """Not of the model: what the process holds more than after a tiny export, beside 220 MB of weights."""
    for name, sizes in (
        ("tiny", {}),
        ("large", {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}),
    ):
        head = sizes.get("hidden_size", 32) // 2
        factors = {"type": "su", "short_factor": [1.0] * (head // 2), "long_factor": [2.0] * (head // 2)}
        (tmp_path / name).mkdir()
        write_tiny_model(tmp_path / name / "model", rope_scaling=factors, **sizes)
        make_run(tmp_path / name, make_recipe(tmp_path / name))
    weights = (tmp_path / "large" / "model" / "model.safetensors").stat().st_size
    assert weights > 200e6
    words = [sys.executable, "-c", MEASURE, tmp_path / "tiny" / "run", tmp_path, tmp_path / "large" / "run"]
    started = time.monotonic()
    done = subprocess.run(
        [*map(str, words)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.split()[-1])
    print(f"{grown / 1e6:.0f} MB beside {weights / 1e6:.0f} MB of weights, in {time.monotonic() - started:.0f} s")
    assert grown < weights / 3


def command(*words: object) -> tuple[int, str]:
    with pytest.MonkeyPatch.context() as here:
        here.setattr(cli_session, "hush", lambda debug, as_json: None)
        done = CliRunner().invoke(app, [*map(str, words)])
    return done.exit_code, done.stdout


def test_the_command_says_what_it_wrote(run: RunFolder, tmp_path: Path) -> None:
    code, said = command("export", run.path, "--to", "merged", "--out", tmp_path / "merged", "--shard-size", "0.001")
    assert code == 0 and vllm.OTHER_TOWER in said and "vllm serve" not in said
    screen = Console(file=io.StringIO())
    notes = ("first", "second")
    show_export(screen, Exported("run", "merged", tmp_path / "merged", 1, None, vllm=vllm.Serving(), notes=notes))
    said = screen.file.getvalue()
    assert said.endswith("\nnote: first\nnote: second\n")
    assert f"vllm serve {tmp_path / 'merged'} --max-model-len" in said and "not run here" in said
    code, said = command("export", run.path, "--to", "adapter", "--out", tmp_path / "adapter", "--json")
    found = json.loads(said)
    assert code == 0 and found["to"] == "adapter" and found["facts"]["kind"] == "LORA" and found["pushed"] is None
    for words in (
        ["--to", "adapter", "--dtype", "float16"],
        ["--to", "merged", "--precision", "int4"],
        ["--to", "merged", "--public"],
        ["--to", "gguf"],
    ):
        assert command("export", run.path, *words, "--out", tmp_path / "new")[0] == 2
    code, said = command("export", run.path, "--to", "merged", "--out", tmp_path / "new", "--base", "nix", "--json")
    assert code == 1 and "--base 'nix' is neither" in json.loads(said)["error"] and not (tmp_path / "new").exists()
    code, said = command("export", run.path, "--to", "merged", "--out", tmp_path / "merged", "--json")
    assert code == 1 and "holds README.md" in json.loads(said)["error"]


def test_an_export_says_where_it_answers_otherwise_than_its_run(tmp_path: Path) -> None:
    """On the screen: of a base that was quantised, of int4, of samples on both sides of rope's long factors."""
    write_tiny_model(tmp_path / "model")
    run = make_run(tmp_path, make_recipe(tmp_path, quantization={"load_in_4bit": True}))
    code, said = command("export", run.path, "--to", "merged", "--out", tmp_path / "merged")
    assert code == 0 and said.count("\nnote: ") == 1 and "the run was trained on a quantised base" in said
    assert f"`phi3v evaluate {tmp_path / 'merged'} --data RECIPE quantization=null` scores it" in said
    said = command("export", run.path, "--to", "adapter", "--out", tmp_path / "adapter")[1]
    assert said.count("\nnote: ") == 2 and "this adapter is for the base as its files have it" in said
    assert "export with --base OWNER/NAME" in said
    assert "`THE BASE` stands for the base" in (tmp_path / "adapter" / "README.md").read_text()
    own = ["--to", "adapter", "--out", tmp_path / "own", "--base", "some/model"]
    assert command("export", run.path, *own)[1].count("\nnote: ") == 1
    assert "THE BASE" not in (tmp_path / "own" / "README.md").read_text()
    (int4,) = notes_of("onnx", tmp_path, {"precision": "int4"}, None, None)
    assert "whose scores were not measured with it" in int4 and "`phi3v evaluate` reads no graphs" in int4
    of_both = [notes_of("onnx", tmp_path, {"precision": one}, run, None) for one in ("int4", "fp32")]
    assert [len(notes) for notes in of_both] == [2, 1] and "quantization=null" not in of_both[1][0]
    config = tmp_path / "config.json"
    lengths = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    config.write_text(json.dumps({"rope_scaling": {"type": "su"}, **lengths}))
    assert serving_of("merged", config, run) == vllm.Serving()  # of a run whose samples were not counted
    run.mark_finished({"samples": {"most_images": 2, "shortest": 300, "longest": 5000}})
    serving = serving_of("merged", config, run)
    assert (serving.images, serving.context) == (2, 8192) and serving_of("adapter", config, run) is None
    assert notes_of("merged", tmp_path, {}, None, serving) == (serving.caveat,) != ("",)


def test_the_commands_of_the_export_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, and the programs of pipeline and PEFT; those of ONNX, vLLM, pip and the hub are not run here."""
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "model")
    write_photos(tmp_path, 20)
    (tmp_path / "0.png").rename(tmp_path / "scarf.jpg")
    make_run(tmp_path, make_recipe(tmp_path, output=str(tmp_path / "runs" / "shop")))
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    ours = [shlex.split(line, comments=True) for line in lines if line.startswith("phi3v ")]
    ours = [words[1:] for words in ours if not {"onnx", "--push"} & {*words}]
    assert len(ours) >= 6
    for words in ours:
        if "--out" in words:
            shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
        code, said = command(*words)
        assert code == 0 and said.strip(), words
    piped, by_peft = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    printed: list[Any] = []
    monkeypatch.setattr(ChatModel.ask, "__kwdefaults__", {**ChatModel.ask.__kwdefaults__, "max_new_tokens": 4})
    for program in (piped.replace("256", "4"), by_peft.replace("microsoft/Phi-3.5-vision-instruct", "model")):
        exec(compile(program, "export.md", "exec"), {"print": printed.append})
    assert printed[0][0]["generated_text"].removeprefix(" ") == printed[1] != ""
