"""Tables whose pictures, sounds and films stay what they are in the file: nothing a set names is opened by `datasets`.

A Parquet or Arrow file says itself which of its columns are pictures, at any depth, also in columns that nobody asked
for; `datasets` would open the paths and addresses in them wherever they lead. In comes a table, map-style or streamed;
out comes the same one with `decode` off in every type, so that such a cell is a mapping {bytes, path}.

Texts of the type `Json`, which `datasets` makes of JSON columns of no one type, are parsed here (`ParsedTable`), cell
by cell: where `datasets` parses, one text that is no JSON stops the whole set.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import datasets

from phi3v.data.json_text import parse_json
from phi3v.data.text_guard import is_too_deep
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
    """A column type that opens and parses nothing, whatever it is made of.

    Example: Image() -> Image(decode=False), List(Image()) -> List(Image(decode=False)), Value("string") -> the same.
    Raises: DataError.
    """
    if isinstance(feature, dict):
        return {name: undecoded_feature(inner, column) for name, inner in feature.items()}
    if isinstance(feature, list | tuple):
        return [undecoded_feature(inner, column) for inner in feature]
    if isinstance(feature, datasets.LargeList | datasets.List):
        return replace(feature, feature=undecoded_feature(feature.feature, column))
    if not hasattr(feature, "decode_example"):
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


class ParsedTable:
    """A table in which texts of the type `Json` are parsed, each when its record is asked for.

    A text that is no JSON, or nests deeper than `text_guard` allows, is an empty cell, and so a problem of its row.
    Example: {"content": Json(decode=False)} and the cell '["a"]' -> ["a"].
    """

    def __init__(self, table: Any, columns: Mapping[str, Any]) -> None:
        """Keep the table.

        Args:
            table: records with their texts as they are.
            columns: name -> type of the columns that hold JSON at some depth, see `json_columns`.
        """
        self._table = table
        self._columns = dict(columns)
        self.column_names = list(table.column_names)

    def __len__(self) -> int:
        """Number of records."""
        return len(self._table)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The record with this number."""
        return self._parsed(self._table[number])

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Several records."""
        return [self._parsed(record) for record in self._table.__getitems__(numbers)]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All records in order."""
        return map(self._parsed, self._table)

    def select_columns(self, columns: list[str]) -> "ParsedTable":
        """The same records with these columns alone."""
        return ParsedTable(self._table.select_columns(columns), self._columns)

    def rename_columns(self, names: dict[str, str]) -> "ParsedTable":
        """The same records with other column names."""
        kinds = {names.get(name, name): kind for name, kind in self._columns.items()}
        return ParsedTable(self._table.rename_columns(names), kinds)

    def _parsed(self, record: dict[str, Any]) -> dict[str, Any]:
        found = {name: _parsed_cell(record[name], kind) for name, kind in self._columns.items() if name in record}
        return {**record, **found}


def json_columns(features: Mapping[str, Any]) -> dict[str, Any]:
    """The columns whose type holds `Json` at some depth: {"id": Value, "turns": List(Json())} -> {"turns": ...}."""
    return {name: kind for name, kind in features.items() if _holds_json(kind)}


def _holds_json(feature: Any) -> bool:
    """Whether a type is `Json` or made of it."""
    if isinstance(feature, dict):
        return any(map(_holds_json, feature.values()))
    if isinstance(feature, list | tuple):
        return any(map(_holds_json, feature))
    return type(feature).__name__ == "Json" or _holds_json(getattr(feature, "feature", ()))


def _parsed_cell(value: Any, feature: Any) -> Any:
    """A cell with its texts of JSON parsed, whatever lies around them."""
    if value is None or not _holds_json(feature):
        return value
    if isinstance(feature, dict):
        return {name: _parsed_cell(inner, feature.get(name)) for name, inner in value.items()}
    if isinstance(feature, list | tuple):
        return [_parsed_cell(inner, feature[0]) for inner in value]
    if type(feature).__name__ != "Json":
        return [_parsed_cell(inner, feature.feature) for inner in value]
    try:
        return None if is_too_deep(value) else parse_json(value)
    except (ValueError, RecursionError):
        return None
