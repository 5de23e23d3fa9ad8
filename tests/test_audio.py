"""Decoding, mixing, resampling, windows and log-mel features."""

import base64
import io
import json
import os
import sys
import threading
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from soundwave.processing import SAMPLING_RATE, AudioError, load_audio
from soundwave.processing import audio_soundwave as audio

RECORDINGS = Path(__file__).parents[1].parent / "shared" / "data"


def tone(seconds: float, rate: int = SAMPLING_RATE, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def peak_hertz(waveform: np.ndarray) -> float:
    return float(np.argmax(np.abs(np.fft.rfft(waveform))) * SAMPLING_RATE / len(waveform))


def encoded(waveform: np.ndarray, rate: int = SAMPLING_RATE, **kwargs) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveform, rate, **{"format": "WAV", **kwargs})
    return file.getvalue()


class Decoder:
    """What a decoded column of `datasets` yields."""

    def __init__(self, waveform: np.ndarray):
        self.data, self.sample_rate = torch.from_numpy(waveform)[None], SAMPLING_RATE

    def get_all_samples(self):
        return self


@pytest.fixture(scope="module")
def wav(tmp_path_factory) -> tuple[Path, np.ndarray]:
    path = tmp_path_factory.mktemp("audio") / "tone.wav"
    waveform = tone(0.3)
    path.write_bytes(encoded(waveform, subtype="FLOAT"))
    return path, waveform


@pytest.fixture(scope="module")
def server(wav):
    handler = partial(SimpleHTTPRequestHandler, directory=str(wav[0].parent))
    handler.log_message = lambda *_: None
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


# Every kind of source


def sources(path: Path, waveform: np.ndarray) -> dict:
    content = path.read_bytes()
    uri = base64.b64encode(content).decode()
    return {
        "path": path,
        "string": str(path),
        "bytes": content,
        "bytearray": bytearray(content),
        "file object": io.BytesIO(content),
        "data URI": f"data:audio/wav;base64,{uri}",
        "datasets bytes": {"bytes": content, "path": None},
        "datasets bytes win": {"bytes": content, "path": "gone.wav"},
        "datasets path": {"bytes": None, "path": str(path)},
        "datasets array": {"array": waveform, "sampling_rate": SAMPLING_RATE, "path": "gone.wav"},
        "datasets decoder": Decoder(waveform),
    }


@pytest.mark.parametrize("kind", sources(Path(__file__), np.zeros(1, np.float32)))
def test_files_and_dictionaries(wav, kind):
    path, waveform = wav
    loaded = load_audio(sources(path, waveform)[kind])
    assert loaded.dtype == np.float32 and loaded.ndim == 1
    np.testing.assert_array_equal(loaded, waveform)


def test_url(wav, server):
    np.testing.assert_array_equal(load_audio(f"{server}/tone.wav"), wav[1])
    with pytest.raises(AudioError, match="404"):
        load_audio(f"{server}/missing.wav")


def test_url_too_large(wav, server, monkeypatch):
    monkeypatch.setattr(audio, "MAX_DOWNLOAD_BYTES", 100)
    with pytest.raises(AudioError, match="larger than"):
        load_audio(f"{server}/tone.wav")


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x,
        lambda x: x.astype(np.float64),
        lambda x: x.tolist(),
        torch.from_numpy,
        lambda x: torch.from_numpy(x).double().requires_grad_(),
        lambda x: x[None],
        lambda x: x[:, None],
        lambda x: np.stack([x, x]),
        lambda x: np.stack([x, x], axis=1),
        lambda x: np.stack([2 * x, np.zeros_like(x)]),
        lambda x: (x * 2**31).astype(np.int32),
    ],
)
def test_waveforms(convert):
    waveform = tone(0.1)
    loaded = load_audio(convert(waveform), sampling_rate=SAMPLING_RATE)
    assert loaded.dtype == np.float32 and loaded.flags.c_contiguous
    np.testing.assert_allclose(loaded, waveform, atol=1e-7)


@pytest.mark.parametrize(("dtype", "scale", "offset"), [(np.int16, 2**15, 0), (np.uint8, 2**7, 128)])
def test_integers_are_scaled(dtype, scale, offset):
    waveform = tone(0.1)
    loaded = load_audio((waveform * scale + offset).astype(dtype), sampling_rate=SAMPLING_RATE)
    np.testing.assert_allclose(loaded, waveform, atol=2 / scale)


@pytest.mark.parametrize(("format", "subtype"), [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("FLAC", None), ("OGG", None)])
def test_formats_rates_and_channels(format, subtype):
    stereo = np.stack([tone(0.5, 44_100), np.zeros(22_050, np.float32)], axis=1)
    loaded = load_audio(encoded(stereo, 44_100, format=format, subtype=subtype))
    assert abs(len(loaded) - 8000) <= 1
    assert peak_hertz(loaded) == pytest.approx(440, abs=3)
    assert np.abs(loaded[1000:-1000]).max() == pytest.approx(0.25, abs=0.02)


