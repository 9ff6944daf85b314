"""An export that is sent to the hub: a stand-in for it says what is sent, and what is said where it takes nothing."""

import json
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from tiny_models import write_photos, write_tiny_model
from tiny_runs import make_recipe, make_run

from phi3v.errors import ConfigError
from phi3v.export import hub
from phi3v.export.run import export
from phi3v.run_folder import RunFolder

BASE = "microsoft/Phi-3.5-vision-instruct"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    """A run that was not evaluated."""
    folder = tmp_path_factory.mktemp("push")
    write_tiny_model(folder / "model")
    write_photos(folder / "photos", 4)
    return make_run(folder, make_recipe(folder))


class FakeHub:
    """Answers as `HfApi`, and keeps what it was asked to do."""

    token = "secret"
    earlier: Path | None = None

    def __init__(self, exists: bool = False, private: bool = True, fault: Exception | None = None) -> None:
        self.exists, self.private, self.fault = exists, private, fault
        self.done: list[dict[str, Any]] = []

    def repo_exists(self, repo: str) -> bool:
        return self.exists

    def repo_info(self, repo: str) -> Any:
        return SimpleNamespace(private=self.private)

    def whoami(self) -> dict[str, Any]:
        if self.fault is not None:
            raise self.fault
        return {}

    def create_repo(self, repo: str, **options: Any) -> None:
        self.done.append({"repo": repo, **options})

    def hf_hub_download(self, repo: str, name: str) -> str:
        if self.earlier is None:
            raise EntryNotFoundError("404 Client Error")
        return str(self.earlier / name)

    def upload_folder(self, **options: Any) -> str:
        files = sorted(path.name for path in Path(options["folder_path"]).iterdir())
        self.done.append({**options, "files": files})
        return "https://huggingface.co/owner/shop/commit/1"


@pytest.mark.parametrize("public", [False, True])
def test_a_push_sends_the_whole_folder_once(public: bool, run: RunFolder, tmp_path: Path) -> None:
    there = FakeHub()
    found = export(run.path, tmp_path / "out", to="adapter", base=BASE, push="owner/shop", public=public, api=there)
    created, sent = there.done
    assert created == {"repo": "owner/shop", "private": not public, "exist_ok": True}
    assert sent["repo_id"] == "owner/shop" and {"README.md", "digests.json", "adapter_config.json"} <= {*sent["files"]}
    assert found.pushed == "https://huggingface.co/owner/shop/commit/1" and sent["delete_patterns"] is None
    assert 'peft.PeftModel.from_pretrained(model, "owner/shop")' in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE


def test_a_push_takes_away_what_an_earlier_one_left(run: RunFolder, tmp_path: Path) -> None:
    """One that stays is loaded: the weights in one file in place of those in shards."""
    there = FakeHub(exists=True)
    there.earlier = tmp_path
    before = {"README.md": "1", "model.safetensors": "2", "a[1].json": "3"}
    (tmp_path / "digests.json").write_text(json.dumps({"sha256": before}))
    export(run.path, tmp_path / "out", to="adapter", base=BASE, push="owner/shop", api=there)
    gone = there.done[-1]["delete_patterns"]
    assert [name for name in before if any(fnmatch(name, one) for one in gone)] == ["model.safetensors", "a[1].json"]


def http_error(status: int, method: str = "POST") -> HfHubHTTPError:
    response = SimpleNamespace(status_code=status, headers={}, request=SimpleNamespace(method=method))
    return HfHubHTTPError(f"{status} Client Error\nand more", response=response)  # type: ignore[arg-type]


def no_json() -> Exception:
    try:
        json.loads("<!doctype html>")
    except ValueError as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    ("there", "options", "says"),
    [
        (FakeHub(), {"push": "a/b/c"}, r"'a/b/c' is no name of a repository"),
        (FakeHub(), {"push": "shop"}, r"'shop' is no name of a repository \(owner/name\): its owner is missing"),
        (FakeHub(), {"base": None}, "name its hub id with --base"),
        (FakeHub(exists=True, private=False), {}, "that repository is public; say --public"),
        (FakeHub(fault=http_error(401)), {}, "the token is not valid; check HF_TOKEN"),
        (FakeHub(fault=http_error(403, "GET")), {}, "lets this token not even read there .403.; .*; check HF_TOKEN$"),
        (FakeHub(fault=http_error(418)), {}, "418 Client Error; check HF_TOKEN and the network$"),
        (FakeHub(fault=http_error(429)), {}, r"failed: the hub has had too many requests \(429\): try again later$"),
        (FakeHub(fault=http_error(503)), {}, r"failed: the hub has a fault of its own \(503\): try again later$"),
        (FakeHub(fault=no_json()), {}, "what answered is not the hub, for it sent no JSON .* and HF_ENDPOINT$"),
        (
            FakeHub(fault=ConnectionError("no connection to huggingface.co")),
            {},
            "no connection to huggingface.co; check",
        ),
        (SimpleNamespace(token=None), {}, "needs a token of the hub: set HF_TOKEN"),
    ],
)
def test_what_keeps_it_from_the_hub_is_told_before_the_export(
    there: Any, options: dict[str, Any], says: str, run: RunFolder, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match=says) as error:
        export(
            run.path, tmp_path / "out", to="adapter", **{"base": BASE, "push": "owner/shop", "api": there, **options}
        )
    assert "\n" not in str(error.value) and not [*tmp_path.iterdir()]


def test_of_an_upload_that_fails_the_folder_stays(run: RunFolder, tmp_path: Path, monkeypatch) -> None:
    there, command = FakeHub(), r"; .*out is complete, send it with `hf upload owner/shop '.*my out' --private`$"
    monkeypatch.setattr(there, "upload_folder", lambda **options: (_ for _ in ()).throw(http_error(403)))
    with pytest.raises(ConfigError, match=r"may not write there .*" + command):
        export(run.path, tmp_path / "my out", to="merged", push="owner/shop", api=there)
    assert (tmp_path / "my out" / "digests.json").is_file()

    def nothing_known(repo: str, name: str) -> str:
        raise LocalEntryNotFoundError("not in the cache") from http_error(503, "HEAD")

    monkeypatch.setattr(there, "hf_hub_download", nothing_known)  # which does not say that no earlier export is there
    with pytest.raises(ConfigError, match=r"a fault of its own \(503\): try again later" + command):
        hub.push(tmp_path / "my out", "owner/shop", public=False, api=there)
