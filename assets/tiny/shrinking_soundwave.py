"""The two adapters: frames into the LLM's space (§2.2.1), then down to one position per token (§2.3.1).

Letters: n windows or recordings, E encoder frames (20 ms), A aligned frames (40 ms), K kept frames, D_e and D widths.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class MultiHeadAttention(nn.Module):
    """Multi-head attention (n, Q, D) over (n, A, D) -> (n, Q, D), with biases as `torch.nn.MultiheadAttention`."""

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, queries: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """``mask`` (n, A) bool: what may be looked at. A row without anything to look at gets exactly 0."""

        def heads(x):  # (n, X, D) -> (n, H, X, D / H)
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        attn_mask = None
        if mask is not None:
            empty = ~mask.any(dim=1, keepdim=True)
            attn_mask = (mask | empty)[:, None, None, :]  # an empty row looks at anything, and is zeroed below: no NaN
        mixed = F.scaled_dot_product_attention(
            heads(self.q_proj(queries)),
            heads(self.k_proj(context)),
            heads(self.v_proj(context)),
            attn_mask=attn_mask,
            dropout_p=self.dropout if self.training else 0.0,
        )
        out = self.out_proj(mixed.transpose(1, 2).flatten(-2))
        return out if mask is None else out.masked_fill(empty[..., None], 0.0)


class AlignmentLayer(nn.Module):
    """One pre-norm Transformer encoder layer with ReLU; ``attention="frame"`` lets a frame see only itself."""

    def __init__(self, config):
        super().__init__()
        width = config.text_config.hidden_size
        self.attention = config.alignment_attention
        self.dropout = nn.Dropout(config.alignment_dropout)
        self.self_attn = MultiHeadAttention(width, config.alignment_num_heads, config.alignment_dropout)
        self.linear1 = nn.Linear(width, config.alignment_ffn_dim)
        self.linear2 = nn.Linear(config.alignment_ffn_dim, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(n, A, D), valid frames (n, A) bool -> (n, A, D)."""
        y = self.norm1(x)
        if self.attention == "frame":
            y = self.self_attn.out_proj(self.self_attn.v_proj(y))
        else:
            y = self.self_attn(y, y, mask)
        x = x + self.dropout(y)
        y = self.linear2(self.dropout(F.relu(self.linear1(self.norm2(x)))))
        return x + self.dropout(y)


class AlignmentAdapter(nn.Module):
    """Stacks two encoder frames and maps them into the LLM's space: (n, E, D_e) -> (n, A, D), A = E / 2 (§2.2.1)."""

    def __init__(self, config):
        super().__init__()
        width = config.text_config.hidden_size
        self.proj = nn.Linear(2 * config.encoder_width, width)
        self.layer = AlignmentLayer(config)
        self.norm = nn.LayerNorm(width)

    def forward(self, encoder_features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``encoder_features`` (n, E, D_e), E even; ``mask`` (n, A) bool of valid aligned frames."""
        n, E, D_e = encoder_features.shape
        stacked = encoder_features.reshape(n, E // 2, 2 * D_e).to(self.proj.weight.dtype)  # (n, A, 2 D_e)
        return self.norm(self.layer(self.proj(stacked), mask))

    @torch.no_grad()
    def init_towards(self, blank: torch.Tensor, n_rows: int) -> None:
        """Let the blank's row (D,) win many frames at the start, as CTC wants it: tokens are rare among frames.

        A blank that begins by losing to the loudest of the head's ``n_rows`` teaches the head to stretch tokens over
        the silence instead of emitting peaks, and it does not come back from there. Frames have length sqrt(D), rows
        of length l then score about N(0, l^2), the loudest ``l * sqrt(2 ln n_rows)``: the frames lean by as much.
        """
        self.norm.bias.copy_(F.normalize(blank.float(), dim=0) * (2 * math.log(n_rows)) ** 0.5)


class ShrinkingAdapter(nn.Module):
    """``LayerNorm(x' + cross_attn(x', x, x))``: the kept frames x' gather the rest (eq. 1, Fig. 3)."""

    def __init__(self, config):
        super().__init__()
        width = config.text_config.hidden_size
        self.context = config.shrink_context
        self.cross_attn = MultiHeadAttention(width, config.shrinking_num_heads, config.shrinking_dropout)
        self.norm = nn.LayerNorm(width)

    @torch.no_grad()
    def init_from_embeddings(self, embedded: torch.Tensor) -> None:
        """Make speech as loud as text: gain = mean norm of embedded tokens (V, D) / sqrt(D)."""
        self.norm.weight.fill_(embedded.float().norm(dim=-1).mean() / embedded.shape[-1] ** 0.5)

    def forward(
        self, kept: torch.Tensor, frames: torch.Tensor, keep: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Kept frames (n, K, D) look back at frames (n, A, D).

        Args:
            kept: the kept frames, packed to the front.
            frames: all aligned frames.
            keep: which frames were kept (n, A) bool.
            mask: valid frames (n, A) bool.

        Returns:
            (n, K, D). Where nothing is left to look at (every frame kept), the norm of the kept frames alone.
        """
        context = {"dropped": mask & ~keep, "kept": keep, "all": mask}[self.context]
        return self.norm(kept + self.cross_attn(kept, frames, context))


def merge_similar(features: torch.Tensor, lengths: torch.Tensor, budget: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge neighbouring positions until each row has at most ``budget`` of them.

    The least informative positions are those most like their neighbour (cosine). A merged position is the mean of its
    members, as loud as they are on average: speech must stay as loud as text.

    Args:
        features: (n, K, D), 0 beyond a row's length or anything.
        lengths: valid positions per row (n,).
        budget: positions that a row may keep, at least 1.

    Returns:
        (n, min(K, budget), D) and lengths (n,).

    Raises:
        ValueError: for a budget below 1.
    """
    if budget < 1:
        raise ValueError(f"max_audio_positions is {budget}; expected at least 1, or None for no bound.")
    n, K, D = features.shape
    if K <= budget:
        return features, lengths
    position = torch.arange(K, device=features.device)
    inside = position < lengths[:, None]  # (n, K)
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    likeness = F.cosine_similarity(wide[:, 1:], wide[:, :-1], dim=-1).masked_fill(~inside[:, 1:], torch.inf)
    # The budget's most telling boundaries stay. Stable: equal ones do not depend on the batch.
    rank = likeness.argsort(dim=1, stable=True).argsort(dim=1)
    starts = F.pad((rank < budget - 1) & inside[:, 1:], (1, 0))
    group = starts.long().cumsum(dim=1)  # (n, K) merged position of each one

    share = inside[..., None].to(wide.dtype)

    def gathered(values: torch.Tensor) -> torch.Tensor:  # sums per group: (n, K, X) -> (n, budget, X)
        sums = values.new_zeros(n, budget, values.shape[-1])
        return sums.scatter_add(1, group[..., None].expand_as(values), values * share)

    count = gathered(torch.ones_like(share)).clamp(min=1)
    mean, loud = gathered(wide) / count, gathered(wide.norm(dim=-1, keepdim=True)) / count
    # What is not merged is multiplied by exactly 1: a row does not change because a longer one stands beside it.
    merged = mean * (loud / mean.norm(dim=-1, keepdim=True).clamp(min=1e-12))
    return merged.to(features.dtype), lengths.clamp(max=budget)
