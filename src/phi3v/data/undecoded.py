"""Tables whose pictures, sounds and films stay what they are in the file: nothing a set names is opened by `datasets`.

A Parquet or Arrow file says itself which of its columns are pictures, at any depth, also in columns that nobody asked
for; `datasets` would open the paths and addresses in them wherever they lead. In comes a table, map-style or streamed;
out comes the same one with `decode` off in every type, so that such a cell is a mapping {bytes, path}.
"""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import datasets

from phi3v.errors import DataError


def undecoded(table: Any) -> Any:
    """The table with no type that opens anything. Raises: DataError for a type that cannot be kept from it.

    Example: {"messages": List({"image": Image()})} -> {"messages": List({"image": Image(decode=False)})}.
    """
    if table.features is None:
        return table
    plain = datasets.Features({name: undecoded_feature(kind, name) for name, kind in table.features.items()})
    if isinstance(table, datasets.IterableDataset):
        return table if plain == table.features else table.cast(plain)
    if plain == table.features and table.format["type"] is None:
        return table
    info = table.info.copy()
    info.features = plain
    # `cast` would copy the whole table; the constructor takes it as it lies, since the storage is the same
    return datasets.Dataset(table.data, info=info, split=table.split, indices_table=table._indices)


def undecoded_feature(feature: Any, column: str) -> Any:
    """A column type that opens nothing, whatever it is made of; `Json` stays, which only parses its own text.

    Example: Image() -> Image(decode=False), List(Image()) -> List(Image(decode=False)), Value("string") -> the same.
    Raises: DataError.
    """
    if isinstance(feature, dict):
        return {name: undecoded_feature(inner, column) for name, inner in feature.items()}
    if isinstance(feature, list | tuple):
        return [undecoded_feature(inner, column) for inner in feature]
    if isinstance(feature, datasets.LargeList | datasets.List):
        return replace(feature, feature=undecoded_feature(feature.feature, column))
    if not hasattr(feature, "decode_example") or type(feature).__name__ == "Json":
        return feature
    if (
        is_dataclass(feature)
        and not isinstance(feature, type)
        and any(field.name == "decode" for field in fields(feature))
    ):
        return replace(feature, decode=False)
    raise DataError(
        f"column {column!r} is of the type {type(feature).__name__}, which reads files on its own: save the set "
        "without that column"
    )
