"""CTC over the LLM's vocabulary: loss against the library's, collapse, seams, packing."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from soundwave.modeling_soundwave.ctc_soundwave import (
    CTCHead,
    collapse_runs,
    linear_argmax,
    linear_ctc_loss,
    pack_rows,
    seam_windows,
)
from tests.tiny_models import tiny_config

D = 6


def naive_loss(hidden, weight, targets, input_lengths, target_lengths, blank, blank_weight, **options):
    rows = weight if blank_weight is None else torch.cat([weight, blank_weight[None]])
    log_p = (hidden @ rows.T).log_softmax(-1)
    return F.ctc_loss(log_p.transpose(0, 1), targets, input_lengths, target_lengths, blank, **options)


@st.composite
def ctc_batches(draw):
    B, A, U, V = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(0, 5)), draw(st.integers(2, 7))
    beside = draw(st.booleans())  # the blank beside the matrix, or one of its rows
    torch.manual_seed(draw(st.integers(0, 2**31)))
    blank = V if beside else draw(st.integers(0, V - 1))
    targets = torch.randint(0, V, (B, U)) if beside else (torch.randint(1, V, (B, U)) + blank) % V
    leaves = [torch.randn(B, A, D), torch.randn(V, D)] + ([torch.randn(D)] if beside else [])
    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    input_lengths = torch.tensor(draw(st.lists(st.integers(1, A), min_size=B, max_size=B)))
    target_lengths = torch.tensor(draw(st.lists(st.integers(0, U), min_size=B, max_size=B)))
    return leaves, targets, input_lengths, target_lengths, blank, beside


@given(ctc_batches(), st.sampled_from(["mean", "sum", "none"]))
def test_linear_ctc_loss_equals_the_library(batch, reduction):
    (hidden, weight, *beside_row), targets, input_lengths, target_lengths, blank, beside = batch
    blank_weight = beside_row[0] if beside else None
    scale = torch.rand(len(hidden), dtype=torch.float64) if reduction == "none" else torch.ones(())
    results = []
    for function in (naive_loss, linear_ctc_loss):
        loss = function(
            hidden,
            weight,
            targets,
            input_lengths,
            target_lengths,
            blank,
            blank_weight=blank_weight,
            reduction=reduction,
            zero_infinity=True,
        )
        grads = torch.autograd.grad((loss * scale).sum(), [hidden, weight, *beside_row])
        results.append((loss, *grads))
    for expected, given_value in zip(*results, strict=True):
        torch.testing.assert_close(given_value, expected, rtol=0, atol=1e-8)


def test_linear_ctc_loss_is_infinite_where_the_target_does_not_fit():
    hidden, weight = torch.randn(1, 2, D, dtype=torch.float64), torch.randn(5, D, dtype=torch.float64)
    targets, one = torch.tensor([[3, 3]]), torch.tensor([2])  # a repeat needs a blank between: three frames
    loss = linear_ctc_loss(hidden, weight, targets, one, one, blank=0)
    assert torch.isinf(loss)


def test_linear_ctc_loss_in_chunks(monkeypatch):
    import soundwave.modeling_soundwave.ctc_soundwave as ctc

    hidden = torch.randn(2, 9, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, D, dtype=torch.float64, requires_grad=True)
    lengths, targets = torch.tensor([9, 7]), torch.tensor([[1, 2], [3, 3]])
    whole = linear_ctc_loss(hidden, weight, targets, lengths, torch.tensor([2, 2]), blank=0)
    expected = torch.autograd.grad(whole, [hidden, weight])
    monkeypatch.setattr(ctc, "FRAMES_PER_CHUNK", 4)
    parts = linear_ctc_loss(hidden, weight, targets, lengths, torch.tensor([2, 2]), blank=0)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(torch.autograd.grad(parts, [hidden, weight]), expected)


def test_linear_ctc_loss_refuses_a_blank_without_its_row():
    hidden, weight, targets = torch.randn(1, 3, D), torch.randn(5, D), torch.tensor([[1]])
    one = torch.tensor([1])
    with pytest.raises(ValueError, match="blank is 5 with 5 rows"):
        linear_ctc_loss(hidden, weight, targets, one, one, blank=5)
    with pytest.raises(ValueError, match="reduction"):
        linear_ctc_loss(hidden, weight, targets, one, one, blank=0, reduction="average")


def test_linear_argmax_equals_the_full_matrix():
    hidden, weight, blank = torch.randn(3, 4, D), torch.randn(7, D), torch.randn(D)
    full = (hidden @ torch.cat([weight, blank[None]]).T).argmax(-1)
    assert torch.equal(linear_argmax(hidden, weight, blank), full)


def test_restricted_head_scores_only_its_tokens():
    allowed = [3, 5, 8, 13]
    config = tiny_config(ctc_token_ids=allowed)
    head = CTCHead(config, holds_rows=False).double()
    embeddings = torch.randn(60, 32, dtype=torch.float64)
    frames = torch.randn(2, 12, 32, dtype=torch.float64)
    assert set(head.labels(frames, embeddings).unique().tolist()) <= {*allowed, config.blank_id}
    loss = head.loss(frames, torch.tensor([12, 9]), torch.tensor([[8, 3], [5, 0]]), torch.tensor([2, 1]), embeddings)
    rows = torch.cat([embeddings[allowed], head.blank[None]])
    log_p = (head.scaled(frames) @ rows.T).log_softmax(-1).transpose(0, 1)
    targets = torch.tensor([[2, 0], [1, 0]])
    expected = F.ctc_loss(log_p, targets, torch.tensor([12, 9]), torch.tensor([2, 1]), 4, reduction="none")
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="ctc_token_ids"):
        head.loss(frames, torch.tensor([12, 9]), torch.tensor([[4], [5]]), torch.tensor([1, 1]), embeddings)


def collapse_one_by_one(ids, length, blank, keep_blanks):
    kept = [a for a in range(length) if a == 0 or ids[a] != ids[a - 1]]
    spoken = [a for a in kept if ids[a] != blank]
    return kept if keep_blanks or not spoken else spoken


@given(st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=4), st.data())
def test_collapse_keeps_the_first_frame_of_each_run(rows, data):
    lengths = torch.tensor([data.draw(st.integers(1, 7)) for _ in rows])
    keep_blanks = data.draw(st.booleans())
    mask = torch.arange(7) < lengths[:, None]
    keep = collapse_runs(torch.tensor(rows), mask, 0, keep_blanks)
    for ids, length, kept in zip(rows, lengths.tolist(), keep, strict=True):
        assert kept.nonzero().flatten().tolist() == collapse_one_by_one(ids, length, 0, keep_blanks)
        assert kept.any()  # a recording always yields a position


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))
def test_pack_rows_keeps_order(n, A, seed):
    torch.manual_seed(seed)
    keep, values = torch.rand(n, A) < 0.5, torch.randn(n, A, 3)
    packed, lengths = pack_rows(values, keep)
    assert packed.shape[1] == max(keep.sum(1).tolist())
    for row, kept, whole, length in zip(packed, keep, values, lengths.tolist(), strict=True):
        assert torch.equal(row[:length], whole[kept])
        assert not row[length:].any()


class TestSeams:
    """Windows of 12 frames that overlap by 4; label 9 is the blank."""

    @staticmethod
    def seam(first_overlap, second_overlap):
        first, second = torch.full((2, 12), 1)
        first[8:], second[:4] = torch.tensor(first_overlap), torch.tensor(second_overlap)
        keep = seam_windows(
            torch.stack([first, second]), torch.tensor([12, 12]), torch.tensor([0, 8]), torch.tensor([0, 0]), blank=9
        )
        end, start = int(keep[0].sum()), 12 - int(keep[1].sum())
        assert keep[0, :end].all() and keep[1, start:].all()  # contiguous
        assert end == start + 8  # every instant once
        return end

    def test_meets_in_the_middle_of_the_longest_shared_silence(self):
        assert self.seam([9, 1, 9, 9], [9, 1, 9, 9]) == 11
        assert self.seam([9, 9, 1, 9], [9, 9, 1, 9]) == 9

    def test_a_word_that_one_window_holds_whole_is_not_cut(self):
        # The first window breaks off inside the word at the end; the second holds it whole after the silence.
        assert self.seam([9, 9, 5, 5], [9, 9, 5, 6]) == 9

    def test_without_shared_silence_meets_in_the_middle_of_the_overlap(self):
        assert self.seam([1, 2, 3, 4], [4, 3, 2, 1]) == 10

    def test_separate_recordings_do_not_touch(self):
        ids = torch.full((2, 12), 9)
        keep = seam_windows(ids, torch.tensor([12, 7]), torch.tensor([0, 0]), torch.tensor([0, 1]), blank=9)
        assert keep.sum(1).tolist() == [12, 7]

    @given(st.data())
    def test_every_instant_is_kept_exactly_once(self, data):
        lengths, offsets, index, totals = [], [], [], []
        for audio in range(data.draw(st.integers(1, 3))):
            total = data.draw(st.integers(1, 40))
            totals.append(total)
            starts = [0]
            while starts[-1] + 12 < total:
                starts.append(starts[-1] + 8)
            offsets += starts
            lengths += [min(12, total - start) for start in starts]
            index += [audio] * len(starts)
        torch.manual_seed(data.draw(st.integers(0, 2**31)))
        ids = torch.randint(7, 10, (len(lengths), 12))
        keep = seam_windows(ids, torch.tensor(lengths), torch.tensor(offsets), torch.tensor(index), blank=9)
        instants = [
            (a, offset + f) for a, offset, row in zip(index, offsets, keep, strict=True) for f in row.nonzero()
        ]
        expected = [(a, f) for a, total in enumerate(totals) for f in range(total)]
        assert [(a, int(f)) for a, f in instants] == expected
