"""Tiny random models of other families with real processors, saved as folders that ``from_pretrained`` reads.

Nothing is downloaded: the tokenizers are those of `tests/tokenizers.py`, and for Voxtral a file in the format of
mistral-common that holds the 256 bytes.
"""

import base64
import json
from pathlib import Path

import torch
from transformers import (
    AudioFlamingo3Config,
    AudioFlamingo3ForConditionalGeneration,
    AudioFlamingo3Processor,
    GenerationConfig,
    GraniteSpeechConfig,
    GraniteSpeechFeatureExtractor,
    GraniteSpeechForConditionalGeneration,
    GraniteSpeechProcessor,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from tests.tokenizers import make_tokenizer

MEL_BINS = 16
VOXTRAL_AUDIO_ID = 24  # fixed by its processor
ENCODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "num_mel_bins": MEL_BINS,
}
# What a publisher likes to sample with; an evaluation is greedy all the same.
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 5, "repetition_penalty": 5.0}

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")

FLAMINGO_TEMPLATE = """{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{- message.content }}{%- else %}{%- for part in message.content %}
{%- if part.type == 'audio' %}{{- '<sound>' }}{%- else %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}
{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def llm_fields(vocabulary: int, **fields) -> dict:
    """Sizes of an LLM of two layers."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
    }
    return sizes | fields


def save_qwen2_audio(folder: Path) -> str:
    """Qwen2-Audio with the template that its processor brings."""
    tokenizer = make_tokenizer("qwen3")
    tokenizer.add_special_tokens(
        {"extra_special_tokens": ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]}, replace_extra_special_tokens=False
    )
    config = Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", **ENCODER},
        text_config={"model_type": "qwen2", **llm_fields(len(tokenizer))},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    processor = Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=MEL_BINS), tokenizer)
    return _save(folder, Qwen2AudioForConditionalGeneration, config, processor)


def save_audio_flamingo3(folder: Path) -> str:
    """Audio Flamingo 3."""
    tokenizer = make_tokenizer("qwen3")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<sound>"]}, replace_extra_special_tokens=False)
    config = AudioFlamingo3Config(
        audio_config={"model_type": "audioflamingo3_encoder", **ENCODER},
        text_config={"model_type": "qwen2", **llm_fields(len(tokenizer))},
        audio_token_id=tokenizer.convert_tokens_to_ids("<sound>"),
    )
    extractor = WhisperFeatureExtractor(feature_size=MEL_BINS)
    processor = AudioFlamingo3Processor(extractor, tokenizer, chat_template=FLAMINGO_TEMPLATE)
    return _save(folder, AudioFlamingo3ForConditionalGeneration, config, processor, scale=12)


def save_granite_speech(folder: Path) -> str:
    """Granite Speech, whose template knows texts only."""
    tokenizer = make_tokenizer("llama3")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|audio|>"]}, replace_extra_special_tokens=False)
    config = GraniteSpeechConfig(
        encoder_config={
            "model_type": "granite_speech_encoder",
            "input_dim": 2 * 80,
            "num_layers": 2,
            "hidden_dim": 32,
            "num_heads": 2,
            "context_size": 20,
            "max_pos_emb": 32,
        },
        projector_config={
            "model_type": "blip_2_qformer",
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "encoder_hidden_size": 32,
        },
        text_config={"model_type": "granite", **llm_fields(len(tokenizer))},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|audio|>"),
        has_lora_adapter=False,
    )
    processor = GraniteSpeechProcessor(
        GraniteSpeechFeatureExtractor(), tokenizer, chat_template=tokenizer.chat_template
    )
    return _save(folder, GraniteSpeechForConditionalGeneration, config, processor, scale=12)


