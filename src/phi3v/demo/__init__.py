"""The embedded default: a small world in which every real code path runs without a download.

`build(folder)` writes the catalogue of generated products, `tiny_model_path()` says where the tiny Phi-3-V lies, a
checkpoint in Microsoft's layout that any recipe can name as its model. `scenes`, `tokenizer` and `pretrain` are what
it was made with; `catalogue` is what it is tuned on. Importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from pathlib import Path

from phi3v.demo.catalogue import ANSWER, PROMPT, write_catalogue

__all__ = ["ANSWER", "PROMPT", "build", "tiny_model_path"]


def build(folder: str | Path, train: int = 1000, test: int = 200, seed: int = 0) -> dict[str, Path]:
    """Write the catalogue: `images/` and the tables of its two parts, whose paths are returned as `train` and `test`.

    Example: `build("world")["test"] == Path("world/test.csv")`, a table with 200 rows whose `imageurl` is a path
    below `world`.
    """
    return write_catalogue(Path(folder), train, test, seed)


def tiny_model_path() -> Path:
    """The folder of the tiny model: configuration, weights, tokenizer and preprocessor."""
    return Path(__file__).parent / "tiny"
