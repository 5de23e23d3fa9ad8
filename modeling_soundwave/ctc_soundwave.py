"""CTC over the LLM's own vocabulary: head, loss without (B, A, V), greedy labels and their probabilities.

Letters: B batch, n windows or recordings, A aligned frames (40 ms), U target tokens, D LLM width, V vocabulary.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

START_LENGTH = 2.0  # of a scoring row, for frames of length sqrt(D)
SCORES_AT_ONCE = 2**21  # of an arg-max: 8 MiB in fp32
FRAMES_PER_ARGMAX, MIN_ROWS = 4096, 512
ROWS_PER_CHUNK = 1024  # of the embeddings that are looked at in fp32 at once
FRAMES_PER_CHUNK = 1024  # frames whose scores exist at once
# In the loss, of so many rows only: on a CPU 16 MiB of scores, which its cache keeps; a GPU wants large products.
ROWS_PER_BLOCK = {"cpu": 4096, "other": 65_536}


class CTCHead(nn.Module):
    """Scores aligned frames against rows that *are* LLM tokens (§2.2.1).

    ``"tied"``: frozen rows of the LLM's input embeddings and a trained scale on the frames. ``"separate"``: rows of
    its own. The blank is a trained row beside the matrix, or one of its rows when ``config.ctc_blank_id`` says so.

    Args:
        config: a `SoundwaveConfig`.
        holds_rows: whether the rows live here; ``False`` = the caller passes the LLM's embedding matrix.
        rows: the LLM's embeddings (R, D) that they start as, taken over without a copy; ``None`` = random ones.
    """

    def __init__(self, config, holds_rows: bool, rows: torch.Tensor | None = None):
        super().__init__()
        text = config.text_config
        ids = range(text.vocab_size) if config.ctc_token_ids is None else config.ctc_token_ids
        n_rows = len(ids)
        self.blank_id = config.blank_id
        self.blank_row = n_rows if config.ctc_blank_id is None else ids.index(config.ctc_blank_id)
        allowed = None if config.ctc_token_ids is None else torch.tensor(config.ctc_token_ids)
        self.register_buffer("token_ids", allowed, persistent=False)  # the configuration holds them
        self.tied = config.ctc_head == "tied"
        self.weight = None
        if holds_rows:
            self.weight = nn.Parameter(torch.empty(n_rows, text.hidden_size) if rows is None else rows)
            self.weight._is_hf_initialized = rows is not None  # the library's mark: no random values over them
        self.log_scale = nn.Parameter(torch.zeros(1)) if self.tied else None  # (1,): FSDP2 cuts no scalars
        self.blank = nn.Parameter(torch.zeros(text.hidden_size)) if config.ctc_blank_id is None else None
        if self.tied and self.weight is not None:
            self.weight.requires_grad_(False)

    @torch.no_grad()
    def init_from_embeddings(self, rows: torch.Tensor) -> None:
        """Start from the LLM's embedding rows (V or R, D) at length 2: own rows each, a tied head's on average.

        The blank starts in a random direction, as loud as the rows; `AlignmentAdapter.init_towards` lets it win.
        """
        chunks = rows.split(ROWS_PER_CHUNK)
        lengths = torch.empty(len(rows), device=rows.device)
        for lengths_of, chunk in zip(lengths.split(ROWS_PER_CHUNK), chunks, strict=True):
            lengths_of.copy_(chunk.float().norm(dim=-1))
        loud = START_LENGTH / lengths.mean()
        length = START_LENGTH
        if self.tied:
            self.log_scale.copy_(loud.log())
            length = START_LENGTH / loud
        if self.tied and self.weight is not None:
            # They stay as the LLM has them, type included: at 128k tokens fp32, or a copy, would double them.
            self.weight.data = rows
        elif self.weight is not None:
            for own, chunk in zip(self.weight.split(ROWS_PER_CHUNK), chunks, strict=True):
                own.copy_(F.normalize(chunk.float(), dim=-1) * START_LENGTH)
        if self.blank is not None:
            nn.init.normal_(self.blank)
            self.blank.mul_(length / self.blank.norm())

    def blank_of(self, rows: torch.Tensor) -> torch.Tensor:
        """The blank's row (D,): the one beside ``rows`` (R, D), or one of them."""
        return rows[self.blank_row] if self.blank is None else self.blank

    def rows(self, embeddings: torch.Tensor | None) -> torch.Tensor:
        """The scoring rows (R, D): our own, or those of ``embeddings`` (V, D) that the head may emit."""
        return self.weight if self.weight is not None else self.allowed_rows(embeddings)

    def allowed_rows(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The rows (R, D) of the LLM's embeddings (V, D) that the head may emit."""
        return embeddings if self.token_ids is None else embeddings[self.token_ids.to(embeddings.device)]

    def scaled(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames (..., D) times the trained scale, so that nothing of size V x D is built per step."""
        # By a scalar, which leaves the type of the frames alone.
        return frames if self.log_scale is None else frames * self.log_scale[0].exp()

    def forward(self, frames: torch.Tensor, embeddings: torch.Tensor | None = None) -> tuple:
        """What scores are made of: scaled frames (..., D), rows (R, D), blank row (D,) or ``None``, blank's number.

        A call, not attributes: accelerate's hooks (``device_map``) bring weights that lie elsewhere only for a call.
        """
        return self.scaled(frames), self.rows(embeddings), self.blank, self.blank_row

    def _to_rows(self, token_ids: torch.Tensor) -> torch.Tensor:
        """LLM token ids -> row numbers of a restricted vocabulary."""
        if self.token_ids is None:
            return token_ids
        allowed = self.token_ids.to(token_ids.device)
        rows = torch.searchsorted(allowed, token_ids.contiguous()).clamp(max=len(allowed) - 1)
        unknown = token_ids[allowed[rows] != token_ids]
        if len(unknown):
            raise ValueError(
                f"CTC targets hold the token ids {unknown.unique()[:5].tolist()}, which config.ctc_token_ids does not "
                "list; add them there."
            )
        return rows

    @torch.no_grad()
    def labels(self, frames: torch.Tensor, embeddings: torch.Tensor | None = None) -> torch.Tensor:
        """Arg-max token ids (n, A) of frames (n, A, D); the blank is ``config.blank_id``."""
        return self._to_ids(linear_argmax(*self(frames, embeddings)[:3]).to(frames.device))

    @torch.no_grad()
    def scores(
        self, frames: torch.Tensor, embeddings: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `labels` says of frames (n, A, D), and how sure it is.

        Returns:
            Token ids (n, A), their log-probabilities (n, A) and those of the blank (n, A): fp32, or fp64 where the
            frames are.
        """
        best, best_log_p, blank_log_p = linear_log_probs(*self(frames, embeddings))
        ids = self._to_ids(best.to(frames.device))
        return ids, best_log_p.to(frames.device), blank_log_p.to(frames.device)

    def _to_ids(self, rows: torch.Tensor) -> torch.Tensor:
        """Row numbers, the blank's last, -> LLM token ids."""
        if self.token_ids is None:
            return rows
        emitted = torch.cat([self.token_ids, self.token_ids.new_tensor([self.blank_id])])
        return emitted.to(rows.device)[rows]

    def loss(self, frames, frame_lengths, labels, label_lengths, embeddings=None) -> torch.Tensor:
        """CTC losses (n,) of frames (n, A, D) against LLM token ids (n, U); an impossible target counts as 0."""
        if len(frames) == 0:  # no transcript in the batch: a zero that still reaches every trained tensor
            trained = sum(p.sum() for p in self.parameters() if p.requires_grad)
            return self.scaled(frames).sum(dim=(1, 2)) + 0.0 * trained
        hidden, rows, blank_row, blank = self(frames, embeddings)
        inside = torch.arange(labels.shape[1], device=labels.device) < label_lengths[:, None]
        filler = 0 if self.token_ids is None else int(self.token_ids[0])
        return linear_ctc_loss(
            hidden,
            rows,
            self._to_rows(labels.masked_fill(~inside, filler)),
            frame_lengths,
            label_lengths,
            blank=blank,
            reduction="none",
            zero_infinity=True,
            blank_weight=blank_row,
        )


def linear_argmax(hidden: torch.Tensor, weight: torch.Tensor, blank_weight: torch.Tensor | None) -> torch.Tensor:
    """Arg-max over ``hidden @ weight.T`` (``blank_weight`` as row V): (..., D) -> (...), a block of scores at a time.

    Blocks of rows, not of frames: scores that stay in a CPU's cache are found faster.
    """
    flat = hidden.reshape(-1, hidden.shape[-1]).to(weight.dtype)
    best = []
    for chunk in flat.split(FRAMES_PER_ARGMAX):
        top, index = chunk.new_full((len(chunk),), -torch.inf), torch.zeros_like(chunk[:, 0], dtype=torch.long)
        block = max(MIN_ROWS, SCORES_AT_ONCE // max(len(chunk), 1) // MIN_ROWS * MIN_ROWS)
        for start in range(0, len(weight), block):
            score, row = (chunk @ weight[start : start + block].T).max(dim=-1)
            better = score > top
            top, index = torch.where(better, score, top), torch.where(better, start + row, index)
        if blank_weight is not None:
            index = torch.where(chunk @ blank_weight.to(weight.dtype) > top, len(weight), index)
        best.append(index)
    return torch.cat(best).view(hidden.shape[:-1]) if best else flat.new_zeros(hidden.shape[:-1], dtype=torch.long)


def linear_log_probs(
    hidden: torch.Tensor, weight: torch.Tensor, blank_weight: torch.Tensor | None, blank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`linear_argmax` of (..., D), its log-probability and that of row ``blank``: (...) each, in chunks of frames."""
    flat = hidden.reshape(-1, hidden.shape[-1]).to(weight.dtype)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    best = torch.empty(len(flat), dtype=torch.long, device=flat.device)
    best_log_p, blank_log_p = (torch.empty(len(flat), dtype=dtype, device=flat.device) for _ in range(2))
    for start in range(0, len(flat), FRAMES_PER_CHUNK):
        chunk = slice(start, start + FRAMES_PER_CHUNK)
        scores = flat[chunk] @ weight.T
        score, index = scores.max(dim=-1)
        total = scores.to(dtype).logsumexp(dim=-1)
        if blank_weight is None:
            blank_score = scores[:, blank]
        else:
            blank_score = flat[chunk] @ blank_weight.to(weight.dtype)
            index = torch.where(blank_score > score, blank, index)
            score = torch.maximum(score, blank_score)
            total = torch.logaddexp(total, blank_score.to(dtype))
        best[chunk], best_log_p[chunk], blank_log_p[chunk] = index, score - total, blank_score - total
    shape = hidden.shape[:-1]
    return best.view(shape), best_log_p.view(shape), blank_log_p.view(shape)


class _LinearCTC(torch.autograd.Function):
    """Per-item CTC losses from hidden states and scoring rows; see `linear_ctc_loss`.

    Only the blank and the target labels enter the lattice; over all V rows one log-sum-exp per frame is needed.
    With posteriors g (B, A, U + 1) of the lattice columns c, d loss / d hidden = softmax(h W) W - g W[c]. The first
    term does not depend on g, so the forward pass stores the sum of both, (B, A, D), and recomputes nothing. A trained
    matrix needs its softmax once more in the backward pass.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, input_lengths, target_lengths, blank, zero_infinity, blank_weight):
        B, A, D = hidden.shape
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        h = hidden.to(weight.dtype)
        blank_row = weight[blank] if blank_weight is None else blank_weight.to(weight.dtype)
        need_hidden = ctx.needs_input_grad[0]
        need_any = need_hidden or ctx.needs_input_grad[1] or ctx.needs_input_grad[7]

        lse, expected = linear_log_sum_exp(h.view(B * A, D), weight, blank_weight, dtype, with_mean=need_hidden)
        lse = lse.view(B, A)

        columns, lattice_targets = _lattice(targets, target_lengths)  # (B, U) labels, each class once
        rows = torch.cat([blank_row.expand(B, 1, D), weight[columns]], dim=1)  # (B, U + 1, D)
        log_p = torch.einsum("bad,bud->bau", h, rows).to(dtype) - lse[..., None]
        if not need_any:  # evaluation, torch.inference_mode included
            log_p = log_p.transpose(0, 1)
            return F.ctc_loss(log_p, lattice_targets, input_lengths, target_lengths, 0, "none", zero_infinity)
        with torch.enable_grad():
            leaf = log_p.detach().requires_grad_()
            losses = F.ctc_loss(
                leaf.transpose(0, 1), lattice_targets, input_lengths, target_lengths, 0, "none", zero_infinity
            )
            (grad,) = torch.autograd.grad(losses.sum(), leaf)
        losses = losses.detach()

        # F.ctc_loss gives exp(log_p) - g, on the assumption that a full log-softmax stands in front of it.
        counted = torch.arange(A, device=hidden.device) < input_lengths[:, None]
        if zero_infinity:
            counted = counted & _feasible(targets, input_lengths, target_lengths)[:, None]
        posterior = (log_p.exp() - grad) * counted[..., None]
        grad_hidden = None
        if need_hidden:
            pull = torch.einsum("bau,bud->bad", posterior.to(rows.dtype), rows).to(dtype)
            grad_hidden = expected.view(B, A, D).mul_(counted[..., None]).sub_(pull)
        ctx.save_for_backward(hidden, weight, blank_weight, grad_hidden, posterior, columns, lse, counted)
        ctx.blank = blank
        return losses

    @staticmethod
    def backward(ctx, grad_losses):
        with torch.autocast(grad_losses.device.type, enabled=False):  # as the forward ran
            return _LinearCTC._backward(ctx, grad_losses)

    @staticmethod
    def _backward(ctx, grad_losses):
        hidden, weight, blank_weight, grad_hidden, posterior, columns, lse, counted = ctx.saved_tensors
        B, A, D = hidden.shape
        dtype = lse.dtype
        d_hidden = d_weight = d_blank = None
        if grad_hidden is not None:
            d_hidden = (grad_hidden * grad_losses.to(dtype)[:, None, None]).to(hidden.dtype)
        if not (ctx.needs_input_grad[1] or ctx.needs_input_grad[7]):  # a frozen head
            return d_hidden, None, None, None, None, None, None, None
        h = hidden.to(dtype) * (grad_losses.to(dtype)[:, None, None] * counted[..., None])  # frames by their share
        pull = torch.einsum("bau,bad->bud", posterior, h)  # (B, U + 1, D)
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
            flat, flat_h = hidden.to(weight.dtype).view(B * A, D), h.view(B * A, D)
            for frames, rows in _blocks(flat, weight):
                scores = (flat[frames] @ weight[rows].T).to(dtype)
                p = scores.sub_(lse.view(-1)[frames, None]).exp_()
                d_weight[rows].addmm_(p.T, flat_h[frames])
            d_weight.index_add_(0, columns.reshape(-1), -pull[:, 1:].reshape(-1, D))
            if blank_weight is None:
                d_weight[ctx.blank] -= pull[:, 0].sum(dim=0)
            d_weight = d_weight.to(weight.dtype)
        if blank_weight is not None and ctx.needs_input_grad[7]:
            blank_scores = hidden.to(weight.dtype) @ blank_weight.to(weight.dtype)
            p = (blank_scores.to(dtype) - lse).exp()  # (B, A)
            d_blank = (torch.einsum("ba,bad->d", p, h) - pull[:, 0].sum(dim=0)).to(blank_weight.dtype)
        return d_hidden, d_weight, None, None, None, None, None, d_blank


def linear_log_sum_exp(
    h: torch.Tensor,
    weight: torch.Tensor,
    blank_weight: torch.Tensor | None,
    dtype: torch.dtype,
    with_mean: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-sum-exp (n,) of the scores of frames (n, D), and the rows' mean (n, D) under their softmax, in ``dtype``.

    All sums are relative to the largest score so far (Milakov and Gimelshein 2018), so that a block of scores is made
    once and used up while a CPU's cache holds it. ``blank_weight`` is one row more.
    """
    n = len(h)
    if blank_weight is None:
        top, total = h.new_full((n,), -torch.inf, dtype=dtype), h.new_zeros(n, dtype=dtype)
        mean = h.new_zeros(h.shape, dtype=dtype) if with_mean else None
    else:
        row = blank_weight.to(weight.dtype)
        top, total = (h @ row).to(dtype), h.new_ones(n, dtype=dtype)
        mean = row.to(dtype).repeat(n, 1) if with_mean else None
    for frames, rows in _blocks(h, weight):
        scores = (h[frames] @ weight[rows].T).to(dtype)
        largest = torch.maximum(top[frames], scores.amax(dim=-1))
        shift = (top[frames] - largest).exp_()
        p = scores.sub_(largest[:, None]).exp_()
        top[frames] = largest
        total[frames].mul_(shift).add_(p.sum(dim=-1))
        if mean is not None:
            mean[frames].mul_(shift[:, None]).add_(p.to(weight.dtype) @ weight[rows])
    return top.add_(total.log()), None if mean is None else mean.div_(total[:, None])


def _blocks(h: torch.Tensor, weight: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Frames and rows whose scores exist at once."""
    size = ROWS_PER_BLOCK["cpu" if h.device.type == "cpu" else "other"]
    for frame in range(0, len(h), FRAMES_PER_CHUNK):
        for row in range(0, len(weight), size):
            yield slice(frame, frame + FRAMES_PER_CHUNK), slice(row, row + size)


def _lattice(targets, target_lengths):
    """Targets (B, U) -> the labels (B, U) of lattice columns 1..U and the targets as column numbers.

    Repeated labels share the column of their first occurrence: CTC must see that they are equal.
    """
    U = targets.shape[1]
    inside = torch.arange(U, device=targets.device) < target_lengths[:, None]
    columns = targets.masked_fill(~inside, 0)
    first = (columns[:, :, None] == columns[:, None, :]).long().argmax(dim=-1) if U else columns
    return columns, first + 1


def _feasible(targets, input_lengths, target_lengths):
    """Whether a target fits its frames: equal neighbours need a blank between them. (B,) bool."""
    inside = torch.arange(targets.shape[1], device=targets.device) < target_lengths[:, None]
    repeats = ((targets[:, 1:] == targets[:, :-1]) & inside[:, 1:]).sum(dim=1)
    return target_lengths + repeats <= input_lengths


def linear_ctc_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    input_lengths: torch.Tensor,
    target_lengths: torch.Tensor,
    blank: int,
    reduction: str = "mean",
    zero_infinity: bool = False,
    blank_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """`F.ctc_loss` of ``log_softmax(hidden @ weight.T)`` without ever building (B, A, V) (Graves et al. 2006).

    Args:
        hidden: frames (B, A, D).
        weight: one row per label (V, D), frozen or trained.
        targets: labels (B, U), padded with anything.
        input_lengths: frames that count (B,).
        target_lengths: labels that count (B,); 0 = nothing is said.
        blank: label of the blank: a row of ``weight``, or V when ``blank_weight`` is given.
        reduction: ``"mean"`` (losses over target lengths, then the mean, as `F.ctc_loss`), ``"sum"``, ``"none"``.
        zero_infinity: whether a target that does not fit its frames counts as loss 0 with gradient 0.
        blank_weight: a blank row (D,) beside ``weight``.

    Returns:
        A scalar, or (B,) for ``"none"``.

    Raises:
        ValueError: for another reduction, or a ``blank`` that does not fit ``blank_weight``.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}, expected 'mean', 'sum' or 'none'.")
    if (blank == len(weight)) != (blank_weight is not None):
        raise ValueError(
            f"blank is {blank} with {len(weight)} rows in weight: give blank_weight for blank = {len(weight)}, "
            "or a row of weight without it."
        )
    if not torch.is_grad_enabled():  # no gradient work; torch.inference_mode allows none
        hidden, weight = hidden.detach(), weight.detach()
        blank_weight = None if blank_weight is None else blank_weight.detach()
    # The rows' own type decides the precision; autocast would change it between forward and backward.
    hidden = hidden.contiguous()
    with torch.autocast(hidden.device.type, enabled=False):
        losses = _LinearCTC.apply(
            hidden, weight, targets, input_lengths, target_lengths, blank, zero_infinity, blank_weight
        )
    if reduction == "mean":
        return (losses / target_lengths.clamp(min=1)).mean()
    return losses.sum() if reduction == "sum" else losses
