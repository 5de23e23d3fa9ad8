"""How much of a batch is padding, by how rows come together, and what that costs in stage I.

    python benchmarks/padding.py --data ../shared/data

Rows as the stages of the paper have them (Tables 9-11: hours over rows are a set's mean length, within a set lengths
are log-normal and end at 30 s; text rows are left out), and recorded clips where there are any. The ways: windows
filled up to 30 s (as Whisper was trained), batches in drawn order, `bucket_batches`, and `max_seconds_per_batch` at
what a batch of 30 s clips holds. Seconds are of forward and backward of the same rows at an eighth of the full shape's
widths (`training_contenders.py`), medians of rounds in which the ways take turns.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import median, paired, write
from contenders import TOKENS_PER_SECOND, Shape
from training_contenders import EIGHTH, MEL_PER_SECOND, build

from soundwave.training.batching import LengthBatches, padding_share
from soundwave.training.mixture import MixtureSampler

LONGEST = 30.0  # seconds
SPREAD = 0.5  # of the logarithm of a length, about that of read speech
SCALE = 10  # of the paper's rows, one in so many is drawn
# Rows and hours of each task (as the mixture knows them) or set.
STAGES = {
    "stage I": {
        "asr": [
            (984_559, 4081.61),
            (713_394, 805.11),
            (143_641, 244.02),
            (718_663, 418.42),
            (281_241, 961.05),
            (170_502, 246.85),
        ],
        "sound": [(4_698, 18.48), (19_737, 82.42)],
    },
    "stage II": {
        "asr": [(3_012_000, 6757.06), (153_102, 1091.42)],
        "st": [(232_953, 364.89), (226_810, 395.10)],
        "sound": [(4_937, 19.33), (19_737, 82.42)],
    },
    "stage III": {
        "asr": [(281_241, 961.05)],
        "st": [(455_648, 753.18)],
        "grounding": [(23_828, 51.36)],
        "language_id": [(269_485, 293.15)],
        "gender": [(319_986, 466.09)],
        "emotion": [(258_541, 347.18)],
        "age": [(77_239, 120.04)],
        "entity": [(114_792, 91.62)],
        "intent": [(212_473, 151.52)],
        "speaker_count": [(156_033, 435.17)],
        "synthesized": [(53_696, 47.55)],
        "vocal_sound": [(29_962, 34.77)],
        "scene": [(159_590, 443.31)],
        "chat": [(132_209, 956.25)],
        "spoken_instruction": [(106_770, 206.30)],
    },
}
GLOBAL_BATCH = {"stage I": (32, 8192), "stage II": (16, 4096), "stage III": (8, 1024)}  # rows at once, per update
DEVICES, BUCKET_BATCHES = 32, 16
FULL_WINDOWS, DRAWN, BUCKETED, BY_SECONDS = "30 s windows", "drawn order", "bucket_batches", "max_seconds_per_batch"
WAYS = (FULL_WINDOWS, DRAWN, BUCKETED, BY_SECONDS)


def rows_like(sets: dict[str, list[tuple[int, float]]], scale: int = SCALE) -> tuple[list[str], np.ndarray]:
    """Task and seconds of every row."""
    rng = np.random.default_rng(0)
    tasks: list[str] = []
    seconds = []
    for task, parts in sets.items():
        for rows, hours in parts:
            n, mean = rows // scale, 3600 * hours / rows
            lengths = rng.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD, n)
            seconds.append(lengths.clip(0.5, LONGEST))
            tasks += [task] * n
    return tasks, np.concatenate(seconds)


def micro_batches(
    way: str, tasks: Sequence[str], seconds: np.ndarray, at_once: int, global_batch: int, devices: int, pool: int
) -> list[np.ndarray]:
    """Rows of each forward pass of the first epoch; ``pool`` updates are sorted together by `bucket_batches`."""
    bucket = pool if way == BUCKETED else 0
    mixture = MixtureSampler(tasks, multiple_of=global_batch, durations=seconds.tolist(), bucket_batches=bucket)
    if way != BY_SECONDS:
        return list(mixture.order(0).reshape(-1, at_once))
    updates = mixture.draws // global_batch
    return list(LengthBatches(mixture, seconds, LONGEST * at_once, devices, updates).micro_batches(0))


def shares(tasks: Sequence[str], seconds: np.ndarray, at_once: int, global_batch: int, devices: int) -> dict:
    """Of each way: which share of an epoch's seconds is padding, and how many passes an update takes on average."""
    figures = {}
    for way in WAYS:
        batches = micro_batches(way, tasks, seconds, at_once, global_batch, devices, BUCKET_BATCHES)
        spoken = sum(seconds[rows].sum() for rows in batches)
        share = 1 - spoken / (LONGEST * sum(map(len, batches)))
        figures[way] = {
            "padding_share": share if way == FULL_WINDOWS else padding_share(batches, seconds),
            "passes_per_update": len(batches) * global_batch / sum(map(len, batches)) / devices,
        }
        figures[way]["seconds_encoded_per_second"] = 1 / (1 - figures[way]["padding_share"])
    return {"rows": len(seconds), "mean_s": float(seconds.mean()), "at_once": at_once, "ways": figures}


