"""Who is compared in training: the stages, and a step with the LLM on all frames, none of them shrunk.

All have random weights and share a batch. CTC labels are injected at 3.3 tokens per second (`contenders.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from contenders import FULL, TOKENS_PER_SECOND, Injected, Shape, prompt, random_model, soundwave_config

from soundwave import SoundwaveForConditionalGeneration, SoundwaveForCTC
from soundwave.modeling_soundwave.speech_soundwave import AudioFeatures
from soundwave.training.lora import add_lora
from soundwave.training.stages import STAGES, StageConfig

# Each width and the vocabulary of the full shape over 8, at full depth: the parts keep their shares of the work.
EIGHTH = Shape(32, 160, 5, 32, 512, 8, 2, 1792, 16_032)
SHAPES = {"full": FULL, "eighth": EIGHTH}
MEL_PER_SECOND = 100


class Unshrunk(SoundwaveForConditionalGeneration):
    """The LLM sees every aligned frame: no CTC scores, nothing shrunk."""

    def align(self, **audio_inputs):
        """Without arg-max."""
        return super().align(**audio_inputs, greedy=False)

    def shrink(self, aligned, max_audio_positions=None):
        """All frames."""
        lengths = aligned.mask.sum(dim=1)
        return AudioFeatures(aligned.frames, lengths, torch.ones_like(lengths, dtype=torch.float32))


@dataclass(frozen=True)
class Contender:
    """What a step is made of; `stage` names the entry of the stage table whose settings it runs with."""

    stage: str
    model: type
    trains: Sequence[str]
    inputs: Sequence[str]


AUDIO = ("input_features", "input_features_mask")
ANSWER = ("input_ids", "attention_mask", "labels")
CTC = ("ctc_labels", "ctc_label_lengths")
CONTENDERS = {
    "stage I": Contender("align", SoundwaveForCTC, STAGES["align"].trains, (*AUDIO, *CTC)),
    "stage II": Contender(
        "shrink", SoundwaveForConditionalGeneration, STAGES["shrink"].trains, (*AUDIO, *ANSWER, *CTC)
    ),
    # By stage II's trainer: trl's needs a processor, and its step is the same.
    "stage III": Contender("shrink", SoundwaveForConditionalGeneration, STAGES["instruct"].trains, (*AUDIO, *ANSWER)),
    "LLM on all frames": Contender("shrink", Unshrunk, ("alignment_adapter",), (*AUDIO, *ANSWER)),
}
BASELINE = "LLM on all frames"


def build(name: str, shape: Shape, device: str) -> torch.nn.Module:
    """The model of a contender, LoRA in it where the contender trains it."""
    contender = CONTENDERS[name]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = random_model(contender.model, soundwave_config(shape), device, dtype)
    model.ctc_head.labels = Injected(model.ctc_head, shape.vocabulary)
    if "lora" in contender.trains:
        config = StageConfig.for_stage("shrink")
        add_lora(model, config.lora_r, config.lora_alpha, config.lora_targets)
    return model


def batch(name: str, shape: Shape, rows: int, seconds: float) -> dict[str, torch.Tensor]:
    """Recordings of equal length, transcripts of 3.3 tokens per second: as answers, and as CTC targets."""
    torch.manual_seed(0)
    frames, tokens = round(seconds * MEL_PER_SECOND), max(1, round(seconds * TOKENS_PER_SECOND))
    transcripts = torch.randint(3, shape.vocabulary, (rows, tokens))
    prompts = torch.tensor([prompt([shape.vocabulary], shape.vocabulary)] * rows)
    input_ids = torch.cat([prompts, transcripts], dim=1)
    inputs = {
        "input_features": torch.randn(rows, shape.mel_bins, frames),
        "input_features_mask": torch.ones(rows, frames, dtype=torch.long),
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": torch.cat([torch.full_like(prompts, -100), transcripts], dim=1),
        "ctc_labels": transcripts,
        "ctc_label_lengths": torch.full((rows,), tokens),
    }
    return {key: inputs[key] for key in CONTENDERS[name].inputs}
