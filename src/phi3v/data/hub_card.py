"""What a data set on the hub says about itself, looked at before one of its files is asked for.

A dataset card (README.md) and .huggingface.yaml may say which files hold the data, and `datasets` follows any address
and any path there: a server's, this machine's. In comes a hub id with its revision; out comes the commit whose card
names files of its own repository and nothing else. Fetches these two files and no other.

Refused in `data_files` and `data_dir`, of whichever configuration: anything with a scheme (ftp://, https://, file:,
hf:// too) or a hop (::), absolute paths, and `..`. Here also: where the files of a set lie in the cache of the hub.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import DatasetCard, HfApi, hf_hub_download
from huggingface_hub import constants as hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name

from phi3v.errors import DataError

_CARD, _STANDALONE = "README.md", ".huggingface.yaml"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_IGNORED = re.compile(r"[\x00-\x20]")
"""What parsers of addresses take out of them before they look for a scheme."""
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def checked_commit(source: str, revision: str | None) -> str | None:
    """The commit to load a data set of the hub at, after a look at what its card names.

    Args:
        source: a hub id, "owner/name".
        revision: commit, tag or branch; None for the newest.
    Returns: the commit; `revision` itself in offline mode, in which `datasets` takes what it has prepared before.
    Raises: DataError for a name that is no hub id, and for a card that names something elsewhere; OSError where the hub
        does not answer or has no such set.
    """
    if not _HUB_ID.fullmatch(source):
        raise DataError(f"data set {source} is no file or folder here, and no hub id, which is owner/name")
    if hub.HF_HUB_OFFLINE:
        return revision
    try:
        card, commit = _card(source, revision)
        standalone = _file(source, _STANDALONE, commit)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ConnectionError(f"Couldn't reach '{source}' on the Hub") from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"Revision '{revision}' doesn't exist for dataset '{source}' on the Hub") from error
    told = [
        (_CARD, {} if card is None else DatasetCard.load(card).data.to_dict()),
        (_STANDALONE, {} if standalone is None else yaml.safe_load(standalone.read_text(encoding="utf-8"))),
    ]
    for name, values in told:
        for place in _places(values):
            if (wrong := what_is_wrong(place)) is not None:
                raise DataError(
                    f"data set {source} is not read: its {name} names {place[:120]!r} as data, {wrong}; only files of "
                    "the set's own repository are fetched: save what you need as files here"
                )
    return commit


def cached_places(source: str, commit: str | None) -> tuple[str, str]:
    """Where the files of a set lie once they were fetched, and what their links may lead to: the set's repository.

    Example: "owner/name" at 0a1b... -> "~/.cache/huggingface/hub/datasets--owner--name/snapshots/0a1b...", whose files
    are links to ../../blobs, and "~/.cache/huggingface/hub/datasets--owner--name".

    Args:
        source: a hub id.
        commit: what `checked_commit` gave; in offline mode None, or a branch or tag, which were fetched before.
    """
    repository = Path(hub.HF_HUB_CACHE, repo_folder_name(repo_id=source, repo_type="dataset"))
    named = repository / "refs" / (commit or hub.DEFAULT_REVISION)
    if named.is_file():
        commit = named.read_text(encoding="utf-8").strip()
    return str(repository / "snapshots" / (commit or hub.DEFAULT_REVISION)), str(repository)


def what_is_wrong(place: str) -> str | None:
    """Why a path in a card is no path inside its repository; None for one that is.

    Example: "data/train-*.parquet" -> None; "ftp://host/a.csv" -> "an address", "/etc/passwd" -> "an absolute path",
    "../other/a.csv" -> "a path that leaves the repository".
    """
    bare = _IGNORED.sub("", place)
    if _SCHEME.match(bare) or "::" in bare or "://" in bare:
        return "an address"
    if bare.startswith(("/", "\\")):
        return "an absolute path"
    return "a path that leaves the repository" if ".." in re.split(r"[/\\]", bare) else None


def _card(source: str, revision: str | None) -> tuple[Path | None, str]:
    """The card's file, None where there is none, and the commit that it is of."""
    try:
        path = Path(hf_hub_download(source, _CARD, repo_type="dataset", revision=revision))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None, str(HfApi().dataset_info(source, revision=revision).sha)
    return path, path.parent.name


def _file(source: str, name: str, commit: str) -> Path | None:
    """A file of the set's repository; None where there is none."""
    try:
        return Path(hf_hub_download(source, name, repo_type="dataset", revision=commit))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None


def _places(values: Any) -> Iterator[str]:
    """All texts in `data_files` and `data_dir` of a card's configurations, names of splits among them.

    Example: {"configs": [{"config_name": "en", "data_files": [{"split": "train", "path": ["a/*"]}]}]} -> "split",
    "path", "train", "a/*".
    """
    configs = values.get("configs") if isinstance(values, Mapping) else None
    for config in configs if isinstance(configs, list) else []:
        if isinstance(config, Mapping):
            yield from _texts([config.get("data_files"), config.get("data_dir")])


def _texts(value: Any) -> Iterator[str]:
    """All texts in lists and mappings within each other."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
