"""Containers, formats, rates and channels; cut files; bounds; decoding and resampling block by block."""

import io
import os
import sys
import threading
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from soundwave.processing import (
    SAMPLING_RATE,
    AudioFormatError,
    AudioLimitError,
    AudioLimits,
    SamplingRateError,
    TruncatedAudioError,
    load_audio,
    open_audio,
)
from soundwave.processing import decoding_soundwave as decoding
from soundwave.processing.resampling_soundwave import resample_blocks
from tests.sounds import encoded, noise, peak_hertz, tone

# Formats

SUBTYPES = {
    "WAV": ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"],
    "FLAC": ["PCM_16", "PCM_24"],
    "OGG": ["VORBIS", "OPUS"],
    "MP3": ["MPEG_LAYER_III"],
    "AIFF": ["PCM_16"],
}
RATES = {
    "OPUS": [8_000, 16_000, 24_000, 48_000],
    "MPEG_LAYER_III": [8_000, 16_000, 22_050, 44_100, 48_000],
    "": [8_000, 11_025, 12_345, 16_000, 22_050, 44_100, 48_000],
}
MATRIX = [
    (format, subtype, rate, channels)
    for format, subtypes in SUBTYPES.items()
    for subtype in subtypes
    for rate in RATES.get(subtype, RATES[""])
    for channels in ([1, 2] if format == "MP3" else [1, 2, 6])
]


@pytest.mark.parametrize(("format", "subtype", "rate", "channels"), MATRIX)
def test_formats_rates_and_channels(format, subtype, rate, channels):
    waveform = tone(0.5, rate)
    first = np.zeros((len(waveform), channels), np.float32)
    first[:, 0] = waveform
    loaded = load_audio(encoded(first, rate, format=format, subtype=subtype))
    assert abs(len(loaded) - 8000) <= (2400 if format == "MP3" else 1)  # encoders of MP3 may add padding
    assert peak_hertz(loaded) == pytest.approx(440, abs=4)
    assert np.abs(loaded[1000:-1000]).max() == pytest.approx(0.5 / channels, rel=0.1, abs=0.01)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.int32, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_arrays(dtype, rate, channels, kind):
    samples = np.repeat(tone(0.2, rate)[:, None], channels, axis=1)  # (n, C)
    if np.dtype(dtype).kind != "f":
        samples = samples * np.iinfo(dtype).max / (2 if dtype == np.uint8 else 1) + 128 * (dtype == np.uint8)
    loaded = load_audio(kind(samples.astype(dtype)), rate)
    np.testing.assert_allclose(loaded, load_audio(tone(0.2, rate), rate), atol=0.02)
    np.testing.assert_array_equal(loaded, load_audio(kind(np.ascontiguousarray(samples.T.astype(dtype))), rate))


