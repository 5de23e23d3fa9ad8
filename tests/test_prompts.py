"""Hints for a transcript: its language and likely words, in the prompt and as a bias of the scores."""

import random

import pytest
import torch
from transformers import SequenceBiasLogitsProcessor

from soundwave import SoundwaveForConditionalGeneration, SoundwaveProcessor
from soundwave.assets import TINY
from soundwave.processing import HintError, MessageError
from tests.processors import ASSISTANT, PROCESSORS, SAMPLING_RATE, audio_item, make_processor, noise, user
from tests.tokenizers import FAMILIES


@pytest.fixture(params=FAMILIES)
def prompting(request) -> SoundwaveProcessor:
    return PROCESSORS[request.param]


def ids_of(processor: SoundwaveProcessor, **hints) -> list[int]:
    """The row of ids of a call with one recording."""
    return processor(audio=noise(100), sampling_rate=SAMPLING_RATE, **hints)["input_ids"][0].tolist()


# In the prompt


def test_without_hints_the_prompt_is_the_saved_one(prompting):
    asked = prompting.apply_chat_template([user(audio_item(100), "Transcribe the speech.")])["input_ids"][0].tolist()
    for none in ({}, {"language": None, "bias": None}, {"bias": []}):
        assert ids_of(prompting, **none) == prompting.transcription_ids(**none) == asked
        assert prompting.transcription_messages(**none) == [user({"type": "audio"}, "Transcribe the speech.")]


def test_hints_are_written_behind_the_prompt(prompting):
    hints = {"language": "de", "bias": ["Anna", "schöne  Grüße"]}
    messages = prompting.transcription_messages(**hints)
    text = "Transcribe the speech. The language is German. Likely words: Anna, schöne Grüße."
    assert messages == [user({"type": "audio"}, text)]
    ids = prompting.transcription_ids(**hints)
    assert ids == prompting.prompt_ids(messages) == ids_of(prompting, **hints)
    assert ids.count(prompting.audio_token_id) == 1 and text in prompting.tokenizer.decode(ids)
    batch = prompting(audio=[noise(100)] * 2, sampling_rate=SAMPLING_RATE, **hints)
    assert batch["input_ids"].tolist() == [ids, ids]


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("en", "English"),
        ("EN", "English"),
        ("pt-BR", "Portuguese"),
        ("zh_CN", "Chinese"),
        ("yue", "Cantonese"),
        ("jv", "Javanese"),
        ("ht", "Haitian Creole"),
        ("Swiss  German", "Swiss German"),
        ("klingon", "klingon"),
    ],
)
def test_languages(given, written):
    text = PROCESSORS["llama3"].transcription_messages(language=given)[0]["content"][1]["text"]
    assert text.endswith(f"The language is {written}.")


@pytest.mark.parametrize(
    ("hints", "error"),
    [
        ({"language": "xx"}, "'xx'; expected its English name or one of the codes en, zh"),
        ({"language": ""}, "language is ''"),
        ({"language": 3}, "language is 3"),
        ({"bias": "Anna"}, "'Anna'; expected a list of words"),
        ({"bias": ["Anna", " "]}, "none of them empty"),
        ({"bias": [b"Anna"]}, "b'Anna'.; expected"),
    ],
)
def test_hints_that_cannot_be_used(hints, error):
    with pytest.raises(HintError, match=error):
        ids_of(PROCESSORS["llama3"], **hints)


def test_hints_and_own_text_exclude_each_other():
    with pytest.raises(ValueError, match="arguments bias, language"):
        PROCESSORS["llama3"](text="x", language="en", bias=["x"])
    with pytest.raises(MessageError, match="lone surrogate"):
        PROCESSORS["llama3"].transcription_ids(bias=["a\ud800"])


# As a bias of the scores


def biased_steps(processor: SoundwaveProcessor, words: list[str], strength: float) -> dict[tuple[int, ...], float]:
    pairs = processor.sequence_bias(words, strength)
    SequenceBiasLogitsProcessor(pairs)  # checks the types
    steps = {tuple(ids): bias for ids, bias in pairs}
    assert len(steps) == len(pairs)
    return steps


