"""Conversations as users write them, checked and split into what is said and what is heard.

A conversation becomes *turns*, `(role, parts)` with a string per text and `None` per recording: hashable, so that
equal texts are rendered once.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from reprlib import Repr
from typing import Any

Turn = tuple[str, tuple[str | None, ...]]

ROLES = ("system", "user", "assistant")
SOURCES = ("audio", "path", "url")  # keys of an audio item that name its recording
_REPR = Repr()
_REPR.maxlevel = 3


class ChatError(ValueError):
    """A conversation that cannot be written: says what was given, expected and what to do. Each kind has its class."""


class MessageError(ChatError):
    """A conversation, message, item or text of the wrong shape or type."""


class PlaceholderError(ChatError):
    """Placeholders and recordings that differ in number."""


class TemplateError(ChatError):
    """A chat template that refuses the conversation or does not write it whole."""


class HintError(ChatError):
    """A language or a list of likely words that cannot be used."""


def brief(value: Any) -> str:
    """Any value in an error's message: neither long nor deep."""
    text = _REPR.repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def split_conversation(conversation: Sequence[Mapping[str, Any]]) -> tuple[tuple[Turn, ...], list[Any]]:
    """Separate what is said from what is heard.

    Args:
        conversation: Messages `{"role", "content"}`; content is a string or a list of `{"type": "text", "text": ...}`
            and `{"type": "audio", "path" | "url" | "audio": ...}` (with `"sampling_rate"` beside a bare waveform).

    Returns:
        The turns, and the recordings in order of appearance (`None` where an audio item names none).

    Raises:
        MessageError: Anything else.
    """
    if not isinstance(conversation, Sequence) or isinstance(conversation, str):
        raise MessageError(
            f"A conversation is {brief(conversation)}, of type {type(conversation).__name__}; expected a list of "
            'messages {"role": ..., "content": ...}.'
        )
    if not conversation:
        raise MessageError("A conversation has no messages; expected at least one.")
    turns, recordings = [], []
    for message in conversation:
        role, content = _checked_message(message)
        parts: list[str | None] = []
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if not isinstance(item, Mapping) or not _is_item(item):
                raise MessageError(
                    f"A {role} message holds the item {brief(item)}; expected "
                    '{"type": "text", "text": ...} or {"type": "audio", "path" | "url" | "audio": ...}.'
                )
            if item["type"] == "audio":
                recordings.append(_recording_of(item))
            parts.append(None if item["type"] == "audio" else item["text"])
        # Neighbouring texts are one text: together they might spell a control token.
        merged: list[str | None] = []
        for heard, run in groupby(parts, key=lambda part: part is None):
            texts = [part or "" for part in run]
            merged += [None] * len(texts) if heard else ["".join(texts)]
        turns.append((role, tuple(merged)))
    return tuple(turns), recordings


def _checked_message(message: Any) -> tuple[str, str | list[Any] | tuple[Any, ...]]:
    """Role and content of a message that has both, and nothing else that would be ignored in silence."""
    if not isinstance(message, Mapping):
        raise MessageError(
            f"A message is {brief(message)}, of type {type(message).__name__}; expected "
            '{"role": ..., "content": ...}. Pass several conversations as a list of lists.'
        )
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise MessageError(f"A message has the role {brief(role)}; expected one of {', '.join(ROLES)}.")
    surplus = [key for key, value in message.items() if key not in ("role", "content") and not is_empty(value)]
    if surplus:
        raise MessageError(
            f"A {role} message has the fields {brief(surplus)}; only 'role' and 'content' are supported."
        )
    if not isinstance(content, str | list | tuple):
        raise MessageError(
            f"A {role} message has the content {brief(content)}, of type {type(content).__name__}; expected a string "
            "or a list of items."
        )
    return role, content


def is_empty(value: Any) -> bool:
    """Whether a field says nothing: rows of a table carry every field that any of them has."""
    return value is None or value is False or (isinstance(value, Sequence | Mapping) and not value)


def _is_item(item: Mapping[str, Any]) -> bool:
    """Whether an item is a text or a recording; one that is both would lose one of them."""
    kind, text = item.get("type"), item.get("text")
    if not isinstance(kind, str):
        return False
    if kind == "audio":
        return is_empty(text)
    return kind == "text" and isinstance(text, str) and all(item.get(key) is None for key in SOURCES)


def _recording_of(item: Mapping[str, Any]) -> Any:
    sources = [item[key] for key in SOURCES if item.get(key) is not None]
    if len(sources) > 1:
        raise MessageError(f"An audio item has the keys {brief(list(item))}; give one of 'path', 'url' and 'audio'.")
    source, rate = sources[0] if sources else None, item.get("sampling_rate")
    if source is None or rate is None:
        return source
    if not isinstance(source, Mapping):
        return {"array": source, "sampling_rate": rate}
    inner = source.get("sampling_rate")
    return {**source, "sampling_rate": rate if inner is None else inner}


def named_recordings(recordings: list[Any]) -> list[Any]:
    """The recordings themselves, after a look that there is one in every place."""
    if any(recording is None for recording in recordings):
        raise MessageError("An audio item names no recording; expected one of the keys 'path', 'url' and 'audio'.")
    return recordings


def fill_recordings(messages: Sequence[Mapping[str, Any]], recordings: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages whose audio items without a recording received the given ones in order."""
    split_conversation(messages)  # every message and item is well-formed from here on
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
        raise PlaceholderError(
            f"The messages of a row have {empty} audio items without a recording, and its 'audio' holds "
            f"{len(recordings)}; expected as many of one as of the other."
        )
    return filled
