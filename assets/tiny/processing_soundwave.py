"""SoundwaveProcessor: recordings and conversations to the tensors of a Soundwave model.

Letters: `B` batch, `N` prompt tokens, `M` mel bins, `T` mel frames (10 ms).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import (
    AddedToken,
    AutoConfig,
    AutoTokenizer,
    BatchFeature,
    ProcessorMixin,
)

from .audio_soundwave import Window, load_audio, log_mel_windows, recordings_list, stream_windows
from .chat_soundwave import (
    CUT,
    DEFAULT_TEMPLATE_KWARGS,
    chat_ids,
    check_unicode,
    encode_cut,
    render,
    template_key,
)
from .decoding_soundwave import open_audio
from .frontends_soundwave import make_extractor, window_frames
from .limits_soundwave import AudioLimits
from .messages_soundwave import MessageError, PlaceholderError, brief, named_recordings, split_conversation
from .prompts_soundwave import SoundwavePromptsMixin

# Appendix C of the paper: the system prompt of all training and decoding.
SYSTEM_PROMPT = (
    "You are a helpful language and speech assistant. You are able to understand the speech content that the user "
    "provides and assist the user with a variety of tasks using natural language."
)
TRANSCRIPTION_PROMPT = "Transcribe the speech."
AUDIO_INPUTS = ["input_features", "input_features_mask", "window_offsets", "windows_per_audio"]


class SoundwaveProcessor(SoundwavePromptsMixin, ProcessorMixin):
    """Recordings and conversations to token ids and windows of mel features, and ids back to text.

    Args:
        feature_extractor: The audio encoder's front end: a `WhisperFeatureExtractor`, or for w2v-BERT 2.0 a
            `SeamlessM4TFeatureExtractor`.
        tokenizer: The LLM's tokenizer. `audio_token` is added to it where missing (the model's embeddings are not
            resized), a missing padding token becomes the end-of-sequence token, and padding is on the left.
        chat_template: The LLM's chat template; `None`: the tokenizer's.
        audio_token: The placeholder of one recording.
        system_prompt: Used when a conversation brings no system turn; `None` or `""`: none is added.
        transcription_prompt: The instruction when recordings come without text.
        audio_padding: `"max_length"`: every window padded to its full length (30 s for Whisper). `"longest"`: to the
            longest of the batch. Must be the model's `audio_padding`.
        chat_template_kwargs: Arguments of the chat template, pinned so that prompts stay those of the training.
    """

    #: Bounds of every recording; set it to another `AudioLimits`. Not saved in files.
    audio_limits = AudioLimits()

    def __init__(
        self,
        feature_extractor: Any,
        tokenizer: Any,
        chat_template: str | None = None,
        audio_token: str = "<|audio|>",
        system_prompt: str | None = SYSTEM_PROMPT,
        transcription_prompt: str = TRANSCRIPTION_PROMPT,
        audio_padding: str = "max_length",
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        if audio_padding not in ("max_length", "longest"):
            raise ValueError(f"audio_padding is {audio_padding!r}; expected 'max_length' or 'longest'.")
        window_frames(feature_extractor)  # refuses other types
        if tokenizer.eos_token is None:
            raise ValueError("The tokenizer has no eos_token; set the one that closes an answer of this LLM.")
        if audio_token not in tokenizer.added_tokens_encoder:
            tokenizer.add_tokens([AddedToken(audio_token, special=True, normalized=False)], special_tokens=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template or _template_of(tokenizer))
        self.audio_token = audio_token
        self.audio_token_id: int = tokenizer.convert_tokens_to_ids(audio_token)
        self.system_prompt = system_prompt
        self.transcription_prompt = transcription_prompt
        self.audio_padding = audio_padding
        self.chat_template_kwargs = {**DEFAULT_TEMPLATE_KWARGS, **(chat_template_kwargs or {})}

    @classmethod
    def from_components(
        cls,
        audio_model: str,
        text_model: str,
        audio_revision: str | None = None,
        text_revision: str | None = None,
        window_seconds: int | None = None,
        **fields: Any,
    ) -> "SoundwaveProcessor":
        """A processor for an encoder and an LLM.

        Args:
            audio_model: Folder or Hub id of a Whisper or w2v-BERT 2.0 checkpoint: its mel bins and window length.
            text_model: Folder or Hub id of the LLM: its tokenizer and chat template.
            audio_revision: Commit or branch of the first.
            text_revision: Commit or branch of the second.
            window_seconds: The model's `window_seconds`, where an encoder has no window of its own.
            fields: Arguments of `SoundwaveProcessor`.
        """
        config = AutoConfig.from_pretrained(audio_model, revision=audio_revision)
        extractor = make_extractor(config, audio_model, window_seconds)
        return cls(extractor, AutoTokenizer.from_pretrained(text_model, revision=text_revision), **fields)

    @property
    def model_input_names(self) -> list[str]:
        """The names of the tensors a call can return."""
        return ["input_ids", "attention_mask", *AUDIO_INPUTS]

    # Audio

    def load_audio(self, source: Any, sampling_rate: int | None = None) -> np.ndarray:
        """Any recording as mono float32 at 16 kHz, (n,); see `audio_soundwave.load_audio`."""
        return load_audio(source, sampling_rate, self.audio_limits)

    def stream_audio(self, source: Any, sampling_rate: int | None = None) -> Iterator[np.ndarray]:
        """The same in blocks (n,) with bounded memory, for long recordings; see `decoding_soundwave.open_audio`."""
        return open_audio(source, sampling_rate, self.audio_limits)

    def stream_windows(self, blocks: Iterable[np.ndarray]) -> Iterator[Window]:
        """The windows of `audio_features` one by one, from the blocks of `stream_audio`."""
        return stream_windows(blocks, self.feature_extractor, self.audio_padding)

    def audio_features(self, waveforms: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """Windows of mel features of waveforms from `load_audio`.

        Returns:
            `input_features` (n_windows, M, T), `input_features_mask` (n_windows, T), `window_offsets` (n_windows,) in
            mel frames, `windows_per_audio` (n_audios,).
        """
        return log_mel_windows(waveforms, self.feature_extractor, self.audio_padding)

    # Calls

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        chat_template: str | None = None,
        tokenize: bool = True,
        return_dict: bool = True,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        sanitize_control_tokens: bool = True,
        return_tensors: str | None = "pt",
        sampling_rate: int | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        tools: Any = None,
        documents: Any = None,
        load_audio_from_video: bool = False,
        padding: Any = True,
        reuse_audio: int = 0,
        **template_kwargs: Any,
    ) -> BatchFeature | torch.Tensor | str | list[str]:
        """Write one conversation, or a list of them, with the LLM's chat template, and load the recordings in it.

        Args:
            conversation: Messages whose content is a string or a list of `{"type": "text", "text": ...}` and
                `{"type": "audio", "path" | "url" | "audio": ...}`.
            chat_template: Another template for this call.
            tokenize: `False` returns the written text instead of tensors. What looks like a control token in a user's
                text is cut in it by U+FDD0, which `processor(text=...)` understands; remove it for reading only.
            return_dict: `False` returns `input_ids` alone.
            add_generation_prompt: Open the assistant's turn at the end; `None`: unless the last message is its own.
            continue_final_message: Leave the last message open instead, to be continued.
            sanitize_control_tokens: Must stay `True`: special tokens and placeholders in texts stay text. Trusted text
                goes through `processor(text=...)`.
            return_tensors: Always PyTorch.
            sampling_rate: Rate of recordings given as bare waveforms, in Hz.
            processor_kwargs: May hold `sampling_rate` or `audio_kwargs` instead.
            tools: Not supported.
            documents: Not supported.
            load_audio_from_video: Not supported.
            padding: Batches are always padded.
            reuse_audio: The first so many recordings are given to the model as `audio_embeds`: they are neither opened
                nor computed, and their items need name no recording. Counted over all conversations of a batch.
            template_kwargs: Arguments of the template, over the pinned ones.

        Returns:
            The tensors of `__call__`.

        Raises:
            MessageError: Malformed messages.
            PlaceholderError: Fewer recordings than `reuse_audio`, or a template that leaves one out.
            TemplateError: The template refuses the conversation.
            AudioError: A recording that cannot be read.
        """
        _refuse(tools=tools, documents=documents, load_audio_from_video=load_audio_from_video)
        _check_tensors(return_tensors)
        if not sanitize_control_tokens:
            raise ValueError(
                "sanitize_control_tokens=False is not supported; trusted text goes to processor(text=...)."
            )
        if continue_final_message and add_generation_prompt:
            raise ValueError("add_generation_prompt and continue_final_message exclude each other; drop one of them.")
        conversations, batched = _conversations(conversation)
        template = chat_template or self.chat_template
        key = template_key({**self.chat_template_kwargs, **template_kwargs})
        rows: list[tuple[int, ...]] = []
        texts: list[str] = []
        recordings: list[Any] = []
        for chat in conversations:
            turns, heard = split_conversation(chat)
            recordings += heard
            opens = turns[-1][0] != "assistant" if add_generation_prompt is None else add_generation_prompt
            ending = "continue" if continue_final_message else "prompt" if opens else ""
            written = (template, key, self.audio_token, self._with_system(turns), ending)
            if tokenize:
                rows.append(chat_ids(self.tokenizer, len(self.tokenizer), *written))
            else:
                texts.append(render(self.tokenizer, *written))
        if not tokenize:
            return texts if batched else texts[0]
        if not isinstance(reuse_audio, int) or reuse_audio not in range(len(recordings) + 1):
            raise PlaceholderError(
                f"reuse_audio is {brief(reuse_audio)} for {len(recordings)} recordings; expected a number from 0 to "
                f"{len(recordings)}: that of the recordings whose audio_embeds the model gets."
            )
        rate = _sampling_rate(sampling_rate, **(processor_kwargs or {}))
        waveforms = [self.load_audio(recording, rate) for recording in named_recordings(recordings[reuse_audio:])]
        batch = self._batch(rows, waveforms, reuse_audio)
        return batch if return_dict else batch["input_ids"]

    def __call__(
        self,
        audio: Any = None,
        text: str | Sequence[str] | None = None,
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
        audio_kwargs: Mapping[str, Any] | None = None,
        images: Any = None,
        videos: Any = None,
        padding: Any = True,
        language: str | None = None,
        bias: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Recordings and *trusted* text to the model's inputs.

        Special tokens and placeholders in `text` count as such: text of a user belongs into `apply_chat_template`.

        Args:
            audio: One recording or a list of them, each as `load_audio` takes it. Without `text`, each gets the
                transcription prompt.
            text: One text or a list, with one `audio_token` per recording.
            sampling_rate: Rate of recordings given as bare waveforms, in Hz.
            return_tensors: Always PyTorch.
            audio_kwargs: May hold `sampling_rate` instead.
            images: Not supported.
            videos: Not supported.
            padding: Batches are always padded, on the left.
            language: Hint for the transcription prompt, see `transcription_messages`; only without `text`.
            bias: Likely words for it, likewise.
            kwargs: None is supported; named in the error.

        Returns:
            `input_ids`, `attention_mask` (B, N); with audio also `input_features` (n_windows, M, T),
            `input_features_mask` (n_windows, T), `window_offsets` (n_windows,) and `windows_per_audio` (n_audios,).

        Raises:
            AudioError: A recording that cannot be read.
            PlaceholderError: Placeholders and recordings that differ in number.
            MessageError: A text that is none.
            HintError: A language or a list of words that cannot be used.
        """
        _refuse(images=images, videos=videos, **kwargs)
        _check_tensors(return_tensors)
        rate = _sampling_rate(sampling_rate, audio_kwargs)
        waveforms = [self.load_audio(recording, rate) for recording in recordings_list(audio)]
        if text is None:
            rows = [self.transcription_ids(language, bias)] * len(waveforms)
        else:
            _refuse(language=language, bias=bias)
            rows = [self._text_ids(one) for one in ([text] if isinstance(text, str) else _texts(text))]
        return self._batch(rows, waveforms)

    def _text_ids(self, text: str) -> list[int]:
        if CUT in check_unicode(text):  # written by apply_chat_template(tokenize=False), and so complete
            return encode_cut(self.tokenizer, text)
        # A rendered chat template brings its own beginning-of-sequence token; a second one would be added here.
        bos = self.tokenizer.bos_token
        begins = bool(bos) and text.startswith(bos)
        return self.tokenizer(text, add_special_tokens=not begins)["input_ids"]

    def _batch(self, rows: Sequence[Sequence[int]], waveforms: Sequence[np.ndarray], reused: int = 0) -> BatchFeature:
        """Pad the rows on the left and add the features, after counting placeholders against recordings."""
        if not rows:
            raise ValueError("Neither audio nor text was given; expected at least one of them.")
        placeholders = sum(row.count(self.audio_token_id) for row in rows)
        if placeholders != reused + len(waveforms):
            raise PlaceholderError(
                f"The text has {placeholders} audio placeholders {self.audio_token} for {len(waveforms)} recordings; "
                "expected as many of one as of the other. Add or remove placeholders or recordings."
            )
        longest = max(map(len, rows))
        input_ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)  # (B, N)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            start = longest - len(row)
            input_ids[index, start:] = torch.tensor(row, dtype=torch.long)
            attention_mask[index, start:] = 1
        features = self.audio_features(waveforms) if waveforms else {}
        return BatchFeature({"input_ids": input_ids, "attention_mask": attention_mask, **features})


