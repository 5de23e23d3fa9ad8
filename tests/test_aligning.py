"""Forced alignment: exact on hand-made scores, right on synthesized speech, the same in pieces as in one."""

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soundwave import SoundwaveForCTC, SoundwaveProcessor
from soundwave.modeling_soundwave import aligning_soundwave as aligning
from soundwave.modeling_soundwave import ctc_soundwave
from soundwave.modeling_soundwave.aligning_soundwave import AlignmentError, cut_pieces, find_anchors, forced_peaks
from soundwave.modeling_soundwave.words_soundwave import FRAME_S
from tests import tiny_models

ASSET = Path(__file__).parents[1] / "assets" / "tiny"
D = 32  # width of the random models


def best_path(log_probs: torch.Tensor, targets: list[int]) -> tuple[float, list[tuple[int, int]]]:
    """Score and peaks of the likeliest path that collapses to the targets, by trying all of them."""
    best, peaks = -math.inf, []
    for path in itertools.product(sorted({0, *targets}), repeat=len(log_probs)):
        runs = [(label, sum(1 for _ in run)) for label, run in itertools.groupby(path)]
        if [label for label, _ in runs if label] != targets:
            continue
        score = float(sum(log_probs[frame, label] for frame, label in enumerate(path)))
        if score > best:
            ends = list(itertools.accumulate(length for _, length in runs))
            best = score
            peaks = [(end - length, end) for (label, length), end in zip(runs, ends, strict=True) if label]
    return best, peaks