CONTAINERS = {
    "m4a": b"\0\0\0\x20ftypM4A " + bytes(500),
    "webm": b"\x1aE\xdf\xa3" + bytes(500),
    "aac": b"\xff\xf1\x50\x80" + bytes(500),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_other_containers_say_what_to_install(container, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(AudioFormatError, match=r"install FFmpeg and `pip install torchcodec`"):
        load_audio(CONTAINERS[container])
    with pytest.raises(AudioFormatError, match=r"expected WAV, FLAC, OGG or MP3. Convert it"):
        load_audio(b"#EXTM3U\nfile:///etc/passwd\n")


@pytest.mark.parametrize("suffix", ["m4a", "mp4", "aac", "webm"])
def test_other_containers_where_ffmpeg_is_installed(suffix, tmp_path):
    try:
        from torchcodec.encoders import AudioEncoder
    except (ImportError, RuntimeError, OSError):
        pytest.skip("torchcodec or FFmpeg's libraries are not installed")
    path = tmp_path / f"tone.{suffix}"
    waveform = tone(65.0, 48_000)
    AudioEncoder(torch.from_numpy(np.stack([waveform, waveform])), sample_rate=48_000).to_file(path)
    blocks = list(open_audio(path))
    assert len(blocks) > 2, "decoded in parts"
    loaded = np.concatenate(blocks)
    assert len(loaded) == pytest.approx(65 * SAMPLING_RATE, abs=2000)
    assert peak_hertz(loaded) == pytest.approx(440, abs=1)
    assert np.abs(loaded[5000:-5000]).max() == pytest.approx(0.5, abs=0.05)
    for source in (path.read_bytes(), io.BytesIO(path.read_bytes())):
        np.testing.assert_array_equal(load_audio(source), loaded)
    with pytest.raises(AudioLimitError):
        load_audio(path, limits=AudioLimits(max_duration_s=40))


# Cut files


def cut(content: bytes, part: float) -> bytes:
    return content[: int(len(content) * part)]


@pytest.mark.parametrize("part", [0.5, 0.9, 0.999])
@pytest.mark.parametrize(
    ("format", "subtype"),
    [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAVEX", "PCM_24"), ("RF64", "PCM_16"), ("W64", "PCM_16"), ("AU", "PCM_16")]
    + [("AIFF", "PCM_16"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS")],
)
def test_cut_files(format, subtype, part):
    content = encoded(noise(5 * SAMPLING_RATE), format=format, subtype=subtype)
    assert len(load_audio(content)) == 5 * SAMPLING_RATE
    with pytest.raises(TruncatedAudioError, match="cut off or damaged"):
        load_audio(cut(content, part))
    blocks = open_audio(cut(content, part))
    with pytest.raises(TruncatedAudioError):
        for block in blocks:
            assert block.size


@given(st.integers(1, 31_999))
def test_wav_cut_anywhere(missing):
    with pytest.raises(TruncatedAudioError):
        load_audio(encoded(noise(16_000))[:-missing])


@pytest.mark.parametrize("announced", [0, 0x7FFFFFFF, 0x7FFFF000, 0x80000000, 0xFFFFFFFF])
@pytest.mark.parametrize("whole", [0, 36, 0x7FFFF024, 0xFFFFFFFF])
def test_wav_from_a_pipe(announced, whole):
    content = bytearray(encoded(noise(16_000)))
    content[4:8], content[40:44] = whole.to_bytes(4, "little"), announced.to_bytes(4, "little")
    assert len(load_audio(bytes(content))) == 16_000


def test_a_header_of_any_length_needs_little_memory(tmp_path):
    path, content = tmp_path / "piped.wav", encoded(noise(16_000))
    with open(path, "wb") as file:
        file.write(b"RIFF\0\0\0\0" + content[8:12] + b"JUNK" + (2**27).to_bytes(4, "little"))
        file.seek(2**27, 1)
        file.write(content[12:40] + bytes(4) + content[44:])
    tracemalloc.start()
    try:
        assert len(load_audio(path)) == 16_000
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def test_flac_from_a_pipe():
    content = bytearray(encoded(noise(16_000), format="FLAC"))
    content[21] &= 0xF0
    content[22:26] = bytes(4)  # the number of samples
    assert len(load_audio(bytes(content))) == 16_000
    with pytest.raises(TruncatedAudioError):
        load_audio(cut(bytes(content), 0.7))


@pytest.mark.parametrize("behind", [bytes(3000), b"TAG" + bytes(125)])
@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_what_stands_behind_the_recording_is_no_cut(format, behind):
    content = encoded(noise(2 * SAMPLING_RATE), format=format)
    assert len(load_audio(content + behind)) == len(load_audio(content))


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_cut_mp3(mode, rate, tmp_path, capfd):
    content = encoded(noise(10 * rate), rate, format="MP3", bitrate_mode=mode)
    assert len(load_audio(content)) == 10 * SAMPLING_RATE
    path = tmp_path / "cut.mp3"
    path.write_bytes(cut(content, 0.5))
    for source in (path, path.read_bytes()):
        with pytest.raises(TruncatedAudioError, match=rf"ends after \d+ samples.* announces {10 * rate}"):
            load_audio(source)
    headless = content[content.index(content[:2], 2) :]  # its length is a guess
    assert len(load_audio(headless)) == pytest.approx(10 * SAMPLING_RATE, rel=0.05)
    for part in (0.3, 0.5, 0.8):
        with pytest.raises(TruncatedAudioError, match="within an MP3 frame"):
            load_audio(cut(headless, part))
    assert capfd.readouterr().err == ""


def test_joined_recordings_are_whole_or_refused():
    mp3, ogg = (encoded(noise(5 * SAMPLING_RATE), format=format) for format in ("MP3", "OGG"))
    assert len(load_audio(mp3 + mp3)) == pytest.approx(10 * SAMPLING_RATE, rel=0.02)
    with pytest.raises(TruncatedAudioError, match="several OGG streams"):
        load_audio(ogg + encoded(noise(SAMPLING_RATE, 1), format="OGG"))


def test_mp3_behind_a_picture():
    mp3 = encoded(noise(5 * SAMPLING_RATE), format="MP3", bitrate_mode="VARIABLE")
    bare = mp3[mp3.index(mp3[:2], 2) :]
    picture = np.random.default_rng(0).bytes(20_000).replace(b"\xff", b"\xff\x00")
    size = bytes((len(picture) >> shift) & 0x7F for shift in (21, 14, 7, 0))
    tagged = b"ID3\x04\0\0" + size + picture
    for content in (mp3, bare):
        assert len(load_audio(tagged + content)) == pytest.approx(5 * SAMPLING_RATE, rel=0.02)


def test_damaged_mp3_is_quiet(capfd):
    content = bytearray(encoded(noise(20 * SAMPLING_RATE), format="MP3"))
    content[20_000:20_400] = bytes(400)
    assert len(load_audio(bytes(content))) == pytest.approx(20 * SAMPLING_RATE, rel=0.01)
    content[20_000:24_000] = bytes(4000)
    with pytest.raises(TruncatedAudioError, match="the decoder stops there"):
        load_audio(bytes(content))
    os.write(2, b"heard again")
    assert capfd.readouterr().err == "heard again"


def test_standard_error_is_heard_while_threads_decode(capfd):
    content = bytearray(encoded(noise(20 * SAMPLING_RATE), format="MP3"))
    content[20_000:20_400] = bytes(400)
    lengths = []

    def decode():
        for _ in range(3):
            lengths.append(len(load_audio(bytes(content))))
            os.write(2, b"x")

    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == [lengths[0]] * 12
    assert capfd.readouterr().err == "x" * 12


def test_decoding_with_standard_error_closed():
    content = encoded(noise(SAMPLING_RATE), format="MP3")
    saved = os.dup(2)
    try:
        os.close(2)
        assert len(load_audio(content)) == SAMPLING_RATE
    finally:
        os.dup2(saved, 2)
        os.close(saved)


# Bounds


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_bounds(format, tmp_path):
    path = tmp_path / f"tone.{format.lower()}"
    path.write_bytes(encoded(tone(3.0, 44_100), 44_100, format=format))
    assert load_audio(path, limits=AudioLimits(max_duration_s=3.2, max_decoded_bytes=600_000)).size
    for limits, message in [
        (AudioLimits(max_duration_s=2.0), "max_duration_s"),
        (AudioLimits(max_decoded_bytes=500_000), "max_decoded_bytes"),
        (AudioLimits(max_file_bytes=1000), "max_file_bytes"),
    ]:
        for source in (path, path.read_bytes(), io.BytesIO(path.read_bytes())):
            with pytest.raises(AudioLimitError, match=message):
                load_audio(source, limits=limits)


def test_bounds_of_arrays_chunks_and_uris():
    limits = AudioLimits(max_duration_s=1.0, max_file_bytes=1000)
    with pytest.raises(AudioLimitError, match=r"lasts 2\.0 s"):
        load_audio(noise(16_000), 8000, limits)
    with pytest.raises(AudioLimitError):
        list(open_audio(iter([noise(5000)] * 4), 16_000, limits))
    for uri in ("data:audio/wav;base64," + "A" * 2000, "data:," + "A" * 2000):
        with pytest.raises(AudioLimitError, match="max_file_bytes"):
            load_audio(uri, limits=limits)
    with pytest.raises(AudioLimitError, match="65 channels"):
        load_audio(encoded(np.zeros((10, 65))))


def test_a_header_that_announces_too_much_is_refused_at_once():
    content = bytearray(encoded(noise(16_000), format="FLAC"))
    content[21] |= 0x0F
    content[22:26] = b"\xff" * 4
    with pytest.raises(AudioLimitError, match="lasts 4294967"):
        open_audio(bytes(content))


def test_a_small_file_that_expands_is_cut_off():
    content = encoded(np.zeros(120 * SAMPLING_RATE), format="FLAC")
    assert len(content) < 60_000
    content = bytearray(content)
    content[21] &= 0xF0
    content[22:26] = bytes(4)  # it does not say how long it is
    blocks = open_audio(bytes(content), limits=AudioLimits(max_duration_s=100))
    taken = 0
    with pytest.raises(AudioLimitError):
        for block in blocks:
            taken += len(block)
    assert taken <= 100 * SAMPLING_RATE


def test_a_long_file_needs_little_memory(tmp_path):
    path = tmp_path / "long.wav"
    with soundfile.SoundFile(path, "w", 44_100, 2, "PCM_16") as file:
        for _ in range(40):
            file.write(np.zeros((10 * 44_100, 2), np.int16))
    largest = max(len(block) for block in open_audio(path))
    assert largest <= decoding.BLOCK // 2 * SAMPLING_RATE / 44_100 + 320


def test_a_low_rate_is_no_bomb():
    blocks = [
        len(block) for block in open_audio(np.zeros(100 * 600, np.float32), 100)
    ]  # ten minutes in 60,000 samples
    assert sum(blocks) == 600 * SAMPLING_RATE and max(blocks) <= (decoding.BLOCK_S + 1) * SAMPLING_RATE


# Block by block


@pytest.mark.parametrize("format", ["WAV", "FLAC", "OGG", "MP3"])
def test_blocks_are_the_whole(format, monkeypatch):
    content = encoded(noise(2 * 22_050), 22_050, format=format)
    whole = load_audio(content)
    for block in (1000, 4096):
        monkeypatch.setattr(decoding, "BLOCK", block)
        np.testing.assert_allclose(load_audio(content), whole, atol=1e-6)


@given(
    rate=st.sampled_from([100, 8_000, 11_025, 22_050, 44_100, 44_101, 48_000, 96_000, 999_999]) | st.floats(100, 1e6),
    samples=st.integers(1, 30_000),
    cuts=st.lists(st.floats(0, 1), max_size=6),
)
def test_resampled_blocks_are_the_whole_resampled(rate, samples, cuts):
    pytest.importorskip("torchaudio")
    samples = min(samples, int(5 * rate) + 1)
    waveform = noise(samples)
    blocks = np.split(waveform, sorted(int(cut * samples) for cut in cuts))
    resampled = np.concatenate(list(resample_blocks(blocks, rate, "noise")))
    whole = np.concatenate(list(resample_blocks([waveform], rate, "noise")))
    assert len(resampled) == pytest.approx(samples * SAMPLING_RATE / rate, rel=1e-3, abs=1)
    np.testing.assert_allclose(resampled, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_resampling_is_that_of_torchaudio(rate):
    functional = pytest.importorskip("torchaudio.functional")
    waveform = noise(3 * rate)
    expected = functional.resample(torch.from_numpy(waveform), rate, SAMPLING_RATE)
    np.testing.assert_allclose(load_audio(waveform, rate), expected.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("resampler", ["torchaudio", "soxr"])
@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 44_101, 48_000, 96_000])
def test_resampling(rate, resampler, monkeypatch):
    if resampler == "soxr":
        pytest.importorskip("soxr")
        monkeypatch.setitem(sys.modules, "torchaudio.transforms", None)
    else:
        pytest.importorskip("torchaudio")
    loaded = load_audio(tone(0.5, rate), sampling_rate=rate)
    assert loaded.dtype == np.float32
    assert abs(len(loaded) - 8000) <= 8
    assert peak_hertz(loaded) == pytest.approx(440, abs=3)
    assert load_audio(tone(0.5, rate)[:1], sampling_rate=rate).size >= 1
    monkeypatch.setattr(decoding, "BLOCK", 1000)
    np.testing.assert_allclose(load_audio(tone(0.5, rate), rate), loaded, atol=1e-5)


def test_no_resampler_and_no_decoder(monkeypatch):
    for name in ("torchaudio.transforms", "soxr", "soundfile"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SamplingRateError, match="pip install soxr"):
        load_audio(tone(0.1, 8000), sampling_rate=8000)
    with pytest.raises(AudioFormatError, match="pip install soundfile"):
        load_audio(b"RIFF")
    assert load_audio(tone(0.1), sampling_rate=SAMPLING_RATE).size == 1600
