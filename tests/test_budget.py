"""The budget of LLM positions per recording, and what a chat keeps of earlier recordings."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from soundwave.modeling_soundwave import speech_soundwave
from soundwave.modeling_soundwave.shrinking_soundwave import merge_similar
from tests.test_modeling import batch_of, mel
from tests.tiny_models import tiny_model


def merged_by_hand(row: torch.Tensor, budget: int) -> torch.Tensor:
    """One row (K, D) -> at most ``budget`` positions, cut where neighbours differ most."""
    if len(row) <= budget:
        return row
    likeness = F.cosine_similarity(row[1:], row[:-1], dim=-1)
    cuts = sorted(likeness.argsort(stable=True)[: budget - 1].tolist())
    groups = [row[a:b] for a, b in zip([0, *(c + 1 for c in cuts)], [*(c + 1 for c in cuts), len(row)], strict=True)]
    return torch.stack([F.normalize(g.mean(dim=0), dim=-1) * g.norm(dim=-1).mean() for g in groups])


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 12), st.integers(0, 10**6))
def test_merging_cuts_where_neighbours_differ_most_and_does_not_depend_on_the_batch(lengths, budget, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(length, 3, generator=generator).double() for length in lengths]
    K = max(lengths)
    filler = 7.0  # what lies beyond a row's end must not count
    features = torch.stack([F.pad(row, (0, 0, 0, K - len(row)), value=filler) for row in rows])
    merged, counts = merge_similar(features, torch.tensor(lengths), budget)
    assert counts.tolist() == [min(length, budget) for length in lengths]
    for row, out, count in zip(rows, merged, counts, strict=True):
        torch.testing.assert_close(out[:count], merged_by_hand(row, budget))


def test_equal_neighbours_merge_first_and_stay_as_they_are():
    row = torch.tensor([[1.0, 0], [1, 0], [0, 2], [0, 2], [3, 3]])[None]
    merged, _ = merge_similar(row, torch.tensor([5]), 3)
    torch.testing.assert_close(merged, torch.tensor([[[1.0, 0], [0, 2], [3, 3]]]))


def test_a_budget_holds_for_every_recording_and_the_compression_says_so():
    model, batch = tiny_model(), batch_of([[3, mel(100, 1), mel(3, 2), 5], [4, mel(30, 3)]])
    audio = {name: batch[name] for name in model.AUDIO_FEATURES if name in batch}
    free, bounded = model.get_audio_features(**audio), model.get_audio_features(**audio, max_audio_positions=4)
    assert free.lengths.max() > 4
    assert bounded.lengths.tolist() == free.lengths.clamp(max=4).tolist()
    torch.testing.assert_close(bounded.compression, torch.tensor([100, 3, 30]) / bounded.lengths)
    out = model(**batch, max_audio_positions=4)
    assert torch.equal(out.audio_positions, bounded.lengths)
    answer = model.generate(**batch, max_audio_positions=4, max_new_tokens=5, return_dict_in_generate=True)
    assert torch.equal(answer.audio_positions, bounded.lengths)
    torch.testing.assert_close(answer.compression, bounded.compression)
    by_call = answer.sequences
    model.config.max_audio_positions = 4
    assert torch.equal(model.generate(**batch, max_new_tokens=5), by_call)
    with pytest.raises(ValueError, match="max_audio_positions is 0"):
        model.get_audio_features(**audio, max_audio_positions=0)


def test_what_needs_no_merging_is_as_without_a_budget():
    """A row must not change because a longer one stands beside it."""
    features = torch.randn(2, 9, 33, generator=torch.Generator().manual_seed(0))
    merged, lengths = merge_similar(features, torch.tensor([9, 4]), 5)
    assert lengths.tolist() == [5, 4] and torch.equal(merged[1, :4], features[1, :4])


def test_a_trained_budget_gets_gradients():
    model, batch = tiny_model().train(), batch_of([[3, mel(100, 1), 5, 6]], labels=True)
    model(**batch, max_audio_positions=3).loss.backward()
    assert model.shrinking_adapter.cross_attn.q_proj.weight.grad.abs().sum() > 0


def test_earlier_recordings_of_a_chat_are_not_encoded_again():
    model, first, second = tiny_model(), mel(60, 1), mel(9, 2)
    whole = batch_of([[3, first, 5, 6, second, 4]])
    kept = model.get_audio_features(**{k: v for k, v in batch_of([[first]]).items() if k in model.AUDIO_FEATURES})
    later = {k: v for k, v in batch_of([[second]]).items() if k in model.AUDIO_FEATURES}
    text = {name: whole[name] for name in ("input_ids", "attention_mask")}
    embeds = {"audio_embeds": kept.embeds, "audio_lengths": kept.lengths}
    torch.testing.assert_close(model(**text, **embeds, **later).logits, model(**whole).logits)
    expected = model.generate(**whole, max_new_tokens=6)
    assert torch.equal(model.generate(**text, **embeds, **later, max_new_tokens=6), expected)
    with pytest.raises(ValueError, match="2 audio tokens.*1 recordings"):
        model(**text, **embeds)


def test_windows_beyond_one_pass_of_the_encoder_come_out_the_same(monkeypatch):
    model, batch = tiny_model(), batch_of([[mel(110, 1), mel(3, 2)], [mel(70, 3)]])
    audio = {name: batch[name] for name in model.AUDIO_FEATURES if name in batch}
    T = batch["input_features"].shape[2]
    monkeypatch.setattr(speech_soundwave, "SIMILAR", 0.0)
    expected = model.get_audio_features(**audio)
    passes = []
    encode = model._encode
    monkeypatch.setattr(model, "_encode", lambda *part: passes.append(part[0].shape) or encode(*part))
    monkeypatch.setitem(speech_soundwave.MEL_FRAMES_PER_PASS, "cpu", 2 * T)
    features = model.get_audio_features(**audio)
    assert max(shape[0] for shape in passes) == 2 and sum(shape[0] for shape in passes) == len(batch["input_features"])
    torch.testing.assert_close(features.embeds, expected.embeds)
    monkeypatch.setattr(speech_soundwave, "SIMILAR", 0.75)
    passes.clear()
    torch.testing.assert_close(model.get_audio_features(**audio).embeds, expected.embeds)
    assert min(shape[2] for shape in passes) < T  # short windows are not padded to the longest


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40))
def test_every_window_goes_through_the_encoder_once_with_others_of_its_length(lengths):
    passes = speech_soundwave.encoder_passes(lengths, most=9000)
    assert sorted(window for windows in passes for window in windows) == list(range(len(lengths)))
    for windows in passes:
        longest = lengths[windows[0]]
        assert len(windows) == 1 or len(windows) * longest <= 9000
        assert all(0.75 * longest <= lengths[window] <= longest for window in windows)
