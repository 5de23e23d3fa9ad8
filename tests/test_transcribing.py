"""Transcripts by the CTC head and by the LLM: times, probabilities, batches, streams."""

import copy
from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soundwave.modeling_soundwave.generation_soundwave import ContextError
from soundwave.modeling_soundwave.llm_transcribing_soundwave import TOKENS_BESIDES, TOKENS_PER_SECOND, cut_at_pauses
from soundwave.modeling_soundwave.transcribing_soundwave import Heard, Stretch, ctc_peaks, ctc_transcript
from soundwave.modeling_soundwave.words_soundwave import FRAME_S, LEAD_FRAMES, TRAIL_FRAMES
from tests.spoken import say, sentences, trained

RATE = 16_000


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * RATE))).astype(np.float32)


@pytest.fixture(scope="module")
def lively(tiny_model):
    """A random model in float64 whose CTC head says something of noise."""
    model = copy.deepcopy(tiny_model).double()
    with torch.no_grad():
        rows = model.ctc_head.rows(model.ctc_rows())
        model.ctc_head.blank.copy_(2.5 * rows.std() * torch.randn(rows.shape[1], dtype=rows.dtype))
    return model


class TestHandMadeScores:
    """A head whose rows are unit vectors: frame by frame, it is known what wins and by how much."""

    @pytest.fixture
    def heard(self, tiny_ctc, processor):
        head = copy.deepcopy(tiny_ctc.ctc_head).double()
        self.red, self.boxes = processor.tokenizer.encode(" red boxes", add_special_tokens=False)[:2]
        with torch.no_grad():
            head.weight.zero_()
            head.weight[self.red, 1] = head.weight[self.boxes, 2] = 1.0
            head.blank.zero_()[0] = 1.0
            if head.tied:
                head.log_scale.zero_()
        said = {"-": 0, "r": 1, "b": 2}
        frames = torch.zeros(1, 60, head.weight.shape[1], dtype=torch.float64)
        script = "-" * 10 + "rr" + "-" * 20 + "b" + "-" * 27
        for frame, sound in enumerate(script):
            frames[0, frame, said[sound]] = 9.0
        frames[0, 11, 1] = 12.0  # the second of the two is the surer
        self.others = len(head.weight)  # rows that score 0, the blank's included
        return Heard(*(values[0] for values in head.scores(frames)))

    def sure(self, score: float) -> float:
        return float(1 / (1 + self.others * np.exp(-score)))

    def test_peaks_times_and_confidences_are_exact(self, heard, processor, tiny_ctc):
        ids, peaks = ctc_peaks(heard, tiny_ctc.config.blank_id)
        assert ids == [self.red, self.boxes]
        assert [peak[:2] for peak in peaks] == [(10, 12), (32, 33)]
        transcript = ctc_transcript(heard, [0], 2.39, processor, tiny_ctc.config)
        first, second = transcript.tokens
        assert (first.start, second.start) == pytest.approx(((10 - LEAD_FRAMES) * 0.04, (32 - LEAD_FRAMES) * 0.04))
        assert (first.end, second.end) == pytest.approx(((12 + TRAIL_FRAMES) * 0.04, (33 + TRAIL_FRAMES) * 0.04))
        assert first.confidence == pytest.approx(self.sure(12), abs=1e-9)
        assert second.confidence == pytest.approx(self.sure(9), abs=1e-9)
        assert transcript.token_ids == ids and transcript.duration == 2.39
        assert transcript.text == "".join(token.text for token in transcript.tokens).strip()

    def test_the_blank_curve_gives_no_speech_and_compression(self, heard, processor, tiny_ctc):
        transcript = ctc_transcript(heard, [0], 2.39, processor, tiny_ctc.config)
        assert transcript.blank_probs.shape == (60,)
        assert float(transcript.blank_probs[0]) == pytest.approx(self.sure(9), abs=1e-6)
        loud = float(np.exp(-12) * self.sure(12))  # the blank scores 0 where "red" scores 12
        assert transcript.no_speech_prob == pytest.approx(loud, rel=1e-6)
        assert transcript.compression == 60 / 2

    def test_a_word_belongs_to_the_segment_in_which_it_begins(self, heard, processor, tiny_ctc):
        transcript = ctc_transcript(heard, [0, 20, 40], 2.39, processor, tiny_ctc.config)
        assert [len(segment.tokens) for segment in transcript.segments] == [1, 1, 0]
        assert [(s.start, s.end) for s in transcript.segments] == [(0.0, 0.8), (0.8, 1.6), (1.6, 2.39)]
        assert " ".join(s.text for s in transcript.segments if s.text) == transcript.text
        assert transcript.segments[2].no_speech_prob == pytest.approx(self.sure(9), abs=1e-6)

    def test_a_seam_through_a_word_does_not_cut_it(self, processor, tiny_ctc):
        ids = processor.tokenizer.encode("unbelievable", add_special_tokens=False)
        assert len(ids) > 1
        labels = torch.full((12,), tiny_ctc.config.blank_id)
        for place, token in enumerate(ids[:3]):
            labels[2 + 3 * place] = token
        transcript = ctc_transcript(Heard(labels, *torch.zeros(2, 12)), [0, 4], 0.48, processor, tiny_ctc.config)
        assert len(transcript.segments[0].words) == 1 and not transcript.segments[1].tokens


