"""Every kind of source, errors, windows and log-mel features."""

import base64
import io
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

from soundwave.processing import (
    SAMPLING_RATE,
    AudioFetchError,
    AudioFormatError,
    AudioValueError,
    EmptyAudioError,
    SamplingRateError,
    load_audio,
    open_audio,
)
from soundwave.processing import audio_soundwave as audio
from tests.sounds import Decoder, encoded, noise, tone

RECORDINGS = Path(__file__).parents[1].parent / "shared" / "data"


@pytest.fixture(scope="module")
def wav(tmp_path_factory) -> tuple[Path, np.ndarray]:
    path = tmp_path_factory.mktemp("audio") / "tone.wav"
    waveform = tone(0.3)
    path.write_bytes(encoded(waveform, subtype="FLOAT"))
    return path, waveform


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


def test_a_stream_that_cannot_be_sought(wav):
    class Pipe(io.RawIOBase):
        def __init__(self, content: bytes):
            self.inner = io.BytesIO(content)

        def readable(self) -> bool:
            return True

        def readinto(self, buffer) -> int:
            return self.inner.readinto(buffer)

    path, waveform = wav
    np.testing.assert_array_equal(load_audio(Pipe(path.read_bytes())), waveform)
    behind = io.BytesIO(b"header" + path.read_bytes())
    behind.read(6)
    np.testing.assert_array_equal(load_audio(behind), waveform)
    with path.open("rb") as file:
        load_audio(file)
        assert not file.closed, "who opened it closes it"


@pytest.mark.parametrize("rate", [SAMPLING_RATE, 44_100])
def test_chunks_as_they_arrive(rate):
    waveform = noise(5 * rate)
    seen = 0

    def chunks():
        nonlocal seen
        for start in range(0, len(waveform), 1000):
            seen = start
            yield waveform[start : start + 1000]

    blocks = open_audio(chunks(), rate)
    first = next(blocks)
    assert seen <= 2000, "a stream does not wait for more than the filter needs"
    loaded = np.concatenate([first, *blocks])
    np.testing.assert_allclose(loaded, load_audio(waveform, rate), atol=1e-6)


# Errors


@pytest.mark.parametrize(
    ("source", "rate", "kind", "message"),
    [
        (np.zeros(0, np.float32), 16_000, EmptyAudioError, "no samples"),
        (np.zeros((2, 0), np.float32), 16_000, EmptyAudioError, "no samples"),
        ([], 16_000, EmptyAudioError, "no samples"),
        (iter([]), 16_000, EmptyAudioError, "no samples"),
        (encoded(np.zeros(0, np.float32)), None, EmptyAudioError, "no samples"),
        (np.array([0.0, np.nan, np.inf], np.float32), 16_000, AudioValueError, "2 of 3 samples"),
        (np.array([[np.inf, -np.inf], [1e40, 0.5], [0, 0]]), 16_000, AudioValueError, "2 of 3 samples"),
        (np.array([0.0, 1e30]), 16_000, AudioValueError, "senseless values in 1 of 2"),
        (encoded(np.array([0.0, np.nan]), subtype="FLOAT"), None, AudioValueError, "NaN"),
        (noise(100), None, SamplingRateError, "sampling_rate="),
        ({"array": noise(100)}, None, SamplingRateError, "sampling_rate="),
        (noise(100), 0, SamplingRateError, "positive"),
        (noise(100), -8000, SamplingRateError, "positive"),
        (noise(100), float("nan"), SamplingRateError, "positive"),
        (noise(100), 10**400, SamplingRateError, "positive"),
        (noise(100), "16 kHz", SamplingRateError, "rate of '16 kHz'; expected a positive"),
        (encoded(noise(100), 1), None, SamplingRateError, "100 to 1000000"),
        (encoded(noise(100), 2**31 - 1), None, SamplingRateError, "100 to 1000000"),
        ({"bytes": None, "path": None}, None, AudioFormatError, "expected"),
        ({"path": {"path": "x.wav"}}, None, AudioFormatError, "expected a path"),
        (b"", None, AudioFormatError, "cannot be decoded"),
        (b"this is no recording", None, AudioFormatError, "WAV, FLAC, OGG or MP3"),
        (encoded(noise(1000))[:20], None, AudioFormatError, "cannot be decoded"),
        ("no/such/file.wav", None, AudioFormatError, "not a file"),
        (Path("/"), None, AudioFormatError, "not a file"),
        ("A" * 5000, None, AudioFormatError, "not a file"),
        ("nul\0.wav", None, AudioFormatError, "not a file"),
        ("http://", None, AudioFetchError, "cannot be downloaded"),
        ("http://[::1", None, AudioFetchError, "cannot be downloaded"),
        ("data:audio/wav;base64", None, AudioFormatError, "data:"),
        ("data:audio/wav;base64,%%%", None, AudioFormatError, "base64"),
        (io.StringIO("text"), None, AudioFormatError, "binary mode"),
        (np.zeros((100, 100), np.float32), 16_000, AudioFormatError, "channels"),
        (np.zeros((2, 2, 100), np.float32), 16_000, AudioFormatError, "shape"),
        (np.float32(0.5), 16_000, AudioFormatError, "expected a path"),
        (np.zeros(4, bool), 16_000, AudioFormatError, "integers"),
        (np.zeros(4, np.int64), 16_000, AudioFormatError, "integers"),
        ([0, 1, 2], 16_000, AudioFormatError, "integers"),
        ([[0.1, 0.2], [0.1]], 16_000, AudioFormatError, "unequal"),
        ([0.1, 10**400], 16_000, AudioFormatError, "type object"),
        (["a", "b"], 16_000, AudioFormatError, "integers of 8"),
        (torch.zeros(3, device="meta"), 16_000, AudioFormatError, "without numbers"),
        (7, None, AudioFormatError, "expected a path"),
        (None, None, AudioFormatError, "expected a path"),
    ],
)
def test_errors_name_the_input_and_the_remedy(source, rate, kind, message):
    with pytest.raises(kind, match=message):
        load_audio(source, rate)


