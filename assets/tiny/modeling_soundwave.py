"""Soundwave (arXiv 2502.12900): recordings and text in, text out.

    (B,M,T) -> encoder -> (B,E,D_e) -> align -> (B,A,D) -> CTC head -> (B,A,V) -> collapse + look back -> (B,K,D)
            -> splice -> (B,L,D) -> LLM -> (B,L,V)

B batch, M mel bins, T mel frames (10 ms), E encoder frames (20 ms), A aligned frames, two stacked (40 ms), K frames
kept after shrinking (varies), N prompt tokens, L LLM positions, D_e and D encoder and LLM width, V LLM vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.modeling_outputs import ModelOutput

from .configuration_soundwave import SoundwaveConfig
from .generation_soundwave import SoundwaveGenerationMixin
from .llm_transcribing_soundwave import SoundwaveLLMTranscribingMixin
from .speech_soundwave import AudioFeatures, SoundwaveModel
from .splicing_soundwave import Spliced, splice_audio


@dataclass
class SoundwaveOutput(ModelOutput):
    """Output of `SoundwaveForConditionalGeneration`.

    ``logits`` (B, L, V) is ``None`` with labels unless ``output_logits``; ``audio_positions`` (n_audios,) counts the
    LLM positions that each recording takes.
    """

    loss: torch.Tensor | None = None
    ce_loss: torch.Tensor | None = None
    ctc_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    audio_positions: torch.Tensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class SoundwaveForConditionalGeneration(SoundwaveLLMTranscribingMixin, SoundwaveGenerationMixin, SoundwaveModel):
    """The speech LLM: text and recordings in, text out (stages II and III)."""

    _holds_llm = True
    _AUTO_CLASSES: tuple[str, ...] = ("AutoModel", "AutoModelForMultimodalLM", "AutoModelForCausalLM")
    main_input_name = "input_ids"
    AUDIO_FEATURES = (
        "input_features",
        "input_features_mask",
        "window_offsets",
        "windows_per_audio",
        "encoder_features",
    )
    AUDIO_INPUTS = (*AUDIO_FEATURES, "audio_embeds", "audio_lengths", "max_audio_positions")

    def __init__(self, config: SoundwaveConfig, audio_tower=None, language_model=None):
        super().__init__(config, audio_tower)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()
        self.generation_config = GenerationConfig(
            bos_token_id=config.text_config.bos_token_id,
            eos_token_id=self.language_model.generation_config.eos_token_id or config.text_config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )

    @property
    def dtype(self) -> torch.dtype:
        """The LLM's."""
        return self.language_model.dtype

    def get_input_embeddings(self):
        """The LLM's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        """Replace the LLM's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        """The LLM's head."""
        return self.language_model.get_output_embeddings()

    def ctc_rows(self) -> torch.Tensor | None:
        """See `SoundwaveForCTC.ctc_rows`."""
        if self.ctc_head.weight is not None:
            return None
        embedding = self.get_input_embeddings()
        if hasattr(embedding, "unshard"):  # FSDP2 would gather them for the embedding's own call, which comes later
            embedding.unshard()
            # Let go of after that call: what the backward pass needs must be a copy.
            return embedding.weight.clone() if embedding.weight.requires_grad else embedding.weight
        hook = getattr(embedding, "_hf_hook", None)  # accelerate's: offloaded weights are there only for a call
        if hook is None or not embedding.weight.is_meta:
            return embedding.weight
        hook.pre_forward(embedding)
        rows = embedding.weight
        hook.post_forward(embedding, None)
        return rows

    def splice(
        self, input_ids, attention_mask, audio_inputs: dict, labels=None, pad_left=None, aligned=None
    ) -> Spliced:
        """Embed the prompts (B, N) and put every recording's features in its place.

        ``audio_embeds`` stand for the first recordings of the batch, audio features for the rest: the earlier turns
        of a chat need not be encoded again.
        """
        features: dict[str, Any] = {name: audio_inputs.get(name) for name in self.AUDIO_FEATURES}
        embeds, lengths = audio_inputs.get("audio_embeds"), audio_inputs.get("audio_lengths")
        if embeds is not None and lengths is None:
            lengths = torch.full((embeds.shape[0],), embeds.shape[1], device=embeds.device)
        if aligned is None and any(features[name] is not None for name in ("input_features", "encoder_features")):
            aligned = self.align(**features)
        compression = None
        if aligned is not None:
            fresh = self.shrink(aligned, audio_inputs.get("max_audio_positions"))
            compression = fresh.compression
            embeds, lengths = fresh[:2] if embeds is None else _stacked(embeds, lengths, fresh)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        audio_id = self.config.audio_token_id
        text_ids = input_ids if audio_id is None else input_ids.masked_fill(input_ids == audio_id, 0)
        text_embeds = self.get_input_embeddings()(text_ids)
        spliced = splice_audio(input_ids, attention_mask, text_embeds, audio_id, embeds, lengths, labels, pad_left)
        return spliced._replace(compression=compression)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        window_offsets: torch.Tensor | None = None,
        windows_per_audio: torch.Tensor | None = None,
        encoder_features: torch.Tensor | None = None,
        audio_embeds: torch.Tensor | None = None,
        audio_lengths: torch.Tensor | None = None,
        max_audio_positions: int | None = None,
        labels: torch.Tensor | None = None,
        ctc_labels: torch.Tensor | None = None,
        ctc_label_lengths: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_ctc_tokens: torch.Tensor | int | None = None,
        output_logits: bool = False,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> SoundwaveOutput:
        """Prompts (B, N) with recordings -> logits (B, L, V), or with ``labels`` (B, N) the losses of stages II, III.

        The loss is the cross-entropy of labelled tokens, plus ``config.ctc_weight`` times the CTC loss where
        ``ctc_labels`` are given (§2.3). ``audio_embeds`` (m, K, D) with ``audio_lengths`` (m,) stand for the first m
        recordings, audio features for the rest, with at most ``max_audio_positions`` for each of these (``None`` = the
        configuration's). With labels only labelled positions reach the LM head.
        ``num_items_in_batch``, ``num_ctc_tokens``: each loss is a sum over this count of tokens; ``None`` = means over
        this batch.
        """
        audio_inputs: dict[str, Any] = {
            "input_features": input_features,
            "input_features_mask": input_features_mask,
            "window_offsets": window_offsets,
            "windows_per_audio": windows_per_audio,
            "encoder_features": encoder_features,
        }
        aligned = audio_positions = ctc_loss = silence = None
        recorded = input_features is not None or encoder_features is not None
        given = recorded or audio_embeds is not None
        if given and inputs_embeds is not None:
            raise ValueError("give inputs_embeds or recordings, not both: recordings are put into input_ids' places.")
        if input_ids is None and inputs_embeds is None:
            raise ValueError("No prompt: give input_ids (B, N), with one audio token per recording, or inputs_embeds.")
        if ctc_labels is not None and labels is None:
            raise ValueError("ctc_labels need labels beside them; for the CTC loss alone use SoundwaveForCTC.")
        prompt = position_ids is None and _is_prompt(past_key_values)  # and no step of a generation
        if inputs_embeds is None and (given or labels is not None or (prompt and self._names_audio(input_ids))):
            # The order of calls is that of the collectives where weights are sharded, so it is the same in every
            # process: encoder, adapters and CTC rows, with recordings or without, and then the LLM.
            if recorded:
                aligned = self.align(**audio_inputs)
            elif labels is not None and not given and torch.distributed.is_initialized():
                silence = self._silent_window(input_ids.device)
            if aligned is not None and labels is not None and ctc_labels is not None:
                ctc_loss = self._reduce_ctc(*self.ctc_losses(aligned, ctc_labels, ctc_label_lengths), num_ctc_tokens)
            shrunk = {
                "audio_embeds": audio_embeds,
                "audio_lengths": audio_lengths,
                "max_audio_positions": max_audio_positions,
            }
            spliced = self.splice(input_ids, attention_mask, shrunk, labels, aligned=aligned)
            inputs_embeds, attention_mask, position_ids, labels, audio_positions = spliced[:5]
            if silence is not None:
                inputs_embeds = inputs_embeds + silence.to(inputs_embeds.dtype)
            input_ids = None
        elif inputs_embeds is None and position_ids is None and attention_mask is not None:
            position_ids = _positions(attention_mask, input_ids.shape[1])  # padding must not move a row's positions
        if labels is not None and not output_logits:
            logits_to_keep = _predicts_label(labels)
        outputs = self.language_model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        loss = ce_loss = None
        logits = outputs.logits
        if labels is not None:
            predicted = logits[_predicts_label(labels)] if output_logits else logits  # (labelled tokens, V)
            loss = ce_loss = _cross_entropy(predicted, labels, num_items_in_batch)
            logits = logits if output_logits else None
            if ctc_loss is not None:
                loss = loss + self.config.ctc_weight * ctc_loss
        return SoundwaveOutput(
            loss=loss,
            ce_loss=ce_loss,
            ctc_loss=ctc_loss,
            logits=logits,
            audio_positions=audio_positions,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _names_audio(self, input_ids: torch.Tensor) -> bool:
        """Whether a prompt holds placeholders of recordings."""
        audio_id = self.config.audio_token_id
        return audio_id is not None and bool((input_ids == audio_id).any())

    def _silent_window(self, device: torch.device) -> torch.Tensor:
        """Zero, by way of every speech module: a rank without recordings must join the others' collectives."""
        bins, T = self.config.mel_bins, self.config.window_mel_frames
        embeds = self.get_audio_features(input_features=torch.zeros(1, bins, T, device=device)).embeds
        trained = [p.sum() for p in self.ctc_head.parameters() if p.requires_grad]
        return 0.0 * (embeds.sum() + sum(trained))


def _stacked(embeds, lengths, fresh: AudioFeatures) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept embeddings (m, K, D) and new ones of other K as one (m + n, K, D), with their lengths (m + n,)."""
    K = max(embeds.shape[1], fresh.embeds.shape[1])
    kept = embeds.to(fresh.embeds)
    both = torch.cat([F.pad(part, (0, 0, 0, K - part.shape[1])) for part in (kept, fresh.embeds)])
    return both, torch.cat([lengths.to(fresh.lengths), fresh.lengths])


def _is_prompt(past_key_values) -> bool:
    return past_key_values is None or past_key_values.get_seq_length() == 0


def _positions(attention_mask: torch.Tensor, last: int) -> torch.Tensor | None:
    """Position ids (B, last) of the newest tokens, counting a row's own; ``None`` without a mask (B, all tokens)."""
    if attention_mask.dim() != 2:
        return None
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -last:]


def _predicts_label(labels: torch.Tensor) -> torch.Tensor:
    """(B, L) bool: the positions whose next token is labelled."""
    return F.pad(labels[:, 1:] != -100, (0, 1), value=False)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
    """Sum of token losses in fp32 over ``num_items``, or over the labelled tokens of this batch."""
    targets = labels[:, 1:][labels[:, 1:] != -100]
    total = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="sum")
    return total / (num_items if num_items is not None else max(len(targets), 1))


SoundwaveForConditionalGeneration.register_for_auto_class("AutoModelForMultimodalLM")