class TestCTC:
    @settings(max_examples=15)
    @given(st.lists(st.floats(0.05, 7.0), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 99))
    def test_equals_the_whole_recordings_in_one_call(self, lively, processor, lengths, windows_per_batch, seed):
        recordings = [noise(seconds, seed + index) for index, seconds in enumerate(lengths)]
        expected = lively.transcribe_ids(**processor.audio_features(recordings))
        transcripts = lively.transcribe_ctc(recordings, processor, RATE, windows_per_batch=windows_per_batch)
        assert [transcript.token_ids for transcript in transcripts] == expected
        for transcript, samples in zip(transcripts, recordings, strict=True):
            assert transcript.duration == pytest.approx(len(samples) / RATE)
            assert len(transcript.blank_probs) == -(-len(samples) // 640)
            edges = [time for segment in transcript.segments for time in (segment.start, segment.end)]
            assert edges[0] == 0.0 and edges == sorted(edges) and edges[-1] == pytest.approx(transcript.duration)
            starts = [token.start for token in transcript.tokens]
            assert starts == sorted(starts) and all(0 <= t.start <= t.end <= edges[-1] for t in transcript.tokens)

    def test_one_recording_in_any_form(self, lively, processor, tmp_path):
        import soundfile

        samples = np.round(noise(5.0) * 32768) / 32768
        soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="PCM_16")
        whole = lively.transcribe_ctc(samples, processor, RATE)
        assert len(whole.segments) > 1 and whole.token_ids
        for form in (samples.tolist(), torch.tensor(samples), tmp_path / "a.wav", (tmp_path / "a.wav").read_bytes()):
            assert lively.transcribe_ctc(form, processor, RATE).token_ids == whole.token_ids
        assert lively.transcribe_ctc([], processor) == []
        assert [t.token_ids for t in lively.transcribe_ctc([samples], processor, RATE)] == [whole.token_ids]

    def test_padded_windows_end_with_the_recording(self, encoder_folder, llm_folder):
        from soundwave import SoundwaveForCTC, SoundwaveProcessor

        processor = SoundwaveProcessor.from_components(encoder_folder, llm_folder, audio_padding="max_length")
        model = SoundwaveForCTC.from_components(
            encoder_folder, llm_folder, audio_token_id=processor.audio_token_id, mask_padding=False
        ).eval()
        transcript = model.transcribe_ctc(noise(0.5), processor, RATE)
        assert len(transcript.blank_probs) == 13 and transcript.segments[-1].end == 0.5

    def test_bad_arguments(self, lively, processor):
        with pytest.raises(ValueError, match="windows_per_batch is 0"):
            lively.transcribe_ctc(noise(0.5), processor, RATE, windows_per_batch=0)
        with pytest.raises(ValueError, match="sampling rate"):
            lively.transcribe_ctc(noise(0.5), processor)
        with pytest.raises(ValueError, match="samples"):
            lively.transcribe_ctc([noise(0.5), np.zeros(0, np.float32)], processor, RATE)


