"""Which recorded clips there are, and which of them no training hears.

The manifest has one JSON object per line: `path` (relative to the manifest), `kind` ("sound", or anything else for
speech), `transcript`, `labels` ({"sound": name, "fold": number} for sounds), `speaker`. Used are sounds, and clips of
a single word.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

MIN_CLIPS = 5  # training recordings a word or sound must have: fewer teach nothing and cannot be tested
HELD_OUT_TAKES = 9  # one in nine takes of a word is for tests, one more for development
SPLITS = ("train", "dev", "test_seen", "test_unseen")


class ManifestError(ValueError):
    """The manifest cannot be read, or holds too little to build a corpus of."""


@dataclass(frozen=True)
class Clip:
    """One labelled recording: a word that somebody says, or a sound of some class."""

    path: Path
    kind: str  # "word" or "sound"
    text: str  # the word, or the name of the sound
    speaker: str | None = None
    take: int | None = None  # number of the recording, read from the end of its file name
    group: str = ""  # clips of one group (cut from one original) never stand on both sides of a split
    fold: int | None = None  # cross-validation fold of a sound collection
    licence: str = ""
    attribution: str = ""


def _bucket(text: str, buckets: int) -> int:
    return int(hashlib.md5(text.encode()).hexdigest(), 16) % buckets


def read_manifest(path: str | Path) -> list[Clip]:
    """The clips of a manifest that a corpus can be built of, in its order.

    Raises:
        ManifestError: If it is no manifest, or names neither one-word clips nor files that exist.
    """
    path = Path(path)
    if not path.is_file():
        raise ManifestError(
            f"{path} is not a file; give a manifest: one JSON object per line with path, kind, transcript, labels and "
            "speaker"
        )
    clips = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            clip = _clip(row, path.parent)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            what = "expected an object with path, kind, transcript"
            raise ManifestError(f"{path}, line {number}: {error!r}; {what}") from error
        if clip is not None:
            clips.append(clip)
    if not any(clip.kind == "word" for clip in clips):
        raise ManifestError(f"{path} has no recording of a single word (transcript); utterances are made of those")
    missing = [clip.path for clip in clips if not clip.path.is_file()]
    if missing:
        raise ManifestError(
            f"{path}: {len(missing)} of its files do not exist, first {missing[0]}; paths are relative to the manifest"
        )
    return clips


def _clip(row: dict, folder: Path) -> Clip | None:
    labels = row.get("labels") or {}
    path = folder / row["path"]
    rights: dict[str, Any] = {"licence": row.get("licence") or "", "attribution": row.get("attribution") or ""}
    if row["kind"] == "sound":
        if "sound" not in labels:
            return None
        # Clips cut from one original recording are near-copies of each other.
        group = str(labels.get("freesound_id", row["path"]))
        return Clip(path, "sound", labels["sound"], group=group, fold=labels.get("fold"), **rights)
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)?", row["transcript"] or "")
    if len(words) != 1:
        return None
    take = re.search(r"(\d+)$", Path(row.get("source_path") or row["path"]).stem)
    number = int(take[1]) if take else None
    return Clip(path, "word", words[0].lower(), row.get("speaker"), number, row["path"], **rights)


@dataclass(frozen=True)
class HoldOut:
    """What no training sees. `None` in `from_clips` means: computed from the manifest.

    Attributes:
        takes: Numbers of the recordings of known speakers that are for tests.
        dev_takes: Likewise for development.
        speaker: All recordings of this speaker are for tests.
        fold: This fold of the sounds is for tests.
        dev_sounds: Groups of sounds for development.
    """

    takes: frozenset[int]
    dev_takes: frozenset[int]
    speaker: str | None
    fold: int | None
    dev_sounds: frozenset[str] = frozenset()

    @classmethod
    def from_clips(
        cls,
        clips: Sequence[Clip],
        takes: Sequence[int] | None = None,
        dev_takes: Sequence[int] | None = None,
        speaker: str | None = None,
        fold: int | None = None,
    ) -> HoldOut:
        """The given hold-out; by default the last ninth of the takes, the ninth before it for development, the last
        speaker by name (where there are at least three) and the last fold.

        Raises:
            ManifestError: If the speaker or the fold is not in the manifest.
        """
        words = [clip for clip in clips if clip.kind == "word"]
        numbers = sorted({clip.take for clip in words if clip.take is not None and clip.speaker is not None})
        size = len(numbers) // HELD_OUT_TAKES  # too few numbers: the split goes by a hash of the path instead
        speakers = sorted({clip.speaker for clip in words if clip.speaker is not None})
        folds = sorted({clip.fold for clip in clips if clip.kind == "sound" and clip.fold is not None})
        if speaker is not None and speaker not in speakers:
            raise ManifestError(f"speaker {speaker!r} says no single word; choose one of {', '.join(speakers)}")
        if fold is not None and fold not in folds:
            raise ManifestError(f"fold {fold} holds no sound of the manifest; choose one of {folds}")
        if takes is None:
            takes = numbers[len(numbers) - size :]
        if dev_takes is None:
            left = [number for number in numbers if number not in set(takes)]
            dev_takes = left[len(left) - size :]
        if speaker is None and len(speakers) >= 3:
            speaker = speakers[-1]
        if fold is None and len(folds) >= 2:
            fold = folds[-1]
        dev_sounds: set[str] = set()
        sounds = [clip for clip in clips if clip.kind == "sound" and (fold is None or clip.fold != fold)]
        for name in {clip.text for clip in sounds}:
            known = {clip.group for clip in sounds if clip.text == name}
            ranked = sorted(known, key=lambda group: _bucket(group, 2**32))
            dev_sounds.update(ranked[: -(-len(ranked) // HELD_OUT_TAKES)])
        return cls(frozenset(takes), frozenset(dev_takes), speaker, fold, frozenset(dev_sounds))

    def split(self, clip: Clip) -> str:
        """The split of a clip: "train", "dev", "test_seen" or "test_unseen" (the unheard speaker)."""
        bucket = _bucket(clip.group or str(clip.path), HELD_OUT_TAKES)
        if clip.kind == "sound":
            if clip.group in self.dev_sounds:
                return "dev"
            return "test_seen" if (clip.fold == self.fold if self.fold is not None else bucket == 0) else "train"
        if self.speaker is not None and clip.speaker == self.speaker:
            return "test_unseen"
        if self.takes and clip.take is not None:
            return "test_seen" if clip.take in self.takes else "dev" if clip.take in self.dev_takes else "train"
        return "test_seen" if bucket == 0 else "dev" if bucket == 1 else "train"


@dataclass
class ClipPool:
    """The clips of one split, by speaker and word, and by sound."""

    words: dict[str, dict[str, list[Clip]]] = field(default_factory=dict)  # speaker -> word -> recordings
    sounds: dict[str, list[Clip]] = field(default_factory=dict)

    def add(self, clip: Clip) -> None:
        """Put a clip where draws find it."""
        if clip.kind == "sound":
            self.sounds.setdefault(clip.text, []).append(clip)
        else:
            self.words.setdefault(clip.speaker or "", {}).setdefault(clip.text, []).append(clip)

    def draw_words(self, speaker: str, words: Sequence[str], rng: np.random.Generator) -> list[Clip]:
        """A recording of each word by one speaker."""
        said = self.words[speaker]
        return [said[word][int(rng.integers(len(said[word])))] for word in words]

    def draw_sound(self, rng: np.random.Generator) -> Clip:
        """A recording of a sound, every class as likely as the others."""
        clips = self.sounds[sorted(self.sounds)[int(rng.integers(len(self.sounds)))]]
        return clips[int(rng.integers(len(clips)))]


def split_clips(clips: Sequence[Clip], hold_out: HoldOut) -> tuple[dict[str, ClipPool], Counter[str]]:
    """The pools of the four splits, and the clips left out: those of words and sounds with too few in training.

    Raises:
        ManifestError: If nothing is left to train or to test on.
    """
    train = Counter((clip.kind, clip.text) for clip in clips if hold_out.split(clip) == "train")
    pools = {split: ClipPool() for split in SPLITS}
    dropped: Counter[str] = Counter()
    for clip in clips:
        if train[clip.kind, clip.text] < MIN_CLIPS:
            dropped[clip.text] += 1
        else:
            pools[hold_out.split(clip)].add(clip)
    for split in ("train", "dev", "test_seen"):
        if not pools[split].words:
            raise ManifestError(
                f"no word is left for {split} with {hold_out}; a word needs {MIN_CLIPS} training recordings: "
                "hold out less"
            )
    return pools, dropped
