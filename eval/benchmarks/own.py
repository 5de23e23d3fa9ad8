"""Our own two: which digit is spoken, and what makes a sound, asked openly, without naming the choices.

An answer is right if it names the right one of the ten and no other; one that names none or several is wrong, and
counted as not parsed.

They read a folder of free recordings with a ``manifest.jsonl``, one JSON object per clip: ``path``, ``kind``
(``digit`` or ``sound``), ``labels`` (``digit``, 0 to 9, or ``sound``), ``speaker``, ``source``. Digits are those of
the Free Spoken Digit Dataset, sounds those of ESC-10.
"""

import json
import reprlib
from pathlib import Path
from typing import Any

from soundwave.eval.benchmarks import Benchmark
from soundwave.eval.benchmarks.sources import (
    DataError,
    first_existing,
    read_lines,
    require_object,
    spoken_item,
    unique,
)
from soundwave.eval.items import FileClip, Item

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
#: Class -> what else an open answer may call it.
SOUNDS = {
    "baby crying": ("baby", "infant"),
    "chainsaw": ("chain saw",),
    "clock ticking": ("clock", "ticking"),
    "dog barking": ("dog", "barking", "bark"),
    "fire crackling": ("fire", "crackling", "flames"),
    "helicopter": ("chopper",),
    "rain": ("raining", "rainfall"),
    "rooster crowing": ("rooster", "cockerel", "crowing"),
    "sea waves": ("waves", "sea", "ocean", "surf"),
    "sneezing": ("sneeze", "sneezes"),
}


class _FromManifest(Benchmark):
    """Clips of one kind.

    Attributes:
        kind: Of the clips, as in the manifest; their label has the same name.
        expected: Of a label, in words.
    """

    kind: str
    expected: str
    metric = "lenient_label_accuracy"
    max_new_tokens = 32

    def load(self, source: str | Path | None = None, revision: str | None = None) -> list[Item]:
        """Clips of this kind of ``manifest.jsonl``."""
        if source is None:
            raise DataError(f"{self.name} is not on the Hub; give the folder of its manifest.jsonl as the source.")
        manifest = first_existing(source, ["manifest.jsonl"])
        items = []
        for number, line in enumerate(read_lines(manifest), start=1):
            if not line.strip():
                continue
            where = f"{manifest}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON ({error}).") from error
            require_object(row, ("path", "kind", "labels"), where)
            if row["kind"] == self.kind:
                items.append(self._item(row, manifest.parent, number, where))
        return unique(items, manifest)

    def _item(self, row: dict[str, Any], folder: Path, number: int, where: str) -> Item:
        label = require_object(row["labels"], (self.kind,), f"{where}, labels")[self.kind]
        path, reference, error = row["path"], self.reference(label), None
        if reference is None:
            error = f"the label is {reprlib.repr(label)}, expected {self.expected}"
        if not isinstance(path, str):
            path, error = f"line-{number}", f"path is {reprlib.repr(path)}, expected the name of a file"
        fields = {"source": row.get("source"), "speaker": row.get("speaker")}
        return spoken_item(path, self.instruction, FileClip(folder / path), reference, error, **fields)

    def reference(self, label: Any) -> str | None:
        """What is right for a label; ``None`` if the label is not one of the ten."""
        raise NotImplementedError


class SpokenDigits(_FromManifest):
    """One digit, read aloud."""

    name = "spoken_digits"
    title = "Spoken digits"
    licence = "CC BY-SA 4.0"
    homepage = "https://github.com/Jakobovski/free-spoken-digit-dataset"
    kind = "digit"
    expected = "a whole number 0 to 9"
    transcribed = True
    settings = {"labels": DIGITS, "synonyms": {str(value): word for value, word in enumerate(DIGITS)}}
    instruction = "Which number is spoken?"

    def reference(self, label: Any) -> str | None:
        """The digit in words."""
        return DIGITS[label] if type(label) is int and 0 <= label <= 9 else None  # True and 3.0 equal digits, too


class EscSounds(_FromManifest):
    """One of the ten sounds of ESC-10."""

    name = "esc_sounds"
    title = "ESC-10 sounds"
    licence = "CC BY 3.0"
    homepage = "https://github.com/karolpiczak/ESC-10"
    kind = "sound"
    expected = f"one of {', '.join(SOUNDS)}"
    settings = {
        "labels": tuple(SOUNDS),
        "synonyms": {word: label for label, words in SOUNDS.items() for word in words},
    }
    instruction = "What makes this sound?"

    def reference(self, label: Any) -> str | None:
        """The class's name."""
        return label if label in tuple(SOUNDS) else None


BENCHMARKS = (SpokenDigits(), EscSounds())
