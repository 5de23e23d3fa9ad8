"""The grammar of the tiny preset: size, splits, German, questions."""

import random

import pytest

from soundwave.training.tiny import grammar
from soundwave.training.tiny.grammar import all_questions, all_sentences, draw_split, sentence_split


@pytest.fixture(scope="module")
def sentences():
    return {sentence.text: sentence for sentence in all_sentences()}


def test_size(sentences):
    words = {word for text in sentences for word in text.split()} | set(grammar.DIGITS)
    words |= {word for question in all_questions() for word in question.text.split()}
    assert len(sentences) >= 17_000
    assert 80 <= len(words) <= 140
    assert len({sentence.intent for sentence in sentences.values()}) == 5  # and digit strings


def test_splits_depend_on_the_text_alone(sentences):
    splits = [sentence_split(text) for text in sentences]
    shares = {split: splits.count(split) / len(splits) for split in ("train", "dev", "test")}
    assert 0.02 < shares["dev"] < 0.04
    assert 0.08 < shares["test"] < 0.2  # 8 % by hash and the held-out pairs
    for split in shares:
        one, other = (draw_split(random.Random(3), split, 50) for _ in range(2))
        assert one == other
        assert {sentence_split(sentence.text) for sentence in one} == {split}


@pytest.mark.parametrize(("colour", "thing"), grammar.HELD_OUT_PAIRS)
def test_held_out_pairs_are_in_no_training_sentence(sentences, colour, thing):
    plural = {noun.english: noun.plural for noun in grammar.OBJECTS}[thing]
    with_pair = [text for text in sentences if f"{colour} {thing} " in text or f"{colour} {plural}" in text]
    assert len(with_pair) > 100
    assert {sentence_split(text) for text in with_pair} == {"test"}


@pytest.mark.parametrize(
    ("text", "german"),
    [
        ("please bring three red boxes to the garage", "bitte bring drei rote Kisten in die Garage"),
        ("carry the blue chair to the office", "trag den blauen Stuhl ins Büro"),
        ("bring the green book to the station", "bring das grüne Buch zum Bahnhof"),
        ("turn off the white lamp in the garden", "schalte die weiße Lampe im Garten aus"),
        ("please turn on the radio at the station", "bitte schalte das Radio am Bahnhof ein"),
        ("open the yellow window in the kitchen", "öffne das gelbe Fenster in der Küche"),
        ("the black table is behind the cellar", "der schwarze Tisch ist hinter dem Keller"),
        ("the two brown bottles are in the hall", "die zwei braunen Flaschen sind im Flur"),
        ("my sister needs nine white balls", "meine Schwester braucht neun weiße Bälle"),
        ("call my brother tomorrow at seven", "ruf meinen Bruder morgen um sieben an"),
        ("it is cold in rome today", "es ist heute kalt in Rom"),
        ("it was hot in the office", "es war im Büro heiß"),
    ],
)
def test_german(sentences, text, german):
    assert sentences[text].german == german


def test_an_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="only 0 of 3 validation sentences"):
        draw_split(random.Random(0), "validation", 3)


def test_questions():
    questions = all_questions()
    answers = {question.text: question.answer for question in questions}
    assert len(answers) == len(questions) > 700
    assert answers["hello what is two plus three"] == "five"
    assert answers["which is bigger three or seven"] == "seven"
    assert answers["please tell me what is the german word for window"] == "Fenster"
    by_split = {
        split: [q for q in questions if grammar.question_split(q) == split] for split in ("train", "dev", "test")
    }
    cores = {split: {question.core for question in found} for split, found in by_split.items()}
    assert not cores["train"] & (cores["test"] | cores["dev"])
    assert len(by_split["test"]) > 90
    # a held-out question has no word that training speech lacks
    spoken = {word for question in by_split["train"] for word in question.text.split()}
    spoken |= {word for sentence in all_sentences() for word in sentence.text.split()}
    assert {word for core in cores["test"] | cores["dev"] for word in core.split()} <= spoken


def test_text_questions_fill_a_test_set():
    splits = [grammar.text_question_split(question) for question in all_questions()]
    assert splits.count("test") >= 400
    assert splits.count("train") >= 200


def test_the_language_model_reads_no_test_sentence():
    """At full size: digit strings and random words could make one by chance."""
    from soundwave.training.tiny.examples import text_examples

    read = {example["content"] for example in text_examples(30_000, 0)} | {
        example["answer"] for example in text_examples(30_000, 0)
    }
    held_out = {s.text for seed in range(3) for s in draw_split(random.Random(seed), "test", 1200, distinct=True)}
    assert not read & held_out
