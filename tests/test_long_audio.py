"""Recordings of several windows: read as streams, joined at seams where no word is lost or said twice."""

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from soundwave.modeling_soundwave.seams_soundwave import best_cut
from soundwave.modeling_soundwave.transcribing_soundwave import Heard, ctc_peaks
from soundwave.modeling_soundwave.words_soundwave import group_words, timed_tokens
from tests.spoken import say, speech, trained

RATE = 16_000
DIGITS = "zero one two three four five six seven eight nine".split()
NEAR = 6  # frames: two windows may hear a word so far apart


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE))).astype(np.float32)


def test_trained_model_transcribes_as_in_one_call():
    model, processor = trained()
    recordings = [speech(seconds, seed=2) for seconds in (58.0, 3.0, 31.0)]
    expected = model.transcribe_ids(**processor.audio_features(recordings))
    for windows_per_batch in (1, 4):
        transcripts = model.transcribe_ctc(recordings, processor, RATE, windows_per_batch=windows_per_batch)
        assert [transcript.token_ids for transcript in transcripts] == expected
    assert [len(transcript.segments) for transcript in transcripts] == [3, 1, 2]


def test_the_sonnet_comes_out_whole(shared_data):
    """53 s of one reading; its words are none of the tiny model's, so what is tested is that all of it is heard."""
    model, processor = trained()
    path = shared_data / "speech" / "misc" / "sonnet001.flac"
    duration = len(processor.load_audio(path)) / RATE
    assert duration > 53
    ctc = model.transcribe_ctc(path, processor)
    pieces = model.transcribe(path, processor, timestamps=True)  # cut at pauses as well: a sentence for each question
    assert all(0 < segment.end - segment.start < 3.01 for segment in pieces.segments)
    assert sum(segment.end - segment.start for segment in pieces.segments) == pytest.approx(duration, abs=0.05)
    model = copy.deepcopy(model)
    model.config.max_transcript_seconds = None
    llm = model.transcribe(path, processor, timestamps=True)
    *_, last = model.transcribe_ctc(
        iter(np.array_split(processor.load_audio(path), 12)), processor, RATE, streaming=True
    )
    for transcript in (ctc, llm, last.transcript):
        assert transcript.duration == pytest.approx(duration)
        assert len(transcript.blank_probs) == -(-round(duration * RATE) // 640)
        first, second = transcript.segments
        assert first.start == 0 and 25 <= first.end == second.start <= 30 and second.end == transcript.duration
        assert first.text and second.text
        starts = [word.start for word in transcript.words]
        assert starts == sorted(starts) and transcript.words[-1].end <= duration
    assert ctc.words[-1].end > duration - 6  # it is read to the end


@pytest.mark.parametrize(("method", "options"), [("transcribe_ctc", {}), ("transcribe", {"max_new_tokens": 1})])
def test_recordings_are_read_as_they_are_transcribed(tiny_model, processor, method, options):
    """Windows of 2 s, a new one each 1.64 s; two are read and encoded at once."""
    model = copy.deepcopy(tiny_model)
    encoded, lags = 0, []

    def count(module, inputs):
        nonlocal encoded
        encoded += len(inputs[0])

    model.audio_tower.conv1.register_forward_pre_hook(count)

    def blocks(seconds):
        for second in range(seconds):
            lags.append(second - 1.64 * encoded)
            yield np.zeros(RATE, np.float32)

    for seconds in (90, 30):
        transcript = getattr(model, method)([blocks(seconds)], processor, RATE, windows_per_batch=2, **options)[0]
        assert transcript.duration == seconds and len(transcript.segments) == len(range(0, 100 * seconds - 36, 164))
        assert encoded == len(transcript.segments) and max(lags) <= 1.64 * (2 + 1) + 2
        encoded, lags = 0, []


@pytest.fixture(scope="module")
def digits():
    """Spoken digits without silence around them, by word and voice."""
    words = {}
    for voice in ("en-us+m4", "en-us+f3"):
        for word in DIGITS:
            samples = say(word, voice=voice).samples
            loud = np.flatnonzero(np.abs(samples) > 0.02)
            words[word, voice] = samples[loud[0] : loud[-1] + 1]
    return words


def string_of_digits(digits, voice: str, lead: float, gap: float, seconds: float, seed: int):
    """Digits with equal gaps after a lead, (n,), and (start, word) of each in seconds."""
    rng = np.random.default_rng(seed)
    parts, said = [np.zeros(round(lead * RATE), np.float32)], []
    length = len(parts[0])
    while length < seconds * RATE:
        word = DIGITS[rng.integers(10)]
        said.append((length / RATE, word))
        parts += [digits[word, voice], np.zeros(round(gap * RATE), np.float32)]
        length += len(parts[-2]) + len(parts[-1])
    samples = np.concatenate(parts)
    return (samples + 1e-3 * rng.standard_normal(len(samples))).astype(np.float32), said


def words_of(model, processor, token_ids: torch.Tensor, offset: int) -> list[tuple[int, str]]:
    """(frame of the peak, word) of labels (A,)."""
    zeros = torch.zeros(len(token_ids))
    ids, peaks = ctc_peaks(Heard(token_ids, zeros, zeros), model.config.blank_id)
    words = group_words(timed_tokens(processor.tokenizer, ids, peaks))
    return [(offset + round(word.start / 0.04), word.text) for word in words]


def errors(heard: list[str], said: list[str]) -> int:
    """Edit distance of two strings of words."""
    row = list(range(len(said) + 1))
    for place, word in enumerate(heard, 1):
        diagonal, row[0] = row[0], place
        for column, other in enumerate(said, 1):
            diagonal, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, diagonal + (word != other))
    return row[-1]


