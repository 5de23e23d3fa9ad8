"""A model whose answers are written down, for tests of what asks models: `ScriptedModel({"item-1": "answer", ...})`.

An answer may be an exception, which is raised when the item is asked, or anything else that a broken model returns.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import soundfile

from soundwave.eval.benchmarks import Benchmark
from soundwave.eval.items import FileClip, Item
from tests.conftest import SAMPLING_RATE, tone


class ScriptedModel:
    """Answers from a dict; reads every recording first, as a model does.

    Attributes:
        asked: Ids of the batches, in order.
    """

    def __init__(self, answers: Mapping[str, Any], name: str = "scripted") -> None:
        self.answers, self.name = answers, name
        self.decoding: dict[str, Any] = {"strategy": "scripted"}
        self.asked: list[list[str]] = []

    def answer(self, items: Sequence[Item], max_new_tokens: int) -> list[str]:
        self.asked.append([item.id for item in items])
        for item in items:
            for clip in item.clips:
                clip.read()
        for item in items:
            if isinstance(self.answers[item.id], BaseException):
                raise self.answers[item.id]
        return [self.answers[item.id] for item in items]

    def describe(self) -> dict[str, Any]:
        about = {"name": self.name, "revision": "1", "class": "ScriptedModel", "parameters": 0, "dtype": "none"}
        return about | {"kind": "scripted"}


class Words(Benchmark):
    """A benchmark of one word each, scored by WER, in two groups."""

    name, title, metric, also, max_new_tokens = "words", "Words", "wer", ("cer",), 8


def word_items(count: int, folder: Path | None = None) -> list[Item]:
    """Items `0` to `count - 1`, right is `word 0`, ...; with a folder, each has a recording, the later the longer."""
    items = []
    for i in range(count):
        clips = []
        if folder is not None:
            soundfile.write(folder / f"{i}.wav", tone(0.05 + 0.01 * i), SAMPLING_RATE)
            clips.append(FileClip(folder / f"{i}.wav"))
        items.append(Item(str(i), "Which word?", clips, f"word {i}", group="even" if i % 2 == 0 else "odd"))
    return items


def right_answers(count: int) -> dict[str, Any]:
    """What is right for `word_items`."""
    return {str(i): f"word {i}" for i in range(count)}
