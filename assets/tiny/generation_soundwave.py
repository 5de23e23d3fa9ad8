"""`generate` for a model whose prompt grows by a number of positions that only the audio tells."""

import copy
from dataclasses import dataclass

import torch
from transformers import GenerationMixin
from transformers.generation import BaseStreamer
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from .drafting_soundwave import Draft, DraftCandidates, Drafting, given_drafts, recorded_drafts
from .verifying_soundwave import StopRule, can_verify, verify_drafts

logger = logging.get_logger(__name__)

DEFAULT_MAX_NEW_TOKENS = 256  # tokens; the library's 20 would count the prompt


class ContextError(ValueError):
    """A prompt that leaves no room for an answer in the LLM's context."""


@dataclass
class SoundwaveGenerateOutput(ModelOutput):
    """What `generate` returns with ``return_dict_in_generate``: the library's fields, and ours behind them.

    ``llm_forwards`` counts forwards of the LLM, the prompt's included; ``draft_tokens`` and ``draft_accepted`` (B,)
    count each row's drafted tokens and those that the answer took over (``None`` without ``ctc_draft``).
    ``audio_positions`` (n_audios,) are the LLM positions of each recording, ``compression`` (n,) the aligned frames
    (40 ms) per position of those that came as audio features.
    """

    sequences: torch.Tensor | None = None  # (B x returned sequences, N + new): prompt ids as given, new ids
    scores: tuple[torch.Tensor, ...] | None = None
    logits: tuple[torch.Tensor, ...] | None = None
    attentions: tuple | None = None
    hidden_states: tuple | None = None
    past_key_values: object | None = None
    sequences_scores: torch.Tensor | None = None
    beam_indices: torch.Tensor | None = None
    llm_forwards: int | None = None
    draft_tokens: torch.Tensor | None = None
    draft_accepted: torch.Tensor | None = None
    audio_positions: torch.Tensor | None = None
    compression: torch.Tensor | None = None


