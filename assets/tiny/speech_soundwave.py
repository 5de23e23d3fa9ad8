"""The speech side: recordings into the LLM's space, with or without an LLM behind it.

Letters as in `modeling_soundwave`: M mel bins, T mel frames (10 ms), E encoder frames (20 ms), A aligned frames
(40 ms), K kept frames, U target tokens, D_e and D widths, V LLM vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from .aligning_soundwave import SoundwaveAligningMixin
from .configuration_soundwave import SoundwaveConfig
from .ctc_soundwave import CTCHead
from .encoders_soundwave import MEL_PER_ENCODER_FRAME, audio_encoder
from .loading_soundwave import SoundwaveLoadingMixin
from .seams_soundwave import collapse_runs, pack_rows, runs_of, seam_windows
from .shrinking_soundwave import AlignmentAdapter, ShrinkingAdapter, merge_similar
from .streaming_soundwave import SoundwaveStreamingMixin
from .transcribing_soundwave import MEL_PER_ALIGNED_FRAME, SoundwaveTranscribingMixin

# Through a frozen encoder at once: one of Whisper's windows is the quickest on a CPU, a GPU wants more to keep busy.
MEL_FRAMES_PER_PASS = {"cpu": 3000, "other": 16 * 3000}
SIMILAR = 0.75  # of the longest window of a pass, the shortest: no more than a quarter of a pass is padding


def _is_sharded(module: nn.Module) -> bool:
    """Whether each process holds a part of the weights only: FSDP2's are DTensors, ZeRO-3's have an id."""
    return any(hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id") for parameter in module.parameters())


def encoder_passes(lengths: list[int], most: int) -> list[list[int]]:
    """Numbers of windows that go through the encoder together, longest first, from their lengths in mel frames.

    A pass holds at most ``most`` frames, padding included, or one window.
    """
    passes: list[list[int]] = []
    for window in sorted(range(len(lengths)), key=lambda window: -lengths[window]):
        longest = lengths[passes[-1][0]] if passes else 0
        similar = lengths[window] >= SIMILAR * longest
        if passes and similar and (len(passes[-1]) + 1) * longest <= most:
            passes[-1].append(window)
        else:
            passes.append([window])
    return passes


class AlignedAudio(NamedTuple):
    """Whole recordings in the LLM's space."""

    frames: torch.Tensor  # (n_audios, A, D)
    mask: torch.Tensor  # (n_audios, A) bool, valid frames first
    token_ids: torch.Tensor | None  # (n_audios, A) arg-max of the CTC head


class AudioFeatures(NamedTuple):
    """Recordings as the LLM sees them; a chat may keep them for its next turns (``audio_embeds``)."""

    embeds: torch.Tensor  # (n_audios, K, D)
    lengths: torch.Tensor  # (n_audios,) valid positions of each
    compression: torch.Tensor  # (n_audios,) aligned frames (40 ms) per position


@dataclass
class SoundwaveCTCOutput(ModelOutput):
    """Output of `SoundwaveForCTC`: losses (), and per recording the arg-max ids (n_audios, A) with their mask."""

    loss: torch.Tensor | None = None
    ctc_loss: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None


class SoundwavePreTrainedModel(SoundwaveLoadingMixin, PreTrainedModel):
    """What all Soundwave models share: configuration, initialisation, loading and saving of stage repositories."""

    config_class = SoundwaveConfig
    config: SoundwaveConfig
    main_input_name = "input_features"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @property
    def device(self) -> torch.device:
        """Where inputs go: that of the first part that is not on disk; accelerate brings those for a call."""
        return next((p.device for p in self.parameters() if not p.is_meta), torch.device("cpu"))

    def post_init(self):
        """As the library; of the layers that must stay whole, only those that are here: FSDP looks for each by name.

        Whisper names its decoder's too.
        """
        super().post_init()
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, CTCHead):
            if module.weight is not None and not getattr(module.weight, "_is_hf_initialized", False):
                nn.init.normal_(module.weight, std=self.config.text_config.hidden_size**-0.5)
            for parameter in (module.log_scale, module.blank):
                if parameter is not None:
                    nn.init.zeros_(parameter)
            if module.token_ids is not None:  # not in any file: the loader leaves it empty
                module.token_ids.copy_(torch.tensor(self.config.ctc_token_ids))

    def train(self, mode: bool = True):
        """Training mode for the parts that are trained; frozen ones stay in evaluation mode (no dropout)."""
        super().train(mode)
        for module in self.children():
            if mode and not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
        return self


