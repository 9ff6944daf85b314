"""An export on the hub: asked for before the work, sent after it.

In comes a folder and the name of a repository. A repository is private unless its owner says otherwise, here or there.
"""

import glob
import json
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from phi3v.digests import DIGESTS
from phi3v.errors import CheckpointError, ConfigError
from phi3v.hub_faults import answer_below, hubs_own
from phi3v.passthrough import connection_fault, first_line
from phi3v.targets import read_json

_MAY_NOT_READ = "the hub lets this token not even read there (403); it needs read and write access"
_MAY_NOT_WRITE = "the token may not write there (it needs write access)"


def check_push(repo: str, *, public: bool, api: Any = None) -> None:
    """Looks whether `repo` can be written before anything is exported: its name, the token, the hub's answer.

    Raises: ConfigError in one line, also for a repository that is public where nothing was said of `public`.
    """
    try:
        validate_repo_id(repo)
        if "/" not in repo:  # the hub would make it yours, and then not find it by this name
            raise HFValidationError("its owner is missing")
    except HFValidationError as error:
        raise ConfigError(f"--push {repo!r} is no name of a repository (owner/name): {first_line(error)}") from error
    api = api or HfApi()
    if not (getattr(api, "token", None) or get_token()):
        raise ConfigError(f"--push {repo} needs a token of the hub: set HF_TOKEN, or log in with `hf auth login`")
    try:
        is_open = api.repo_exists(repo) and not api.repo_info(repo).private
        if not is_open:
            api.whoami()
    except Exception as error:
        raise _refused(repo, error) from error
    if is_open and not public:
        raise ConfigError(f"--push {repo}: that repository is public; say --public, or name another one")


def push(folder: Path, repo: str, *, public: bool, api: Any = None) -> str:
    """Sends a folder and gives back the commit's address; files of an earlier export there that this one has not go, as
    weights in one file would be loaded in place of new ones in shards. Raises: ConfigError in one line.
    """
    api = api or HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        old = [name for name in _exported_there(repo, api) if not (folder / name).is_file()]
        told = {"repo_id": repo, "folder_path": str(folder), "commit_message": "phi3v export"}
        return str(api.upload_folder(**told, delete_patterns=[glob.escape(name) for name in old] or None))
    except Exception as error:
        command = shlex.join(["hf", "upload", repo, str(folder), *([] if public else ["--private"])])
        raise _refused(repo, error, f"; {folder} is complete, send it with `{command}`") from error


def _exported_there(repo: str, api: Any) -> list[str]:
    """The files that an earlier export to the repository names as its own; none where there is none."""
    try:
        noted = read_json(Path(api.hf_hub_download(repo, DIGESTS))).get("sha256")
    except LocalEntryNotFoundError:
        raise  # a kind of the next one, though the hub did not say that there is none: it gave no answer, or a fault
    except (EntryNotFoundError, CheckpointError):
        return []
    return [str(name) for name in noted] if isinstance(noted, dict) else []


def _refused(repo: str, error: Exception, rest: str = "") -> ConfigError:
    """What the hub or the network said, as one line; other errors are ours and go on."""
    if not isinstance(error, OSError | ValueError) and not type(error).__module__.startswith("httpx"):
        raise error
    return ConfigError(f"--push {repo} failed: {_reason(error)}{rest}")


def _reason(error: Exception) -> str:
    """Why, and what to do: of the hub's own faults no token is guilty, nor is the network of what the hub answered."""
    answer = answer_below(error)
    status = 0 if answer is None else answer.status_code
    if (fault := hubs_own(status)) is not None:
        return f"{fault}: try again later"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return (
            "what answered is not the hub, for it sent no JSON (a proxy's page, or one to log in at a network?): check "
            "the network and HF_ENDPOINT"
        )
    if status == 401:
        return "the token is not valid; check HF_TOKEN"
    if status == 403:
        reading = getattr(getattr(answer, "request", None), "method", None) in ("GET", "HEAD")
        return f"{_MAY_NOT_READ if reading else _MAY_NOT_WRITE}; check HF_TOKEN"
    return f"{connection_fault(error) or first_line(error)}; check HF_TOKEN and the network"
