"""MMAU test-mini: 1,000 multiple-choice questions on speech, sound and music, in two versions that differ."""

import json
import reprlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soundwave.eval.benchmarks import Benchmark
from soundwave.eval.benchmarks.sources import (
    DataError,
    read_hub_table,
    read_json,
    read_parquet_table,
    require_list,
    require_object,
    table_clips,
    unique,
)
from soundwave.eval.choices import letter_of
from soundwave.eval.items import Clip, FileClip, Item

FILE = "mmau-test-mini.json"
KEYS = ("id", "audio_id", "question", "choices", "answer", "task")
HUB_COLUMNS = ("context", "instruction", "choices", "answer", "other_attributes")
TASKS = ("speech", "sound", "music")


class MmauMini(Benchmark):
    """One version of test-mini, scored by the string match of Sakshi113/MMAU ``evaluation.py``.

    The repository has no prompt: the options follow the question under letters, and ``instruction`` asks for one. A
    reply of a bare letter stands for its option's text, without which the match would count it as wrong, and a letter
    in front of that very text is dropped. The headline is the repository's total over all items; the paper's Table 12
    prints the mean of speech and sound alone, which is the area ``"speech and sound"``.

    Attributes:
        commit: Of Sakshi113/MMAU, whose ``mmau-test-mini.json`` this version is.
        date: Of the commit.
        choices: Number of options -> number of items with so many: how the versions are told apart.
    """

    hub_id = "gamma-lab-umd/MMAU-test-mini"
    homepage = "https://github.com/Sakshi113/MMAU"
    size = 1000
    metric = "string_match"
    settings = {"letters": True}
    areas = {task: (task,) for task in TASKS} | {"speech and sound": ("speech", "sound")}
    max_new_tokens = 64
    instruction = "Reply with the letter of the right option."
    commit: str
    date: str
    choices: Mapping[int, int]

    def load(self, source: str | Path | None = None, revision: str | None = None) -> list[Item]:
        """Items of ``mmau-test-mini.json`` beside ``test-mini-audios``, or of the Hub's parquet files.

        A full set that is the other version is refused: figures of the two cannot be compared.
        """
        if source is not None and (Path(source) / FILE).is_file():
            items = self._from_json(Path(source))
        else:
            table = (
                read_hub_table(self.hub_id, HUB_COLUMNS, revision=revision, audio="context")
                if source is None
                else read_parquet_table(Path(source), HUB_COLUMNS, audio="context")
            )
            where = str(source or self.hub_id)
            items = [
                self._from_cells(row, clip, f"{where}, row {number}")
                for number, (row, clip) in enumerate(table_clips(table, "context"))
            ]
        self._check_version(items, source or self.hub_id)
        return unique(items, source or self.hub_id)

    def _from_json(self, folder: Path) -> list[Item]:
        path = folder / FILE
        entries = [
            require_object(entry, KEYS, f"{path}, item {number}")
            for number, entry in enumerate(require_list(read_json(path), str(path)))
        ]
        return [self._item(entry, FileClip(folder / str(entry["audio_id"]))) for entry in entries]

    def _from_cells(self, row: Mapping[str, Any], clip: Clip, where: str) -> Item:
        try:
            attributes = json.loads(row["other_attributes"])
        except (TypeError, ValueError):
            attributes = row["other_attributes"]
        require_object(attributes, ["id", "task"], f"{where}: other_attributes")
        cells = {"question": row["instruction"], "choices": row["choices"], "answer": row["answer"]}
        return self._item({**attributes, **cells}, clip)

    def _item(self, entry: Mapping[str, Any], clip: Clip) -> Item:
        choices, answer = entry["choices"], entry["answer"]
        error = None
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            choices, error = [], f"the options are {reprlib.repr(entry['choices'])}, expected a list of texts"
        elif answer not in choices:
            error = f"the right answer {reprlib.repr(answer)} is none of the options {choices}"
        elif entry["task"] not in TASKS:
            error = f"the task is {reprlib.repr(entry['task'])}, expected {', '.join(TASKS)}"
        elif not isinstance(entry["question"], str):
            error = f"the question is {reprlib.repr(entry['question'])}, expected text"
        options = [f"({letter_of(position)}) {choice}" for position, choice in enumerate(choices)]
        about = {key: entry[key] for key in ("difficulty", "category", "sub-category") if key in entry}
        fields = {"choices": choices, "source": entry.get("dataset"), **about} | ({"error": error} if error else {})
        return Item(
            id=str(entry["id"]),
            instruction="\n".join([str(entry["question"]), *options, self.instruction or ""]).rstrip(),
            clips=[clip],
            reference=answer if answer in choices else None,
            group=entry["task"] if entry["task"] in TASKS else None,
            fields=fields,
        )

    def _check_version(self, items: list[Item], where: str | Path | None) -> None:
        found = dict(Counter(len(item.fields["choices"]) for item in items))
        if len(items) == self.size and found != dict(self.choices):
            other = next((version for version in BENCHMARKS if found == dict(version.choices)), None)
            what = f"that is {other.name}" if other else "that is neither version known here"
            raise DataError(
                f"{where}: items by number of options are {dict(sorted(found.items()))}, but {self.name} has "
                f"{dict(self.choices)}; {what}. Take {FILE} of {self.homepage} at commit {self.commit}."
            )


class MmauMini202501(MmauMini):
    """The version at the time of the paper (February 2025); 894 items are in both, 258 of them with changes."""

    name = "mmau_mini_2025_01"
    title = "MMAU test-mini (January 2025)"
    commit = "a5cd89a"
    date = "2025-01-28"
    choices = {2: 10, 4: 990}


class MmauMini202508(MmauMini):
    """The current version, after the release v05.15.25."""

    name = "mmau_mini_2025_08"
    title = "MMAU test-mini (August 2025)"
    commit = "f0a4a97"
    date = "2025-08-09"
    choices = {2: 27, 4: 948, 5: 24, 8: 1}


BENCHMARKS: tuple[MmauMini, ...] = (MmauMini202501(), MmauMini202508())