def step(model: torch.nn.Module, batches: Sequence[np.ndarray], shape: Shape, window: float | None) -> None:
    """Forward and backward of stage I on rows of so many seconds each, (rows,) per forward pass."""
    model.config.audio_padding = "longest" if window is None else "max_length"
    for seconds in batches:
        frames = torch.from_numpy(seconds * MEL_PER_SECOND / 4).ceil().long() * 4
        T = round((window or 0) * MEL_PER_SECOND) or int(frames.max())
        tokens = torch.from_numpy(seconds * TOKENS_PER_SECOND).long()
        loss = model(
            input_features=torch.randn(len(seconds), shape.mel_bins, T),
            input_features_mask=torch.arange(T) < frames[:, None],
            ctc_labels=torch.randint(3, shape.vocabulary, (len(seconds), max(1, int(tokens.max())))),
            ctc_label_lengths=tokens,
        ).loss
        loss.backward()
    model.zero_grad()


def times(
    seconds: np.ndarray, repeats: int, at_once: int = 8, updates: int = 4, accumulated: int = 4, shape: Shape = EIGHTH
) -> dict:
    """Seconds per update of each way, on the same rows."""
    global_batch = at_once * accumulated
    seconds = seconds[np.random.default_rng(0).permutation(len(seconds))[: updates * global_batch]]
    tasks = ["asr"] * len(seconds)
    model = build("stage I", shape, "cpu").train()
    functions: dict[str, Callable[[], object]] = {}
    for way in WAYS:
        batches = micro_batches(way, tasks, seconds, at_once, global_batch, devices=1, pool=updates)
        window = LONGEST if way == FULL_WINDOWS else None
        functions[way] = partial(step, model, [seconds[rows] for rows in batches], shape, window)
    took = {way: median(values) / updates for way, values in paired(functions, repeats).items()}
    ratios = {way: value / took[DRAWN] for way, value in took.items()}
    return {"rows_per_update": global_batch, "updates": updates, "seconds_per_update": took, "ratio": ratios}


def recorded(data: Path) -> np.ndarray:
    """Seconds of the recorded speech in a folder with a manifest, cut at 30."""
    rows = [json.loads(line) for line in (data / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    return np.minimum([row["duration_s"] for row in rows if row["path"].startswith("speech/")], LONGEST)


def main() -> None:
    """Measure, write `results/padding.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with manifest.jsonl and speech/")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    arguments = parser.parse_args()
    rows = {stage: rows_like(sets) for stage, sets in STAGES.items()}
    figures: dict = {stage: shares(*rows[stage], *GLOBAL_BATCH[stage], DEVICES) for stage in STAGES}
    if arguments.data is not None:
        clips = recorded(arguments.data)
        figures["recorded speech"] = shares(["asr"] * len(clips), clips, at_once=8, global_batch=32, devices=1)
    print(json.dumps(figures, indent=1), flush=True)
    if arguments.repeats:
        figures["update of stage I"] = times(rows["stage I"][1], arguments.repeats)
        print(json.dumps(figures["update of stage I"], indent=1))
    if not arguments.dry_run:
        write("padding", figures)


if __name__ == "__main__":
    main()