def save_voxtral(folder: Path) -> str:
    """Voxtral; needs mistral-common."""
    folder.mkdir(parents=True, exist_ok=True)
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    names = [token["token_str"] for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    names += [f"<SPECIAL_{i}>" for i in range(len(names), VOXTRAL_AUDIO_ID)] + [
        "[AUDIO]",
        "[BEGIN_AUDIO]",
        "[TRANSCRIBE]",
    ]
    letters = [base64.b64encode(bytes([value])).decode() for value in range(256)]
    tekken = {
        "config": {
            "pattern": r"\S+|\s+",
            "num_vocab_tokens": 256,
            "default_vocab_size": 256 + len(names),
            "default_num_special_tokens": len(names),
            "version": "v7",
        },
        "vocab": [{"rank": i, "token_bytes": letter, "token_str": None} for i, letter in enumerate(letters)],
        "special_tokens": [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)],
        "audio": {
            "sampling_rate": 16_000,
            "frame_rate": 12.5,
            "audio_encoding_config": {"num_mel_bins": MEL_BINS, "hop_length": 160, "window_size": 400},
            "chunk_length_s": 30.0,
        },
    }
    (folder / "tekken.json").write_text(json.dumps(tekken))
    WhisperFeatureExtractor(feature_size=MEL_BINS, processor_class="VoxtralProcessor").save_pretrained(folder)
    config = VoxtralConfig(
        audio_config={
            "model_type": "voxtral_encoder",
            "hidden_size": 32,
            "intermediate_size": 128,  # four frames are one position of the LLM
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_mel_bins": MEL_BINS,
        },
        text_config={"model_type": "llama", **llm_fields(256 + len(names), head_dim=8, eos_token_id=2)},
        audio_token_id=VOXTRAL_AUDIO_ID,
    )
    return _save(folder, VoxtralForConditionalGeneration, config, None, scale=12)


def save_whisper(folder: Path) -> str:
    """A speech recogniser of 30 s windows."""
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    special += [f"<|{0.02 * step:.2f}|>" for step in range(1501)]
    backend = json.loads(make_tokenizer("qwen3")._tokenizer.to_str())
    vocabulary, merges = backend["model"]["vocab"], [tuple(pair) for pair in backend["model"]["merges"]]
    tokenizer = WhisperTokenizer(vocab=vocabulary, merges=merges, unk_token="<|endoftext|>", pad_token="<|endoftext|>")
    tokenizer.add_tokens(special, special_tokens=True)
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True))
    config = WhisperConfig(
        **ENCODER,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=64,
        vocab_size=len(tokenizer),
        max_target_positions=40,
        pad_token_id=ids["<|endoftext|>"],
        bos_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|endoftext|>"],
        decoder_start_token_id=ids["<|startoftranscript|>"],
    )
    processor = WhisperProcessor(WhisperFeatureExtractor(feature_size=MEL_BINS), tokenizer)
    model = _random(WhisperForConditionalGeneration, config, scale=4)
    embeddings = model.get_input_embeddings().weight.data
    embeddings /= 4  # else a token is followed by itself
    embeddings[len(vocabulary) :] /= 10  # words are likelier than time stamps, which are four times as many
    model.generation_config = GenerationConfig(
        **{key: getattr(model.generation_config, key) for key in TOKEN_IDS},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        is_multilingual=False,
        max_new_tokens=12,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def save_wav2vec2(folder: Path) -> str:
    """A speech recogniser with a CTC head over letters."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    processor = Wav2Vec2Processor(
        Wav2Vec2FeatureExtractor(), Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), pad_token="<pad>")
    )
    config = Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16,) * 7,
        vocab_size=len(letters),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        pad_token_id=0,
    )
    return _save(folder, Wav2Vec2ForCTC, config, processor)


def _random(kind, config, scale: float):
    torch.manual_seed(3)
    model = kind(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= scale  # so that an answer depends on what is heard
    return model


def _save(folder: Path, kind, config, processor, scale: float = 4.0) -> str:
    model = _random(kind, config, scale)
    if model.can_generate():
        ids = {key: getattr(model.generation_config, key) for key in TOKEN_IDS}
        model.generation_config = GenerationConfig(**ids | SAMPLING)
    model.save_pretrained(folder)
    if processor is not None:
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        processor.save_pretrained(folder)
    return str(folder)
