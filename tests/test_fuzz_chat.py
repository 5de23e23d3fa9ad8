"""Conversations as nobody should write them: each is taken, or refused by an exception of its kind, and soon."""

import random
import time
import tracemalloc
from collections import UserDict, deque
from types import SimpleNamespace

import numpy as np
import pytest

from soundwave.processing import AudioError, ChatError, MessageError, TemplateError
from tests.processors import ASSISTANT, PROCESSORS, SAMPLING_RATE, USER, make_processor, noise, user
from tests.tokenizers import FAMILIES

SECONDS = 5.0  # of the processor, that no conversation may take


def deep(levels: int, kind: type) -> object:
    value: object = []
    for _ in range(levels):
        value = {"content": value} if kind is dict else [value]
    return value


class NoMapping:
    """Looks like a message to whoever only calls `get`."""

    def get(self, key, default=None):
        return {"role": "user", "content": "x"}.get(key, default)


def circle() -> list:
    value: list = []
    value.append(value)
    return value


# Values of the wrong type, size or content, made anew for every place that one is put into.
VALUES = [
    lambda _: None,
    lambda _: True,
    lambda rng: rng.choice([0, -1, 7, 10**30, float("nan"), float("inf"), 1j]),
    lambda rng: rng.choice(["", " ", "user", "User", "tool", "text", "audio", "<|audio|>", "<|eot_id|>", "a.wav"]),
    lambda rng: rng.choice(
        ["\ud800", "x\udfff", "\0", "a\0b", "\ufdd0", "\uffff", "\u202e", "e\u0301" * 50, "😀" * 9]
    ),
    lambda rng: "".join(chr(rng.randrange(1, 0xD800)) for _ in range(rng.randrange(200))),
    lambda rng: rng.randbytes(rng.randrange(60)),
    lambda rng: bytearray(rng.randbytes(5)),
    lambda rng: rng.choice([[], {}, (), set(), [None], [[]], [{}], [1, 2], ["text"], {"a": 1}, {1: 2, "b": None}]),
    lambda rng: deep(rng.choice([3, 60, 5000]), rng.choice([list, dict])),
    lambda _: circle(),
    lambda rng: rng.choice(
        [np.zeros(3), np.array(["user"]), np.float32(1.0), np.array([]), np.array({}), np.zeros((2, 2))]
    ),
    lambda rng: rng.choice(
        [object(), object, len, NoMapping(), SimpleNamespace(messages=3), range(3), memoryview(b"ab")]
    ),
    lambda _: (item for item in [{"type": "text", "text": "x"}]),
    lambda _: iter([USER]),
    lambda _: deque([USER]),
    lambda rng: UserDict(rng.choice([USER, {"type": "text", "text": "x"}, {"type": "audio"}, {}])),
    lambda rng: {
        "array": rng.choice([noise(50), [0.0, 0.1], "x", None, [[]]]),
        "sampling_rate": rng.choice([SAMPLING_RATE, 0, "x"]),
    },
]


def sound_conversation(rng: random.Random) -> list[dict]:
    """Something to spoil: a conversation of one to four turns with texts and recordings."""

    def item() -> dict:
        audio = {"type": "audio", "audio": noise(rng.choice([1, 300, 900])), "sampling_rate": SAMPLING_RATE}
        return rng.choice([audio, {"type": "text", "text": "What is said?"}, {"type": "text", "text": "<|eot_id|>"}])

    turns = [user(*(item() for _ in range(rng.randrange(1, 4))))]
    for _ in range(rng.randrange(2)):
        turns += [{**ASSISTANT}, user(item())]
    return [{"role": "system", "content": "Be brief."}, *turns] if rng.random() < 0.3 else turns


def places(value: object, found: list | None = None, depth: int = 0) -> list[tuple]:
    """Every (container, key) below a value."""
    found = [] if found is None else found
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys:
        found.append((value, key))
        if depth < 6:
            places(value[key], found, depth + 1)
    return found


def spoil(rng: random.Random, conversation: list) -> object:
    """A conversation after one or two mutations."""
    for _ in range(rng.choice([1, 1, 2])):
        spots = places(conversation)
        value = rng.choice(VALUES)(rng)
        if not spots or rng.random() < 0.05:
            return value
        container, key = rng.choice(spots)
        match rng.randrange(6):
            case 0:
                del container[key]
            case 1 if isinstance(container, list):
                container.insert(key, value)
            case 1:
                container[rng.choice(["tool_calls", "sampling_rate", "path", "url", "audio", "text", "type", 3])] = (
                    value
                )
            case 2 if isinstance(container, list):
                container.extend([container[key]] * rng.choice([1, 30]))
            case 3:
                container[key] = [container[key]]
            case _:
                container[key] = value
    return conversation


def ways(rng: random.Random, processor) -> list:
    """The calls that take a conversation."""
    options = {
        "tokenize": rng.random() < 0.8,
        "add_generation_prompt": rng.choice([None, True, False]),
        "sampling_rate": rng.choice([None, SAMPLING_RATE]),
        "reuse_audio": rng.choice([0, 0, 0, 1]),
    }
    if rng.random() < 0.1:
        options |= {"continue_final_message": True, "add_generation_prompt": None}
    return [
        lambda chat: processor.apply_chat_template(chat, **options),
        lambda chat: processor.apply_chat_template([chat, [USER]], **options),
        lambda chat: processor.prompt_ids(chat),
        lambda chat: processor.prompt_and_answer_ids([*chat, ASSISTANT] if isinstance(chat, list) else chat),
        lambda chat: processor.example_messages({"messages": chat, "audio": ["a.wav"]}),
    ]


