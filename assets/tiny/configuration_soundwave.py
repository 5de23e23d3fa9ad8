"""What a Soundwave model is: the sizes and switches that are saved with its weights."""

from typing import ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

MEL_FRAMES_PER_SECOND = 100
WINDOW_SECONDS = 30  # of an encoder without a bound of its own: as Whisper's


class SoundwaveConfig(PreTrainedConfig):
    """Configuration of every Soundwave model (arXiv 2502.12900).

    The defaults are the paper's; the values that reproduce the published inference code are set by its converter
    (the two differ, see the field notes).

    Args:
        audio_config: the encoder's own configuration (Whisper or w2v-BERT 2.0). Width ``D_e``.
        text_config: the LLM's own configuration, any ``AutoModelForCausalLM``. Width ``D``, vocabulary ``V``.
        audio_token_id: id that stands for one recording in ``input_ids``. May be >= ``V``: it is never embedded.
        alignment_attention: ``"full"`` (§2.2.1) lets a frame attend to its whole window; ``"frame"`` only to itself,
            as the published code does.
        alignment_num_heads: heads of the alignment layer; ``None`` = the LLM's.
        alignment_ffn_dim: feed-forward width of the alignment layer; ``None`` = 2 ``D`` (Table 1: 144M in all).
        alignment_dropout: probability, in the alignment layer.
        shrink_context: what the kept frames look back at (§2.3.1, Fig. 3): ``"dropped"`` the frames not kept,
            ``"kept"`` (published code) the kept ones, or ``"all"``.
        shrinking_num_heads: heads of the look-back attention; ``None`` = the LLM's.
        shrinking_dropout: probability, on the look-back attention weights.
        keep_blanks: whether a run of CTC blanks keeps one position (published code) or none.
        mask_padding: whether frames beyond a recording's end are masked; the published code counts them all
            (which needs full windows: ``audio_padding="max_length"``).
        ctc_head: ``"tied"`` scores with the LLM's input embeddings, frozen, times a trained scale; ``"separate"``
            with a matrix of its own, initialised from them.
        ctc_blank_id: ``None`` = a trained blank row beside the matrix; an id = that row *is* the blank (released
            layout).
        ctc_token_ids: the LLM token ids that the CTC head may emit, ascending; ``None`` = all ``V``.
        ctc_weight: weight of the CTC loss beside the cross-entropy in stage II (0.3).
        max_audio_positions: most LLM positions that a recording may take; more are merged, the most alike first.
            ``None`` = no bound.
        max_transcript_seconds: the longest stretch of speech that the LLM was trained to write down; `transcribe` cuts
            longer ones at pauses. ``None`` = a whole window.
        audio_padding: ``"max_length"`` encodes full windows, as Whisper was trained; ``"longest"`` only what is there.
        window_seconds: length of an encoder window; longer recordings are cut into such windows. ``None`` = the
            encoder's own: 30 for w2v-BERT, which has no bound; Whisper's follows from its positions.
        audio_model_id: Hub id of the encoder.
        audio_model_revision: commit of the encoder. Set = its weights are read from there and not saved with ours.
        text_model_id: Hub id of the LLM.
        text_model_revision: commit of the LLM. Set = its weights are read from there and not saved with ours.
        lora: ``{"r", "alpha", "target_modules"}`` of the LLM's LoRA tensors saved with the weights, ``None`` without.
        encoder_lora: the same of the encoder's.
        pad_token_id: padding id of ``input_ids``; ``None`` = the LLM's.

    Raises:
        ValueError: for a value outside the choices above, naming the field.
    """

    model_type = "soundwave"
    sub_configs_defaults = {
        "audio_config": SubConfigSpec(config_class=AutoConfig, model_type="whisper"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    audio_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    audio_token_id: int | None = None
    alignment_attention: str = "full"
    alignment_num_heads: int | None = None
    alignment_ffn_dim: int | None = None
    alignment_dropout: float = 0.1
    shrink_context: str = "dropped"
    shrinking_num_heads: int | None = None
    shrinking_dropout: float = 0.1
    keep_blanks: bool = False
    mask_padding: bool = True
    ctc_head: str = "tied"
    ctc_blank_id: int | None = None
    ctc_token_ids: list | None = None
    ctc_weight: float = 0.3
    max_audio_positions: int | None = None
    max_transcript_seconds: float | None = None
    audio_padding: str = "max_length"
    window_seconds: int | None = None
    audio_model_id: str | None = None
    audio_model_revision: str | None = None
    text_model_id: str | None = None
    text_model_revision: str | None = None
    lora: dict | None = None
    encoder_lora: dict | None = None
    pad_token_id: int | None = None
    tie_word_embeddings: bool = False

    _CHOICES: ClassVar[dict[str, tuple]] = {
        "alignment_attention": ("full", "frame"),
        "shrink_context": ("dropped", "kept", "all"),
        "ctc_head": ("tied", "separate"),
        "audio_padding": ("max_length", "longest"),
    }

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name, choices in self._CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"SoundwaveConfig.{name} is {getattr(self, name)!r}, expected one of {choices}.")
        for name in ("max_audio_positions", "max_transcript_seconds"):
            if (bound := getattr(self, name)) is not None and bound <= 0:
                raise ValueError(f"SoundwaveConfig.{name} is {bound}, expected more than 0, or None for no bound.")
        self._check_window()
        if self.audio_padding == "longest" and not self.mask_padding:
            raise ValueError(
                "SoundwaveConfig.mask_padding is False with audio_padding 'longest': how much padding counts would "
                "depend on the batch; set mask_padding or audio_padding='max_length'."
            )
        text = self.text_config
        self.alignment_num_heads = self.alignment_num_heads or text.num_attention_heads
        self.shrinking_num_heads = self.shrinking_num_heads or text.num_attention_heads
        self.alignment_ffn_dim = self.alignment_ffn_dim or 2 * text.hidden_size
        for name in ("alignment_num_heads", "shrinking_num_heads"):
            if text.hidden_size % getattr(self, name):
                raise ValueError(
                    f"SoundwaveConfig.{name} is {getattr(self, name)}, expected a divisor of the LLM's width "
                    f"{text.hidden_size}."
                )
        if self.ctc_token_ids is not None and sorted(set(self.ctc_token_ids)) != list(self.ctc_token_ids):
            raise ValueError("SoundwaveConfig.ctc_token_ids must be ascending without repeats.")
        emitted = range(text.vocab_size) if self.ctc_token_ids is None else self.ctc_token_ids
        if self.ctc_blank_id is not None and self.ctc_blank_id not in emitted:
            raise ValueError(
                f"SoundwaveConfig.ctc_blank_id is {self.ctc_blank_id}, which the CTC head cannot emit: expected "
                + (f"an id below {text.vocab_size}." if self.ctc_token_ids is None else "one of ctc_token_ids.")
            )
        if self.pad_token_id is None:
            self.pad_token_id = text.pad_token_id

    @property
    def blank_id(self) -> int:
        """Id of the CTC blank among the token ids that the head emits: ``V``, or the released layout's own row."""
        return self.text_config.vocab_size if self.ctc_blank_id is None else self.ctc_blank_id

    def _check_window(self) -> None:
        if self.window_seconds is None:
            return
        if self.window_seconds < 1:
            raise ValueError(f"SoundwaveConfig.window_seconds is {self.window_seconds}, expected at least 1.")
        if self._is_whisper and self.window_mel_frames != MEL_FRAMES_PER_SECOND * self.window_seconds:
            raise ValueError(
                f"SoundwaveConfig.window_seconds is {self.window_seconds}, but this Whisper encoder has windows of "
                f"{self.window_mel_frames / MEL_FRAMES_PER_SECOND:g} s; leave window_seconds out."
            )

    @property
    def _is_whisper(self) -> bool:
        return self.audio_config.model_type == "whisper"

    @property
    def window_mel_frames(self) -> int:
        """Length of an encoder window in mel frames of 10 ms (3,000 for Whisper)."""
        if self._is_whisper:
            return 2 * self.audio_config.max_source_positions
        return MEL_FRAMES_PER_SECOND * (self.window_seconds or WINDOW_SECONDS)

    @property
    def mel_bins(self) -> int:
        """Mel bins ``M`` of ``input_features``; w2v-BERT takes two frames of them at once."""
        audio = self.audio_config
        return audio.num_mel_bins if self._is_whisper else audio.feature_projection_input_dim // 2

    @property
    def encoder_width(self) -> int:
        """Width ``D_e`` of the encoder's frames."""
        return self.audio_config.hidden_size


SoundwaveConfig.register_for_auto_class()
