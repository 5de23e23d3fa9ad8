"""From frames with CTC labels to what is said: runs of labels collapse, overlapping windows are joined at seams.

Letters: n windows or recordings, A aligned frames (40 ms), K kept frames.
"""

from collections import defaultdict
from itertools import pairwise

import torch


def collapse_runs(token_ids: torch.Tensor, mask: torch.Tensor, blank: int, keep_blanks: bool) -> torch.Tensor:
    """Which frames stay: the first of each run of equal labels, without blanks unless kept (§2.3.1).

    A recording whose frames are all blank keeps its blank runs, so that it yields at least one position.

    Args:
        token_ids: arg-max labels (n, A).
        mask: valid frames (n, A) bool, valid ones first.
        blank: label of the blank.
        keep_blanks: whether a run of blanks keeps its first frame.

    Returns:
        (n, A) bool.
    """
    starts = torch.ones_like(mask)
    starts[:, 1:] = token_ids[:, 1:] != token_ids[:, :-1]
    starts &= mask
    if keep_blanks:
        return starts
    spoken = starts & (token_ids != blank)
    return torch.where(spoken.any(dim=1, keepdim=True), spoken, starts)


def seam_windows(
    token_ids: torch.Tensor, lengths: torch.Tensor, offsets: torch.Tensor, audio_index: torch.Tensor, blank: int
) -> torch.Tensor:
    """Which frames of overlapping windows make up the whole recordings; where two of them meet: `best_cut`.

    Args:
        token_ids: arg-max labels per window (n, A).
        lengths: valid frames per window (n,).
        offsets: start of each window in its recording, in aligned frames (n,).
        audio_index: recording of each window (n,), ascending; windows of a recording ascend in time.
        blank: label of the blank.

    Returns:
        (n, A) bool: each instant of a recording is kept in exactly one window.
    """
    n, A = token_ids.shape
    start, end = [0] * n, lengths.tolist()
    labels = token_ids.cpu()
    begins, recordings = offsets.tolist(), audio_index.tolist()
    for later in range(1, n):
        first = later - 1
        if recordings[first] == recordings[later]:
            shift = begins[later] - begins[first]
            cut = best_cut(labels[first, : end[first]], labels[later, : end[later]], shift, blank)
            start[later], end[first] = cut - shift, cut
    frame = torch.arange(A, device=token_ids.device)
    bounds = torch.tensor([start, end], device=token_ids.device)
    return (frame >= bounds[0, :, None]) & (frame < bounds[1, :, None])


def best_cut(first: torch.Tensor, second: torch.Tensor, shift: int, blank: int) -> int:
    """Where two overlapping windows of one recording meet, so that no word is cut, lost or said twice.

    At the ends of the overlap a window may hold half a word, and the two may hear a word some frames apart. So each
    possible cut votes for the tokens that it makes of the overlap, with its distance from the nearer end; only cuts
    that make the winning tokens are taken. Of these, the middle of the longest run that is blank in both windows, or
    without any, the cut nearest to the middle of the overlap.

    Args:
        first: arg-max labels of the earlier window (A,).
        second: arg-max labels of the later one (A',).
        shift: frames between the two starts.
        blank: label of the blank.

    Returns:
        The frame of the first window at which the second takes over: ``first[:cut]`` and ``second[cut - shift:]``.
    """
    overlap = max(min(len(first) - shift, len(second)), 0)
    # One frame on either side tells whether a token goes on beyond the overlap.
    before, after = first[max(shift - 1, 0) : shift].tolist(), second[overlap : overlap + 1].tolist()
    a, b = first[shift : shift + overlap].tolist(), second[:overlap].tolist()
    votes: dict[tuple[int, ...], int] = defaultdict(int)
    made = []
    for cut in range(overlap + 1):
        made.append(tuple(runs_of(before + a[:cut] + b[cut:] + after, blank)))
        votes[made[-1]] += 1 + min(cut, overlap - cut)
    winner = max(votes, key=lambda tokens: votes[tokens])
    good = [tokens == winner for tokens in made]
    quiet = [good[f] and a[f] == b[f] == blank for f in range(overlap)]
    longest = run_end = run = 0
    for frame, silent in enumerate(quiet):
        run = run + 1 if silent else 0
        if run > longest:
            longest, run_end = run, frame + 1
    if longest:
        return shift + run_end - (longest + 1) // 2
    return shift + min((cut for cut in range(overlap + 1) if good[cut]), key=lambda cut: abs(2 * cut - overlap))


def runs_of(token_ids: list[int], blank: int, before: int | None = None) -> list[int]:
    """Greedy CTC of one row of labels, behind a frame with the label ``before``: runs collapsed, blanks dropped."""
    previous = [blank if before is None else before, *token_ids]
    return [token for token, last in zip(token_ids, previous, strict=False) if token not in (last, blank)]


def blank_runs(token_ids: list[int], blank: int) -> list[tuple[int, int]]:
    """(first frame, end) of each run of blanks."""
    ends = [0, *(frame + 1 for frame, token in enumerate(token_ids) if token != blank), len(token_ids) + 1]
    return [(first, stop - 1) for first, stop in pairwise(ends) if stop - 1 > first]


def pack_rows(values: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the kept entries of each row to its front: (n, A, ...) and (n, A) bool -> (n, K, ...), lengths (n,).

    Entries beyond a row's length are 0. K is the largest length.
    """
    lengths = keep.sum(dim=1)
    longest = int(lengths.max()) if len(keep) else 0
    order = keep.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    shape = order.shape + (1,) * (values.dim() - 2)
    packed = values.gather(1, order.view(shape).expand(order.shape + values.shape[2:]))
    inside = torch.arange(longest, device=keep.device) < lengths[:, None]
    return packed * inside.view(shape).to(packed.dtype), lengths
