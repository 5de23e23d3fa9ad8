"""Who is compared: Soundwave, the published code's way of running it, and Qwen2-Audio, from waveforms to new ids.

All have random weights: speed does not depend on them, with one exception. A random CTC head compresses nothing, so
speech-like CTC labels, 3.3 tokens per second, are put in the place of the head's own, which are computed all the same.
"""

from dataclasses import dataclass

import numpy as np
import torch
from common import SAMPLING_RATE
from transformers import (
    LlamaConfig,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from soundwave import SoundwaveConfig, SoundwaveForConditionalGeneration
from soundwave.processing.audio_soundwave import log_mel_windows

TOKENS_PER_SECOND = 3.3  # of CTC, and of an answer that is a transcript
ALIGNED_FRAMES_PER_SECOND = 25
TEXT_BEFORE, TEXT_AFTER = 24, 16  # prompt tokens around a recording


@dataclass
class Shape:
    """Widths and depths that the contenders share."""

    encoder_layers: int
    encoder_width: int
    encoder_heads: int
    layers: int
    width: int
    heads: int
    key_value_heads: int
    feed_forward: int
    vocabulary: int
    mel_bins: int = 128


SMALL = Shape(6, 384, 6, 8, 512, 8, 8, 1408, 32_000)
# Whisper large-v3's encoder, Llama-3.1-8B.
FULL = Shape(32, 1280, 20, 32, 4096, 32, 8, 14_336, 128_256)
# Qwen2-Audio-7B: the same encoder, a Qwen-7B (whose attention has no shared keys) with its own vocabulary.
QWEN2_AUDIO_7B = Shape(32, 1280, 20, 32, 4096, 32, 32, 11_008, 156_032)


class Injected:
    """Stands before `CTCHead.labels`: pays for the scores, then returns 3.3 tokens a second between blanks."""

    def __init__(self, head, vocabulary: int):
        self.labels, self.blank, self.vocabulary = head.labels, head.blank_id, vocabulary

    def __call__(self, frames: torch.Tensor, embeddings=None) -> torch.Tensor:
        """(..., A, D) -> (..., A)."""
        computed = self.labels(frames, embeddings)
        return self.speech_like(computed.numel(), computed.device).view_as(computed)

    def speech_like(self, frames: int, device) -> torch.Tensor:
        """(frames,) ids."""
        number = torch.arange(frames, device=device) * TOKENS_PER_SECOND // ALIGNED_FRAMES_PER_SECOND
        starts = number.diff(prepend=number.new_tensor([-1.0])) > 0
        return torch.where(starts, 3 + number.long() * 7919 % (self.vocabulary - 3), self.blank)


def prompt(placeholder: list[int], vocabulary: int) -> list[int]:
    """Ids of a prompt with a recording in it."""
    text = [3 + i * 31 % (vocabulary - 3) for i in range(TEXT_BEFORE + TEXT_AFTER)]
    return text[:TEXT_BEFORE] + placeholder + text[TEXT_BEFORE:]


def whisper_config(shape: Shape) -> WhisperConfig:
    """The encoder."""
    return WhisperConfig(
        d_model=shape.encoder_width,
        encoder_layers=shape.encoder_layers,
        encoder_attention_heads=shape.encoder_heads,
        encoder_ffn_dim=4 * shape.encoder_width,
        decoder_layers=0,
        num_mel_bins=shape.mel_bins,
    )


def soundwave_config(shape: Shape) -> SoundwaveConfig:
    """Of our model, in "longest" padding."""
    text = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
        eos_token_id=None,
        pad_token_id=0,
    )
    audio, audio_id = whisper_config(shape), shape.vocabulary
    return SoundwaveConfig(audio_config=audio, text_config=text, audio_token_id=audio_id, audio_padding="longest")


def random_model(kind, config, device: str, dtype: torch.dtype):
    """A model made where and as it will run: at full size there is no room for a copy."""
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(config).eval()
    finally:
        torch.set_default_dtype(default)


