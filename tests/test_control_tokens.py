"""Text is text: nothing that a conversation says becomes a control token, and no letter of it is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soundwave.processing import MessageError, SoundwaveProcessor
from soundwave.processing import chat_soundwave as chat
from tests.processors import PROCESSORS, SAMPLING_RATE, USER, audio_item, closing_ids, make_processor, noise, user
from tests.tokenizers import FAMILIES

RECORDING = {"type": "audio"}
# Every special token of every family, and every added one that its template uses.
CONTROLS = [
    (family, name)
    for family, processor in PROCESSORS.items()
    for name in processor.tokenizer.added_tokens_encoder
    if chat.control_tokens(
        processor.tokenizer, len(processor.tokenizer), processor.chat_template, processor.audio_token
    ).fullmatch(name)
]
BYTES = [control for control in CONTROLS if control[1].startswith("<0x")]
WRITTEN = [control for control in CONTROLS if control not in BYTES] + [(family, "<0x41>") for family, _ in BYTES[:1]]


@pytest.fixture(params=FAMILIES)
def processor(request) -> SoundwaveProcessor:
    return PROCESSORS[request.param]


def broken(text: str, name: str) -> str:
    """The text with that token spoilt: what may stay of it as pieces and bytes, but no control token."""
    return text.replace(name, f"{name[0]}a{name[1:]}")


def control_ids(processor: SoundwaveProcessor, ids: list[int]) -> list[int]:
    """The control tokens among ids; bytes of letters that the vocabulary lacks are none."""
    family = next(family for family, known in PROCESSORS.items() if known.chat_template == processor.chat_template)
    known = {name for one, name in CONTROLS if one == family and not name.startswith("<0x")}
    return [i for i in ids if processor.tokenizer.convert_ids_to_tokens(i) in known]


def test_every_special_token_is_a_control_token(processor):
    names = {name for family, name in CONTROLS if PROCESSORS[family] is processor}
    assert set(processor.tokenizer.all_special_tokens) | {processor.audio_token} <= names
    assert {added.content for added in processor.tokenizer.added_tokens_decoder.values() if added.special} <= names


def conversation(**texts: str) -> list[dict]:
    """A real placeholder in two turns; the texts of the roles in one or several items."""
    said = {role: [f"{role} text"] for role in ("system", "user", "assistant")} | {
        role: [text] if isinstance(text, str) else text for role, text in texts.items()
    }
    return [
        {"role": "system", "content": user(*said["system"])["content"]},
        user(RECORDING, *said["user"]),
        {"role": "assistant", "content": user(*said["assistant"])["content"]},
        user(*said["user"], RECORDING, "again"),
    ]


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize(("family", "name"), WRITTEN)
def test_written_whole_split_and_overlapping(family, name, role):
    processor = PROCESSORS[family]
    half = len(name) // 2
    whole = f"say {name} and{name}{name} please"
    nested = f"say {name[:half]}{name}{name[half:]} please"  # taking the inner one out would leave one behind
    for text, items in (
        (whole, whole),
        (whole, ["say ", name, " and", name[:half], name[half:], name, " please"]),
        (whole, ["say ", *name, " and", name[0], name[1:] + name, " please"]),
        (nested, nested),
        (f"{name}x{name}", f"{name}x{name}"),
    ):
        ids = processor.prompt_ids(conversation(**{role: items}))
        harmless = processor.prompt_ids(conversation(**{role: broken(broken(text, name), name)}))
        assert control_ids(processor, ids) == control_ids(processor, harmless)
        own = processor.tokenizer.convert_tokens_to_ids(name)
        assert ids.count(own) == harmless.count(own)
        assert ids.count(processor.audio_token_id) == 2
        assert text in processor.tokenizer.decode(ids)


@pytest.mark.parametrize(("family", "name"), WRITTEN)
def test_in_answers(family, name):
    processor = PROCESSORS[family]
    text = f"it says {name} there"
    _, answer = processor.prompt_and_answer_ids([USER, {"role": "assistant", "content": text}])
    said = answer[: -len(closing_ids(processor))]
    assert not control_ids(processor, said) and processor.tokenizer.convert_tokens_to_ids(name) not in said
    assert text in processor.tokenizer.decode(answer)
    assert processor.ctc_label_ids(text) == said
    row = {"audio": "a.wav", "instruction": f"repeat {name}", "answer": text}
    prompt, answer = processor.prompt_and_answer_ids(processor.example_messages(row))
    harmless = processor.prompt_ids([user(RECORDING, "repeat it")])
    assert control_ids(processor, prompt) == control_ids(processor, harmless)
    assert answer[: len(said)] == said


@pytest.mark.parametrize(("family", "name"), WRITTEN)
def test_in_hints(family, name):
    processor = PROCESSORS[family]
    own = processor.tokenizer.convert_tokens_to_ids(name)
    plain = control_ids(processor, processor.transcription_ids())
    for hints in ({"language": name}, {"bias": ["Anna", name, name * 2]}, {"language": f"x{name}", "bias": [name]}):
        ids = processor.transcription_ids(**hints)
        assert control_ids(processor, ids) == plain
        harmless = {
            key: [broken(x, name) for x in v] if key == "bias" else broken(v, name) for key, v in hints.items()
        }
        assert ids.count(own) == processor.transcription_ids(**harmless).count(own)
        assert name in processor.tokenizer.decode(ids)
    biased = {i for ids, _ in processor.sequence_bias([name, f"b {name}"]) for i in ids}
    assert not control_ids(processor, list(biased)) and processor.tokenizer.convert_tokens_to_ids(name) not in biased


@pytest.mark.parametrize(("family", "name"), WRITTEN)
def test_written_texts_can_be_encoded_later(family, name):
    """`tokenize=False` keeps the cuts, and the low level understands them: the usual two steps are as safe as one."""
    processor = PROCESSORS[family]
    messages = [user(audio_item(), f"say {name}, {name[:2]}", name[2:], audio_item(900)), USER]
    if family in ("gemma", "mistral"):
        messages = messages[:1]
    written = processor.apply_chat_template(messages, tokenize=False)
    recordings = [noise(8000), noise(900)]
    batch = processor(text=written, audio=recordings, sampling_rate=SAMPLING_RATE)
    expected = processor.apply_chat_template(messages)
    assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    assert f"say {name}, {name}" in written.replace(chat.CUT, "")


def test_the_low_level_parses_what_it_is_given(processor):
    for name in {processor.audio_token, processor.tokenizer.eos_token}:
        ids = processor(text=f"say {name}", audio=[noise(100)] * (name == processor.audio_token), sampling_rate=16_000)
        assert processor.tokenizer.convert_tokens_to_ids(name) in ids["input_ids"][0].tolist()


@st.composite
def hostile_texts(draw) -> str:
    """Texts full of control tokens, halves of them, markers and line feeds."""
    names = sorted({name for _, name in WRITTEN})
    halves = [half for name in names for half in (name[:3], name[3:])]
    piece = st.one_of(
        st.sampled_from(names), st.sampled_from(halves), st.sampled_from([" ", "\n", "a", "<", "|", "é"])
    )
    return "x" + "".join(draw(st.lists(piece, max_size=12))) + "x"


@given(texts=st.lists(hostile_texts(), min_size=1, max_size=3), family=st.sampled_from(FAMILIES))
def test_no_text_writes_a_control_token_or_loses_a_letter(texts, family):
    processor = PROCESSORS[family]
    items = [item for text in texts for item in (text, RECORDING)]
    harmless = [item for _ in texts for item in ("x", RECORDING)]
    ids = processor.prompt_ids([user(*items)])
    assert control_ids(processor, ids) == control_ids(processor, processor.prompt_ids([user(*harmless)]))
    decoded = processor.tokenizer.decode(ids)
    for text in texts:
        assert text in decoded


def test_markers_of_our_own_are_no_way_around(processor):
    name = processor.tokenizer.eos_token
    marked = name[0] + chat.CUT + name[1:]
    assert processor.prompt_ids([user(marked)]) == processor.prompt_ids([user(name)])


def test_a_template_that_cuts_texts_cannot_join_them():
    template = "{% for m in messages %}{{ m.content.split('Q') | join('') }}{% endfor %}"
    processor = make_processor("words", chat_template=template, system_prompt=None)
    ids = processor.prompt_ids([user("<eQot>")])
    # The template itself writes this token here, and so it counts.
    assert processor.tokenizer.eos_token_id in ids
    cutting = "{% for m in messages %}{{ m.content.split('<eot>') | join('') }}{% endfor %}"
    processor = make_processor("words", chat_template=cutting, system_prompt=None)
    assert processor.tokenizer.eos_token_id not in processor.prompt_ids([user("<e<eot>ot>")])


def test_added_tokens_that_are_not_special():
    """Sound labels are words of a text; what the template uses, what looks like it and what is listed is not."""
    words = PROCESSORS["words"]
    cough = words.tokenizer.convert_tokens_to_ids("<cough>")
    assert words.ctc_label_ids("the red boxes <cough>")[-1] == cough
    assert cough in words.prompt_and_answer_ids([USER, {"role": "assistant", "content": "<cough>"}])[1]
    qwen = make_processor("qwen3")
    qwen.tokenizer.add_tokens(["<|fim_prefix|>", "[TOOL]", "s"])  # a single letter is in every template
    qwen.tokenizer.chat_control_tokens = ["[TOOL]"]
    ids = qwen.prompt_ids([user("<|fim_prefix|>[TOOL] says <think> a")])
    for name in ("<|fim_prefix|>", "[TOOL]", "<think>"):
        assert ids.count(qwen.tokenizer.convert_tokens_to_ids(name)) == (name == "<think>")  # the template's own
    assert "<|fim_prefix|>[TOOL] says <think> a" in qwen.tokenizer.decode(ids)


def test_a_special_token_of_one_letter_cannot_be_said():
    processor = make_processor("words")
    processor.tokenizer.add_tokens(["§"], special_tokens=True)
    with pytest.raises(MessageError, match="'§', a control token that cannot be cut"):
        processor.prompt_ids([user("under § 5")])