class SoundwaveForCTC(
    SoundwaveTranscribingMixin, SoundwaveStreamingMixin, SoundwaveAligningMixin, SoundwavePreTrainedModel
):
    """Encoder, alignment adapter and CTC head: what stage I trains; transcribes without an LLM (§2.2)."""

    _holds_llm = False
    _AUTO_CLASSES: tuple[str, ...] = ("AutoModel", "AutoModelForCTC")

    def __init__(
        self,
        config: SoundwaveConfig,
        audio_tower: nn.Module | None = None,
        ctc_rows: torch.Tensor | None = None,
    ):
        super().__init__(config)
        encoder = audio_encoder(config.audio_config.model_type)
        self.audio_tower = audio_tower or encoder.build(config.audio_config)
        self.alignment_adapter = AlignmentAdapter(config)
        holds_rows = config.ctc_head == "separate" or not self._holds_llm
        self.ctc_head = CTCHead(config, holds_rows, ctc_rows)
        self.freeze()
        if type(self) is SoundwaveForCTC:
            self.post_init()

    def freeze(self) -> None:
        """What no stage trains (Fig. 2): the encoder and the rows of a tied CTC head. A run may unfreeze them."""
        self.audio_tower.requires_grad_(False)
        if self.ctc_head.tied and self.ctc_head.weight is not None:
            self.ctc_head.weight.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """Type of what learns, or of the LLM where there is one; a frozen encoder may have another."""
        return self.alignment_adapter.proj.weight.dtype

    def get_input_embeddings(self):
        """None: there is no LLM to embed tokens."""
        return None

    def ctc_rows(self) -> torch.Tensor | None:
        """The LLM's embedding matrix (V, D) for a tied head; ``None`` where the head holds its rows itself."""
        return None

    def encode(self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The encoder alone: mel frames (n_windows, M, T), the valid ones (n_windows, T) -> (n_windows, E, D_e).

        A frozen encoder takes windows of similar length together, and a bounded number of frames at once, however
        many windows there are.
        """
        tower = self.audio_tower
        features = input_features.to(tower.dtype)
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in tower.parameters()):
            return self._encode(features, input_features_mask)
        n, _, T = features.shape
        lengths, mask = [T] * n, input_features_mask
        if mask is not None and n > 1 and self.config.audio_padding == "longest":
            lengths = mask.sum(dim=1).tolist()
        with torch.no_grad():
            kind = features.device.type
            passes = encoder_passes(lengths, MEL_FRAMES_PER_PASS.get(kind, MEL_FRAMES_PER_PASS["other"]))
            if len(passes) == 1 or _is_sharded(tower):  # every process has to gather its layers as often
                return self._encode(features, mask)
            encoded = features.new_zeros(n, T // MEL_PER_ENCODER_FRAME, self.config.encoder_width)
            for windows in passes:
                longest = -(-lengths[windows[0]] // MEL_PER_ALIGNED_FRAME) * MEL_PER_ALIGNED_FRAME
                part = self._encode(features[windows, :, :longest], None if mask is None else mask[windows, :longest])
                encoded[windows, : part.shape[1]] = part.to(encoded.device)
            return encoded

    def _encode(self, features: torch.Tensor, features_mask: torch.Tensor | None) -> torch.Tensor:
        """As `encode`, at once."""
        encoder = audio_encoder(self.config.audio_config.model_type)
        return encoder.encode(self.audio_tower, features, features_mask, self.config.audio_padding)

    def align(
        self,
        input_features=None,
        input_features_mask=None,
        window_offsets=None,
        windows_per_audio=None,
        encoder_features=None,
        greedy: bool = True,
    ) -> AlignedAudio:
        """Windows -> whole recordings in the LLM's space: encode, align, then join windows at their seams.

        ``greedy=False`` leaves out the arg-max over V where only a loss needs the frames and no windows are joined.

        Raises:
            ValueError: when features are missing, non-finite, of another shape than the encoder takes, or the counts
                of windows differ.
        """
        self._check_audio(input_features, input_features_mask, windows_per_audio, window_offsets, encoder_features)
        mask = None
        if input_features_mask is not None and self.config.mask_padding:
            mask = input_features_mask[:, ::MEL_PER_ALIGNED_FRAME].bool()
            counts = mask.sum(dim=1).tolist()  # asked before the encoder keeps a GPU busy
            if min(counts) < 1:
                raise ValueError(f"window {counts.index(0)} is masked whole; leave out a recording without samples.")
            mask = mask[:, : max(counts)]  # what is masked for every window costs nothing from here on
        if encoder_features is None:
            encoder_features = self.encode(input_features, input_features_mask)
        n, E, _ = encoder_features.shape
        if mask is None:
            mask = torch.ones(n, E // 2, dtype=torch.bool, device=encoder_features.device)
        A = mask.shape[1]
        frames = self.alignment_adapter(encoder_features[:, : 2 * A], mask)  # (n_windows, A, D)
        mask = mask.to(frames.device)  # a device map may move them
        whole = windows_per_audio is None or len(windows_per_audio) == n
        if whole and not greedy:
            return AlignedAudio(frames, mask, None)
        token_ids = self._labels(frames, mask)
        if whole:
            return AlignedAudio(frames, mask, token_ids)

        windows_per_audio, window_offsets = windows_per_audio.to(frames.device), window_offsets.to(frames.device)
        audio_index = torch.repeat_interleave(windows_per_audio)  # (n_windows,) recording of each window
        offsets = window_offsets // MEL_PER_ALIGNED_FRAME
        kept = mask & seam_windows(token_ids, mask.sum(dim=1), offsets, audio_index, self.config.blank_id)
        # Kept frames in window order are each recording's frames in order: number them within their recording.
        row = audio_index[:, None].expand(n, A)[kept]
        lengths = torch.zeros_like(windows_per_audio).index_add(0, row, torch.ones_like(row))
        column = torch.arange(len(row), device=row.device) - (lengths.cumsum(0) - lengths)[row]
        size = (len(windows_per_audio), int(lengths.max()))
        joined = frames.new_zeros(*size, frames.shape[-1]).index_put((row, column), frames[kept])
        token_ids = token_ids.new_full(size, self.config.blank_id).index_put((row, column), token_ids[kept])
        mask = torch.arange(size[1], device=row.device) < lengths[:, None]
        return AlignedAudio(joined, mask, token_ids)

    def _labels(self, frames: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Arg-max ids (n, A) of the valid frames, the blank elsewhere: the scores over V are dear on padding too."""
        valid = self.ctc_head.labels(frames[mask], self.ctc_rows())
        return torch.full_like(mask, self.config.blank_id, dtype=torch.long).masked_scatter(mask, valid)

    def _check_audio(self, input_features, mask, windows_per_audio, window_offsets, encoder_features) -> None:
        features = input_features if encoder_features is None else encoder_features
        if features is None:
            raise ValueError(
                "No audio: give input_features (n_windows, M, T) or encoder_features (n_windows, E, D_e)."
            )
        bins, longest = self.config.mel_bins, self.config.window_mel_frames
        if encoder_features is None and (features.dim() != 3 or features.shape[1] != bins):
            raise ValueError(f"input_features have shape {tuple(features.shape)}, expected (n_windows, {bins}, T).")
        if not features.numel():
            raise ValueError(
                f"audio features of shape {tuple(features.shape)} hold nothing; leave them out without a recording."
            )
        frames = features.shape[-1] if encoder_features is None else features.shape[1] * MEL_PER_ENCODER_FRAME
        if frames % MEL_PER_ALIGNED_FRAME or frames > longest:
            raise ValueError(
                f"windows have {frames} mel frames, expected a multiple of {MEL_PER_ALIGNED_FRAME} up to {longest}; "
                "the processor cuts longer recordings into windows."
            )
        n = features.shape[0]
        for name, given, shape in (
            ("input_features_mask", mask, (n, frames)),
            ("window_offsets", window_offsets, (n,)),
        ):
            if given is not None and tuple(given.shape) != shape:
                raise ValueError(
                    f"{name} has shape {tuple(given.shape)}, expected {shape}, as the processor returns it."
                )
        if not self.training and not bool(torch.isfinite(features).all()):
            raise ValueError("audio features hold NaN or infinite values; check the recordings for them.")
        if windows_per_audio is not None:
            counts = windows_per_audio.tolist()
            if min(counts, default=1) < 1:
                raise ValueError(f"windows_per_audio is {counts}; every recording has a window.")
            if sum(counts) != n:
                raise ValueError(f"windows_per_audio counts {sum(counts)} windows, but {n} came.")
            if window_offsets is None and len(counts) != n:
                raise ValueError("a recording of several windows needs window_offsets (n_windows,) in mel frames.")

    def ctc_losses(self, aligned: AlignedAudio, ctc_labels, ctc_label_lengths) -> tuple[torch.Tensor, torch.Tensor]:
        """CTC losses (m,) and target lengths (m,) of the recordings that have a transcript (length >= 0)."""
        known = ctc_label_lengths >= 0
        lengths = ctc_label_lengths[known]
        frame_lengths = aligned.mask.sum(dim=1)[known]
        losses = self.ctc_head.loss(aligned.frames[known], frame_lengths, ctc_labels[known], lengths, self.ctc_rows())
        return losses, lengths

    def _reduce_ctc(self, losses, lengths, num_ctc_tokens):
        """Sum over a given count of target tokens, or the mean of per-token means (published code)."""
        if num_ctc_tokens is not None:
            return losses.sum() / num_ctc_tokens
        return (losses / lengths.clamp(min=1)).sum() / max(len(lengths), 1)

    def forward(
        self,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        window_offsets: torch.Tensor | None = None,
        windows_per_audio: torch.Tensor | None = None,
        encoder_features: torch.Tensor | None = None,
        ctc_labels: torch.Tensor | None = None,
        ctc_label_lengths: torch.Tensor | None = None,
        num_ctc_tokens: torch.Tensor | int | None = None,
    ) -> SoundwaveCTCOutput:
        """Greedy labels, and with ``ctc_labels`` (n_audios, U) the CTC loss over the LLM's vocabulary (§2.2.1).

        In training the labels are left out, unless windows are joined by them.
        ``num_ctc_tokens``: the loss is a sum over this count of target tokens; ``None`` = the mean of per-token means.
        """
        audio = (input_features, input_features_mask, window_offsets, windows_per_audio, encoder_features)
        aligned = self.align(*audio, greedy=not self.training)
        loss = None
        if ctc_labels is not None:
            loss = self._reduce_ctc(*self.ctc_losses(aligned, ctc_labels, ctc_label_lengths), num_ctc_tokens)
        return SoundwaveCTCOutput(loss=loss, ctc_loss=loss, token_ids=aligned.token_ids, mask=aligned.mask)

    @torch.no_grad()
    def transcribe_ids(self, **audio_inputs) -> list[list[int]]:
        """Greedy CTC: the LLM token ids of each recording, runs collapsed and blanks dropped."""
        aligned = self.align(**audio_inputs)
        assert aligned.token_ids is not None  # greedy by default
        rows = zip(aligned.token_ids, aligned.mask, strict=True)
        return [runs_of(ids[valid].tolist(), self.config.blank_id) for ids, valid in rows]


class SoundwaveModel(SoundwaveForCTC):
    """The whole speech side: recordings -> about one position per token in the LLM's space (§2.3.1)."""

    def __init__(
        self,
        config: SoundwaveConfig,
        audio_tower: nn.Module | None = None,
        ctc_rows: torch.Tensor | None = None,
    ):
        super().__init__(config, audio_tower, ctc_rows)
        self.shrinking_adapter = ShrinkingAdapter(config)
        if type(self) is SoundwaveModel:
            self.post_init()

    def shrink(self, aligned: AlignedAudio, max_audio_positions: int | None = None) -> AudioFeatures:
        """Keep the CTC peaks, let them look back; more than ``max_audio_positions`` of a recording are merged."""
        keep = collapse_runs(aligned.token_ids, aligned.mask, self.config.blank_id, self.config.keep_blanks)
        kept, lengths = pack_rows(aligned.frames, keep)
        embeds = self.shrinking_adapter(kept, aligned.frames, keep, aligned.mask)
        budget = self.config.max_audio_positions if max_audio_positions is None else max_audio_positions
        if budget is not None:
            embeds, lengths = merge_similar(embeds, lengths, budget)
        return AudioFeatures(embeds, lengths, aligned.mask.sum(dim=1) / lengths)

    def get_audio_features(self, max_audio_positions: int | None = None, **audio_inputs) -> AudioFeatures:
        """Shrunk features of recordings, their lengths and compression; reusable as ``audio_embeds`` in a chat.

        Args:
            max_audio_positions: budget of LLM positions per recording; ``None`` = the configuration's.
            **audio_inputs: as for `align`.
        """
        return self.shrink(self.align(**audio_inputs), max_audio_positions)


SoundwaveForCTC.register_for_auto_class("AutoModelForCTC")
