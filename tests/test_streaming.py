"""Transcripts while audio arrives: stable text only grows, and ends as the whole transcript."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soundwave.modeling_soundwave.streaming_soundwave import _GrowingText, _Stream, agreed
from tests.spoken import say, sentences, speech, trained

RATE = 16_000


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE))).astype(np.float32)


def chunks_of(samples, sizes):
    """Chunks of the sizes in turn, until nothing is left."""
    start = turn = 0
    while start < len(samples):
        end = start + sizes[turn % len(sizes)]
        yield samples[start:end]
        start, turn = end, turn + 1


def check_stream(model, processor, chunks, rate=RATE):
    """All values of a stream, after checking that they keep what they promise."""
    values = list(model.transcribe_ctc(chunks, processor, rate, streaming=True))
    for before, value in zip(values, values[1:], strict=False):
        assert value.text.startswith(before.text) and value.duration >= before.duration
        assert before.transcript is None
    transcript = values[-1].transcript
    assert values[-1].text == transcript.text and values[-1].tail == ""
    assert values[-1].duration == transcript.duration == pytest.approx(transcript.segments[-1].end)
    assert len(transcript.blank_probs) == -(-round(transcript.duration * RATE) // 640)
    starts = [token.start for token in transcript.tokens]
    assert starts == sorted(starts)
    assert [token.id for token in transcript.tokens] == transcript.token_ids or len(transcript.text) == 0
    return values


@pytest.fixture(scope="module")
def lively(tiny_ctc):
    """A random model whose CTC head says something of noise: decodings in a row often disagree."""
    model = copy.deepcopy(tiny_ctc)
    with torch.no_grad():
        rows = model.ctc_head.rows(model.ctc_rows())
        model.ctc_head.blank.copy_(3 * rows.std() * torch.randn(rows.shape[1]))
    return model


@settings(max_examples=25)
@given(st.floats(0.01, 9.0), st.lists(st.integers(1, 60_000), min_size=1, max_size=5), st.integers(0, 2**31))
def test_stable_text_only_grows(lively, processor, seconds, sizes, seed):
    samples = noise(seconds, seed)
    sizes = [max(size, 800) for size in sizes]
    values = list(lively.transcribe_ctc(chunks_of(samples, sizes), processor, RATE, streaming=True))
    assert all(after.text.startswith(before.text) for before, after in zip(values, values[1:], strict=False))
    last = values[-1]
    assert last.text == last.transcript.text and last.tail == "" and last.duration == len(samples) / RATE
    assert len(last.transcript.blank_probs) == -(-len(samples) // 640)
    spoken = processor.tokenizer.decode(last.transcript.token_ids, skip_special_tokens=True)
    assert spoken.strip() == last.text


def test_trained_model_on_a_stream_of_several_windows():
    model, processor = trained()
    samples = speech(56, seed=4)
    values = check_stream(model, processor, chunks_of(samples, [16_000, 1600, 40_000, 1, 24_000]))
    assert len(values[-1].transcript.segments) == 3
    # Little is held back for long: as a rule, all but the newest seconds are stable while they arrive.
    whole, prompt = values[-1].transcript, 0
    for value in values:
        said = [word for word in whole.words if word.end < value.duration - 6]
        prompt += len(value.text.split()) >= len(said) - 1
    assert prompt > 0.8 * len(values)
    offline = model.transcribe_ctc(samples, processor, RATE)
    words = [set(t.text.split()) for t in (whole, offline)]
    assert len(words[0] & words[1]) > 0.8 * len(words[1])


def test_single_sentences_end_as_their_offline_transcript():
    model, processor = trained()
    for seed, text in enumerate(sentences(12, seed=9)):
        samples = say(text, seed=seed).samples
        values = check_stream(model, processor, chunks_of(samples, [1600]))
        offline = model.transcribe_ctc(samples, processor, RATE)
        assert values[-1].text == offline.text
        assert values[-1].transcript.token_ids == offline.token_ids


def test_one_chunk_is_the_offline_transcript_of_a_window(lively, processor):
    samples = noise(1.9)
    *_, value = lively.transcribe_ctc([samples], processor, RATE, streaming=True)
    offline = lively.transcribe_ctc(samples, processor, RATE)
    assert value.transcript.token_ids == offline.token_ids
    torch.testing.assert_close(value.transcript.blank_probs, offline.blank_probs)


def test_chunks_of_other_rates_and_types(lively, processor):
    samples = noise(4.0)
    float_values = list(lively.transcribe_ctc(chunks_of(samples, [5000]), processor, RATE, streaming=True))
    integers = np.round(samples * 32768).astype(np.int16)
    for form in (integers, torch.tensor(integers)):
        values = list(lively.transcribe_ctc(chunks_of(form, [5000]), processor, RATE, streaming=True))
        assert values[-1].duration == float_values[-1].duration
    slow = list(lively.transcribe_ctc(chunks_of(samples, [5000]), processor, 8_000, streaming=True))
    assert slow[-1].duration == pytest.approx(8.0)


def test_bad_streams(lively, processor):
    for chunks in ([], [np.zeros(0, np.float32)]):
        with pytest.raises(ValueError, match="no samples"):
            list(lively.transcribe_ctc(chunks, processor, RATE, streaming=True))
    with pytest.raises(ValueError, match="NaN"):
        list(lively.transcribe_ctc([np.full(100, np.nan, np.float32)], processor, RATE, streaming=True))
    with pytest.raises(ValueError, match="rate"):
        list(lively.transcribe_ctc([noise(1.0)], processor, streaming=True))


def test_nothing_but_labels_is_kept_of_what_is_stable(lively, processor):
    stream = _Stream(lively, processor)
    for seed in range(40):
        stream.take(torch.from_numpy(noise(0.7, seed)))
        stream.decode()
        assert len(stream.samples) <= 2 * RATE and len(stream.heard.token_ids) <= 50
        assert sum(len(part.token_ids) for part in stream.stable) == stream.stable_end
        assert all(values.untyped_storage().nbytes() == values.nbytes for part in stream.stable for values in part)
        assert stream.start <= stream.stable_end  # so what is not stable yet has less than a window


class TestAgreement:
    @pytest.mark.parametrize(
        ("before", "heard", "end"),
        [
            ([9, 1, 9, 9, 9], [9, 1, 9, 9, 9], 3),  # in the silence after the token
            ([9, 1, 9, 2, 9, 9], [9, 1, 9, 3, 9, 9], 2),  # up to where they differ
            ([9, 1, 9, 9, 9, 9], [9, 9, 9, 1, 9, 9], 5),  # the same token at another time
            ([1, 9, 9], [2, 9, 9], 0),
            ([1, 1, 1], [1, 1, 1], 0),  # no silence: the token may go on
            ([9, 9, 1, 9, 9, 9, 9], [9, 9, 1, 9], 3),  # the shorter one ends
            ([], [9], 0),
        ],
    )
    def test_ends_in_the_last_common_silence(self, before, heard, end):
        assert agreed(before, heard, last=9, blank=9) == end

    def test_a_token_that_goes_on_is_not_said_again(self):
        assert agreed([4, 9, 9], [9, 9, 9], last=4, blank=9) == 2

    @given(st.lists(st.integers(0, 2), max_size=30), st.lists(st.integers(0, 2), max_size=30), st.integers(0, 2))
    def test_both_say_the_same_up_to_there(self, before, heard, last):
        from soundwave.modeling_soundwave.seams_soundwave import runs_of

        end = agreed(before, heard, last, 0)
        assert end <= min(len(before), len(heard))
        assert runs_of(before[:end], 0, last) == runs_of(heard[:end], 0, last)


def test_text_never_breaks_inside_a_character(processor):
    sentence = "grüße 你好 naïve 🙂 boxes"
    ids = processor.tokenizer.encode(sentence, add_special_tokens=False)
    text = _GrowingText(processor)
    for token in ids:
        before = text.with_tail([])[0]
        text.add([token])
        assert text.with_tail([])[0].startswith(before) and "\ufffd" not in text.text
    assert text.with_tail([]) == (sentence, "")
