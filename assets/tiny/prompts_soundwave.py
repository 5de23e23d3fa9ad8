"""What a processor says: the ids of prompts, answers and transcripts, hints for a transcript, and biased words."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from transformers.models.whisper.tokenization_whisper import LANGUAGES

from .chat_soundwave import CUT, answer_ids, chat_ids, control_tokens, cut, encode_cut, template_key
from .messages_soundwave import (
    HintError,
    MessageError,
    Turn,
    brief,
    fill_recordings,
    is_empty,
    named_recordings,
    split_conversation,
)

NAMES_OF_CODES = {**LANGUAGES, "jv": "javanese"}  # Whisper's own code of Javanese is not the ISO one


class SoundwavePromptsMixin:
    """The text side of `SoundwaveProcessor`: conversations and training rows to token ids."""

    tokenizer: Any
    chat_template: str
    chat_template_kwargs: dict[str, Any]
    audio_token: str
    system_prompt: str | None
    transcription_prompt: str

    def prompt_ids(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Ids up to where the answer begins; a final assistant's message is the answer and left out."""
        return list(self._ids(self._prompt_turns(messages), "prompt"))

    def prompt_and_answer_ids(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
        """Ids of the prompt, and of the final assistant's answer with its closing tokens."""
        turns = self._turns(messages)
        if turns[-1][0] != "assistant":
            raise MessageError(
                f"The last of {len(turns)} messages is not the assistant's; expected the answer there. "
                "Use prompt_ids for a conversation without it."
            )
        prompt = self._ids(turns[:-1], "prompt")
        return list(prompt), answer_ids(self.tokenizer, prompt, self._ids(turns))

    def ctc_label_ids(self, text: str) -> list[int]:
        """Ids of a transcript, the same as the same text has as an answer: they are compared token by token."""
        if not text.strip():
            return []
        question: Turn = ("user", (self.transcription_prompt,))
        prompt = self._ids((question,), "prompt")
        empty = answer_ids(self.tokenizer, prompt, self._ids((question, ("assistant", ("",)))))
        answer = answer_ids(self.tokenizer, prompt, self._ids((question, ("assistant", (text,)))))
        # What the empty answer has as well the template wrote: perhaps closed thoughts, surely the closing tokens. A
        # space before the text belongs to the answer.
        shared, opening, closing = min(len(empty), len(answer)), 0, 1
        while opening < shared - 1 and empty[opening] == answer[opening]:
            opening += 1
        while closing < shared - opening and empty[-closing - 1] == answer[-closing - 1]:
            closing += 1
        return answer[opening if self.tokenizer.decode(answer[:opening]).strip() else 0 : -closing]

    def transcription_messages(
        self, language: str | None = None, bias: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """The conversation that asks for a transcript of one recording, which it does not name.

        Hints help a model whose LLM heeds such instructions; one that was trained on the bare prompt alone may do
        worse with them. `sequence_bias` needs no training.

        Args:
            language: Hint for the language spoken: its English name, or an ISO 639-1 code ("de", "pt-BR").
            bias: Words and phrases that are likely to be said, such as names, spelt as they should come out.

        Raises:
            HintError: An unknown code, or words that are none.
        """
        text = self.transcription_prompt
        if language is not None:
            text += f" The language is {language_name(language)}."
        if bias is not None and (words := checked_words(bias)):
            text += f" Likely words: {', '.join(words)}."
        return [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": text}]}]

    def transcription_ids(self, language: str | None = None, bias: Sequence[str] | None = None) -> list[int]:
        """Ids of the prompt of `transcription_messages`, with one placeholder."""
        return self.prompt_ids(self.transcription_messages(language, bias))

    def sequence_bias(self, words: Sequence[str], strength: float = 4.0) -> list[list[Any]]:
        """What `generate(sequence_bias=...)` takes to make words more likely in an answer.

        Every word is biased at the beginning of the answer and inside of it, with and without a space before it, as it
        is and with a capital first letter. The library raises a token's score when the ids before it are those of a
        given sequence, so the steps of a word are given one by one: the first of n tokens gets `strength / n`, because
        other words begin like it, and each further one, once all before it are there, gets `strength`.

        Args:
            words: Words and phrases, as for `transcription_messages`.
            strength: Added to the scores of the tokens, in nats: 4 lets a word win that is 50 times less likely.

        Raises:
            HintError: No words, or a strength that is not positive.
        """
        words = checked_words(words)
        if not words or not isinstance(strength, int | float) or not 0 < strength < inf:
            raise HintError(
                f"The words are {brief(words)} and the strength is {brief(strength)}; expected at least one word and "
                "a positive number. Words that must not occur go to generate(bad_words_ids=...)."
            )
        control = control_tokens(self.tokenizer, len(self.tokenizer), self.chat_template, self.audio_token)
        forms = [form for word in words for form in dict.fromkeys((word, word[0].upper() + word[1:]))]
        sequences = [self.ctc_label_ids(form) for form in forms]
        for text in (*forms, *(f" {form}" for form in forms)):
            sequences.append(encode_cut(self.tokenizer, CUT + cut(text, control)))  # cut off: not at the beginning
        steps: dict[tuple[int, ...], float] = {}
        for ids in sequences:
            for length in range(1, len(ids) + 1):
                step = tuple(ids[:length])
                share = strength / len(ids) if length == 1 else float(strength)
                steps[step] = max(share, steps.get(step, 0.0))
        return [[list(step), bias] for step, bias in steps.items()]

    def example_messages(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The conversation of a training or evaluation row: audio, then the instruction, then the answer if any.

        A row with `messages` keeps them; audio items that name no recording take those of `audio` in order.
        """
        audio = row.get("audio")
        recordings = list(audio) if isinstance(audio, list | tuple) else [] if audio is None else [audio]
        if not is_empty(row.get("messages")):
            return fill_recordings(row["messages"], recordings)
        content: list[dict[str, Any]] = [{"type": "audio", "audio": recording} for recording in recordings]
        if not is_empty(row.get("instruction")):
            content.append({"type": "text", "text": row["instruction"]})
        messages = [{"role": "user", "content": content}]
        answer = row.get("answer")
        if answer is not None:
            said = answer.strip() if isinstance(answer, str) else answer  # anything else is refused with the messages
            messages.append({"role": "assistant", "content": [{"type": "text", "text": said}]})
        return messages

    def recordings_of(self, messages: Sequence[Mapping[str, Any]]) -> list[Any]:
        """The recordings of a conversation in order of appearance, each something `load_audio` takes."""
        return named_recordings(split_conversation(messages)[1])

    def _turns(self, messages: Sequence[Mapping[str, Any]]) -> tuple[Turn, ...]:
        return self._with_system(split_conversation(messages)[0])

    def _with_system(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        if self.system_prompt and not any(role == "system" for role, _ in turns):
            turns = (("system", (self.system_prompt,)), *turns)
        return turns

    def _prompt_turns(self, messages: Sequence[Mapping[str, Any]]) -> tuple[Turn, ...]:
        turns = self._turns(messages)
        return turns[:-1] if turns[-1][0] == "assistant" else turns

    def _ids(self, turns: tuple[Turn, ...], ending: str = "") -> tuple[int, ...]:
        key = template_key(self.chat_template_kwargs)
        return chat_ids(self.tokenizer, len(self.tokenizer), self.chat_template, key, self.audio_token, turns, ending)


def language_name(language: str) -> str:
    """The English name of a language given by name or ISO 639-1 code; names stay as they are."""
    name = " ".join(language.split()) if isinstance(language, str) else ""
    code = name.lower().replace("_", "-").partition("-")[0]
    if code in NAMES_OF_CODES:
        return NAMES_OF_CODES[code].title()
    if len(code) <= 2:
        raise HintError(
            f"The language is {brief(language)}; expected its English name or one of the codes "
            f"{', '.join(NAMES_OF_CODES)}. Give the name of any other language."
        )
    return name


def checked_words(words: Sequence[str]) -> list[str]:
    """Likely words without needless white space."""
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) and word.strip() for word in words):
        raise HintError(f"The likely words are {brief(words)}; expected a list of words, none of them empty.")
    return [" ".join(word.split()) for word in words]