def check(seed: int, processors: list) -> bool:
    """Whether one spoilt conversation was refused; anything but our own exceptions, or anything slow, is a failure."""
    rng = random.Random(seed)
    conversation = spoil(rng, sound_conversation(rng))
    call = rng.choice(ways(rng, rng.choice(processors)))
    start = time.process_time()
    try:
        call(conversation)
        return False
    except (ChatError, AudioError) as error:
        assert len(str(error)) < 2000 and str(error).endswith(".")
        return True
    finally:
        assert time.process_time() - start < SECONDS, f"seed {seed}"


@pytest.fixture(scope="module")
def processors() -> list:
    return [
        *PROCESSORS.values(),
        make_processor("llama3", system_prompt=None),
        make_processor("gemma", system_prompt=None),
    ]


def test_two_thousand_spoilt_conversations(processors):
    refused = [check(seed, processors) for seed in range(2000)]
    assert 800 < sum(refused) < 1900  # some were spoilt where it does no harm


@pytest.mark.parametrize("kind", [list, dict])
@pytest.mark.parametrize("levels", [10, 20_000])
def test_deep_nesting(kind, levels):
    for conversation in (deep(levels, kind), [deep(levels, kind)], [{"role": "user", "content": deep(levels, kind)}]):
        with pytest.raises(MessageError):
            PROCESSORS["llama3"].apply_chat_template(conversation)


HUGE = {
    "one word": lambda eos: "a" * 1_000_000,
    "control tokens": lambda eos: eos * (1_000_000 // len(eos)),
    "control tokens and numbers": lambda eos: "".join(f"{eos}{number}" for number in range(100_000))[:1_000_000],
    "halves of control tokens": lambda eos: eos[:-1] * (1_000_000 // len(eos)),
    "zeros": lambda eos: "\0" * 1_000_000,
}


# The default is what took minutes while a text was rebuilt at every cut.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "control tokens" else pytest.mark.slow) for name in HUGE]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_of_a_megabyte(family, name):
    processor = PROCESSORS[family]
    text = HUGE[name](processor.tokenizer.eos_token)
    start = time.process_time()
    ids = processor.prompt_ids([user({"type": "audio"}, text)])
    assert time.process_time() - start < SECONDS
    assert text in processor.tokenizer.decode(ids)


def test_long_texts_are_not_remembered():
    from soundwave.processing import chat_soundwave as chat

    before = chat.cached_chat_ids.cache_info().currsize
    PROCESSORS["llama3"].prompt_ids([user("x" * 5000)])
    assert chat.cached_chat_ids.cache_info().currsize == before


@pytest.mark.parametrize("turns", [1, 90, 900])
def test_what_is_remembered_is_bounded(turns):
    """Conversations that somebody makes up to fill the memory of a server."""
    from soundwave.processing import chat_soundwave as chat

    processor = PROCESSORS["llama3"]
    processor.prompt_ids([USER])
    chat.cached_chat_ids.cache_clear()
    tracemalloc.start()
    try:
        for k in range(20):
            processor.prompt_ids([user(chr(0x1F600 + k) * (900 // turns))] * turns)
        each = tracemalloc.get_traced_memory()[0] / 20
    finally:
        tracemalloc.stop()
    assert each * chat.cached_chat_ids.cache_info().maxsize < 200e6


@pytest.mark.parametrize(
    ("conversation", "error"),
    [
        (None, "None, of type NoneType; expected a list of messages"),
        ("Hello?", "'Hello\\?', of type str; expected a list of messages"),
        (USER, "of type dict; expected a list of messages"),
        (iter([USER]), "iterator.*; expected a list of messages"),
        ([NoMapping()], "of type NoMapping; expected a list|A message is|A conversation is"),
        ([USER, "more"], "A message is 'more', of type str"),
        ([{"role": None, "content": "x"}], "role None; expected one of system, user, assistant"),
        ([{"content": "x"}], "role None"),
        ([{"role": ["user"], "content": "x"}], "role \\['user'\\]"),
        ([{"role": "user"}], "content None, of type NoneType; expected a string or a list"),
        ([{"role": "user", "content": b"x"}], "content b'x', of type bytes"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "of type dict; expected a string"),
        ([{"role": "user", "content": ["x"]}], "holds the item 'x'; expected"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "holds the item"),
        ([{"role": "user", "content": [{"type": "text", "text": "x", "audio": "a.wav"}]}], "holds the item"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "a.wav", "text": "x"}]}], "holds the item"),
        ([user("a \ud83d b")], "lone surrogate '.ud83d' at character 2 of 5"),
    ],
)
def test_what_the_refusals_say(conversation, error):
    with pytest.raises(MessageError, match=error):
        PROCESSORS["llama3"].apply_chat_template(conversation)


def test_templates_that_fail_on_their_own():
    for template in ("{{ messages[0].content.missing.more }}", "{{ 1 / 0 }}", "{{ messages[9] + 1 }}", "{% if %}"):
        processor = make_processor("llama3", chat_template=template)
        with pytest.raises(TemplateError, match="refuses a conversation with the roles"):
            processor.prompt_ids([USER])
    with pytest.raises(TemplateError, match="continue_final_message"):
        dropping = make_processor(
            "words", chat_template="{{ '<user>' }}{% if false %}{{ messages[0].content }}{% endif %}"
        )
        dropping.apply_chat_template([USER], continue_final_message=True)