def test_mp3():
    loaded = load_audio(encoded(tone(0.5, 22_050), 22_050, format="MP3"))
    assert peak_hertz(loaded) == pytest.approx(440, abs=3)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_cut_mp3(mode, tmp_path, capfd):
    content = encoded(noise(10 * SAMPLING_RATE), format="MP3", bitrate_mode=mode)
    assert len(load_audio(content)) == 10 * SAMPLING_RATE
    path = tmp_path / "cut.mp3"
    path.write_bytes(content[: len(content) // 2])
    for source in (path, path.read_bytes()):
        with pytest.raises(AudioError, match=r"ends after \d+ of the 160000 samples"):
            load_audio(source)
    headless = content[content.index(content[:2], 2) :]  # its length is a guess, and no reason to refuse it
    assert load_audio(headless[: len(headless) // 2]).size
    assert capfd.readouterr().err == ""


def test_damaged_mp3_is_quiet(capfd):
    content = bytearray(encoded(noise(20 * SAMPLING_RATE), format="MP3"))
    content[20_000:20_400] = bytes(400)
    assert len(load_audio(bytes(content))) == pytest.approx(20 * SAMPLING_RATE, rel=0.01)
    content[20_000:24_000] = bytes(4000)
    with pytest.raises(AudioError, match="cannot be decoded"):
        load_audio(bytes(content))
    os.write(2, b"heard again")
    assert capfd.readouterr().err == "heard again"


def test_decoding_with_standard_error_closed(wav):
    saved = os.dup(2)
    try:
        os.close(2)
        np.testing.assert_array_equal(load_audio(wav[0]), wav[1])
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@pytest.mark.parametrize("resampler", ["torchaudio", "soxr"])
@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 44_101, 48_000, 96_000])
def test_resampling(rate, resampler, monkeypatch):
    if resampler == "soxr":
        pytest.importorskip("soxr")
        monkeypatch.setitem(sys.modules, "torchaudio", None)
        monkeypatch.setitem(sys.modules, "torchaudio.functional", None)
    else:
        pytest.importorskip("torchaudio")
    loaded = load_audio(tone(0.5, rate), sampling_rate=rate)
    assert loaded.dtype == np.float32
    assert abs(len(loaded) - 8000) <= 8
    assert peak_hertz(loaded) == pytest.approx(440, abs=3)
    assert load_audio(tone(0.5, rate)[:1], sampling_rate=rate).size >= 1


def test_no_resampler_and_no_decoder(monkeypatch):
    for name in ("torchaudio", "torchaudio.functional", "soxr", "soundfile"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(AudioError, match="pip install soxr"):
        load_audio(tone(0.1, 8000), sampling_rate=8000)
    with pytest.raises(AudioError, match="pip install soundfile"):
        load_audio(b"RIFF")
    assert load_audio(tone(0.1), sampling_rate=SAMPLING_RATE).size == 1600


# Errors


@pytest.mark.parametrize(
    ("source", "rate", "message"),
    [
        (np.zeros(0, np.float32), 16_000, "no samples"),
        (np.zeros((2, 0), np.float32), 16_000, "no samples"),
        ([], 16_000, "no samples"),
        (encoded(np.zeros(0, np.float32)), None, "no samples"),
        (np.array([0.0, np.nan, np.inf], np.float32), 16_000, "2 of 3 samples"),
        (noise(100), None, "sampling_rate="),
        ({"array": noise(100)}, None, "sampling_rate="),
        (noise(100), 0, "positive"),
        (noise(100), -8000, "positive"),
        ({"bytes": None, "path": None}, None, "expected"),
        (b"", None, "cannot be decoded"),
        (b"this is no recording", None, "WAV, FLAC, OGG or MP3"),
        (encoded(noise(1000))[:20], None, "cannot be decoded"),
        ("no/such/file.wav", None, "not a file"),
        (Path("/"), None, "not a file"),
        ("A" * 5000, None, "not a file"),
        ("http://", None, "cannot be downloaded"),
        ("data:audio/wav;base64", None, "data:"),
        ("data:audio/wav;base64,%%%", None, "base64"),
        (io.StringIO("text"), None, "binary mode"),
        (np.zeros((100, 100), np.float32), 16_000, "channels"),
        (np.zeros((2, 2, 100), np.float32), 16_000, "shape"),
        (np.float32(0.5), 16_000, "expected a path"),
        (np.zeros(4, bool), 16_000, "integers"),
        (np.zeros(4, np.int64), 16_000, "integers"),
        ([0, 1, 2], 16_000, "integers"),
        ([[0.1, 0.2], [0.1]], 16_000, "unequal"),
        (7, None, "expected a path"),
        (None, None, "expected a path"),
    ],
)
def test_errors_name_the_input_and_the_remedy(source, rate, message):
    with pytest.raises(AudioError, match=message):
        load_audio(source, rate)


def test_error_is_a_value_error_and_short():
    uri = "data:audio/wav;base64," + "A" * 100_000
    with pytest.raises(ValueError, match="cannot be decoded") as raised:
        load_audio(uri)
    assert len(str(raised.value)) < 500


# Windows


@given(frames=st.integers(1, 20_000).map(lambda n: 4 * n), window=st.integers(6, 750).map(lambda n: 4 * n))
def test_windows_cover_a_recording(frames, window):
    offsets = audio.window_offsets(frames, window)
    ends = [min(offset + window, frames) for offset in offsets]
    assert offsets[0] == 0 and ends[-1] == frames
    assert all(offset % 4 == 0 for offset in offsets)
    assert all(end - start == window for start, end in zip(offsets[:-1], ends[:-1], strict=True))
    for next_start, end in zip(offsets[1:], ends, strict=False):
        assert window / 6 <= end - next_start < window / 6 + 4  # frames that two neighbours share
    if len(offsets) > 1:
        assert ends[-1] - offsets[-1] > ends[-2] - offsets[-1], "the last window must bring something new"


def test_windows_of_whisper():
    assert audio.window_offsets(3000, 3000) == [0]
    assert audio.window_offsets(3004, 3000) == [0, 2500]
    assert audio.window_offsets(8000, 3000) == [0, 2500, 5000]
    assert audio.OVERLAP == Fraction(1, 6)


# Features


@pytest.mark.parametrize("samples", [1, 399, 640, 641, 16_000, 479_000, 479_900, 480_000])
def test_max_length_is_what_whisper_computes(samples):
    extractor = WhisperFeatureExtractor()
    waveform = noise(samples)
    ours = audio.log_mel_windows([waveform], extractor, "max_length")
    theirs = extractor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt")["input_features"]
    torch.testing.assert_close(ours["input_features"], theirs, rtol=0, atol=1e-6)
    assert ours["input_features_mask"].sum() == -(-samples // 640) * 4


@pytest.mark.parametrize("padding", ["max_length", "longest"])
def test_long_recordings_are_their_windows(padding):
    extractor = WhisperFeatureExtractor(chunk_length=2)  # windows of 200 frames, 164 apart
    waveform = noise(5 * SAMPLING_RATE)
    batch = audio.log_mel_windows([waveform, waveform[:8000]], extractor, padding)
    assert batch["window_offsets"].tolist() == [0, 164, 328, 0]
    assert batch["windows_per_audio"].tolist() == [3, 1]
    assert batch["input_features_mask"].sum(1).tolist() == [200, 200, 172, 52]
    for offset, features in zip([0, 164, 328], batch["input_features"], strict=False):
        cut = waveform[offset * 160 : (offset + 200) * 160]
        alone = audio.log_mel_windows([cut], extractor, padding)["input_features"][0]
        assert torch.equal(features[:, : alone.shape[1]], alone)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 40_000), min_size=1, max_size=5), seed=st.integers(0, 100))
def test_longest_does_not_depend_on_neighbours(lengths, seed):
    extractor = WhisperFeatureExtractor(chunk_length=1)
    waveforms = [noise(length, seed + index) for index, length in enumerate(lengths)]
    batch = audio.log_mel_windows(waveforms, extractor, "longest")
    start = 0
    for waveform, count in zip(waveforms, batch["windows_per_audio"].tolist(), strict=True):
        alone = audio.log_mel_windows([waveform], extractor, "longest")
        frames = alone["input_features"].shape[2]
        rows = slice(start, start + count)
        assert torch.equal(batch["input_features"][rows, :, :frames], alone["input_features"])
        assert not batch["input_features"][rows, :, frames:].any()
        assert torch.equal(batch["input_features_mask"][rows, :frames], alone["input_features_mask"])
        assert not batch["input_features_mask"][rows, frames:].any()
        assert not batch["input_features"][rows].masked_select(~batch["input_features_mask"][rows, None]).any()
        start += count
    assert start == len(batch["input_features"])
    assert (batch["input_features_mask"].sum(1) % 4 == 0).all()


def test_silence_is_finite():
    for padding in ("max_length", "longest"):
        features = audio.log_mel_windows([np.zeros(5000, np.float32)], WhisperFeatureExtractor(), padding)
        assert features["input_features"].isfinite().all()


# Real recordings


def one_of_each_kind() -> list[dict]:
    manifest = RECORDINGS / "manifest.jsonl"
    if not manifest.is_file():
        return []
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    kinds = {(Path(row["path"]).suffix, row["sample_rate"], row["channels"]): row for row in rows}
    return [*kinds.values(), max(rows, key=lambda row: row["duration_s"])]


@pytest.mark.skipif(not RECORDINGS.is_dir(), reason="no recordings beside the checkout")
@pytest.mark.parametrize("row", one_of_each_kind(), ids=lambda row: row["path"])
def test_real_recordings(row):
    waveform = load_audio(RECORDINGS / row["path"])
    assert len(waveform) / SAMPLING_RATE == pytest.approx(row["duration_s"], abs=2e-3)
    assert 1e-4 < np.abs(waveform).max() < 1.5
    batch = audio.log_mel_windows([waveform], WhisperFeatureExtractor(), "longest")
    assert batch["input_features"].isfinite().all()
    frames = -(-len(waveform) // 640) * 4
    assert (batch["window_offsets"] + batch["input_features_mask"].sum(1))[-1] == frames
