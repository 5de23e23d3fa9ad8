"""Turns to token ids, through the chat template of the LLM itself.

A recording is one audio token. Text of a conversation never becomes a control token: what looks like one is cut in
two by a marker before rendering, and the text is encoded in pieces afterwards. The marker is a code point that Unicode
reserves for internal use and that never occurs in exchanged text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from .messages_soundwave import MessageError, PlaceholderError, TemplateError, Turn

CUT = "\ufdd0"
ROLES_NAMED = 20  # in a message
LONG_TEXT = 1000  # characters; longer conversations are not remembered
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


def template_key(template_kwargs: Mapping[str, Any]) -> str:
    """The template's arguments as a hashable text."""
    try:
        return json.dumps(template_kwargs, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:  # no JSON type; a circle; too deep
        raise TemplateError(
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

    Raises:
        MessageError: No turns, or a text that cannot be encoded.
        TemplateError: The template refuses the turns.
    """
    if not turns:
        raise MessageError("A conversation has no messages before the answer; expected at least one.")
    if not has_system_role(tokenizer, template, key):
        turns = _system_to_user(turns)
    control = control_tokens(tokenizer, len(tokenizer), template, audio_token)
    messages = [
        {"role": role, "content": "".join(audio_token if part is None else cut(part, control) for part in parts)}
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
    except Exception as error:  # a template is a program of its own, and what it gets are plain strings
        roles = ", ".join(message["role"] for message in messages[:ROLES_NAMED])
        more = ", ..." if len(messages) > ROLES_NAMED else ""
        raise TemplateError(
            f"The chat template refuses a conversation with the roles {roles}{more}: {str(error)[:200]}. Write the "
            "turns as this LLM expects them."
        ) from error


def _with_pinned_date(template: str) -> str:
    """The template with a clock that stands still; arguments of a template may be values only, so it is a macro."""
    if "strftime_now" not in template:
        return template
    filters = "".join(f"|replace('{directive}', '{value}')" for directive, value in PINNED_DATE.items())
    # The empty expression keeps a line feed at the beginning of the template from being taken for the block's own.
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}{{{{ '' }}}}{template}"


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
    # A recording counts as much as its role, and so does a turn: a thousand empty ones are long too.
    size = sum(len(role) + sum(len(part or role) for part in parts) for role, parts in turns)
    ids_of = _chat_ids if size > LONG_TEXT else cached_chat_ids
    return ids_of(tokenizer, vocabulary, template, key, audio_token, turns, ending)


def _chat_ids(
    tokenizer: Any, vocabulary: int, template: str, key: str, audio_token: str, turns: tuple[Turn, ...], ending: str
) -> tuple[int, ...]:
    text = render(tokenizer, template, key, audio_token, turns, ending)
    ids = encode_cut(tokenizer, text)
    given = sum(part is None for _, parts in turns for part in parts)
    found = ids.count(tokenizer.convert_tokens_to_ids(audio_token))
    if given != found:
        raise PlaceholderError(
            f"The conversation has {given} recordings, but the chat template wrote {found} placeholders "
            f"{audio_token}; expected one each. Does the template leave a turn out?"
        )
    return tuple(ids)


# Prompts of a task are few and come back in every row. Bounded for servers, which hear other texts all the time.
cached_chat_ids = lru_cache(maxsize=1024)(_chat_ids)


def encode_cut(tokenizer: Any, text: str) -> list[int]:
    """Ids of a rendered text: control tokens are parsed, but nothing joins over a cut."""
    first, *pieces = text.split(CUT)
    ids = _encode(tokenizer, [first])[0]
    for piece in _encode_inside(tokenizer, pieces):
        ids += piece
    return ids


def _encode_inside(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts that are not the beginning: some tokenizers put a space before the first word of what they get."""
    unique = list(dict.fromkeys(texts))  # a hostile text has thousands of equal pieces
    if not unique:
        return []
    anchor, *anchored = _encode(tokenizer, ["\n", *("\n" + text for text in unique)])
    known = {
        text: ids[len(anchor) :] if ids[: len(anchor)] == anchor else _encode(tokenizer, [text])[0]
        for text, ids in zip(unique, anchored, strict=True)
    }
    return [known[text] for text in texts]


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]


@lru_cache(maxsize=64)
def control_tokens(tokenizer: Any, vocabulary: int, template: str, audio_token: str) -> re.Pattern:
    """Matches what a text must not write: special tokens, and added tokens that the template uses or that look so."""
    listed = getattr(tokenizer, "chat_control_tokens", None) or ()  # for templates that put their tokens together
    tokens = {
        name
        for name, special in ((added.content, added.special) for added in tokenizer.added_tokens_decoder.values())
        # An added token of one letter or of white space is a piece of ordinary text, even where a template has it.
        if special
        or name in listed
        or (name.startswith("<|") and name.endswith("|>"))
        or (name in template and len(name) > 1 and not name.isspace())
    }
    return re.compile("|".join(map(re.escape, sorted({*tokens, audio_token}, key=len, reverse=True))))


def cut(text: str, control: re.Pattern) -> str:
    """Cut every control token after its first character, so that neither tokenizer nor template takes it for one."""
    text = check_unicode(text).replace(CUT, "")
    cuts = [0]
    while match := control.search(text, cuts[-1]):  # from inside the last one: <s> is also in <<s>>
        if len(match[0]) == 1:
            raise MessageError(f"The text has {match[0]!r}, a control token that cannot be cut; leave it out.")
        cuts.append(match.start() + 1)
    return CUT.join(text[start:end] for start, end in pairwise((*cuts, len(text))))


def check_unicode(text: str) -> str:
    """The text itself; lone surrogates (half a character, left behind by a faulty decoder) cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MessageError(
            f"The text has the lone surrogate {text[error.start]!r} at character {error.start} of {len(text)}; "
            "expected whole characters. Decode its source as UTF-8."
        ) from error
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
        raise TemplateError(
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
        raise TemplateError(
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