@given(st.integers(1, 6), st.lists(st.integers(1, 3), max_size=4), st.integers(0, 10**6))
def test_the_path_is_the_best_of_all(n_frames, targets, seed):
    scores = torch.randn(n_frames, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    log_probs = (3 * scores).log_softmax(dim=-1)
    best, expected = best_path(log_probs, targets)
    if best == -math.inf:
        with pytest.raises(AlignmentError, match=rf"{len(targets)} tokens .* came with {n_frames} frames"):
            forced_peaks(log_probs, torch.tensor(targets, dtype=torch.long))
        return
    peaks = forced_peaks(log_probs, torch.tensor(targets, dtype=torch.long))
    assert [(first, stop) for first, stop, _ in peaks] == expected
    labels = [0] * n_frames
    for target, (first, stop, confidence) in zip(targets, peaks, strict=True):
        labels[first:stop] = [target] * (stop - first)
        assert confidence == pytest.approx(float(log_probs[first:stop, target].max().exp()))
    assert sum(float(log_probs[frame, label]) for frame, label in enumerate(labels)) == pytest.approx(best)


@pytest.mark.parametrize("allowed", [None, [3, 5, 8, 13, 21, 34, 55]], ids=["whole", "restricted"])
@pytest.mark.parametrize("blank", [None, 5], ids=["blank beside", "blank inside"])
def test_columns_are_those_of_the_whole_softmax(allowed, blank, monkeypatch):
    monkeypatch.setattr(ctc_soundwave, "FRAMES_PER_CHUNK", 7)
    monkeypatch.setattr(ctc_soundwave, "ROWS_PER_BLOCK", {"cpu": 3})
    head_kind = {"ctc_head": "separate"} if blank else {}
    model = tiny_models.tiny_model(ctc_token_ids=allowed, ctc_blank_id=blank, **head_kind)
    frames = torch.randn(30, D, dtype=torch.float64)
    hidden, rows, blank_row, _ = model.ctc_head(frames, model.ctc_rows())
    ids = allowed or list(range(60))
    whole = torch.cat([hidden @ rows.T, *([] if blank_row is None else [(hidden @ blank_row)[:, None]])], dim=1)
    whole = whole.detach().log_softmax(dim=-1)
    columns = [-1 if blank is None else ids.index(blank), ids.index(8), ids.index(34)]
    scores = []
    monkeypatch.setattr(aligning, "forced_peaks", lambda *given: scores.extend(given) or [(0, 1, 1.0)] * 3)
    model.align_frames(frames, [34, 8, 34])
    assert torch.allclose(scores[0], whole[:, columns])
    assert scores[1].tolist() == [2, 1, 2]


def test_ids_that_the_head_does_not_emit_take_no_time():
    model = tiny_models.tiny_model(ctc_token_ids=[3, 5, 8, 13])
    frames = torch.randn(40, D, dtype=torch.float64)
    plain = model.align_frames(frames, [3, 5, 5])
    eos, audio, blank = model.config.text_config.eos_token_id, model.config.audio_token_id, model.config.blank_id
    spans = model.align_frames(frames, [eos, 3, 9, 5, audio, 5, blank, 10**6])
    assert [spans[1], spans[3], spans[5]] == plain
    assert spans[0] == (plain[0][0], plain[0][0], plain[0][2])
    for index, before in ((2, plain[0]), (4, plain[1]), (6, plain[2]), (7, plain[2])):
        assert spans[index] == (before[1], before[1], before[2])
    assert model.align_frames(frames, [eos, 9]) == [(0, 0, 0.0)] * 2
    assert model.align_frames(frames, []) == []


def test_more_tokens_than_frames():
    model = tiny_models.tiny_model()
    frames = torch.randn(4, D, dtype=torch.float64)
    assert len(model.align_frames(frames, [5, 6, 7, 8])) == 4
    with pytest.raises(AlignmentError, match=r"4 tokens \(1 of them repeated\) came with 4 frames of 40 ms.*least 5"):
        model.align_frames(frames, [5, 5, 7, 8])
    spans = model.align_frames(frames, [5, 6] * 4, strict=False)
    assert len(spans) == 8 and spans[-1][1] == 4 and {span[2] for span in spans} == {0.0}
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_without_torchaudio_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchaudio.functional", None)
    with pytest.raises(AlignmentError, match="pip install torchaudio"):
        tiny_models.tiny_model().align_frames(torch.randn(4, D, dtype=torch.float64), [5])


def test_half_precision_scores():
    model = tiny_models.tiny_model(dtype=torch.bfloat16)
    assert len(model.align_frames(torch.randn(20, D, dtype=torch.bfloat16), [5, 6, 7])) == 3


@given(st.data())
def test_anchors_ascend_and_lie_where_both_say_the_same(data):
    written = data.draw(st.lists(st.integers(0, 30), max_size=60))
    cut = data.draw(st.integers(0, len(written)))
    heard = written[:cut] + data.draw(st.lists(st.integers(0, 30), max_size=10)) + written[cut:]
    peaks = [(3 * index + 1, 3 * index + 2, 1.0) for index in range(len(heard))]
    anchors = find_anchors(heard, peaks, written)
    assert all(a < b and i < j for (a, i), (b, j) in itertools.pairwise(anchors))
    for frame, index in anchors:
        said = frame // 3
        assert heard[said - 2 : said + 2] == written[index - 2 : index + 2]
        assert peaks[said - 1][1] <= frame <= peaks[said][0]


def test_all_anchors_of_equal_texts_are_found():
    ids = list(range(20))
    peaks = [(index, index + 1, 1.0) for index in ids]
    assert find_anchors(ids, peaks, ids) == [(index, index) for index in range(2, 19)]


@given(st.lists(st.tuples(st.integers(1, 900), st.integers(1, 300)), max_size=20), st.integers(100, 1000))
def test_pieces_are_bounded(steps, limit):
    points = list(zip(*(itertools.accumulate(values) for values in zip(*steps, strict=True)), strict=True))
    *anchors, (n_frames, n_tokens) = points or [(1, 0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aligning, "PIECE_SIZE", limit)
        bounds = cut_pieces(anchors, n_frames, n_tokens)
    assert bounds[0] == (0, 0) and bounds[-1] == (n_frames, n_tokens)
    for (frame, token), (next_frame, next_token) in itertools.pairwise(bounds):
        assert frame <= next_frame and token <= next_token
        assert next_frame - frame + 4 * (next_token - token) <= limit + 5  # a frame and a token by rounding


# On speech


@pytest.fixture(scope="module")
def tiny() -> tuple[SoundwaveForCTC, SoundwaveProcessor]:
    model = SoundwaveForCTC.from_pretrained(ASSET, dtype=torch.float32).eval()
    return model, SoundwaveProcessor.from_pretrained(ASSET)


@pytest.fixture(scope="module")
def spoken() -> tuple[np.ndarray, str, list[tuple[float, float]]]:
    """Some 90 s of sentences: samples, text, (start, end) of each word in seconds."""
    pytest.importorskip("espeakng_loader", reason='needs the embedded synthesizer: pip install "soundwave[tiny]"')
    import random

    from soundwave.training.tiny.grammar import draw_sentence
    from soundwave.training.tiny.synthesizer import UNSEEN_VOICES
    from soundwave.training.tiny.utterances import Job, speak

    rng = random.Random(3)
    parts = tuple(draw_sentence(rng).text for _ in range(40))
    clip = speak(Job("long", parts, UNSEEN_VOICES[0], 0, training=False))
    ends = [start for start, _ in clip.words[1:]] + [len(clip.samples) / 16_000]
    words = [(start, end) for (start, name), end in zip(clip.words, ends, strict=True) if name != "sil"]
    return clip.samples, " ".join(parts), words


@pytest.fixture(scope="module")
def aligned(tiny, spoken):
    return tiny[0].align_text(spoken[0], spoken[1], tiny[1], sampling_rate=16_000)


def test_words_of_a_given_text(aligned, spoken):
    samples, text, truth = spoken
    assert aligned.text == text
    assert [word.text for word in aligned.words] == text.split()
    assert " ".join(segment.text for segment in aligned.segments) == text
    assert len(aligned.segments) > 1 and aligned.duration == pytest.approx(len(samples) / 16_000)
    errors = [abs(word.start - start) for word, (start, _) in zip(aligned.words, truth, strict=True)]
    assert np.median(errors) <= 0.08
    middles = [(word.start + word.end) / 2 for word in aligned.words]
    inside = [a - 0.04 <= middle <= b + 0.04 for middle, (a, b) in zip(middles, truth, strict=True)]
    assert np.mean(inside) >= 0.95
    assert np.mean([word.confidence for word in aligned.words]) > 0.8
    for first, second in itertools.pairwise(aligned.words):
        assert first.start < first.end <= second.start + 1e-9


def test_pieces_give_what_the_whole_gives(aligned, tiny, spoken, monkeypatch):
    monkeypatch.setattr(aligning, "PIECE_SIZE", 600)
    monkeypatch.setattr(aligning, "KEPT_BYTES", 0)  # the frames are computed a second time
    sizes = []
    peaks = forced_peaks

    def noted(log_probs, targets):
        sizes.append(len(log_probs))
        return peaks(log_probs, targets)

    monkeypatch.setattr(aligning, "forced_peaks", noted)
    pieces = tiny[0].align_text(spoken[0], spoken[1], tiny[1], sampling_rate=16_000, windows_per_batch=2)
    assert len(sizes) > 5 and max(sizes) <= 600
    assert [(w.text, w.start, w.end) for w in pieces.words] == [(w.text, w.start, w.end) for w in aligned.words]


def test_a_text_that_is_not_said_has_low_confidence(aligned, tiny, spoken, monkeypatch):
    monkeypatch.setattr(aligning, "PIECE_SIZE", 600)
    text = " ".join(["Paris melons zebra"] * 60)
    transcript = tiny[0].align_text(spoken[0], text, tiny[1], sampling_rate=16_000)
    assert [word.text for word in transcript.words] == text.split()
    assert np.median([word.confidence for word in transcript.words]) < 0.05
    assert all(a.start <= a.end <= b.start + 1e-9 for a, b in itertools.pairwise(transcript.words))
    assert transcript.words[-1].end <= transcript.duration


def test_texts_too_long_and_empty(tiny):
    model, processor = tiny
    silence = np.zeros(8000, np.float32)
    with pytest.raises(AlignmentError, match=r"40 tokens, which need 79 frames of 40 ms, but the recording has 13"):
        model.align_text(silence, " ".join(["red"] * 40), processor, sampling_rate=16_000)
    transcript = model.align_text(silence, " ", processor, sampling_rate=16_000)
    assert (transcript.text, transcript.segments, transcript.duration) == ("", [], 0.5)


def test_padded_windows_hold_no_words(encoder_folder, llm_folder, processor):
    """The published layout: all frames of a window count, whatever the length of its recording."""
    fields = {"audio_padding": "max_length", "mask_padding": False}
    padded = SoundwaveForCTC.from_components(encoder_folder, llm_folder, processor.audio_token_id, **fields)
    windows = SoundwaveProcessor.from_components(encoder_folder, llm_folder, audio_padding="max_length")
    waveform = np.random.default_rng(0).standard_normal(5 * 8000).astype(np.float32)
    for samples in (8000, 40_000):  # of windows of 2 s
        transcript = padded.align_text(waveform[:samples] / 10, "the red boxes", windows, sampling_rate=16_000)
        assert [word.text for word in transcript.words] == ["the", "red", "boxes"]
        assert len(transcript.blank_probs) == -(-samples // 640)
        assert transcript.words[-1].end <= transcript.duration == samples / 16_000


def test_what_can_be_read_only_once(aligned, tiny, spoken, tmp_path, monkeypatch):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "clip.wav", spoken[0], 16_000, subtype="FLOAT")
    monkeypatch.setattr(aligning, "KEPT_BYTES", 0)
    with open(tmp_path / "clip.wav", "rb") as file:
        whole = tiny[0].align_text(file, spoken[1], tiny[1])
    chunks = iter(np.array_split(spoken[0], 7))
    pieces = tiny[0].align_text(chunks, spoken[1], tiny[1], sampling_rate=16_000)
    for transcript in (whole, pieces):
        assert [word.start for word in transcript.words] == [word.start for word in aligned.words]


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(0, 30), st.integers(0, 10**6))
def test_spans_of_any_scores_are_in_order(n_frames, n_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    model = tiny_models.tiny_model()
    ids = torch.randint(0, tiny_models.VOCABULARY + 2, (n_tokens,), generator=generator).tolist()
    spans = model.align_frames(torch.randn(n_frames, D, generator=generator, dtype=torch.float64), ids, strict=False)
    assert len(spans) == n_tokens
    assert all(0 <= a[0] <= a[1] <= b[0] and b[1] <= n_frames for a, b in itertools.pairwise(spans))
    assert all(math.isfinite(start * FRAME_S) and 0 <= confidence <= 1 + 1e-9 for start, _, confidence in spans)
