"""Recordings of items: whole files, segments, cells of tables; what cannot be read says so and nothing else breaks."""

import io

import numpy as np
import pytest
import soundfile
from datasets import Audio, Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from soundwave.eval.items import CellClip, FileClip, Item, TableClip
from soundwave.processing.limits_soundwave import AudioError, EmptyAudioError
from tests.conftest import SAMPLING_RATE, tone


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Two seconds of noise in 16 bit, so that a file gives back the very samples."""
    path = tmp_path_factory.mktemp("clips") / "noise.wav"
    samples = np.random.default_rng(0).integers(-8000, 8000, 2 * SAMPLING_RATE).astype(np.int16)
    soundfile.write(path, samples, SAMPLING_RATE)
    return path, samples / np.float32(32768)


@settings(max_examples=20)
@given(start=st.integers(0, 31_000), length=st.integers(1, 1000))
def test_a_segment_is_that_part_of_the_file(recording, start, length):
    path, samples = recording
    clip = FileClip(path, start / SAMPLING_RATE, (start + length) / SAMPLING_RATE)
    np.testing.assert_array_equal(clip.read(), samples[start : start + length])
    assert clip.duration_s == pytest.approx(length / SAMPLING_RATE)


def test_a_whole_file_and_an_open_end(recording):
    path, samples = recording
    whole, rest = FileClip(path), FileClip(path, start_s=1.5)
    np.testing.assert_array_equal(whole.read(), samples)
    np.testing.assert_array_equal(rest.read(), samples[24_000:])
    assert (whole.name, whole.duration_s, rest.duration_s) == ("noise.wav", 2.0, 0.5)


def test_a_segment_of_stereo_at_another_rate(tmp_path):
    wave = tone(2.0, 440, 44_100)
    soundfile.write(tmp_path / "a.flac", np.stack([wave, wave], axis=1), 44_100)
    heard = FileClip(tmp_path / "a.flac", 0.5, 1.0).read()
    assert heard.shape == (8000,) and heard.dtype == np.float32
    spectrum = np.abs(np.fft.rfft(heard))
    assert np.argmax(spectrum) * 2 == pytest.approx(440, abs=2)  # 2 Hz per bin: half a second


def test_what_cannot_be_read_is_named_when_it_is_read(recording, tmp_path):
    path, _ = recording
    (tmp_path / "broken.wav").write_bytes(b"RIFF but no sound")
    with pytest.raises(EmptyAudioError, match=r"noise\.wav lasts 2\.00 s.*from 3 s to 4 s"):
        FileClip(path, 3.0, 4.0).read()
    for name in ("broken.wav", "missing.wav"):
        for clip in (FileClip(tmp_path / name), FileClip(tmp_path / name, 0.5, 0.7)):
            with pytest.raises(AudioError, match=name):
                clip.read()
        assert FileClip(tmp_path / name).duration_s is None
    nothing = CellClip(None, "audio-3")
    assert (nothing.name, nothing.duration_s) == ("audio-3", None)
    with pytest.raises(AudioError):
        nothing.read()


def test_cells_of_a_table(recording):
    path, samples = recording
    file = io.BytesIO()
    soundfile.write(file, samples[:4000], SAMPLING_RATE, format="FLAC", subtype="PCM_16")
    cells = [{"bytes": file.getvalue(), "path": "folder/b.flac"}, {"bytes": None, "path": str(path)}]
    table = Dataset.from_dict({"speech": cells, "text": ["a", "b"]}).cast_column("speech", Audio(decode=False))
    first, second = (TableClip(table, row, "speech") for row in range(2))
    np.testing.assert_array_equal(first.read(), samples[:4000])
    np.testing.assert_array_equal(second.read(), samples)
    assert [(clip.name, clip.duration_s) for clip in (first, second)] == [("b.flac", 0.25), ("noise.wav", 2.0)]


def test_the_length_of_an_item(recording, tmp_path):
    path, _ = recording
    whole, part, missing = FileClip(path), FileClip(path, 0.0, 0.5), FileClip(tmp_path / "missing.wav")
    assert Item("a", None, [whole, part], "x").duration_s == 2.5
    assert Item("a", None, [whole, missing], "x").duration_s is None
    assert Item("a", "text", [], "x").duration_s is None


def test_a_key_in_an_address_is_in_no_name():
    assert CellClip({"bytes": None, "path": "https://me:hidden@host/clips/a.wav?sig=hidden/x"}).name == "a.wav"
