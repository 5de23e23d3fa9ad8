"""What a run takes on one device, estimated before it begins; activations only roughly, the rest from exact sizes.

A layer of a Transformer keeps about `16 D + 3 F` numbers per position for the backward pass (D its width, F that of
its feed-forward): the inputs of two norms in fp32, queries, keys, values, what LoRA reads, and three feed-forward
tensors. With gradient checkpointing only its input, D numbers, and all of one layer at a time.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from soundwave.modeling_soundwave.ctc_soundwave import FRAMES_PER_CHUNK
from soundwave.training.lora import is_lora

GRADIENT_BYTES, OPTIMIZER_BYTES = 4, 8  # per trained parameter, fp32: the gradient, and AdamW's two moments
# Per weight: NF4 has a scale per 64 weights, itself in 8 bit, with one of its own per 256 of them.
QUANTIZED_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
POSITIONS_PER_SECOND = 4  # that the LLM takes for speech, about one per token
ENCODER_HZ, ALIGNED_HZ = 50, 25


@dataclass(frozen=True)
class MicroBatch:
    """What goes through the model at once."""

    audio_s: float  # padding included
    text_tokens: int  # of prompts and answers
    labelled_tokens: int


@dataclass(frozen=True)
class Part:
    """A row of the table of what trains."""

    name: str
    parameters: int
    trained: int
    dtype: str
    weight_bytes: int


def parts_of(model: nn.Module, quantization: str | None = None) -> list[Part]:
    """The modules of a model in the order of the data flow, their LoRA apart."""
    parts = []
    for name, module in model.named_children():
        linear = {id(layer.weight) for layer in _hidden_layers(module)}
        own = dict(module.named_parameters(name))
        for lora in (False, True):
            chosen = {n: p for n, p in own.items() if is_lora(n) == lora}
            if not chosen:
                continue
            packed = quantization if name == "language_model" and not lora else None
            size = sum(
                p.numel() * (QUANTIZED_BYTES[packed] if packed and id(p) in linear else p.element_size())
                for p in chosen.values()
            )
            dtypes = dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in chosen.values())
            parts.append(
                Part(
                    name=f"{name}, LoRA" if lora else name,
                    parameters=sum(p.numel() for p in chosen.values()),
                    trained=sum(p.numel() for p in chosen.values() if p.requires_grad),
                    dtype=" + ".join([*([packed] if packed else []), *dtypes]),
                    weight_bytes=int(size),
                )
            )
    return parts


def memory(model: nn.Module, parts: list[Part], batch: MicroBatch, mixed: bool, checkpointing: bool) -> dict[str, int]:
    """Bytes on one device, by what they are for; nothing is sharded.

    Args:
        model: any Soundwave model, frozen as the run will.
        parts: its `parts_of`.
        batch: the largest that goes through at once.
        mixed: whether matrix products are in 16 bit.
        checkpointing: whether gradient checkpointing is on.
    """
    trained = sum(part.trained for part in parts)
    return {
        "weights": sum(part.weight_bytes for part in parts),
        "gradients": GRADIENT_BYTES * trained,
        "optimizer": OPTIMIZER_BYTES * trained,
        "activations": _activations(model, batch, 2 if mixed else 4, checkpointing),
    }


def _activations(model: nn.Module, batch: MicroBatch, width: int, checkpointing: bool) -> int:
    """Bytes kept for the backward pass, and the largest passing thing beside them; numbers take `width` bytes."""
    config, training = (
        model.config,
        {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad},
    )
    D, D_e, V = config.text_config.hidden_size, config.encoder_width, config.text_config.vocab_size
    E, A, K = (round(batch.audio_s * hz) for hz in (ENCODER_HZ, ALIGNED_HZ, POSITIONS_PER_SECOND))
    kept = 0
    if "audio_tower" in training:
        layers = config.audio_config.num_hidden_layers
        kept += _layers(E, D_e, _widest(model.audio_tower), layers, width, checkpointing)
    if training & {"audio_tower", "alignment_adapter"}:
        kept += _layers(A, D, config.alignment_ffn_dim, 1, width, False) + A * 2 * D_e * width
    if training & {"audio_tower", "alignment_adapter", "ctc_head"}:
        kept += A * D * 8  # CTC: features in fp32, and their gradient, which the forward pass makes
    if not hasattr(model, "language_model"):
        return kept + min(A, FRAMES_PER_CHUNK) * V * 8
    kept += 8 * (A + K) * D * width if len(training - {"language_model"}) else 0
    L = batch.text_tokens + K
    kept += _layers(L, D, _widest(model.language_model), config.text_config.num_hidden_layers, width, checkpointing)
    return kept + batch.labelled_tokens * V * (width + 8)  # scores of labelled tokens, and their gradient in fp32


def _layers(positions: int, D: int, F: int, layers: int, width: int, checkpointing: bool) -> int:
    one = (16 * D + 3 * F) * positions * width
    return layers * positions * D * width + 2 * one if checkpointing else layers * one


def _widest(part: nn.Module) -> int:
    """Width of the feed-forward layers."""
    return max(layer.out_features for layer in _hidden_layers(part))


def _hidden_layers(part: nn.Module) -> list[nn.Linear]:
    """The linear layers of a module, but the LLM's output layer."""
    output = part.get_output_embeddings() if isinstance(part, PreTrainedModel) else None
    return [layer for layer in part.modules() if isinstance(layer, nn.Linear) and layer is not output]
