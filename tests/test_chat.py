"""Conversations to ids and back, with the chat templates of several LLM families."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soundwave.processing import MessageError, PlaceholderError, SoundwaveProcessor, TemplateError
from soundwave.processing import chat_soundwave as chat
from tests.processors import (
    ANSWER,
    ASSISTANT,
    PROCESSORS,
    SAMPLING_RATE,
    USER,
    audio_item,
    closing_ids,
    make_processor,
    noise,
    user,
)
from tests.tokenizers import FAMILIES, SETTINGS


@pytest.fixture(params=FAMILIES)
def processor(request) -> SoundwaveProcessor:
    return PROCESSORS[request.param]


def own_ids(processor: SoundwaveProcessor, messages: list[dict], generation: bool) -> list[int]:
    """What the tokenizer itself makes of plain messages."""
    return processor.tokenizer.apply_chat_template(
        messages, add_generation_prompt=generation, return_dict=False, **processor.chat_template_kwargs
    )


# Conversations


def test_ids_are_those_of_the_llms_own_template(processor):
    conversation = [user("where are the boxes?"), {"role": "assistant", "content": "in the garage"}, USER]
    processor = make_processor_without_system(processor)
    assert processor.prompt_ids(conversation) == own_ids(processor, flat(conversation), generation=True)
    full = own_ids(processor, [*flat(conversation), ASSISTANT], generation=False)
    prompt, answer = processor.prompt_and_answer_ids([*conversation, ASSISTANT])
    assert prompt + answer == full[: len(prompt + answer)]
    assert not processor.tokenizer.decode(full[len(prompt + answer) :]).strip()


def make_processor_without_system(processor: SoundwaveProcessor) -> SoundwaveProcessor:
    return SoundwaveProcessor(processor.feature_extractor, processor.tokenizer, system_prompt=None)


def flat(messages: list[dict]) -> list[dict]:
    return [
        {**m, "content": m["content"] if isinstance(m["content"], str) else "".join(i["text"] for i in m["content"])}
        for m in messages
    ]


def test_system_prompt(processor):
    default = processor.tokenizer.decode(processor.prompt_ids([USER]))
    assert default.count("You are a helpful language and speech assistant.") == 1
    own = processor.tokenizer.decode(processor.prompt_ids([{"role": "system", "content": "Say nothing."}, USER]))
    assert "Say nothing." in own and "You are a helpful" not in own
    assert own.index("Say nothing.") < own.index("What is said?")


@pytest.mark.parametrize("family", ["gemma", "mistral"])
def test_without_system_role_the_first_user_turn_gets_it(family):
    processor = PROCESSORS[family]
    conversation = [{"role": "system", "content": "Be brief."}, USER, ASSISTANT, USER]
    merged = [user("Be brief.\n\nWhat is said?"), ASSISTANT, USER]
    plain = make_processor_without_system(processor)
    assert processor.prompt_ids(conversation) == plain.prompt_ids(merged)


def test_no_turn_for_the_system_prompt():
    with pytest.raises(TemplateError, match="no user turn"):
        PROCESSORS["mistral"].apply_chat_template([ASSISTANT])


def test_special_tokens_added_later_stay_text_too():
    processor = make_processor("llama3")
    before = processor.prompt_ids([user("say <later> please")])
    processor.tokenizer.add_tokens(["<later>"], special_tokens=True)
    after = processor.prompt_ids([user("say <later> please")])
    assert processor.tokenizer.convert_tokens_to_ids("<later>") not in after
    assert processor.tokenizer.decode(after) == processor.tokenizer.decode(before)


def test_template_that_drops_the_system_turn_in_silence():
    template = (
        "{% for m in messages if m.role != 'system' %}{{ '<' + m.role + '>' + m.content + '<eot>' }}{% endfor %}"
    )
    processor = make_processor("words", chat_template=template)
    assert "You are a helpful" in processor.tokenizer.decode(processor.prompt_ids([USER]))


def test_beginning_of_sequence_exactly_once(processor):
    bos = processor.tokenizer.bos_token_id
    expected = 0 if bos is None else 1
    rendered = processor.apply_chat_template([user(audio_item(), "What?")], tokenize=False)
    for ids in (
        processor.prompt_ids([USER]),
        processor.apply_chat_template([USER])["input_ids"][0].tolist(),
        processor(audio=noise(100), sampling_rate=SAMPLING_RATE)["input_ids"][0].tolist(),
        processor(audio=noise(100), text=rendered, sampling_rate=SAMPLING_RATE)["input_ids"][0].tolist(),
    ):
        assert ids.count(bos) == expected
        assert bos is None or ids[0] == bos


def test_one_token_per_recording_in_order(processor):
    conversation = [user(audio_item(), "and", audio_item()), ASSISTANT, user("now", audio_item())]
    ids = processor.prompt_ids(conversation)
    assert ids.count(processor.audio_token_id) == 3
    text = processor.tokenizer.decode(ids)
    assert [piece.strip() for piece in text.split(processor.audio_token)][1].startswith("and")


def test_pinned_template_arguments():
    text = PROCESSORS["llama3"].apply_chat_template([USER], tokenize=False)
    assert "Today: 26 Jul 2024" in text
    clock = "{% if strftime_now is defined %}{{ strftime_now('%Y-%m-%d, %d %B') }}{% endif %}"
    dated = make_processor("words", chat_template=clock + SETTINGS["words"][0])
    assert dated.apply_chat_template([USER], tokenize=False).startswith("2024-07-26, 26 July<bos>")
    undated = make_processor("llama3", chat_template_kwargs={"date_string": "1 Jan 2020"})
    assert "Today: 1 Jan 2020" in undated.apply_chat_template([USER], tokenize=False)
    qwen = PROCESSORS["qwen3"]
    assert qwen.apply_chat_template([USER], tokenize=False).endswith("assistant\n<think>\n\n</think>\n\n")
    assert qwen.apply_chat_template([USER], tokenize=False, enable_thinking=True).endswith("assistant\n")
    with pytest.raises(TemplateError, match="JSON"):
        qwen.apply_chat_template([USER], helper=object())


def test_endings(processor):
    closed = processor.apply_chat_template([USER, ASSISTANT])["input_ids"][0].tolist()
    prompt = processor.apply_chat_template([USER])["input_ids"][0].tolist()
    assert prompt == processor.prompt_ids([USER]) == processor.prompt_ids([USER, ASSISTANT])
    assert closed[: len(prompt)] == prompt and len(closed) > len(prompt)
    begun = processor.apply_chat_template([USER, ASSISTANT], continue_final_message=True)["input_ids"][0].tolist()
    assert begun == prompt + processor.prompt_and_answer_ids([USER, ASSISTANT])[1][: -len(closing_ids(processor))]
    with pytest.raises(ValueError, match="exclude each other"):
        processor.apply_chat_template([USER], add_generation_prompt=True, continue_final_message=True)


def test_what_a_template_refuses_it_says_itself():
    with pytest.raises(TemplateError, match="with the roles user, user: must alternate"):
        PROCESSORS["gemma"].apply_chat_template([USER, USER])
    with pytest.raises(TemplateError, match="roles assistant: must alternate"):
        make_processor("gemma", system_prompt=None).prompt_ids([ASSISTANT, ASSISTANT])


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "<|eot_id|>", "content": "x"}, "role"),
        ({"role": "user", "content": [{"type": "image", "url": "x"}]}, "image"),
        ({"role": "user", "content": [{"type": "text"}]}, "text"),
        ({"role": "user", "content": [{"type": "audio", "path": "a", "url": "b"}]}, "give one of"),
        ({"role": "user", "content": "x", "tool_calls": [1]}, "tool_calls"),
        ({"role": "user", "content": [{"type": "audio"}]}, "names no recording"),
        ({"role": "user"}, "content None"),
    ],
)
def test_conversations_that_cannot_be_written(message, error):
    with pytest.raises(MessageError, match=error):
        PROCESSORS["llama3"].apply_chat_template([message])


def test_empty_conversation_and_unsupported_arguments():
    processor = PROCESSORS["llama3"]
    for empty in ([], [[]], [[USER], []]):
        with pytest.raises(MessageError, match="no messages"):
            processor.apply_chat_template(empty)
    with pytest.raises(ValueError, match="tools"):
        processor.apply_chat_template([USER], tools=[{}])
    with pytest.raises(ValueError, match="sanitize_control_tokens"):
        processor.apply_chat_template([USER], sanitize_control_tokens=False)


def test_template_that_leaves_a_turn_out():
    processor = make_processor("words", chat_template="{{ '<user>' + messages[-1].content + '<eot>' }}")
    with pytest.raises(PlaceholderError, match="2 recordings.* 1 placeholders"):
        processor.prompt_ids([user({"type": "audio"}), user({"type": "audio"})])


# Training helpers


def test_answers_end_with_the_closing_token(processor):
    closing = closing_ids(processor)
    prompt, answer = processor.prompt_and_answer_ids([user({"type": "audio"}, "What is said?"), ASSISTANT])
    assert prompt == processor.prompt_ids([user({"type": "audio"}, "What is said?")])
    said = answer[: -len(closing)]
    assert answer == said + closing and not set(closing) & set(said)
    assert processor.tokenizer.decode(said).strip() == ANSWER
    _, empty = processor.prompt_and_answer_ids([USER, {"role": "assistant", "content": ""}])
    opening = empty[: -len(closing)]
    assert empty == opening + closing and not processor.tokenizer.decode(opening).strip()


def test_template_that_does_not_close_gets_the_end_of_sequence():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    processor = make_processor("llama3", chat_template=template)
    _, answer = processor.prompt_and_answer_ids([USER, ASSISTANT])
    assert answer[-1] == processor.tokenizer.eos_token_id
    assert processor.tokenizer.decode(answer[:-1]).strip() == ANSWER


def test_prompt_must_begin_the_conversation():
    template = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<eot>' }}{% endfor %}"
    processor = make_processor(
        "words", chat_template=template + "{% if add_generation_prompt %}{{ 'thoughts' }}{% endif %}"
    )
    with pytest.raises(TemplateError, match="not the beginning"):
        processor.prompt_and_answer_ids([USER, ASSISTANT])
    with pytest.raises(MessageError, match="not the assistant's"):
        processor.prompt_and_answer_ids([USER])


@given(words=st.lists(st.sampled_from(["the", "red", "Garten", "3", "schließe", "box,"]), max_size=6))
def test_ctc_labels_are_the_ids_of_the_answer(words):
    text = " ".join(words)
    for processor in PROCESSORS.values():
        labels = processor.ctc_label_ids(text)
        if not text:
            assert labels == []
            continue
        _, answer = processor.prompt_and_answer_ids([USER, {"role": "assistant", "content": text}])
        assert labels + closing_ids(processor) == answer
        assert processor.tokenizer.decode(labels).strip() == text


def test_ctc_labels_leave_out_what_the_template_thinks():
    thinking = make_processor("qwen3", chat_template_kwargs={"enable_thinking": True})
    _, answer = thinking.prompt_and_answer_ids([USER, ASSISTANT])
    assert "<think>" in thinking.tokenizer.decode(answer)
    assert thinking.ctc_label_ids(ANSWER) == PROCESSORS["qwen3"].ctc_label_ids(ANSWER)
    assert thinking.ctc_label_ids("") == []


def test_rows():
    processor = PROCESSORS["llama3"]
    row = {"audio": "a.wav", "instruction": "What is said?", "answer": " the red boxes\n"}
    messages = processor.example_messages(row)
    assert messages == [
        user({"type": "audio", "audio": "a.wav"}, "What is said?"),
        {"role": "assistant", "content": [{"type": "text", "text": "the red boxes"}]},
    ]
    assert processor.recordings_of(messages) == ["a.wav"]
    assert processor.example_messages({**row, "audio": None, "answer": None}) == [user("What is said?")]
    assert processor.recordings_of(processor.example_messages({**row, "audio": ["a", "b"]})) == ["a", "b"]
    turns = [user({"type": "audio"}, "and", {"type": "audio", "path": "own.wav"}), ASSISTANT, user({"type": "audio"})]
    filled = processor.example_messages({"messages": turns, "audio": ["a", "b"]})
    assert processor.recordings_of(filled) == ["a", "own.wav", "b"]
    with pytest.raises(PlaceholderError, match="2 audio items .* 1;"):
        processor.example_messages({"messages": turns, "audio": "a"})


def test_equal_texts_are_written_once():
    processor = make_processor("llama3")
    row = {"audio": "a.wav", "instruction": "What is said?", "answer": ANSWER}
    first = processor.prompt_and_answer_ids(processor.example_messages(row))
    misses = chat.cached_chat_ids.cache_info().misses
    for name in "bcd":
        assert processor.prompt_and_answer_ids(processor.example_messages({**row, "audio": name})) == first
    assert chat.cached_chat_ids.cache_info().misses == misses
    first[0].clear()  # what is handed out is the caller's
    assert processor.prompt_ids(processor.example_messages(row))
    processor.tokenizer.add_tokens(["boxes"])
    boxes = processor.tokenizer.convert_tokens_to_ids("boxes")
    assert boxes in processor.prompt_and_answer_ids(processor.example_messages(row))[1]