class TestTrained:
    def test_silence_and_speech_are_told_apart(self):
        model, processor = trained()
        rng = np.random.default_rng(0)
        silence = [np.zeros(RATE, np.float32), (1e-3 * rng.standard_normal(3 * RATE)).astype(np.float32)]
        spoken = [say(text, seed=i).samples for i, text in enumerate(sentences(4, seed=5))]
        transcripts = model.transcribe_ctc([*silence, *spoken], processor, RATE)
        assert all(t.no_speech_prob > 0.9 and t.text == "" for t in transcripts[:2])
        assert all(t.no_speech_prob < 0.05 and 2 < t.compression < 20 for t in transcripts[2:])

    def test_peaks_and_words_lie_where_they_are_said(self):
        """Lead and trail were set on other voices and other sentences."""
        model, processor = trained()
        inside, start_errors = [], []
        for index, text in enumerate(sentences(24, seed=3)):
            spoken = say(text, voice=("en-us+m4", "en-us+f3", "en+michel", "en-gb-scotland+f3")[index % 4], seed=index)
            bounds = [
                (start, spoken.words[place + 1][0])
                for place, (start, name) in enumerate(spoken.words)
                if name != "sil"
            ]
            ((heard, _),) = model.hear(*list(processor.audio_features([spoken.samples]).values())[:2])
            transcript = model.transcribe_ctc(spoken.samples, processor, RATE)
            if transcript.text != text:  # a wrong word has no true time
                continue
            word, peaks = -1, ctc_peaks(heard, model.config.blank_id)[1]
            for token, (first, stop, _) in zip(transcript.tokens, peaks, strict=True):
                word += token.text.startswith(" ") or word < 0
                inside.append(bounds[word][0] - 0.04 <= first * 0.04 and stop * 0.04 <= bounds[word][1] + 0.04)
            start_errors += [abs(w.start - b[0]) for w, b in zip(transcript.words, bounds, strict=True)]
        assert len(start_errors) > 80
        assert np.mean(inside) >= 0.95
        assert np.median(start_errors) <= 0.08

    def test_the_llm_answers_stretches_as_it_answers_recordings(self):
        model, processor = trained()
        recordings = [say(text, seed=i).samples for i, text in enumerate(sentences(5, seed=8))]
        inputs = processor(audio=recordings, sampling_rate=RATE)
        ids = model.generate(**inputs, max_new_tokens=60, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        expected = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
        plain = model.transcribe(recordings, processor, RATE)
        assert [transcript.text for transcript in plain] == expected
        drafted = model.transcribe(recordings, processor, RATE, ctc_draft=True, windows_per_batch=2)
        assert [transcript.text for transcript in drafted] == expected
        assert max(t.llm_forwards for t in drafted) < min(t.llm_forwards for t in plain)
        assert not any(transcript.cut for transcript in plain)

    def test_the_llms_words_have_times(self):
        model, processor = trained()
        text = sentences(1, seed=8)[0]
        spoken = say(text)
        transcript = model.transcribe(spoken.samples, processor, RATE, timestamps=True)
        assert transcript.text == " ".join(word.text for word in transcript.words) == text
        starts = [start for start, name in spoken.words if name != "sil"]
        errors = [abs(word.start - start) for word, start in zip(transcript.words, starts, strict=True)]
        assert np.median(errors) <= 0.08
        assert model.transcribe(spoken.samples, processor, RATE).words == []


class TestLLM:
    def test_a_list_equals_its_items(self, lively, processor):
        recordings = [noise(seconds, seed) for seed, seconds in enumerate((5.0, 0.3, 2.5))]
        options = {"max_new_tokens": 6}
        alone = [lively.transcribe(samples, processor, RATE, **options) for samples in recordings]
        for windows_per_batch in (1, 3, 8):
            together = lively.transcribe(recordings, processor, RATE, windows_per_batch=windows_per_batch, **options)
            assert [t.token_ids for t in together] == [t.token_ids for t in alone]
            assert [[(s.start, s.end, s.text) for s in t.segments] for t in together] == [
                [(s.start, s.end, s.text) for s in t.segments] for t in alone
            ]
        ctc = lively.transcribe_ctc(recordings[0], processor, RATE)
        assert [(s.start, s.end) for s in alone[0].segments] == [(s.start, s.end) for s in ctc.segments]
        torch.testing.assert_close(alone[0].blank_probs, ctc.blank_probs)
        assert alone[0].no_speech_prob == pytest.approx(ctc.no_speech_prob)
        assert alone[0].compression == ctc.compression

    def test_the_limit_cuts_and_says_so(self, lively, processor):
        samples = noise(1.5)
        whole = lively.transcribe(samples, processor, RATE)
        limit = TOKENS_BESIDES + int(TOKENS_PER_SECOND * 1.52)
        assert len(whole.token_ids) <= limit and whole.cut == (len(whole.token_ids) == limit)
        short = lively.transcribe(samples, processor, RATE, max_new_tokens=4)
        assert short.cut and short.segments[0].cut and short.token_ids == whole.token_ids[:4]

    def test_the_end_of_the_context_cuts_and_says_so(self, lively, processor):
        samples, small = noise(1.5), copy.deepcopy(lively)
        whole = lively.transcribe(samples, processor, RATE, max_new_tokens=20)
        positions = len(processor.transcription_ids()) - 1 + round(38 / whole.compression)
        small.config.text_config.max_position_embeddings = positions + 5
        short = small.transcribe(samples, processor, RATE, max_new_tokens=20)
        assert len(whole.token_ids) > 5 and short.token_ids == whole.token_ids[:5] and short.cut
        with pytest.raises(ValueError, match="max_new_tokens is 0"):
            lively.transcribe(samples, processor, RATE, max_new_tokens=0)

    def test_silence_is_not_asked_about(self, lively, processor):
        silent = copy.deepcopy(lively)
        with torch.no_grad():
            frames = silent.align(**processor.audio_features([noise(3.0)])).frames
            silent.ctc_head.log_scale.fill_(-10.0)  # all rows score 0 ...
            silent.ctc_head.blank.copy_(1e8 * frames.mean(dim=(0, 1)))  # ... but for the blank
        transcript = silent.transcribe(noise(3.0), processor, RATE, timestamps=True)
        assert (transcript.text, transcript.token_ids, transcript.llm_forwards) == ("", [], 0)
        assert transcript.no_speech_prob > 0.99 and len(transcript.segments) > 1 and not transcript.cut

    def test_a_language_is_a_hint_in_the_prompt(self, lively, processor):
        with pytest.raises(ValueError):
            lively.transcribe(noise(0.5), processor, RATE, language="")
        with pytest.raises(ContextError):
            lively.transcribe(noise(0.5), processor, RATE, language="German " * 2000)
        assert lively.transcribe(noise(0.5), processor, RATE, language="German").language == "German"

    def test_likely_words_become_likelier(self, lively, processor):
        plain = lively.transcribe(noise(0.5), processor, RATE, max_new_tokens=8)
        biased = lively.transcribe(noise(0.5), processor, RATE, max_new_tokens=8, bias=["boxes"])
        assert biased.text.count("boxes") > plain.text.count("boxes")
        drafted = lively.transcribe(noise(0.5), processor, RATE, max_new_tokens=8, bias=["boxes"], ctc_draft=True)
        assert drafted.token_ids == biased.token_ids

    def test_stretches_longer_than_the_llm_learned_are_cut_at_pauses(self, lively, processor):
        short = copy.deepcopy(lively)
        short.config.max_transcript_seconds = 0.4
        whole, pieces = (model.transcribe(noise(5.0), processor, RATE, timestamps=True) for model in (lively, short))
        assert len(pieces.segments) > len(whole.segments)
        assert all(segment.end - segment.start <= 0.4 + 1e-9 for segment in pieces.segments)
        bounds = [(segment.start, segment.end) for segment in pieces.segments]
        assert [end for _, end in bounds[:-1]] == [start for start, _ in bounds[1:]]
        assert (bounds[0][0], bounds[-1][1]) == (0.0, 5.0)
        assert torch.equal(pieces.blank_probs, whole.blank_probs)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 20))
