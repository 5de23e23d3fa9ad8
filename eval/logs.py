"""``answers.jsonl`` and ``judgements.jsonl``: one line per answer or judgement, written as it comes.

``answers.settings.json`` beside them holds, by test set, what its answers depend on.

A run may be killed at any time: what is lost is the line that was just being written, and a reader drops it.
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ANSWERS_FILE = "answers.jsonl"
JUDGEMENTS_FILE = "judgements.jsonl"
SETTINGS_FILE = "answers.settings.json"
#: Half of a surrogate pair, as a server may send it, has no UTF-8; written like this it is JSON's own escape for it.
ERRORS = "backslashreplace"


class AnswerLog:
    """``answers.jsonl`` of a folder, appended batch by batch so that a killed run keeps what it has.

    Args:
        folder: Where the file is, or will be.
        name: Of the test set. Lines of other sets stay.
        keep: Which rows of an earlier run of this set stay, to go on from them; without it they go: a set is scored
            from one run.

    Attributes:
        rows: Those that stayed.

    Raises:
        ValueError: If a line of the file cannot be read.
    """

    file_name = ANSWERS_FILE

    def __init__(self, folder: str | os.PathLike[str], name: str, keep: Callable[[Row], bool] | None = None) -> None:
        self.path = Path(folder) / self.file_name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        stay = [row for row in read_rows(self.path) if row["name"] != name or (keep is not None and keep(row))]
        self.rows = [row for row in stay if row["name"] == name]
        if self.path.is_file():  # written anew: a torn last line would run into the next one
            replace_file(self.path, "".join(map(line_of, stay)))

    def append(self, rows: Iterable[Row]) -> None:
        """Write rows at the end of the file; they are on the disk on return."""
        with self.path.open("a", encoding="utf-8", errors=ERRORS) as file:
            file.writelines(map(line_of, rows))
            file.flush()
            os.fsync(file.fileno())


class JudgementLog(AnswerLog):
    """``judgements.jsonl``, in the same way."""

    file_name = JUDGEMENTS_FILE


def read_answers(folder: str | os.PathLike[str]) -> list[Row]:
    """Rows of a folder's ``answers.jsonl``; none if there is no such file.

    Raises:
        ValueError: If a line other than a torn last one cannot be read.
    """
    return read_rows(Path(folder) / ANSWERS_FILE)


def read_judgements(folder: str | os.PathLike[str]) -> list[Row]:
    """Rows of a folder's ``judgements.jsonl``, as ``read_answers``."""
    return read_rows(Path(folder) / JUDGEMENTS_FILE)


def read_settings(folder: str | os.PathLike[str]) -> dict[str, Row]:
    """What the answers of each test set were made with: a folder's ``answers.settings.json``; empty without one.

    Raises:
        ValueError: If it holds something else.
    """
    path = Path(folder) / SETTINGS_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); remove it, and evaluate again with --overwrite") from None
    if not isinstance(settings, dict) or not all(isinstance(of_set, dict) for of_set in settings.values()):
        raise ValueError(
            f"{path} holds no settings by name of the test set; remove it, and evaluate again with --overwrite"
        )
    return settings


def replace_file(path: Path, text: str) -> None:
    """Write a file beside the old one and move it there: a reader never sees half a file."""
    beside = path.with_suffix(path.suffix + ".new")
    beside.write_text(text, encoding="utf-8", errors=ERRORS)
    beside.replace(path)


def line_of(row: Row) -> str:
    """A row as it stands in a file."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_rows(path: Path) -> list[Row]:
    """Rows of a file of lines; none if there is no such file. A torn last line is dropped.

    Raises:
        ValueError: If another line cannot be read.
    """
    if not path.is_file():
        return []
    # Not `splitlines`: an answer may hold one of the other characters that it takes for the end of a line. Bytes: a
    # kill may cut a character in two.
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except ValueError as error:
            if number == len(lines):  # no line end: a kill tore it
                break
            raise ValueError(
                f"{path}, line {number} is no JSON ({error}); remove it, and its item is asked again"
            ) from None
        if not isinstance(row, dict) or "name" not in row:
            raise ValueError(f"{path}, line {number} is no row of a test set: it has no 'name'; remove it")
        rows.append(row)
    return rows
