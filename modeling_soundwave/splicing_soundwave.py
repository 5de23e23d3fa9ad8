"""One placeholder per recording becomes K positions: embeddings, mask and labels realigned together.

Letters: B batch, N prompt tokens, L LLM positions = N - 1 + K per recording, K kept frames, D LLM width.
"""

from typing import NamedTuple

import torch


class Spliced(NamedTuple):
    """A batch ready for the LLM."""

    inputs_embeds: torch.Tensor  # (B, L, D), 0 on padding
    attention_mask: torch.Tensor  # (B, L)
    position_ids: torch.Tensor  # (B, L)
    labels: torch.Tensor | None  # (B, L), -100 on recordings, padding and a row's first position
    audio_positions: torch.Tensor | None  # (n_audios,) positions that each recording takes
    source: torch.Tensor  # (B, L) position in input_ids that each one comes from, -1 on padding
    compression: torch.Tensor | None = None  # (n,) aligned frames per position of newly encoded recordings


def check_mask(attention_mask: torch.Tensor) -> None:
    """Raise a ValueError for a row whose valid tokens are not contiguous."""
    steps = attention_mask.bool().int().diff(dim=1)
    holes = (steps == 1).sum(dim=1) + (steps == -1).sum(dim=1) > 1
    padded_both = (steps == 1).any(dim=1) & (steps == -1).any(dim=1)
    if bool((holes | padded_both).any()):
        rows = torch.nonzero(holes | padded_both).flatten().tolist()
        raise ValueError(f"attention_mask has a hole in rows {rows}; pad each row on one side only.")


def splice_audio(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    text_embeds: torch.Tensor,
    audio_token_id: int | None,
    audio_embeds: torch.Tensor | None,
    audio_lengths: torch.Tensor | None,
    labels: torch.Tensor | None = None,
    pad_left: bool | None = None,
) -> Spliced:
    """Put the shrunk features of every recording where its placeholder stands (§2.1), by gather alone.

    Args:
        input_ids: (B, N), one ``audio_token_id`` per recording, in order of the recordings.
        attention_mask: (B, N), 0 on padding, each row padded on one side.
        text_embeds: (B, N, D) embeddings of the ids (anything at placeholders).
        audio_token_id: the placeholder.
        audio_embeds: (n_audios, K, D), or ``None`` without recordings.
        audio_lengths: (n_audios,) valid positions of each.
        labels: (B, N) or ``None``.
        pad_left: side of the padding that different lengths need; ``None`` = the side that ``attention_mask`` shows
            (left when it shows none).

    Raises:
        ValueError: when placeholders and recordings differ in number, the mask has a hole, or lengths do not fit.
    """
    B, N, D = text_embeds.shape
    device = text_embeds.device  # a device map may have put it elsewhere than the recordings
    input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
    labels, audio_embeds, audio_lengths = (
        None if given is None else given.to(device) for given in (labels, audio_embeds, audio_lengths)
    )
    check_mask(attention_mask)
    valid = attention_mask.bool()
    is_audio = valid & (input_ids == audio_token_id) if audio_token_id is not None else torch.zeros_like(valid)
    if audio_embeds is None or not len(audio_embeds):
        audio_embeds = audio_lengths = None  # an empty list of recordings
    n_audios = 0 if audio_embeds is None else audio_embeds.shape[0]
    if int(is_audio.sum()) != n_audios:
        raise ValueError(
            f"input_ids hold {int(is_audio.sum())} audio tokens (id {audio_token_id}), but {n_audios} recordings were "
            "given; give one placeholder per recording."
        )
    if audio_embeds is not None and audio_lengths is not None:
        K = audio_embeds.shape[1]
        if audio_lengths.shape != (n_audios,) or bool(((audio_lengths < 0) | (audio_lengths > K)).any()):
            raise ValueError(
                f"audio_lengths are {audio_lengths.tolist()}, expected {n_audios} numbers of positions up to {K}: "
                "those of audio_embeds (n_audios, K, D)."
            )

    audio_number = (is_audio.flatten().cumsum(0) - 1).view(B, N).clamp(min=0)  # (B, N) recording of a placeholder
    width = valid.long()  # positions that each token takes
    if audio_embeds is not None and audio_lengths is not None:
        width = torch.where(is_audio, audio_lengths[audio_number], width)
    ends = width.cumsum(dim=1)
    totals = ends[:, -1]
    L = int(totals.max())
    if pad_left is None:
        pad_left = not bool((valid[:, 0] & ~valid[:, -1]).any())

    position = torch.arange(L, device=device).expand(B, L)
    shift = (L - totals)[:, None] if pad_left else torch.zeros_like(totals)[:, None]
    position = position - shift  # position within the row's own content
    inside = (position >= 0) & (position < totals[:, None])
    source = torch.searchsorted(ends, position.clamp(min=0).contiguous(), right=True).clamp(max=N - 1)  # (B, L)

    embeds = text_embeds.gather(1, source[..., None].expand(B, L, D))
    from_audio = is_audio.gather(1, source) & inside
    if audio_embeds is not None and audio_embeds.shape[1]:
        offset = (position - (ends - width).gather(1, source)).clamp(0, audio_embeds.shape[1] - 1)
        spoken = audio_embeds[audio_number.gather(1, source), offset].to(embeds.dtype)  # (B, L, D)
        embeds = torch.where(from_audio[..., None], spoken, embeds)
    embeds = embeds * inside[..., None].to(embeds.dtype)
    if labels is not None:
        unpredicted = from_audio | (position <= 0) | ~inside  # nothing stands before a row's first position
        labels = labels.gather(1, source).masked_fill(unpredicted, -100)
    return Spliced(
        inputs_embeds=embeds,
        attention_mask=inside.to(attention_mask.dtype),
        position_ids=position.clamp(min=0) * inside,
        labels=labels,
        audio_positions=audio_lengths,
        source=source.masked_fill(~inside, -1),
    )