class SoundwaveGenerationMixin(GenerationMixin):
    """Runs the speech side once, then the library's own `generate` over spliced embeddings."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        generation_config=None,
        attention_mask: torch.Tensor | None = None,
        ctc_draft: bool | list[list[int]] | None = None,
        draft_confidence: float | None = None,
        **kwargs,
    ):
        """Answer a batch of prompts with recordings, text only, or both.

        Args:
            input_ids: prompts (B, N), one audio token per recording; padded on either side.
            generation_config: as in the library.
            attention_mask: (B, N).
            ctc_draft: ``True`` = the CTC tokens of a row's recordings are a draft of its answer, which the LLM
                verifies in blocks: the same greedy ids in fewer forwards where the answer is a transcript. A list of
                B lists of token ids = these drafts. Greedy decoding with a dynamic cache only.
            draft_confidence: lossy. Drafted tokens whose CTC probability is at least this (0 to 1) are taken over
                although the LLM would have said something else; ``None`` = every token is the LLM's.
            **kwargs: the audio inputs of `forward` (``input_features``, ``audio_embeds``, ...) and anything that the
                library's `generate` takes. ``max_length`` counts the ids of ``input_ids`` plus the new ones.

        Returns:
            ``[original prompt ids, new ids]`` (B x returned sequences, N + new), or with ``return_dict_in_generate``
            a `SoundwaveGenerateOutput` with such ``sequences``.

        Raises:
            ContextError: when the expanded prompt fills the LLM's context.
            ValueError: when audio tokens and recordings differ in number, ``max_length`` leaves nothing to say, or
                drafts do not fit the rows or the way of decoding.
        """
        if input_ids is None:
            raise ValueError(
                "generate needs input_ids (B, N): the processor's output. Embeddings alone are not taken."
            )
        if drafted := ctc_draft is not None and ctc_draft is not False:
            self._check_greedy(generation_config, kwargs)
        elif draft_confidence is not None:
            raise ValueError("draft_confidence is about drafts; give ctc_draft=True beside it.")
        audio_inputs = {name: kwargs.pop(name, None) for name in self.AUDIO_INPUTS}
        aligned = None
        recorded = any(audio_inputs[name] is not None for name in ("input_features", "encoder_features"))
        if ctc_draft is True and recorded:
            aligned = self.align(**{name: audio_inputs[name] for name in self.AUDIO_FEATURES})
        spliced = self.splice(input_ids, attention_mask, audio_inputs, pad_left=True, aligned=aligned)
        drafting = Drafting()
        if drafted:
            embeds = audio_inputs["audio_embeds"]
            drafting.drafts = self._drafts(ctc_draft, draft_confidence, input_ids, attention_mask, aligned, embeds)
            kwargs["prompt_lookup_num_tokens"] = 1  # the library's assisted decoding, whose candidates are ours
        if kwargs.get("assistant_model") is None:  # it would be handed to the assistant too
            kwargs["drafting"] = drafting

        prompt_length, expanded_length = input_ids.shape[1], spliced.inputs_embeds.shape[1]
        limits = self._limits(generation_config, kwargs, prompt_length, spliced)
        if generation_config is None:
            kwargs |= limits
        else:  # the library takes a configuration or loose arguments, not both
            kwargs["generation_config"] = copy.deepcopy(generation_config)
            lookup = {name: kwargs.pop(name) for name in ("prompt_lookup_num_tokens",) if name in kwargs}
            kwargs["generation_config"].update(max_length=None, **limits, **lookup)

        if kwargs.get("streamer") is not None:
            kwargs["streamer"] = _PromptAsGiven(kwargs["streamer"], input_ids)
        output = super().generate(
            input_ids=self._expanded_ids(input_ids, spliced),
            inputs_embeds=spliced.inputs_embeds,
            attention_mask=spliced.attention_mask,
            **kwargs,
        )
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        copies = sequences.shape[0] // input_ids.shape[0]
        prompts = input_ids.repeat_interleave(copies, dim=0).to(sequences.device)
        sequences = torch.cat([prompts, sequences[:, expanded_length:]], dim=1)
        if isinstance(output, torch.Tensor):
            return sequences
        result = SoundwaveGenerateOutput(**(dict(output) | {"sequences": sequences}))
        result.audio_positions, result.compression = spliced.audio_positions, spliced.compression
        if "drafting" in kwargs:
            result.llm_forwards = drafting.forwards
        if drafting.drafts is not None:
            result.draft_tokens = torch.tensor([len(draft.tokens) for draft in drafting.drafts])
            result.draft_accepted = torch.tensor([draft.accepted for draft in drafting.drafts])
        return result

    def _check_greedy(self, generation_config, kwargs: dict) -> None:
        """Raise a ValueError where an answer would not be the greedy one."""
        if kwargs.get("assistant_model") is not None:
            raise ValueError("ctc_draft and assistant_model both draft the answer; give one of them.")
        sources = [source for source in (generation_config, self.generation_config) if source is not None]
        for name, plain in (("do_sample", False), ("num_beams", 1), ("num_return_sequences", 1)):
            given = [kwargs.get(name), *(getattr(source, name) for source in sources)]
            value = next((value for value in given if value is not None), plain)
            if value != plain:
                raise ValueError(f"ctc_draft verifies drafts of one greedy answer per row; {name} is {value}.")

    def _limits(self, generation_config, kwargs: dict, prompt_length: int, spliced) -> dict[str, int]:
        """The caller's limits of length, taken out of ``kwargs``, as limits of what is new in the LLM's context."""
        given = generation_config if generation_config is not None else self.generation_config
        new_tokens, max_length = kwargs.pop("max_new_tokens", None), kwargs.pop("max_length", None)
        if new_tokens is None and max_length is None:
            new_tokens, max_length = given.max_new_tokens, given.max_length
        if new_tokens is None:
            new_tokens = DEFAULT_MAX_NEW_TOKENS if max_length is None else max_length - prompt_length
        if new_tokens <= 0:
            raise ValueError(
                f"nothing may be generated: max_length {max_length} and {prompt_length} prompt ids; "
                "raise max_length or give max_new_tokens."
            )
        expanded_length = spliced.inputs_embeds.shape[1]
        context = getattr(self.config.text_config, "max_position_embeddings", None)
        if context is not None and expanded_length + new_tokens > context:
            if expanded_length >= context:
                raise ContextError(_full_context(spliced, context))
            logger.warning_once(
                f"max_new_tokens is {new_tokens}, but the prompt takes {expanded_length} of the LLM's {context} "
                f"positions; the answer stops after {context - expanded_length} tokens at the latest."
            )
            new_tokens = context - expanded_length
        limits = {"max_new_tokens": new_tokens}
        if min_length := kwargs.pop("min_length", given.min_length):
            limits["min_length"] = min_length + expanded_length - prompt_length
        return limits

    def _drafts(self, ctc_draft, confidence, input_ids, attention_mask, aligned, audio_embeds) -> list[Draft]:
        """One draft per row: as given, or the CTC tokens of its recordings."""
        if ctc_draft is not True:
            if confidence is not None:
                raise ValueError("draft_confidence needs the CTC probabilities of ctc_draft=True, not given drafts.")
            return given_drafts(ctc_draft, len(input_ids), self.config.text_config.vocab_size)
        if aligned is None and audio_embeds is not None:
            raise ValueError(
                "ctc_draft=True needs the audio features of a recording, and only audio_embeds came; give its CTC "
                "tokens as ctc_draft=[[ids], ...]."
            )
        is_audio = input_ids == (-1 if self.config.audio_token_id is None else self.config.audio_token_id)
        if attention_mask is not None:
            is_audio &= attention_mask.bool()
        per_row, blank = is_audio.sum(dim=1).tolist(), self.config.blank_id
        if confidence is None:
            return recorded_drafts(aligned, blank, per_row)
        if not 0 < confidence <= 1:
            raise ValueError(f"draft_confidence is {confidence}, expected a probability: above 0, at most 1.")
        logger.warning_once("draft_confidence is lossy: the answer may differ from what the LLM says by itself.")
        return recorded_drafts(
            aligned, blank, per_row, lambda frames: self.ctc_head.scores(frames, self.ctc_rows())[1], confidence
        )

    def _assisted_decoding(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        inputs_tensor=None,
        drafting=None,
        **kwargs,
    ):
        """The library's assisted decoding; with our drafts for batches too, and ending where plain greedy ends."""
        shared = (input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer)
        if drafting is None or drafting.drafts is None:
            return super()._assisted_decoding(*shared, inputs_tensor=inputs_tensor, drafting=drafting, **kwargs)
        stop = StopRule(stopping_criteria)
        unpadded = len(input_ids) > 1 and stop.others and not stop.eos  # rows that end go on until all have ended
        if not can_verify(kwargs["past_key_values"], self.config.text_config) or unpadded:
            reason = "without an eos token rows cannot end" if unpadded else "this LLM's cache cannot be rolled back"
            logger.warning_once(f"ctc_draft is not used: {reason}. Decoding is plain.")
            return self._sample(*shared, drafting=drafting, **kwargs)
        if len(input_ids) == 1 and not drafting.lossy and not stop.others:
            return super()._assisted_decoding(*shared, drafting=drafting, **kwargs)
        return verify_drafts(self, *shared, drafting, **kwargs)

    def _get_candidate_generator(self, generation_config, model_kwargs, **kwargs):
        """The library's choice, or our draft of one row."""
        drafting = model_kwargs.get("drafting")
        if drafting is not None and drafting.drafts is not None:
            return DraftCandidates(drafting.drafts[0], generation_config.max_length)
        return super()._get_candidate_generator(generation_config, model_kwargs=model_kwargs, **kwargs)

    def _expanded_ids(self, input_ids: torch.Tensor, spliced) -> torch.Tensor:
        """Ids (B, L) beside the spliced embeddings, for the processors that look at ids.

        Positions of a recording carry the audio token, or, where that id is beyond the vocabulary, the LLM's bos: an
        id that no processor can hurt by penalising it.
        """
        text = self.config.text_config
        stand_in = self.config.audio_token_id
        if stand_in is None or stand_in >= text.vocab_size:
            stand_in = next((i for i in (text.bos_token_id, self.config.pad_token_id) if i is not None), 0)
        filler = self.config.pad_token_id if self.config.pad_token_id is not None else stand_in
        ids = input_ids.to(spliced.source.device).gather(1, spliced.source.clamp(min=0))
        if self.config.audio_token_id is not None:
            ids = torch.where(ids == self.config.audio_token_id, stand_in, ids)
        return ids.masked_fill(spliced.source < 0, filler)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        inputs_embeds=None,
        is_first_iteration=False,
        drafting=None,
        **kwargs,
    ):
        """As the library's, and ids beyond the spliced prompt are embedded too.

        The library replaces the ids of the first step by the embeddings; candidate ids of assisted decoding that
        follow the prompt would vanish in silence. ``drafting`` counts the forwards and goes no further.
        """
        if drafting is not None:
            drafting.forwards += 1
        if is_first_iteration and inputs_embeds is not None and input_ids.shape[1] > inputs_embeds.shape[1]:
            extra = self.get_input_embeddings()(input_ids[:, inputs_embeds.shape[1] :])
            inputs_embeds = torch.cat([inputs_embeds, extra.to(inputs_embeds.dtype)], dim=1)
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )

    def generate_batch(self, *args, **kwargs):
        """Not available: the library's continuous batching takes token ids only and would ignore the audio.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "generate_batch takes token ids only and would ignore every recording; call generate with a padded batch."
        )


def _full_context(spliced, context: int) -> str:
    """What to say of a prompt that fills the context."""
    positions = (spliced.source >= 0).sum(dim=1)
    audio = 0 if spliced.audio_positions is None else int(spliced.audio_positions.sum())
    return (
        f"the longest prompt takes {int(positions.max())} positions and leaves no room for an answer: the LLM has "
        f"{context} (max_position_embeddings). The {len(positions)} prompts are {int(positions.sum()) - audio} "
        f"positions of text and {audio} of recordings. Give max_audio_positions to merge positions of a recording, "
        "split the recording, or let model.transcribe go through it piece by piece."
    )


class _PromptAsGiven(BaseStreamer):
    """Hands a streamer the prompt (B, N) as it was given; the library begins with the expanded one."""

    def __init__(self, streamer: BaseStreamer, prompt: torch.Tensor):
        self.streamer = streamer
        self.prompt: torch.Tensor | None = prompt.cpu()

    def put(self, value):
        """Pass on new ids; in place of the first ones, the prompt."""
        value, self.prompt = (value if self.prompt is None else self.prompt), None
        self.streamer.put(value)

    def end(self):
        """Pass on the end."""
        self.streamer.end()
