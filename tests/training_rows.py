"""A handful of spoken and written rows on disk, for the tests of training."""

import json
from pathlib import Path

import numpy as np
import soundfile

WORDS = ("red boxes", "the kitchen", "three", "bring them to the garage", "please")


def write_rows(folder: Path, spoken: int = 10, written: int = 4, longest_s: float = 3.0) -> Path:
    """Write `spoken` recordings of 0.2 to `longest_s` seconds (some beyond the tiny window) and a `rows.jsonl`.

    Tasks: asr (most), sound (every fourth; the last without words), text_qa without audio.
    """
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for k in range(spoken):
        seconds = 0.2 + (longest_s - 0.2) * k / max(1, spoken - 1)
        name = f"clip{k}.wav"
        soundfile.write(folder / name, 0.1 * rng.standard_normal(int(seconds * 16_000)), 16_000)
        text = "" if k == spoken - 1 else WORDS[k % len(WORDS)]
        task = "sound" if k % 4 == 3 else "asr"
        rows.append(_row(f"s{k}", name, task, "Transcribe the speech.", text or "silence", text))
    for k in range(written):
        rows.append(_row(f"t{k}", None, "text_qa", f"how much is {k} plus one?", WORDS[k % len(WORDS)], None))
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _row(name: str, audio: str | None, task: str, instruction: str, answer: str, transcript: str | None) -> dict:
    return {
        "id": name,
        "audio": audio,
        "task": task,
        "instruction": instruction,
        "answer": answer,
        "transcript": transcript,
        "language": "en",
        "source": "noise",
        "duration_s": None,
    }
