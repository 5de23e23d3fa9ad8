"""Tiny random stand-ins for encoders and LLMs, saved as folders that every `from_components` takes."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from tests.tokenizers import make_tokenizer

MEL_BINS = 16
WINDOW_S = 2  # so that windows, overlap and seams are met by recordings of a few seconds
LLM_CONFIGS: dict[str, type[PreTrainedConfig]] = {"qwen3": Qwen3Config, "gemma": Gemma3TextConfig}  # others: Llama


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


def w2v_bert_config(**fields) -> Wav2Vec2BertConfig:
    """Two layers of w2v-BERT 2.0, with the positions and the SpecAugment of its checkpoint."""
    sizes = {
        "feature_projection_input_dim": 2 * MEL_BINS,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "conv_depthwise_kernel_size": 5,
    }
    return Wav2Vec2BertConfig(**(sizes | fields))


def save_w2v_bert(folder: Path, seed: int = 0, **fields) -> str:
    """A w2v-BERT 2.0 encoder of two layers; returns the folder."""
    torch.manual_seed(seed)
    Wav2Vec2BertModel(w2v_bert_config(**fields)).save_pretrained(folder)
    return str(folder)


def save_llm(folder: Path, seed: int = 1, family: str = "llama3") -> str:
    """An LLM of two layers with a tokenizer of `tests/tokenizers.py`; returns the folder."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(family)
    kind = LLM_CONFIGS.get(family, LlamaConfig)
    config = kind(
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
        **({} if kind is LlamaConfig else {"head_dim": 12}),
        # One layer that sees the last 16 positions only, as most of Gemma's do.
        **(
            {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]} if family == "gemma" else {}
        ),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
