"""Which items of a benchmark are asked, in what order, and what tells them from the items of another run."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import numpy as np

from soundwave.eval.benchmarks import Benchmark
from soundwave.eval.items import Item
from soundwave.training.data import DataError

Row = dict[str, Any]
#: Of the drawing under a limit.
SEED = 0


def problem_of(item: Item, benchmark: Benchmark) -> str | None:
    """Why an item is not asked."""
    if "error" in item.fields:
        return str(item.fields["error"])
    if item.reference is None and not benchmark.judged:
        return "the item has no reference, so no answer could be right"
    return None


def item_length(item: Item) -> tuple[float, int]:
    """What items are sorted by: seconds of audio, then characters of the question."""
    return item.duration_s or 0.0, len(item.instruction or "")


def sample_items(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most ``limit`` items in their order: the groups in turn, each one's items shuffled with a fixed seed.

    Their fields are copies: models note in them what they heard, and the same items may be asked again.
    """
    if limit is None or limit >= len(items):
        return [_own_fields(item) for item in items]
    groups: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        groups.setdefault(item.group or "", []).append(number)
    rng = np.random.default_rng(SEED)
    shuffled = [rng.permutation(groups[group]).tolist() for group in sorted(groups)]
    drawn = [number for turn in zip_longest(*shuffled) for number in turn if number is not None]
    return [_own_fields(items[number]) for number in sorted(drawn[:limit])]


def _own_fields(item: Item) -> Item:
    return replace(item, fields=dict(item.fields))


def check_unique(items: Sequence[Item], name: str) -> None:
    """Refuse what could not be resumed.

    Raises:
        DataError: If there is no item, or two have one id.
    """
    if not items:
        raise DataError(f"test set {name!r} has no rows; give at least one")
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise DataError(f"test set {name!r}: two items have the id {item.id!r}; every answer is kept by its id")
        seen.add(item.id)


def describe_dataset(about: Row, items: Sequence[Item], total: int) -> Row:
    """``dataset`` of an entry: name, revision, rows, and the hash of what is asked and of what decides the scores.

    No folder takes part in it, nor why an item is broken: a file that is repaired leaves the data what it was.

    Args:
        about: ``name`` and, of data on the Hub, ``revision``; else the hash is the revision.
        items: Those that are asked, as they were loaded.
        total: Out of how many.
    """
    told = [
        {
            **{name: getattr(item, name) for name in ("id", "instruction", "messages", "reference", "group")},
            "clips": [clip.name for clip in item.clips],
            "fields": {name: value for name, value in item.fields.items() if name != "error"},
        }
        for item in items
    ]
    content = json.dumps(told, ensure_ascii=False, sort_keys=True)
    sha = "sha256:" + hashlib.sha256(content.encode()).hexdigest()[:16]
    sampled = {"sampled_from": total, "sampling_seed": SEED} if len(items) < total else {}
    return {"revision": sha, **about, "rows": len(items), "content": sha, **sampled}


__all__ = ["SEED", "check_unique", "describe_dataset", "item_length", "problem_of", "sample_items"]
