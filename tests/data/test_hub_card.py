"""What a card on the hub names as data: files of its own repository, or nothing is fetched at all."""

import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from hub_server import COMMIT, hub_server
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image

from phi3v.data import hub_card
from phi3v.data.columns import RowOptions
from phi3v.data.hub_card import what_is_wrong
from phi3v.data.images import image_name, image_size
from phi3v.data.reading import Reading
from phi3v.data.schema import ImageRef
from phi3v.data.sources import load_rows
from phi3v.errors import DataError

OPTIONS = RowOptions(images=None, prompt="?", answer="{title}")
ADDRESS, ABSOLUTE, OUTSIDE = "an address", "an absolute path", "a path that leaves the repository"
PLACES = {
    "data/train-*.parquet": None,
    "data/**": None,
    "2024..2025/a..b.csv": None,
    "data/at 10:30.csv": None,
    "train": None,
    "ftp://127.0.0.1/a.csv": ADDRESS,
    "https://elsewhere.example/a.parquet": ADDRESS,
    "HTTP://elsewhere.example/a.parquet": ADDRESS,
    "hf://datasets/other/set/a.parquet": ADDRESS,
    "s3://bucket/*": ADDRESS,
    "file:///etc/passwd": ADDRESS,
    "file:/etc/passwd": ADDRESS,
    " \tfi\nle:/etc/passwd": ADDRESS,
    "zip://a.csv::https://elsewhere.example/a.zip": ADDRESS,
    "a.zip::b": ADDRESS,
    "C:\\a.csv": ADDRESS,
    "/etc/passwd": ABSOLUTE,
    " /etc/passwd": ABSOLUTE,
    "\\\\server\\share\\a.csv": ABSOLUTE,
    "..": OUTSIDE,
    "../a.csv": OUTSIDE,
    "data/../../a.csv": OUTSIDE,
    "data\\..\\..\\a.csv": OUTSIDE,
    "data/.\n./a.csv": OUTSIDE,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_place_is_a_path_inside_the_repository_or_is_named(place: str) -> None:
    assert what_is_wrong(place) == PLACES[place]


class Hub:
    """A stand-in for the hub: files of one set, and what was asked."""

    def __init__(self, folder: Path, files: dict[str, str]) -> None:
        self.folder, self.files = folder / "snapshots" / COMMIT, files
        self.folder.mkdir(parents=True)
        self.fetched: list[tuple[str, str | None]] = []
        self.loaded: list[dict[str, Any]] = []

    def download(self, repo_id: str, filename: str, *, repo_type: str, revision: str | None) -> str:
        assert (repo_id, repo_type) == ("owner/name", "dataset")
        self.fetched.append((filename, revision))
        if filename not in self.files:
            raise EntryNotFoundError(filename)
        (self.folder / filename).write_text(self.files[filename])
        return str(self.folder / filename)

    def load(self, source: str, **options: Any) -> datasets.DatasetDict:
        self.loaded.append({"source": source, **options})
        return datasets.DatasetDict({"train": datasets.Dataset.from_list([{"title": "a hat"}])})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a hub of some files."""

    def make(files: dict[str, str]) -> Hub:
        made = Hub(tmp_path, files)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_card, "hf_hub_download", made.download)
        monkeypatch.setattr(datasets, "load_dataset", made.load)
        return made

    return make


def card(*configs: dict[str, Any]) -> str:
    """A README whose head holds configurations; JSON is YAML too."""
    return f"---\nconfigs: {json.dumps(configs)}\n---\n# A set\n"


BAD = "ftp://127.0.0.1:9/a.csv"
CARDS = {
    "a text": {"data_files": BAD},
    "a list": {"data_files": ["a.csv", BAD]},
    "a split": {"data_files": [{"split": "train", "path": BAD}]},
    "paths of a split": {"data_files": [{"split": "train", "path": "a.csv"}, {"split": "test", "path": ["b", BAD]}]},
    "a folder": {"data_dir": BAD},
}


@pytest.mark.parametrize("kind", CARDS)
@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_a_card_that_names_something_elsewhere_is_refused_before_anything_is_fetched(
    name: str, kind: str, hub: Any
) -> None:
    """Whichever configuration it is, also one that nobody asked for."""
    configs = [{"config_name": "fine", "data_files": "data/*.csv"}, {"config_name": "bad", **CARDS[kind]}]
    text = card(*configs) if name == "README.md" else json.dumps({"configs": configs})
    made = hub({"README.md": "# A set\n", name: text})
    with pytest.raises(DataError) as caught:
        load_rows("owner/name", options=OPTIONS, subset="fine")
    assert str(caught.value) == (
        f"data set owner/name is not read: its {name} names '{BAD}' as data, an address; only files of the set's own "
        "repository are fetched: save what you need as files here"
    )
    assert made.loaded == [] and {name for name, _ in made.fetched} == {"README.md", ".huggingface.yaml"}


def test_what_was_looked_at_is_what_is_loaded(hub: Any) -> None:
    made = hub({"README.md": card({"config_name": "default", "data_files": "data/*.csv", "sep": ";"})})
    rows, _ = load_rows("owner/name", options=OPTIONS, revision="main")
    assert [row.answer for row in rows] == ["a hat"]
    assert made.fetched == [("README.md", "main"), (".huggingface.yaml", COMMIT)]
    assert made.loaded == [{"source": "owner/name", "revision": COMMIT}]


def test_without_the_hub_nothing_is_loaded_unless_offline_mode_is_chosen(
    hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = hub({})

    def unreachable(*args: Any, **options: Any) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(hub_card, "hf_hub_download", unreachable)
    with pytest.raises(DataError, match="cannot be read: Couldn't reach 'owner/name' on the Hub; it is no file"):
        load_rows("owner/name", options=OPTIONS)
    with pytest.raises(DataError, match="hf://datasets/owner/name is an address, .* name a hub set as owner/name"):
        load_rows("hf://datasets/owner/name", options=OPTIONS)
    with pytest.raises(DataError, match="data set owner/name/more is no file or folder here, and no hub id"):
        load_rows("owner/name/more", options=OPTIONS)
    assert made.loaded == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert len(load_rows("owner/name", options=OPTIONS, revision="abc")[0]) == 1
    assert made.loaded == [{"source": "owner/name", "revision": "abc"}]


@pytest.mark.parametrize("offline", [False, True])
def test_paths_of_a_row_lead_to_files_of_its_own_set(
    offline: bool, hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache as huggingface_hub lays it out, with a set of a stranger's beside a private one."""
    hub({})
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(
        hub_card, "HfApi", lambda: SimpleNamespace(dataset_info=lambda *a, **k: SimpleNamespace(sha=COMMIT))
    )
    places = {}
    for repository, name in (("datasets--owner--name", "images/a.png"), ("datasets--me--private", "secret.png")):
        blob, places[name] = cache / repository / "blobs" / "0a1b", cache / repository / "snapshots" / COMMIT / name
        for file in (blob, places[name]):
            file.parent.mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(blob, "PNG")
        places[name].symlink_to(os.path.relpath(blob, places[name].parent))
    (cache / "datasets--owner--name" / "refs").mkdir()
    (cache / "datasets--owner--name" / "refs" / "main").write_text(COMMIT)
    places["images/a.png"].with_name("link.png").symlink_to(places["secret.png"])
    secret = str(places["secret.png"].relative_to(cache))
    outside = ["../../../" + secret, str(places["secret.png"]), "images/link.png"]
    named = ["images/a.png", str(places["images/a.png"]), secret, *outside]
    records = datasets.Dataset.from_list([{"image": name, "title": "a hat"} for name in named])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: {"train": records})
    look = load_rows("owner/name", options=RowOptions(prompt="?", answer="{title}"), reading=Reading(max_skipped=1.0))
    assert [row.index for row in look[0]] == [0, 1] and image_size(look[0][0].images[0]) == (9, 9)
    told = {problem.row: (problem.reason_code, problem.message) for problem in look[1]}
    lost = cache / "datasets--owner--name" / "snapshots" / COMMIT / secret
    assert told[2] == ("image_path", f"image {secret} does not exist (looked for {lost})")
    for row, name in enumerate(outside, start=3):
        assert told[row][1].startswith(f"image {image_name(ImageRef(name))} lies outside {lost.parents[5]}: ")


OURS = """
from phi3v.data.opening import open_set
try:
    open_set("owner/name")
except ValueError as error:
    print(error)
"""
ALONE = """
import datasets
try:
    datasets.load_dataset("owner/name", revision="COMMIT")
except Exception as error:
    print(type(error).__name__)
"""


def test_datasets_alone_would_ask_the_server_that_a_card_names(tmp_path: Path) -> None:
    """The real `datasets` and a hub of our own: what it does without the look shows that the look is needed."""
    asked: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as stranger:

        def listen() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = stranger.accept()
                    asked.append(connection)
                    connection.close()

        threading.Thread(target=listen, daemon=True).start()
        place = f"ftp://127.0.0.1:{stranger.getsockname()[1]}/a.csv"
        with hub_server({"README.md": card({"config_name": "default", "data_files": place})}) as server:
            environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
            environment |= {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home")}
            for program, told, connections in (
                (OURS, f"data set owner/name is not read: its README.md names '{place}' as data, an address", 0),
                (ALONE, "EOFError", 1),
            ):
                command = [sys.executable, "-c", program.replace("COMMIT", COMMIT)]
                done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
                assert done.stdout.startswith(told), done.stderr
                assert len(asked) == connections
