"""How the data of a benchmark is read: parquet tables, CSV and JSON files, checked for what the benchmark needs.

A table or file whose schema changed raises ``DataError`` at once. An item that is broken alone becomes an ``Item``
with ``fields["error"]``: the run counts and names it.
"""

import csv
import json
import reprlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soundwave.eval.items import Clip, Item, TableClip
from soundwave.training.errors import DataError

if TYPE_CHECKING:  # takes seconds to import, which the list of benchmarks does not need
    from datasets import Dataset

TAB_SEPARATED = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "escapechar": "\\"}


def read_hub_table(
    hub_id: str | None,
    columns: Collection[str],
    *,
    config: str | None = None,
    split: str = "test",
    revision: str | None = None,
    audio: str = "audio",
) -> "Dataset":
    """A split of a data set on the Hub; its recordings stay undecoded.

    Only the files of this split are fetched: `load_dataset` would take those of the configuration's other splits, too,
    of LibriSpeech and CoVoST 2 tens of gigabytes to train on.

    Args:
        hub_id: ``owner/name``; ``None``: the data is not on the Hub.
        columns: That it must have.
        config: Name of the configuration.
        split: Name of the split.
        revision: Commit, tag or branch.
        audio: Column of the recordings.

    Raises:
        DataError: If it cannot be loaded, or a column is missing.
    """
    if hub_id is None:
        raise DataError("this benchmark is not on the Hub; give the folder of its data as the source.")
    from datasets import load_dataset, load_dataset_builder
    from datasets.exceptions import DatasetsError

    try:
        builder = load_dataset_builder(hub_id, config, revision=revision)
        files = builder.config.data_files or {}
        if split not in files:
            raise ValueError(f"its splits are {', '.join(map(str, files)) or 'not known'}")
        table = load_dataset(builder.name, data_files={split: list(files[split])}, split=split)
    except (OSError, ValueError, DatasetsError) as error:  # no network, no such repository, configuration or split
        raise DataError(
            f"{hub_id}, split {split!r}: cannot be loaded ({error}); give the folder of its files as the source."
        ) from error
    return _checked_table(table, columns, audio, f"{hub_id}, split {split!r}")


def read_parquet_table(
    folder: Path,
    columns: Collection[str],
    *,
    config: str | None = None,
    split: str = "test",
    audio: str = "audio",
) -> "Dataset":
    """The same from a local copy of the data set's repository: ``[config/]split/*.parquet`` or ``split-*.parquet``.

    Raises:
        DataError: If there are no such files, a part of them is missing, or a column is.
    """
    starts = [f"{config}/"] if config else ["", "data/", "default/"]
    patterns = [f"{start}{split}{end}" for start in starts for end in ("-*.parquet", "/*.parquet")]
    files = next((found for pattern in patterns if (found := sorted(folder.glob(pattern)))), [])
    if not files:
        raise DataError(f"{folder} holds no parquet files; expected {' or '.join(patterns)}.")
    parts = files[0].stem.rpartition("-of-")[2]
    if parts.isdigit() and int(parts) != len(files):
        raise DataError(f"{files[0].parent} holds {len(files)} parts of the {int(parts)} that {files[0].name} names.")
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    try:
        table = Dataset.from_parquet([str(file) for file in files])
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(f"{files[0]} and its other parts cannot be read ({error.__cause__ or error}).") from error
    return _checked_table(table, columns, audio, f"{files[0].parent}, split {split!r}")


def _checked_table(table: "Dataset", columns: Collection[str], audio: str, where: str) -> "Dataset":
    from datasets import Audio

    require(table.column_names, columns, where)
    if not len(table):
        raise DataError(f"{where} holds no rows.")
    return table.cast_column(audio, Audio(decode=False))


def table_clips(table: "Dataset", audio: str = "audio") -> Iterable[tuple[dict[str, Any], Clip]]:
    """(the other columns, the recording) of every row."""
    rows = table.remove_columns([audio])
    for number, row in enumerate(rows):
        yield row, TableClip(table, number, audio)


