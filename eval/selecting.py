"""Which items of a benchmark are asked, in what order, and what tells them from the items of another run."""

import hashlib
import json
from collections.abc import Sequence
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
    """At most ``limit`` items in their order: the groups in turn, each one's items shuffled with a fixed seed."""
    if limit is None or limit >= len(items):
        return list(items)
    groups: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        groups.setdefault(item.group or "", []).append(number)
    rng = np.random.default_rng(SEED)
    shuffled = [rng.permutation(groups[group]).tolist() for group in sorted(groups)]
    drawn = [number for turn in zip_longest(*shuffled) for number in turn if number is not None]
    return [items[number] for number in sorted(drawn[:limit])]


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
    """``dataset`` of an entry: name, revision, rows, and the hash of what is asked, which no folder takes part in.

    Args:
        about: ``name`` and, of data on the Hub, ``revision``; else the hash is the revision.
        items: Those that are asked.
        total: Out of how many.
    """
    told = [
        [item.id, item.instruction, item.messages, item.reference, item.group, [clip.name for clip in item.clips]]
        for item in items
    ]
    sha = "sha256:" + hashlib.sha256(json.dumps(told, ensure_ascii=False).encode()).hexdigest()[:16]
    sampled = {"sampled_from": total, "sampling_seed": SEED} if len(items) < total else {}
    return {"revision": sha, **about, "rows": len(items), "content": sha, **sampled}


__all__ = ["SEED", "check_unique", "describe_dataset", "item_length", "problem_of", "sample_items"]
