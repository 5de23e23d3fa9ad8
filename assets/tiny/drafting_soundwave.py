"""Drafts of an answer: the CTC tokens of a recording, kept in step with what the LLM accepts of them.

Letters: B batch, A aligned frames (40 ms), V vocabulary.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from transformers.generation import CandidateGenerator

from .seams_soundwave import collapse_runs

TOKENS_PER_FORWARD = 1024  # drafted tokens that one forward verifies, over all rows: bounds its scores over V
# A block is so many times as long as the draft has been right on average between two errors. Every drafted token is
# computed: measured on a CPU (4 layers, width 512, V 16,000), blocks without a bound cost 2.2x plain decoding for a
# wrong draft, these 1.2x, with as many forwards for drafts that are partly right.
RUNS_PER_BLOCK = 4


class Draft:
    """Token ids that an answer may well have, and where in them the answer stands.

    One row of the edit-distance table (Wagner and Fischer 1974) between the accepted tokens and every prefix of the
    draft is kept. Drafting goes on behind the prefix that the accepted tokens are nearest to: after a wrong, a
    missing or an extra token the rest of the draft is still used. Among equally near prefixes one that ends with the
    token accepted last wins, then the one next to where the draft stood before (a substitution).

    Args:
        tokens: drafted ids.
        trusted: which of them are taken without the LLM's agreement; ``None`` = none (exact decoding).
    """

    def __init__(self, tokens: list[int], trusted: list[bool] | None = None):
        self.tokens = np.asarray(tokens, dtype=np.int64)
        self.trusted = np.zeros(len(tokens), dtype=bool) if trusted is None else np.asarray(trusted, dtype=bool)
        self.position = 0  # of the next drafted token
        self.accepted = 0  # drafted tokens that became part of the answer
        self._steps = np.arange(len(tokens) + 1)
        self._distance = self._steps.copy()  # (len(tokens) + 1,) accepted tokens against each prefix

    def block(self, length: int) -> list[int]:
        """At most ``length`` drafted ids from where the draft stands; fewer, the more of it has been wrong so far."""
        errors = int(self._distance[self.position])
        if errors:
            length = min(length, RUNS_PER_BLOCK * max(1, self.accepted // errors))
        return self.tokens[self.position : self.position + max(length, 0)].tolist()

    def agreed(self, block: list[int], chosen: list[int]) -> int:
        """How many ids of a block may be accepted, given what the LLM chose at each of their places."""
        trusted = self.trusted[self.position :]
        return next((n for n, token in enumerate(block) if token != chosen[n] and not trusted[n]), len(block))

    def advance(self, tokens: list[int]) -> None:
        """Take note of tokens that became part of the answer."""
        ahead = self.tokens[self.position : self.position + len(tokens)].tolist()
        same = next((n for n, token in enumerate(ahead) if token != tokens[n]), len(ahead))
        self.accepted += same
        if self._distance[self.position] == 0:  # word for word so far: the table's row is known
            self.position += same
            self._distance = np.abs(self._steps - self.position)
            tokens = tokens[same:]
        for token in tokens:
            self._advance(token)

    def _advance(self, token: int) -> None:
        hit = self.tokens == token
        before = self._distance
        substituted = before[:-1] + ~hit
        best = np.append(before[0] + 1, np.minimum(substituted, before[1:] + 1))
        self._distance = np.minimum.accumulate(best - self._steps) + self._steps  # and tokens of the draft left out
        nearest = self._distance == self._distance.min()
        ends_with_token = nearest & np.append(False, hit & (substituted == self._distance[1:]))
        candidates = np.flatnonzero(ends_with_token if ends_with_token.any() else nearest)
        self.position = int(candidates[np.abs(candidates - self.position - 1).argmin()])


@dataclass
class Drafting:
    """What one call of `generate` knows of its drafts; handed through, so that the model itself keeps no state."""

    drafts: list[Draft] | None = None  # one per row, None = plain decoding
    forwards: int = 0  # of the LLM

    @property
    def lossy(self) -> bool:
        """Whether some tokens are taken without the LLM's agreement."""
        return any(draft.trusted.any() for draft in self.drafts or ())


class DraftCandidates(CandidateGenerator):
    """One row's draft in the form that the library's assisted decoding asks for."""

    requires_model_outputs = False

    def __init__(self, draft: Draft, max_length: int):
        self.draft = draft
        self.max_length = max_length

    def get_candidates(self, input_ids: torch.LongTensor) -> tuple[torch.LongTensor, None]:
        """Ids so far (1, L) -> with a block of the draft behind them; no scores."""
        room = self.max_length - input_ids.shape[1] - 1  # the forward itself brings one token more
        block = self.draft.block(min(room, TOKENS_PER_FORWARD))
        return torch.cat([input_ids, torch.tensor([block], dtype=torch.long, device=input_ids.device)], dim=1), None

    def update_candidate_strategy(self, input_ids: torch.LongTensor, scores: torch.Tensor, num_matches: int) -> None:
        """Realign the draft with the ``num_matches`` + 1 newest of the ids."""
        self.draft.advance(input_ids[0, -num_matches - 1 :].tolist())


def recorded_drafts(aligned, blank: int, per_row: list[int], log_probs=None, confidence: float = 1.0) -> list[Draft]:
    """The greedy CTC tokens of each row's recordings, runs collapsed and blanks dropped.

    Args:
        aligned: an `AlignedAudio` of the last of the batch's recordings, or ``None``; earlier ones have no draft.
        blank: id of the blank.
        per_row: recordings of each row (B,).
        log_probs: of the frames' best tokens: a function of frames (n, D), or ``None`` to trust no token.
        confidence: probability from which on a token is trusted.
    """
    counts, ids, trusted = [], [], []
    if aligned is not None:
        keep = collapse_runs(aligned.token_ids, aligned.mask, blank, keep_blanks=False) & (aligned.token_ids != blank)
        counts, ids = keep.sum(dim=1).tolist(), aligned.token_ids[keep].tolist()
        trusted = [False] * len(ids)
        if log_probs is not None:
            trusted = (log_probs(aligned.frames[keep]).exp() >= confidence).tolist()
    counts = [0] * (sum(per_row) - len(counts)) + counts
    before = list(accumulate(counts, initial=0))  # tokens before each recording
    bounds = [before[recordings] for recordings in accumulate(per_row, initial=0)]
    return [Draft(ids[i:j], trusted[i:j]) for i, j in pairwise(bounds)]


def given_drafts(drafts: list[list[int]], rows: int, vocab_size: int) -> list[Draft]:
    """The caller's own drafts.

    Raises:
        ValueError: unless there is one per row, of ids that the LLM has.
    """
    if len(drafts) != rows:
        raise ValueError(f"ctc_draft holds {len(drafts)} drafts for {rows} rows; give one list of token ids per row.")
    wrong = [token for draft in drafts for token in draft if not 0 <= token < vocab_size]
    if wrong:
        raise ValueError(f"ctc_draft holds {wrong[:5]}, expected token ids from 0 to {vocab_size - 1}.")
    return [Draft(draft) for draft in drafts]
