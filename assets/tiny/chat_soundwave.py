"""Conversations to token ids, through the chat template of the LLM itself.

A conversation becomes *turns*, `(role, parts)` with a string per text and `None` per recording: hashable, so that
equal texts are rendered once. A recording is one audio token. Text of a conversation never becomes a control token:
what looks like one is cut in two by a marker before rendering, and the text is encoded in pieces afterwards. The
marker is a code point that Unicode reserves for internal use and that never occurs in exchanged text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

Turn = tuple[str, tuple[str | None, ...]]

ROLES = ("system", "user", "assistant")
CUT = "\ufdd0"
# Templates that print today's date get this one: tomorrow's prompts must be those of the training.
PINNED_DATE = {
    "%d": "26",
    "%-d": "26",
    "%m": "07",
    "%b": "Jul",
    "%B": "July",
    "%Y": "2024",
    "%y": "24",
    "%A": "Friday",
}
DEFAULT_TEMPLATE_KWARGS = {"enable_thinking": False, "date_string": "26 Jul 2024"}


class ChatError(ValueError):
    """A conversation that cannot be written with this template: says what was given, expected and what to do."""


def split_conversation(conversation: Sequence[Mapping[str, Any]]) -> tuple[tuple[Turn, ...], list[Any]]:
    """Separate what is said from what is heard.

    Args:
        conversation: Messages `{"role", "content"}`; content is a string or a list of `{"type": "text", "text": ...}`
            and `{"type": "audio", "path" | "url" | "audio": ...}` (with `"sampling_rate"` beside a bare waveform).

    Returns:
        The turns, and the recordings in order of appearance (`None` where an audio item names none).
    """
    turns, recordings = [], []
    for message in conversation:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ChatError(f"A message has the role {role!r}; expected one of {', '.join(ROLES)}.")
        surplus = sorted(key for key, value in message.items() if key not in ("role", "content") and value)
        if surplus:
            raise ChatError(f"A {role} message has the fields {surplus}; only 'role' and 'content' are supported.")
        parts: list[str | None] = []
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content or []:
            kind = item.get("type")
            if kind == "audio":
                recordings.append(_recording_of(item))
                parts.append(None)
            elif kind == "text" and isinstance(item.get("text"), str):
                # Neighbouring texts are one text: together they might spell a control token.
                if parts and parts[-1] is not None:
                    parts[-1] += item["text"]
                else:
                    parts.append(item["text"])
            else:
                raise ChatError(
                    f"A {role} message holds an item of type {kind!r} with the keys {sorted(item)}; expected "
                    '{"type": "text", "text": ...} or {"type": "audio", "path" | "url" | "audio": ...}.'
                )
        turns.append((role, tuple(parts)))
    return tuple(turns), recordings


def _recording_of(item: Mapping[str, Any]) -> Any:
    sources = [item[key] for key in ("audio", "path", "url") if item.get(key) is not None]
    if len(sources) > 1:
        raise ChatError(f"An audio item has the keys {sorted(item)}; give one of 'path', 'url' and 'audio'.")
    if sources and item.get("sampling_rate") and not isinstance(sources[0], dict):
        return {"array": sources[0], "sampling_rate": item["sampling_rate"]}
    return sources[0] if sources else None


def fill_recordings(messages: Sequence[Mapping[str, Any]], recordings: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages whose audio items without a recording received the given ones in order."""
    filled, empty = [], 0
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            items = []
            for item in content:
                if item.get("type") == "audio" and _recording_of(item) is None:
                    item = {"type": "audio", "audio": recordings[empty] if empty < len(recordings) else None}
                    empty += 1
                items.append(item)
            content = items
        filled.append({"role": message["role"], "content": content})
    if empty != len(recordings):
        raise ChatError(
            f"The messages of a row have {empty} audio items without a recording, and its 'audio' holds "
            f"{len(recordings)}; expected as many of one as of the other."
        )
    return filled


def template_key(template_kwargs: Mapping[str, Any]) -> str:
    """The template's arguments as a hashable text."""
    try:
        return json.dumps(template_kwargs, sort_keys=True)
    except TypeError as error:
        raise ChatError(
            f"Chat template arguments {sorted(template_kwargs)} must be plain JSON values: {error}."
        ) from error


def render(
    tokenizer: Any, template: str, key: str, audio_token: str, turns: tuple[Turn, ...], ending: str = ""
) -> str:
    """Write turns with the template; control tokens in their texts are cut by `CUT`.

    Args:
        tokenizer: The LLM's tokenizer.
        template: Its chat template.
        key: The template's arguments, from `template_key`.
        audio_token: What stands for one recording.
        turns: From `split_conversation`.
        ending: `"prompt"` opens the assistant's turn, `"continue"` leaves the last turn open, `""` closes it.
    """
    if not has_system_role(tokenizer, template, key):
        turns = _system_to_user(turns)
    control = control_tokens(tokenizer, len(tokenizer), template, audio_token)
    messages = [
        {"role": role, "content": "".join(audio_token if part is None else _cut(part, control) for part in parts)}
        for role, parts in turns
    ]
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=_with_pinned_date(template),
            tokenize=False,
            add_generation_prompt=ending == "prompt",
            continue_final_message=ending == "continue",
            **json.loads(key),
        )
    except Exception as error:
        # A template's own refusal, known by its home: jinja's error class is not ours to import.
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        roles = ", ".join(message["role"] for message in messages) or "none"
        raise ChatError(
            f"The chat template refuses a conversation with the roles {roles}: {error}. Write the turns as this LLM "
            "expects them."
        ) from error


