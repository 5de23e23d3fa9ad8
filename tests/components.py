"""Tiny random stand-ins for Whisper and an LLM, saved as folders that every `from_components` takes."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tests.tokenizers import make_tokenizer

MEL_BINS = 16
WINDOW_S = 2  # so that windows, overlap and seams are met by recordings of a few seconds


def save_encoder(folder: Path, window_s: int = WINDOW_S, seed: int = 0) -> str:
    """A Whisper encoder of two layers; returns the folder."""
    torch.manual_seed(seed)
    config = WhisperConfig(
        num_mel_bins=MEL_BINS,
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        max_source_positions=50 * window_s,
    )
    WhisperEncoder(config).save_pretrained(folder)
    return str(folder)


def save_llm(folder: Path, seed: int = 1, family: str = "llama3") -> str:
    """A Llama of two layers with a tokenizer of `tests/tokenizers.py`; returns the folder."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(family)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token else tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
