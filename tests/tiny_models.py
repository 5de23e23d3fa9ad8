"""Random models of the real classes at toy sizes, for tests that need no processor."""

import torch
from transformers import LlamaConfig, WhisperConfig

from soundwave.modeling_soundwave import SoundwaveConfig, SoundwaveForConditionalGeneration

VOCABULARY = 60
AUDIO_ID = VOCABULARY  # beyond the vocabulary: must never be embedded
MEL_BINS = 16
WINDOW_MEL_FRAMES = 160


def tiny_config(**fields) -> SoundwaveConfig:
    """D_e = 24, D = 32, windows of 1.6 s; ``fields`` of `SoundwaveConfig` on top."""
    audio = WhisperConfig(
        d_model=24,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        num_mel_bins=MEL_BINS,
        max_source_positions=WINDOW_MEL_FRAMES // 2,
        dropout=0.0,
    )
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    defaults = {
        "audio_config": audio,
        "text_config": text,
        "audio_token_id": AUDIO_ID,
        "audio_padding": "longest",
    }
    return SoundwaveConfig(**(defaults | fields))


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float64, **fields) -> SoundwaveForConditionalGeneration:
    """A model whose random CTC head emits a lively mix of tokens and blanks."""
    torch.manual_seed(seed)
    model = SoundwaveForConditionalGeneration(tiny_config(**fields)).to(dtype).eval()
    model.init_from_embeddings()
    with torch.no_grad():
        if model.ctc_head.blank is not None:
            rows = model.ctc_head.rows(model.ctc_rows())
            model.ctc_head.blank.copy_(3 * rows.std() * torch.randn(rows.shape[1], dtype=dtype))
            model.alignment_adapter.norm.bias.zero_()  # no lean to the blank
    return model
