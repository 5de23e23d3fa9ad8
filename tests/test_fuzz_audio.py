"""Mutated audio files: an error of ours or samples, within seconds and bounded memory, and no crash of a codec."""

import faulthandler
import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from soundwave.processing import AudioError, load_audio
from tests.sounds import encoded, noise, tone

HANG_S = 5.0
MAX_GROWTH = 2**30  # bytes


def seeds() -> list[bytes]:
    """Small files of every container."""
    waveforms = [(noise(8000), 16_000), (np.stack([tone(0.4, 44_100), tone(0.4, 44_100, 880)], 1), 44_100)]
    formats = [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "PCM_U8"), ("WAVEX", "PCM_24"), ("RF64", "PCM_16")]
    formats += [("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None), ("AIFF", "PCM_16")]
    files = [
        encoded(waveform, 48_000 if subtype == "OPUS" else rate, format=format, subtype=subtype)
        for waveform, rate in waveforms
        for format, subtype in formats
    ]
    return files + [
        mp3[mp3.index(mp3[:2], 2) :] for mp3 in files if mp3[:2] in (b"\xff\xfb", b"\xff\xf3", b"\xff\xe3")
    ]


def mutated(files: list[bytes], rng: np.random.Generator) -> bytes:
    """One to four mutations of one of the files."""
    content = bytearray(files[rng.integers(len(files))])
    for _ in range(rng.integers(1, 5)):
        size = max(1, len(content))
        start, length = int(rng.integers(size)), int(rng.integers(1, 1 + min(size, 3000)))
        if rng.random() < 0.4:  # where the headers are
            start = int(rng.integers(min(size, 120)))
        part = content[start : start + length]
        match rng.integers(9):
            case 0:
                for position in rng.integers(start, min(size, start + 400), rng.integers(1, 9)):
                    content[position : position + 1] = rng.bytes(1)
            case 1:
                del content[start:]
            case 2:
                del content[start : start + length]
            case 3:
                content[start : start + length] = bytes(len(part))
            case 4:
                content[start:start] = part * int(rng.integers(1, 9))
            case 5:  # a field of a header
                number = [0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, int(rng.integers(2**32))][rng.integers(6)]
                content[start : start + 4] = number.to_bytes(4, ("little", "big")[rng.integers(2)])
            case 6:  # a bit
                content[start : start + 1] = bytes([part[0] ^ 1 << rng.integers(8)]) if part else b""
            case 7:  # another file's content behind this one's beginning
                other = files[rng.integers(len(files))]
                content[start:] = other[int(rng.integers(len(other))) :]
            case 8:  # another container's beginning
                content[:start] = files[rng.integers(len(files))][: int(rng.integers(1, 200))]
    return bytes(content)


def fuzz(count: int, seed: int) -> None:
    """Load `count` mutated files; prints the number of the file before it, and what came out in the end."""
    files, outcomes = seeds(), Counter[str]()
    for content in files:
        assert load_audio(content).size
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        os.write(1, f"{number}\n".encode())
        content = mutated(files, np.random.default_rng([seed, number]))
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        try:
            outcome = load_audio(content)
            assert outcome.size and np.isfinite(outcome).all()
            outcomes["loaded"] += 1
        except AudioError as error:
            assert type(error) is not AudioError and len(str(error)) < 1000, error
            outcomes[type(error).__name__] += 1
        faulthandler.cancel_dump_traceback_later()
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024  # Linux: KiB
    print(dict(outcomes), f"{growth / 2**20:.0f} MiB")
    assert growth < MAX_GROWTH


@pytest.mark.parametrize("count", [500, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutated_files(count):
    command = f"from tests.test_fuzz_audio import fuzz; fuzz({count}, {count})"
    run = subprocess.run(
        [sys.executable, "-c", command], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=1800
    )
    print(run.stdout.splitlines()[-1:])
    assert run.returncode == 0, f"file {run.stdout.splitlines()[-1:]}: {run.stderr[-3000:]}"
