"""Collapse, packing, and where windows of one recording meet."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soundwave.modeling_soundwave.seams_soundwave import best_cut, collapse_runs, pack_rows, runs_of, seam_windows


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

    def test_a_word_that_is_heard_at_two_times_is_said_once(self):
        # The longest common silence lies between the places where the windows put the 5.
        first = torch.tensor([9, 1, 9, 5, 9, 9, 9, 9, 9, 9, 9, 2, 9, 9, 3, 9])
        second = torch.tensor([9, 1, 9, 9, 9, 9, 9, 9, 5, 9, 9, 2, 9, 9, 3, 9])
        cut = best_cut(first, second, 0, blank=9)
        assert runs_of([*first[:cut].tolist(), *second[cut:].tolist()], 9) == [1, 5, 2, 3]


BLANK, OVERLAP, LONGEST_WORD = 0, 40, 10


def two_windows(rng: random.Random):
    """A string of words of known extent, each of some tokens, and two windows over it that overlap by 40 frames.

    Both hear what they hold whole, up to a frame apart; of a word that its end cuts, a window hears anything.
    """
    words, length = [], 0
    while length < 100:
        extent = rng.randint(3, LONGEST_WORD)
        places = rng.choice([[rng.randint(1, extent - 2)], [1, extent - 2] if extent > 5 else [1]])
        words.append((length, length + extent, [(place, rng.randint(1, 5)) for place in places]))
        length += extent + rng.randint(0, 3)
    end = rng.randint(55, 60)
    windows = []
    for begin, stop in ((0, end), (end - OVERLAP, length)):
        labels = [BLANK] * (stop - begin)
        for start, over, peaks in words:
            if begin <= start and over <= stop:
                late = rng.randint(0, 1)
                for place, token in peaks:
                    labels[start + place + late - begin] = token
            elif max(start, begin) < min(over, stop) and rng.random() < 0.8:
                labels[rng.randrange(max(start, begin), min(over, stop)) - begin] = rng.randint(1, 7)
        windows.append(labels)
    return [token for _, _, peaks in words for _, token in peaks], *windows, end - OVERLAP


@settings(max_examples=1000)
@given(st.integers(0, 2**31))
def test_what_either_window_holds_whole_is_said_exactly_once(seed):
    said, first, second, shift = two_windows(random.Random(seed))
    cut = best_cut(torch.tensor(first), torch.tensor(second), shift, BLANK)
    assert runs_of(first[:cut] + second[cut - shift :], BLANK) == said


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(0, 3))
def test_runs_of_continues_a_label(ids, before):
    assert runs_of([before, *ids], 0)[before != 0 :] == runs_of(ids, 0, before)