def _with_pinned_date(template: str) -> str:
    """The template with a clock that stands still; arguments of a template may be values only, so it is a macro."""
    if "strftime_now" not in template:
        return template
    filters = "".join(f"|replace('{directive}', '{value}')" for directive, value in PINNED_DATE.items())
    # The empty expression keeps a line feed at the beginning of the template from being taken for the block's own.
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}{{{{ '' }}}}{template}"


# Prompts of a task are few and come back in every row; answers come back every epoch.
@lru_cache(maxsize=16_384)
def chat_ids(
    tokenizer: Any,
    vocabulary: int,
    template: str,
    key: str,
    audio_token: str,
    turns: tuple[Turn, ...],
    ending: str = "",
) -> tuple[int, ...]:
    """Token ids of a conversation, one audio token per recording; arguments as for `render`.

    `vocabulary` is the size of the tokenizer: tokens added later must not meet ids remembered from before.
    """
    text = render(tokenizer, template, key, audio_token, turns, ending)
    ids = encode_cut(tokenizer, text)
    given = sum(part is None for _, parts in turns for part in parts)
    found = ids.count(tokenizer.convert_tokens_to_ids(audio_token))
    if given != found:
        raise ChatError(
            f"The conversation has {given} recordings, but the chat template wrote {found} placeholders "
            f"{audio_token}; expected one each. Does the template leave a turn out?"
        )
    return tuple(ids)


def encode_cut(tokenizer: Any, text: str) -> list[int]:
    """Ids of a rendered text: control tokens are parsed, but nothing joins over a cut."""
    first, *pieces = text.split(CUT)
    ids = _encode(tokenizer, first)
    for piece in pieces:
        ids += _encode_inside(tokenizer, piece)
    return ids


def _encode_inside(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that is not the beginning: some tokenizers put a space before the first word of what they get."""
    anchor = _encode(tokenizer, "\n")
    ids = _encode(tokenizer, "\n" + text)
    return ids[len(anchor) :] if ids[: len(anchor)] == anchor else _encode(tokenizer, text)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@lru_cache(maxsize=64)
def control_tokens(tokenizer: Any, vocabulary: int, template: str, audio_token: str) -> re.Pattern:
    """Matches what a conversation's text must not write: special tokens, and the added tokens the template uses."""
    tokens = {
        added.content
        for added in tokenizer.added_tokens_decoder.values()
        if added.special or (added.content in template and not added.content.isspace())
    }
    return re.compile("|".join(map(re.escape, sorted({*tokens, audio_token}, key=len, reverse=True))))


def _cut(text: str, control: re.Pattern) -> str:
    """Cut every control token after its first character, so that neither tokenizer nor template takes it for one."""
    text = text.replace(CUT, "")
    at = 0
    while match := control.search(text, at):  # from inside the last one: <s> is also in <<s>>
        at = match.start() + 1
        if match.end() == at:
            raise ChatError(f"The text has {match[0]!r}, a control token that cannot be cut; leave it out.")
        text = f"{text[:at]}{CUT}{text[at:]}"
    return text


@lru_cache(maxsize=64)
def has_system_role(tokenizer: Any, template: str, key: str) -> bool:
    """Whether the template writes a system turn: some refuse it, some leave it out in silence."""
    messages = [{"role": "system", "content": "probe-s"}, {"role": "user", "content": "probe-u"}]
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=_with_pinned_date(template), tokenize=False, **json.loads(key)
        )
    except Exception:  # the template's own refusal; jinja's error class is not ours to import
        return False
    return "probe-s" in text


def _system_to_user(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Put the system turns' text before the first user turn, as the families without that role are instructed."""
    system: tuple[str | None, ...] = tuple(
        part for role, parts in turns if role == "system" for piece in parts if piece for part in (piece, "\n\n")
    )
    rest = [turn for turn in turns if turn[0] != "system"]
    for index, (role, parts) in enumerate(rest):
        if role == "user" and system:
            rest[index] = (role, (*system, *parts))
            return tuple(rest)
    if system:
        raise ChatError(
            "The chat template has no system role, and the conversation has no user turn to put the system prompt "
            "into; add a user turn."
        )
    return tuple(rest)


@lru_cache(maxsize=64)
def _special_ids(tokenizer: Any, vocabulary: int) -> frozenset[int]:
    return frozenset(index for index, added in tokenizer.added_tokens_decoder.items() if added.special)


def answer_ids(tokenizer: Any, prompt: tuple[int, ...], full: tuple[int, ...]) -> list[int]:
    """What the model must produce after the prompt: the answer and all that closes it, up to the last special token.

    A few families close a turn with several tokens. Which of them ends generation is for the LLM's generation config
    to say: the model learns them all.

    Args:
        tokenizer: The LLM's tokenizer.
        prompt: Ids with the opened assistant's turn.
        full: Ids of the same conversation with the answer.
    """
    if full[: len(prompt)] != prompt:
        at = next(i for i, pair in enumerate(zip((*full, None), prompt, strict=False)) if pair[0] != pair[1])
        raise ChatError(
            "The prompt is not the beginning of the conversation with its answer: they differ at token "
            f"{at} of {len(prompt)}, after {tokenizer.decode(list(prompt[max(0, at - 8) : at]))!r}. "
            "Answers must not begin with white space; a template that writes more into closed turns than into its "
            "generation prompt needs other arguments (chat_template_kwargs)."
        )
    answer = list(full[len(prompt) :])
    special = _special_ids(tokenizer, len(tokenizer))
    last = max((i for i, token in enumerate(answer) if token in special), default=-1)
    # Generation ends at the last of them: a line feed that the template writes behind it is never asked for.
    if last >= 0 and not tokenizer.decode(answer[last + 1 :]).strip():
        return answer[: last + 1]
    # The template does not close the turn, and a model that never sees an end would never stop.
    return [*answer, tokenizer.eos_token_id]