def _template_of(tokenizer: Any) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no chat template; use the instruction-tuned LLM, or pass "
            "chat_template=."
        )
    return tokenizer.get_chat_template()


def _conversations(conversation: Any) -> tuple[list[Any], bool]:
    """One conversation or a list of them (also the library's `Chat`), and whether it is a list."""
    batched = isinstance(conversation, Sequence) and bool(conversation) and not isinstance(conversation[0], Mapping)
    if not batched or isinstance(conversation, str | bytes):
        return [conversation], False
    return [getattr(chat, "messages", chat) for chat in conversation], True


def _texts(text: Any) -> Sequence[str]:
    if not isinstance(text, list | tuple) or not all(isinstance(one, str) for one in text):
        raise MessageError(f"The text is {brief(text)}, of type {type(text).__name__}; expected a string or a list.")
    return text


def _sampling_rate(given: int | None, audio_kwargs: Mapping[str, Any] | None = None, **kwargs: Any) -> int | None:
    """The rate, wherever the caller put it; `padding` may stand beside it and changes nothing."""
    named = {**kwargs, **(audio_kwargs or {})}
    rate = named.pop("sampling_rate", None)
    named.pop("padding", None)
    _refuse(**named)
    if given is not None and rate is not None and given != rate:
        raise ValueError(f"sampling_rate is given twice, as {given!r} and {rate!r}; give it once.")
    return rate if given is None else given


def _refuse(**arguments: Any) -> None:
    """Refuse what would change nothing: an argument that is ignored in silence is a wrong result."""
    given = sorted(name for name, value in arguments.items() if value is not None and value is not False)
    if given:
        raise ValueError(f"SoundwaveProcessor does not support the arguments {', '.join(given)}; leave them out.")


def _check_tensors(return_tensors: str | None) -> None:
    if return_tensors not in ("pt", None):
        raise ValueError(f"return_tensors is {return_tensors!r}; the processor returns PyTorch tensors ('pt').")


SoundwaveProcessor.register_for_auto_class()
