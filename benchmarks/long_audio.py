"""Cost of long recordings: seconds and peak memory of a transcript, each length in a process of its own.

    python benchmarks/long_audio.py --minutes 10 60 180
    python benchmarks/long_audio.py --minutes 10 60 --methods ctc

The tiny model transcribes WAV files of repeated synthesized sentences, read as streams: with the CTC head alone
("ctc") and with the LLM ("llm", "draft": with CTC drafts). Memory is the whole process's peak ("process_mib"), and
what it takes beyond what it holds with the model loaded and one window transcribed ("peak_mib"). Writes
results/long_audio.json and two plots.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch

try:
    from benchmarks import common
except ImportError:  # run as a script
    import common  # type: ignore[no-redef]

METHODS = ("ctc", "llm", "draft")
BLOCK_S = 60  # of different sentences, before they are repeated
MIB = 2**20
PLOTS = (
    ("long_audio_seconds", "seconds", "Time of a transcript (tiny model, CPU)", "seconds"),
    ("long_audio_memory", "process_mib", "Peak memory of the process (tiny model)", "MiB"),
)


def write_recording(path: Path, minutes: float) -> None:
    """A WAV file of sentences of the tiny grammar in unheard voices, repeated after `BLOCK_S`."""
    from soundwave.training.tiny.grammar import draw_split
    from soundwave.training.tiny.synthesizer import UNSEEN_VOICES
    from soundwave.training.tiny.utterances import Job, speak

    parts: list[np.ndarray] = []
    for index, sentence in enumerate(draw_split(random.Random(0), "test", BLOCK_S)):
        voice = UNSEEN_VOICES[index % len(UNSEEN_VOICES)]
        parts.append(speak(Job(str(index), (sentence.text,), voice, index, training=False)).samples)
    block = np.concatenate(parts)[: BLOCK_S * common.SAMPLING_RATE]
    left = round(minutes * 60 * common.SAMPLING_RATE)
    with soundfile.SoundFile(path, "w", common.SAMPLING_RATE, 1, "PCM_16") as file:
        while left > 0:
            file.write(block[:left])
            left -= len(block)


def measure(path: str, method: str, windows_per_batch: int) -> dict[str, float]:
    """Transcribe one file in this process: seconds, and the memory beyond the model in MiB."""
    from soundwave import SoundwaveForConditionalGeneration, SoundwaveProcessor
    from soundwave.assets import TINY

    model = SoundwaveForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    processor = SoundwaveProcessor.from_pretrained(TINY)

    def transcribe(audio, **options):
        if method == "ctc":
            return model.transcribe_ctc(audio, processor, windows_per_batch=windows_per_batch, **options)
        options |= {"ctc_draft": method == "draft", "windows_per_batch": windows_per_batch}
        return model.transcribe(audio, processor, **options)

    transcribe(np.zeros(common.SAMPLING_RATE, np.float32), sampling_rate=common.SAMPLING_RATE)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    start = time.perf_counter()
    transcript = transcribe(path)
    seconds = time.perf_counter() - start
    peak = common.process_peak()
    return {
        "audio_s": round(transcript.duration, 3),
        "seconds": round(seconds, 2),
        "peak_mib": round((peak - before) / MIB, 1),
        "process_mib": round(peak / MIB, 1),
        "segments": len(transcript.segments),
        "words": len(transcript.text.split()),
    }


def in_child(path: Path, method: str, windows_per_batch: int) -> dict[str, float]:
    """`measure` in a new process: a peak never falls again."""
    command = [sys.executable, __file__, "--child", str(path), method, str(windows_per_batch)]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(finished.stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[10, 60])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--windows-per-batch", type=int, default=8)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        path, method, windows_per_batch = options.child
        print(json.dumps(measure(path, method, int(windows_per_batch))))
        return
    runs: dict[str, list[dict[str, float]]] = {method: [] for method in options.methods}
    with tempfile.TemporaryDirectory() as folder:
        for minutes in options.minutes:
            path = Path(folder) / "long.wav"
            write_recording(path, minutes)
            for method in options.methods:
                run = in_child(path, method, options.windows_per_batch)
                runs[method].append(run)
                print(f"{method:5}  {minutes:6g} min  {run['seconds']:8.1f} s  {run['peak_mib']:7.1f} MiB", flush=True)
    common.write("long_audio", {"windows_per_batch": options.windows_per_batch, "runs": runs})
    for name, key, title, ylabel in PLOTS:
        canvas, axes = common.figure(title, "recording (min)", ylabel, log="xy" if key == "seconds" else "x")
        for method, points in runs.items():
            axes.plot([p["audio_s"] / 60 for p in points], [p[key] for p in points], "o-", label=method)
        if key != "seconds":
            axes.set_ylim(bottom=0)
        axes.legend()
        common.save(canvas, name)


if __name__ == "__main__":
    main()
