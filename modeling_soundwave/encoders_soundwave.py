"""Audio encoders: how each one is built, what checkpoints call its tensors, and how it runs.

All of them take the mel frames of their own front end, (n_windows, M, T) with T of 10 ms, and give a frame per 20 ms,
(n_windows, E, D_e). The modules are the library's, so that their tensors keep their names.

Letters as in `modeling_soundwave`: M mel bins, T mel frames, E encoder frames, D_e encoder width.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig, PreTrainedModel, Wav2Vec2BertModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder

MEL_PER_ENCODER_FRAME = 2  # 10 ms -> 20 ms


class WhisperAudioEncoder:
    """Whisper's encoder (§2.2.1), of any size."""

    prefixes: ClassVar[tuple[str, ...]] = ("model.encoder.", "encoder.", "")
    parts: ClassVar[tuple[str, ...]] = ("conv1.", "conv2.", "embed_positions.", "layers.", "layer_norm.")

    @staticmethod
    def build(config: PreTrainedConfig) -> PreTrainedModel:
        """A new encoder with random weights."""
        return WhisperEncoder._from_config(config)

    @staticmethod
    def encode(
        tower: PreTrainedModel, features: torch.Tensor, features_mask: torch.Tensor | None, padding: str
    ) -> torch.Tensor:
        """Log-mel (n, M, T) with valid frames (n, T) -> (n, E, D_e).

        With ``padding="longest"`` only what is there is encoded: positions are cut to E, padding is masked in the
        attention and zeroed before the second convolution, so that a window does not depend on its neighbours.
        """
        if padding == "max_length":
            return tower(features).last_hidden_state
        valid = features.new_ones(1, 1, 1) if features_mask is None else features_mask[:, None].to(features.dtype)
        x = F.gelu(tower.conv1(features * valid))
        x = x * valid.to(x.device)  # a device map may move it
        x = F.gelu(tower.conv2(x)).transpose(1, 2)  # (n, E, D_e)
        x = x + tower.embed_positions(torch.arange(x.shape[1], device=x.device))
        x = F.dropout(x, p=tower.dropout, training=tower.training)
        mask = None if features_mask is None else features_mask[:, ::MEL_PER_ENCODER_FRAME]
        mask = create_bidirectional_mask(config=tower.config, inputs_embeds=x, attention_mask=mask)
        if isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, -torch.inf)  # or each layer makes it anew
        for layer in tower.layers:
            x = layer(x, mask)
        return tower.layer_norm(x)


class W2vBertAudioEncoder:
    """w2v-BERT 2.0, the encoder of Seamless (§2.2.1 names it): a Conformer on filter banks, two mel frames at once."""

    prefixes: ClassVar[tuple[str, ...]] = ("wav2vec2_bert.", "")
    parts: ClassVar[tuple[str, ...]] = ("feature_projection.", "encoder.")

    @staticmethod
    def build(config: PreTrainedConfig) -> PreTrainedModel:
        """A new encoder with random weights.

        Its own SpecAugment and LayerDrop are switched off in ``config``: the masks are ours, and a layer that is left
        out has no gradient, which distributed training takes for an error.

        Raises:
            ValueError: for an encoder with an adapter, which has frames of another length.
        """
        if config.add_adapter:
            raise ValueError(
                "audio_config.add_adapter is True: that adapter makes frames of 40 ms or more, where Soundwave stacks "
                "frames of 20 ms itself; set add_adapter=False."
            )
        config.mask_time_prob = config.mask_feature_prob = config.layerdrop = 0.0
        return Wav2Vec2BertModel._from_config(config)

    @staticmethod
    def encode(
        tower: PreTrainedModel, features: torch.Tensor, features_mask: torch.Tensor | None, padding: str
    ) -> torch.Tensor:
        """Normalised filter banks (n, M, T) with valid frames (n, T) -> (n, E, D_e); padding is always masked."""
        stacked = features.transpose(1, 2).unflatten(1, (-1, MEL_PER_ENCODER_FRAME)).flatten(2)  # (n, E, 2 M)
        mask = None if features_mask is None else features_mask[:, ::MEL_PER_ENCODER_FRAME]
        return tower(stacked, attention_mask=mask).last_hidden_state


AudioEncoder = type[WhisperAudioEncoder] | type[W2vBertAudioEncoder]
ENCODERS: dict[str, AudioEncoder] = {"whisper": WhisperAudioEncoder, "wav2vec2-bert": W2vBertAudioEncoder}


def audio_encoder(model_type: str) -> AudioEncoder:
    """What Soundwave knows of a type of encoder.

    Raises:
        ValueError: for a type that it does not run.
    """
    if model_type not in ENCODERS:
        raise ValueError(
            f"audio_config is a {model_type!r}; the encoders that Soundwave runs are {' and '.join(ENCODERS)}."
        )
    return ENCODERS[model_type]