def read_separated(path: Path, columns: Collection[str], **dialect: Any) -> list[dict[str, str]]:
    """Rows of a CSV file; a TSV file with ``**TAB_SEPARATED``.

    Raises:
        DataError: If the file or a column is missing, or a row has not as many cells as the header.
    """
    with open(existing(path), encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, **dialect)
        try:
            require(reader.fieldnames or [], columns, str(path))
            rows = list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {reader.line_num}: cannot be read ({error}).") from error
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise DataError(f"{path}, row {number}: its cells do not match the columns {', '.join(columns)}.")
    if not rows:
        raise DataError(f"{path} holds no rows.")
    return rows


def read_json(path: Path) -> Any:
    """Contents of a JSON file.

    Raises:
        DataError: If it is missing, or not JSON.
    """
    existing(path)  # its error is a ValueError, too
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}).") from error


def read_lines(path: Path) -> list[str]:
    """Lines of a text file, ended by line feeds only: other separators may stand inside a sentence.

    Raises:
        DataError: If it is missing, or not UTF-8.
    """
    try:
        text = existing(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}).") from error
    return text.removesuffix("\n").split("\n")


def existing(path: Path) -> Path:
    """The path.

    Raises:
        DataError: If there is nothing.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist; give the folder of the data in its published layout.")
    return path


def first_existing(folder: str | Path, names: Sequence[str]) -> Path:
    """The first of these paths below a folder that exists.

    Raises:
        DataError: If there is none.
    """
    folder = existing(Path(folder))
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise DataError(f"{folder} holds none of {', '.join(names)}; give the folder of the data in its published layout.")


def require(found: Collection[str], needed: Collection[str], where: str) -> None:
    """Check the columns or keys of a source.

    Raises:
        DataError: Naming those that are missing and those found.
    """
    if missing := [name for name in needed if name not in found]:
        raise DataError(f"{where}: {', '.join(missing)} missing, found {', '.join(found) or 'nothing'}.")


def require_list(value: Any, where: str) -> list[Any]:
    """The value.

    Raises:
        DataError: If it is no list.
    """
    if not isinstance(value, list):
        raise DataError(f"{where}: found {reprlib.repr(value)}, expected a list.")
    return value


def require_object(value: Any, keys: Collection[str], where: str) -> dict[str, Any]:
    """The value.

    Raises:
        DataError: If it is no JSON object, or a key is missing.
    """
    if not isinstance(value, dict):
        raise DataError(f"{where}: found {reprlib.repr(value)}, expected an object with {', '.join(keys)}.")
    require(value, keys, where)
    return value


def spoken_item(
    name: str, instruction: str | None, clip: Clip, reference: Any, error: str | None = None, **fields: Any
) -> Item:
    """An item of one recording; broken if its reference is no text, or if ``error`` says so."""
    if not isinstance(reference, str) or not reference.strip():
        error = error or f"the reference is {reprlib.repr(reference)}, expected text"
        reference = None
    if error:
        fields["error"] = error
    return Item(str(name), instruction, [clip], reference, fields=fields)


def unique(items: list[Item], where: str | Path) -> list[Item]:
    """The items.

    Raises:
        DataError: If there are none, or two have one id.
    """
    if not items:
        raise DataError(f"{where} holds no items; give the folder of the data in its published layout.")
    ids: set[str] = set()
    for item in items:
        if item.id in ids:
            raise DataError(f"{where}: two items have the id {item.id!r}; each must stand there once.")
        ids.add(item.id)
    return items


__all__ = [
    "TAB_SEPARATED",
    "DataError",
    "existing",
    "first_existing",
    "read_hub_table",
    "read_json",
    "read_lines",
    "read_parquet_table",
    "read_separated",
    "require",
    "require_list",
    "require_object",
    "spoken_item",
    "table_clips",
    "unique",
]
