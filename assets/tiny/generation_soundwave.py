"""`generate` for a model whose prompt grows by a number of positions that only the audio tells."""

import copy

import torch
from transformers import GenerationMixin

DEFAULT_MAX_NEW_TOKENS = 256  # tokens; the library's 20 would count the prompt


class SoundwaveGenerationMixin(GenerationMixin):
    """Runs the speech side once, then the library's own `generate` over spliced embeddings."""

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.LongTensor | None = None,
        generation_config=None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ):
        """Answer a batch of prompts with recordings, text only, or both.

        Args:
            input_ids: prompts (B, N), one audio token per recording; padded on either side.
            generation_config: as in the library.
            attention_mask: (B, N).
            **kwargs: the audio inputs of `forward` (``input_features``, ``audio_embeds``, ...) and anything that the
                library's `generate` takes. ``max_length`` counts the ids of ``input_ids`` plus the new ones.

        Returns:
            ``[original prompt ids, new ids]`` (B x returned sequences, N + new), or the library's output object with
            such ``sequences``.

        Raises:
            ValueError: when audio tokens and recordings differ in number, or ``max_length`` leaves nothing to say.
        """
        if input_ids is None:
            raise ValueError(
                "generate needs input_ids (B, N): the processor's output. Embeddings alone are not taken."
            )
        audio_inputs = {name: kwargs.pop(name, None) for name in self.AUDIO_INPUTS}
        spliced = self.splice(input_ids, attention_mask, audio_inputs, pad_left=True)
        prompt_length, expanded_length = input_ids.shape[1], spliced.inputs_embeds.shape[1]

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
        limits = {"max_new_tokens": new_tokens}
        if min_length := kwargs.pop("min_length", given.min_length):
            limits["min_length"] = min_length + expanded_length - prompt_length
        if generation_config is None:
            kwargs |= limits
        else:  # the library takes a configuration or loose arguments, not both
            kwargs["generation_config"] = copy.deepcopy(generation_config)
            kwargs["generation_config"].update(max_length=None, **limits)

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
        output.sequences = sequences
        return output

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
        ids = input_ids.gather(1, spliced.source.clamp(min=0))
        if self.config.audio_token_id is not None:
            ids = torch.where(ids == self.config.audio_token_id, stand_in, ids)
        return ids.masked_fill(spliced.source < 0, filler)

    def prepare_inputs_for_generation(
        self, input_ids, next_sequence_length=None, inputs_embeds=None, is_first_iteration=False, **kwargs
    ):
        """As the library's, and ids beyond the spliced prompt are embedded too.

        The library replaces the ids of the first step by the embeddings; candidate ids of assisted decoding that
        follow the prompt would vanish in silence.
        """
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
