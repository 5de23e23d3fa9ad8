"""The splice: every token and every recording once, in order, labels with their tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soundwave.modeling_soundwave.splicing_soundwave import splice_audio

AUDIO = 99
PAD = 0


@st.composite
def prompts(draw):
    """Rows of ids (7..20) with recordings, padded on a side per row, and the recordings' lengths in order."""
    rows = draw(st.lists(st.lists(st.sampled_from([7, 8, 9, AUDIO]), min_size=1, max_size=6), min_size=1, max_size=4))
    lengths = [draw(st.integers(0, 5)) for row in rows for token in row if token == AUDIO]
    left = [draw(st.booleans()) for _ in rows]
    return rows, lengths, left


def splice_one_by_one(row, lengths, embeds, audio):
    """(positions, source, labels) of one row, token by token."""
    positions, labels = [], []
    for token, embed in zip(row, embeds, strict=True):
        if token == AUDIO:
            features, length = audio.pop(0), lengths.pop(0)
            positions += list(features[:length])
            labels += [-100] * length
        else:
            positions.append(embed)
            labels.append(token)
    return positions, [-100, *labels[1:]] if labels else []  # nothing predicts the first position


@given(prompts(), st.sampled_from([True, False, None]))
def test_splice_equals_one_by_one(prompt, pad_left):
    rows, lengths, left = prompt
    N = max(map(len, rows))
    ids, mask = torch.full((len(rows), N), PAD), torch.zeros(len(rows), N, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(N - len(row), N) if left[i] else slice(0, len(row))
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    text = torch.randn(len(rows), N, 3)
    audio = torch.randn(len(lengths), max([*lengths, 1]), 3) if lengths else None
    out = splice_audio(
        ids,
        mask,
        text,
        AUDIO,
        audio,
        torch.tensor(lengths) if lengths else None,
        labels=ids.clone(),
        pad_left=pad_left,
    )
    assert out.inputs_embeds.shape[1] == max(int(out.attention_mask.sum(1).max()), 0)
    remaining, counts = list(audio) if lengths else [], list(lengths)
    for i, row in enumerate(rows):
        positions, labels = splice_one_by_one(row, counts, text[i][mask[i].bool()], remaining)
        inside = out.attention_mask[i].bool()
        if pad_left is not None and len(positions):
            assert inside[-1 if pad_left else 0]
        assert int(inside.sum()) == len(positions)
        assert torch.equal(out.inputs_embeds[i][inside], torch.stack(positions) if positions else torch.zeros(0, 3))
        assert out.labels[i][inside].tolist() == labels
        assert (out.labels[i][~inside] == -100).all()
        assert out.position_ids[i][inside].tolist() == list(range(len(positions)))
    assert not remaining


def test_gradients_reach_text_and_audio():
    ids = torch.tensor([[7, AUDIO, 8]])
    text, audio = torch.randn(1, 3, 2, requires_grad=True), torch.randn(1, 4, 2, requires_grad=True)
    out = splice_audio(ids, torch.ones_like(ids), text, AUDIO, audio, torch.tensor([3]))
    out.inputs_embeds.sum().backward()
    assert text.grad[0, :, 0].tolist() == [1, 0, 1]
    assert audio.grad[0, :, 0].tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("mask", [[1, 0, 1], [0, 1, 0]])
def test_a_hole_in_the_mask_is_an_error(mask):
    ids = torch.tensor([[7, 8, 9]])
    with pytest.raises(ValueError, match="attention_mask has a hole in rows"):
        splice_audio(ids, torch.tensor([mask]), torch.zeros(1, 3, 2), AUDIO, None, None)


def test_an_empty_list_of_recordings_is_none():
    ids, text = torch.tensor([[7, 8]]), torch.randn(1, 2, 3)
    out = splice_audio(ids, torch.ones_like(ids), text, AUDIO, torch.zeros(0, 4, 3), torch.zeros(0, dtype=torch.long))
    assert torch.equal(out.inputs_embeds, text) and out.audio_positions is None


def test_counts_that_differ_are_an_error():
    ids = torch.tensor([[AUDIO, 8, AUDIO]])
    with pytest.raises(ValueError, match="2 audio tokens .* but 1 recordings"):
        splice_audio(ids, torch.ones_like(ids), torch.zeros(1, 3, 2), AUDIO, torch.zeros(1, 2, 2), torch.tensor([2]))