@pytest.mark.parametrize("gap", [0.08, pytest.param(0.2, marks=pytest.mark.slow)])
def test_words_at_every_phase_of_a_seam(digits, gap):
    """A string of words moved in steps of 40 ms over a whole period (a word and its gap, 0.6 s).

    What both windows hear at one place is said once: not lost, not twice. The seam costs nothing: near it there are
    about as many errors as where a single window is centred on it.
    """
    model, processor = trained()
    common = 0
    seam_errors = centre_errors = spoken = 0
    for step in range(15):
        voice = ("en-us+m4", "en-us+f3")[step % 2]
        samples, said = string_of_digits(digits, voice, 0.1 + 0.04 * step, gap, 38.0, seed=step // 4)
        features = processor.audio_features([samples])
        (first, _), (second, _) = model.hear(features["input_features"], features["input_features_mask"])
        first, second, shift = first.token_ids, second.token_ids, int(features["window_offsets"][1]) // 4
        cut = best_cut(first, second, shift, model.config.blank_id)
        joined = words_of(model, processor, torch.cat([first[:cut], second[cut - shift :]]), 0)
        windows = words_of(model, processor, first, 0), words_of(model, processor, second, shift)

        def count(words, frame, word):
            return sum(other == word and abs(place - frame) <= NEAR for place, other in words)

        for frame, word in windows[0]:
            alone = [count(words, frame, word) for words in windows]
            if frame >= shift and min(alone):
                common += 1
                assert min(alone) <= count(joined, frame, word) <= max(alone), (step, frame, word)

        begin = 17.5
        centred = processor.audio_features([samples[round(begin * RATE) : round((begin + 20) * RATE)]])
        ((middle, _),) = model.hear(centred["input_features"], centred["input_features_mask"])
        middle = words_of(model, processor, middle.token_ids, int(begin / 0.04))
        near = [word for start, word in said if 24 <= start < 31]
        spoken += len(near)
        seam_errors += errors([word for frame, word in joined if 23.9 <= frame * 0.04 < 31.2], near)
        centre_errors += errors([word for frame, word in middle if 23.9 <= frame * 0.04 < 31.2], near)
    assert common > 60 and spoken > 100
    assert seam_errors <= 1.2 * centre_errors + 3, Counter(seam=seam_errors, centre=centre_errors, words=spoken)


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_length(tmp_path, monkeypatch):
    from benchmarks.long_audio import in_child, write_recording

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # the children import soundwave as we do
    peaks = []
    for minutes in (10, 30):
        write_recording(tmp_path / "long.wav", minutes)
        run = in_child(tmp_path / "long.wav", "ctc", 8)
        assert run["audio_s"] == 60 * minutes
        peaks.append(run["peak_mib"])
    assert peaks[1] < 1.3 * peaks[0], peaks