@pytest.mark.parametrize("word", ["garage", "schließe", "Anna", "two plus", "Šk"])
def test_every_place_of_a_word_is_biased_step_by_step(prompting, word):
    steps = biased_steps(prompting, [word], 6.0)
    for said in (word, f"it {word}", f"please the {word}"):
        answer = prompting.ctc_label_ids(said)
        ends = [end for end in range(len(answer), 0, -1) if prompting.tokenizer.decode(answer[:end]).strip() == said]
        starts = [start for start in range(min(ends)) if tuple(answer[start : min(ends)]) in steps]
        assert starts, f"{said!r} is not written as any biased sequence"
        ids = answer[starts[0] : min(ends)]
        for length in range(2, len(ids) + 1):
            assert steps[tuple(ids[:length])] == 6.0
        assert steps[tuple(ids[:1])] in {6.0 / length for length in range(1, 2 * len(word) + 4)}


def test_words_that_begin_alike_share_the_stronger_step():
    processor = PROCESSORS["words"]
    alone, both = (biased_steps(processor, words, 4.0) for words in (["the"], ["the", "thermometer"]))
    assert all(both[ids] >= bias for ids, bias in alone.items())
    assert {4.0} == {bias for ids, bias in both.items() if len(ids) > 1}


@pytest.mark.parametrize(
    ("words", "strength"), [([], 1.0), ("Anna", 1.0), (["x"], 0), (["x"], -2.0), (["x"], float("inf")), (["x"], "4")]
)
def test_biases_that_cannot_be_used(words, strength):
    with pytest.raises(HintError, match="expected"):
        PROCESSORS["llama3"].sequence_bias(words, strength)


def test_a_word_of_many_tokens_is_said_because_of_its_bias(tiny_model, processor):
    """A random model says anything but this; its scores lie close together."""
    inputs = processor(audio=[noise(9000), noise(30_000, 1)], sampling_rate=SAMPLING_RATE)

    def said(**options) -> list[str]:
        ids = tiny_model.generate(**inputs, max_new_tokens=12, do_sample=False, **options)
        return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    assert len(processor.ctc_label_ids("Zanzibar")) > 3
    assert not any("Zanzibar" in text for text in said())
    assert all("Zanzibar" in text for text in said(sequence_bias=processor.sequence_bias(["Zanzibar"], 40.0)))


def test_a_misheard_word_comes_out_right():
    """The trained tiny model takes "cups are" for "door" in this voice; its neighbour in the batch stays as it was."""
    from soundwave.training.tiny.grammar import draw_split
    from soundwave.training.tiny.synthesizer import UNSEEN_VOICES
    from soundwave.training.tiny.utterances import Job, speak

    model = SoundwaveForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    tiny = SoundwaveProcessor.from_pretrained(TINY)
    sentences = draw_split(random.Random(5), "test", 40, distinct=True)
    texts = [sentences[i].text for i in (22, 0)]
    waveforms = [
        speak(Job(f"u{i}", (sentences[i].text,), UNSEEN_VOICES[i % len(UNSEEN_VOICES)], i, False)).samples
        for i in (22, 0)
    ]
    inputs = tiny(audio=waveforms, sampling_rate=SAMPLING_RATE)

    def heard(**options) -> list[str]:
        ids = model.generate(**inputs, max_new_tokens=40, do_sample=False, **options)
        decoded = tiny.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in decoded]

    assert heard() == [texts[0].replace("cups are", "door"), texts[1]]
    assert heard(sequence_bias=tiny.sequence_bias(["cups", "are"])) == texts
    assert heard(sequence_bias=tiny.sequence_bias(["bottles", "rome"])) == heard()  # and nothing is made up


# Recordings of earlier turns


def test_a_chat_that_reuses_audio_goes_on_as_one_that_does_not(tiny_model, processor):
    first, second = audio_item(40_000, 1), audio_item(9000, 2)
    known = tiny_model.get_audio_features(**processor.audio_features([first["audio"]]))
    chat = [user(first, "What is said?"), ASSISTANT, user("And here?", second)]
    plain = tiny_model.generate(**processor.apply_chat_template(chat), max_new_tokens=8)
    inputs = processor.apply_chat_template(chat, reuse_audio=1)
    assert inputs["windows_per_audio"].tolist() == [1]
    inputs |= {"audio_embeds": known.embeds, "audio_lengths": known.lengths}
    assert tiny_model.generate(**inputs, max_new_tokens=8).tolist() == plain.tolist()


# Rows


def test_rows_with_fields_of_the_wrong_type():
    processor = make_processor("llama3")
    for row in ({"instruction": 3}, {"instruction": "x", "answer": 3}, {"messages": "x"}, {"messages": [3]}):
        with pytest.raises(MessageError):
            processor.prompt_ids(processor.example_messages({"audio": None, **row}))
    assert processor.example_messages({"audio": None, "messages": [ASSISTANT], "answer": None}) == [ASSISTANT]
