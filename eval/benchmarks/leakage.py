"""Training rows that overlap a benchmark, found by the names of ids and recordings (Soundwave, App. A.4).

    python -m soundwave.eval.benchmarks.leakage --train rows.jsonl --benchmark librispeech_clean --source LibriSpeech

The paper dropped training files that AIR-Bench uses by their file names. A name in common is no proof (two data sets
may both have a ``1.wav``), and a copy under another name is not found.
"""

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import PurePosixPath

from soundwave.eval.benchmarks import get_benchmark
from soundwave.eval.items import Item
from soundwave.training.data import load_rows, recordings

AUDIO_SUFFIXES = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".mp4"}


def overlaps(training_ids: Iterable[str], items: Iterable[Item]) -> dict[str, list[str]]:
    """Training ids that share a name with an item or its recordings.

    Args:
        training_ids: Ids, file names or paths of what a model was trained on.
        items: Of a benchmark.

    Returns:
        Item id -> the training ids, for the items that have any.
    """
    trained: dict[str, list[str]] = {}
    for training_id in training_ids:
        trained.setdefault(_name(training_id), []).append(training_id)
    found = {}
    for item in items:
        names = dict.fromkeys(_name(name) for name in (item.id, *(clip.name for clip in item.clips)))
        if same := [training_id for name in names for training_id in trained.get(name, ())]:
            found[item.id] = same
    return found


def _name(path: str) -> str:
    """Name of a file without folders and without the suffix that a conversion changes."""
    name = PurePosixPath(path.replace("\\", "/"))
    return (name.stem if name.suffix.lower() in AUDIO_SUFFIXES else name.name).casefold()


def main(argv: list[str] | None = None) -> int:
    """List the overlaps. Returns the exit code: 1 if there are any."""
    parser = argparse.ArgumentParser(prog="leakage", description="Training rows that overlap a benchmark.")
    parser.add_argument("--train", required=True, nargs="+", metavar="FILE", help="training rows")
    parser.add_argument("--benchmark", required=True, help="name of the benchmark")
    parser.add_argument("--source", help="folder of its data; the Hub if not given")
    arguments = parser.parse_args(argv)
    rows = load_rows(arguments.train)
    names = [name for row in rows for name in (row["id"], *(clip.get("path") for clip in recordings(row))) if name]
    items = get_benchmark(arguments.benchmark).load(arguments.source)
    found = overlaps(dict.fromkeys(names), items)
    for item, same in found.items():
        sys.stdout.write(f"{item}: {', '.join(os.path.basename(name) for name in same)}\n")
    sys.stdout.write(f"{len(found)} of {len(items)} items of {arguments.benchmark} share a name with a training row\n")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