def test_pieces_are_cut_in_their_longest_silence(labels, most):
    heard = Heard(torch.tensor(labels), torch.arange(len(labels)), torch.zeros(len(labels)))
    whole = Stretch(3, 100, True, heard, torch.arange(len(labels))[:, None])
    pieces = list(cut_at_pauses(whole, most * FRAME_S, blank=0))
    assert torch.equal(torch.cat([piece.frames for piece in pieces]), whole.frames)
    assert [label for piece in pieces for label in piece.heard.token_ids.tolist()] == labels
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    start = 0
    for piece in pieces:
        assert piece.start == 100 + start and 1 <= len(piece.frames) <= most
        start += len(piece.frames)
        second_half = labels[start - len(piece.frames) + most // 2 : start - len(piece.frames) + most]
        if not piece.last and 0 in second_half:
            runs = [len(list(run)) for label, run in groupby(second_half) if label == 0]
            around = labels[max(start - 1, 0) : start + 1]
            assert 0 in around  # the cut lies in a silence ...
            cut = start - (piece.start - 100) - most // 2
            left = right = cut
            while left > 0 and second_half[left - 1] == 0:
                left -= 1
            while right < len(second_half) and second_half[right] == 0:
                right += 1
            assert right - left == max(runs)  # ... and in the longest one