def test_closed_file():
    file = io.BytesIO(encoded(noise(100)))
    file.close()
    with pytest.raises(AudioFormatError, match="open binary file"):
        load_audio(file)


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


@settings(max_examples=60)
@given(
    samples=st.integers(1, 200 * SAMPLING_RATE) | st.integers(1, 6 * SAMPLING_RATE),
    cuts=st.lists(st.floats(0, 1), max_size=6),
    padding=st.sampled_from(["max_length", "longest"]),
)
def test_streamed_windows_are_those_of_the_whole(samples, cuts, padding):
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    waveform = noise(samples)
    blocks = np.split(waveform, sorted(int(cut * samples) for cut in cuts))
    whole = audio.log_mel_windows([waveform], extractor, padding)
    windows = list(audio.stream_windows(blocks, extractor, padding))
    assert [window.offset for window in windows] == whole["window_offsets"].tolist()
    assert [window.frames for window in windows] == whole["input_features_mask"].sum(1).tolist()
    assert [window.last for window in windows] == [False] * (len(windows) - 1) + [True]
    for features, window in zip(whole["input_features"], windows, strict=True):
        width = window.frames if padding == "longest" else extractor.nb_max_frames
        assert window.features.shape == (16, width)
        assert torch.equal(features[:, :width], window.features)


@pytest.mark.parametrize("ends", [-640, -1, 0, 1, 640])
def test_streamed_windows_at_the_ends_of_windows(ends):
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    for count in range(4):
        waveform = noise((200 + 164 * count) * 160 + ends)
        whole = audio.log_mel_windows([waveform], extractor, "longest")["window_offsets"].tolist()
        assert [window.offset for window in audio.stream_windows([waveform], extractor, "longest")] == whole


def test_windows_come_before_the_stream_ends():
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    asked = 0

    def blocks():
        nonlocal asked
        while True:  # a microphone
            asked += 1
            yield noise(8000, asked)

    windows = audio.stream_windows(blocks(), extractor, "longest")
    assert next(windows).offset == 0 and asked == 5  # 2.5 s
    assert next(windows).offset == 164 and asked == 8
    with pytest.raises(EmptyAudioError):
        next(audio.stream_windows([noise(0)], extractor, "longest"))


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