class Soundwave:
    """Our model as `generate` runs it. ``batch`` recordings at once, in "longest" padding."""

    name = "Soundwave"

    def __init__(self, shape: Shape, device="cpu", dtype=torch.float32):
        self.model = random_model(SoundwaveForConditionalGeneration, soundwave_config(shape), device, dtype)
        self.model.generation_config.eos_token_id = None
        self.inject = Injected(self.model.ctc_head, shape.vocabulary)
        self.model.ctc_head.labels = self.inject
        self.extractor = WhisperFeatureExtractor(feature_size=shape.mel_bins)
        self.ids, self.device, self.dtype = prompt([shape.vocabulary], shape.vocabulary), device, dtype

    def inputs(self, waveforms: list[np.ndarray]) -> dict:
        """Waveforms (n,) at 16 kHz -> what `generate` takes."""
        features = log_mel_windows(waveforms, self.extractor, "longest")
        ids = torch.tensor([self.ids] * len(waveforms))
        batch = {**features, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {name: value.to(self.device) for name, value in batch.items()}

    @torch.inference_mode()
    def answer(self, waveforms: list[np.ndarray], new_tokens: int) -> torch.Tensor:
        """-> new ids (B, new_tokens)."""
        return self.model.generate(**self.inputs(waveforms), max_new_tokens=new_tokens)[:, len(self.ids) :]


class Published:
    """The same weights the way the published code runs them: one recording at a time, padded to 30 s, scores for all
    750 frames, runs of blanks kept."""

    name = "published way"

    def __init__(self, soundwave: Soundwave):
        self.ours = soundwave
        self.model = soundwave.model
        # A matrix of its own, as the published layout has: made once, no part of what is timed.
        self.rows = torch.cat([self.model.get_input_embeddings().weight, self.model.ctc_head.blank[None]]).detach()

    @torch.inference_mode()
    def answer(self, waveforms: list[np.ndarray], new_tokens: int) -> list[torch.Tensor]:
        """-> new ids (1, new_tokens) of each recording."""
        return [self._one(waveform, new_tokens) for waveform in waveforms]

    def _one(self, waveform: np.ndarray, new_tokens: int) -> torch.Tensor:
        model, head = self.model, self.model.ctc_head
        mel = self.ours.extractor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt")["input_features"]
        encoded = model.audio_tower(mel.to(self.ours.device, self.ours.dtype)).last_hidden_state
        everything = torch.ones(1, encoded.shape[1] // 2, dtype=torch.bool, device=encoded.device)
        frames = model.alignment_adapter(encoded, everything)  # (1, 750, D)
        scores = head.scaled(frames) @ self.rows.T  # (1, 750, V)
        ids = scores.argmax(dim=-1)[0]
        spoken = min(len(ids), round(len(waveform) / SAMPLING_RATE * ALIGNED_FRAMES_PER_SECOND))
        ids = torch.full_like(ids, head.blank_id)  # speech-like labels, and the padding is blank
        ids[:spoken] = self.ours.inject.speech_like(spoken, ids.device)
        starts = torch.nn.functional.pad(ids[1:] != ids[:-1], (1, 0), value=True)[None]  # blank runs stay
        kept = frames[starts][None]
        shrunk = model.shrinking_adapter(kept, frames, starts, everything)
        prompt_ids = torch.tensor([self.ours.ids], device=ids.device)
        text = model.get_input_embeddings()(prompt_ids.clamp(max=head.blank_id - 1))
        embeds = torch.cat([text[:, :TEXT_BEFORE], shrunk, text[:, TEXT_BEFORE + 1 :]], dim=1)
        return model.language_model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=ids.device),
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            do_sample=False,
        )


class Qwen2Audio:
    """Qwen2-Audio: one LLM position per 40 ms; the processor pads to 30 s and repeats the placeholder."""

    name = "Qwen2-Audio"

    def __init__(self, shape: Shape, device="cpu", dtype=torch.float32):
        config = Qwen2AudioConfig(
            audio_config={
                "model_type": "qwen2_audio_encoder",
                "d_model": shape.encoder_width,
                "encoder_layers": shape.encoder_layers,
                "encoder_attention_heads": shape.encoder_heads,
                "encoder_ffn_dim": 4 * shape.encoder_width,
                "num_mel_bins": shape.mel_bins,
            },
            text_config={
                "model_type": "qwen2",
                "hidden_size": shape.width,
                "intermediate_size": shape.feed_forward,
                "num_hidden_layers": shape.layers,
                "num_attention_heads": shape.heads,
                "num_key_value_heads": shape.key_value_heads,
                "vocab_size": shape.vocabulary,
                "max_position_embeddings": 8192,
            },
            audio_token_index=shape.vocabulary - 1,
        )
        self.model = random_model(Qwen2AudioForConditionalGeneration, config, device, dtype)
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0
        self.extractor = WhisperFeatureExtractor(feature_size=shape.mel_bins)
        self.shape, self.device, self.dtype = shape, device, dtype

    def inputs(self, waveforms: list[np.ndarray]) -> dict:
        """As its processor makes them, padded on the left."""
        audio = self.extractor(
            waveforms,
            sampling_rate=SAMPLING_RATE,
            return_attention_mask=True,
            padding="max_length",
            return_tensors="pt",
        )
        lengths = ((audio["attention_mask"].sum(dim=1) - 1) // 2 + 1 - 2) // 2 + 1
        placeholder, vocabulary = self.model.config.audio_token_id, self.shape.vocabulary - 1
        rows = [prompt([placeholder] * n, vocabulary) for n in lengths.tolist()]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return {
            "input_ids": ids.to(self.device),
            "attention_mask": mask.to(self.device),
            "input_features": audio["input_features"].to(self.device, self.dtype),
            "feature_attention_mask": audio["attention_mask"].to(self.device),
        }

    @torch.inference_mode()
    def answer(self, waveforms: list[np.ndarray], new_tokens: int) -> torch.Tensor:
        """-> new ids (B, new_tokens)."""
        inputs = self.inputs(waveforms)
        ids = self.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        return ids[:, inputs["input_ids"].shape[1] :]
