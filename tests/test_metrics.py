"""Scores against values worked out by hand, and against jiwer called directly."""

import evaluate
import jiwer
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from soundwave.eval import metrics, scoring

WORDS = st.lists(st.sampled_from(["red", "box", "the", "to", "garage"]), min_size=1, max_size=6).map(" ".join)


def test_word_error_rate_is_of_the_corpus_not_a_mean_of_sentences():
    references = ["a b c d e f g h", "x"]
    hypotheses = ["a b c d e f g h", "y z"]
    # One substitution and one insertion over nine words; the mean of the sentences would be (0 + 2) / 2.
    assert metrics.word_error_rate(references, hypotheses) == pytest.approx(2 / 9)


def test_character_error_rate_counts_spaces():
    assert metrics.character_error_rate(["ab cd"], ["abcd"]) == pytest.approx(1 / 5)


def test_words_in_silence_are_insertions():
    assert metrics.word_error_rate(["a b", ""], ["a b", "c"]) == pytest.approx(1 / 2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6))
def test_rates_equal_jiwer_over_the_whole_corpus(pairs):
    references, hypotheses = [list(side) for side in zip(*pairs, strict=True)]
    assert metrics.word_error_rate(references, hypotheses) == pytest.approx(jiwer.wer(references, hypotheses))
    assert metrics.character_error_rate(references, hypotheses) == pytest.approx(jiwer.cer(references, hypotheses))


def test_normalisers():
    assert metrics.word_error_rate(["Hello, World!"], ["hello world"]) == 1
    assert metrics.word_error_rate(["Hello, World!"], ["hello world"], normalizer="basic") == 0
    # The English one also writes numbers as digits and drops fillers; the basic one does not.
    assert metrics.word_error_rate(["um it's twenty one"], ["it is 21"], normalizer="english") == 0
    assert metrics.word_error_rate(["um it's twenty one"], ["it is 21"], normalizer="basic") > 0
    with pytest.raises(ValueError, match="'none', 'basic' or 'english'"):
        metrics.word_error_rate(["a"], ["a"], normalizer="whisper")


def test_german_nouns_keep_their_capitals_in_the_strict_form():
    assert metrics.word_error_rate(["die Kiste"], ["die kiste"]) == 0.5


def test_accuracies():
    assert metrics.accuracy(["switch", "phone"], [" Switch.", "digits"]) == 0.5
    assert metrics.sentence_accuracy(["a b", "a  c"], ["a b", "a c"]) == 1
    assert metrics.sentence_accuracy(["a b"], ["A b"]) == 0


def test_label_is_what_follows_the_last_separator():
    references = ["what is two plus two : four", "what is big : small", "Berlin"]
    hypotheses = ["what is two plus you : four.", "what is big : big", "berlin"]
    assert metrics.label_accuracy(references, hypotheses) == pytest.approx(2 / 3)
    assert scoring.final_label("a : b : C d!") == "c d"
    # A colon inside a word, such as a time, does not separate.
    assert scoring.final_label("at 10:30") == "at 10:30"


def test_sound_accuracy_looks_at_labels_only():
    references = ["<cough> open the door", "close it <laugh>", "no sound"]
    hypotheses = ["<cough> open a door", "<laugh> <laugh>", "no sound"]
    assert metrics.sound_accuracy(references, hypotheses) == pytest.approx(2 / 3)


def test_interval_covers_the_value_and_shrinks_with_the_data():
    rng = np.random.default_rng(0)

    def score(n):
        right = rng.random(n) < 0.9
        return scoring.score("accuracy", ["a"] * n, ["a" if r else "b" for r in right])

    few, many = score(50), score(2000)
    for result in (few, many):
        assert result.interval[0] <= result.value <= result.interval[1]
    width = [result.interval[1] - result.interval[0] for result in (few, many)]
    # 95% of a proportion p of n: 2 * 1.96 * sqrt(p (1 - p) / n)
    expected = 2 * 1.96 * np.sqrt(many.value * (1 - many.value) / 2000)
    assert width[1] == pytest.approx(expected, rel=0.15)
    assert width[0] > 3 * width[1]


def test_interval_is_repeatable_and_exact_for_perfect_answers():
    references = ["a b", "c d e"]
    assert scoring.score("wer", references, references).interval == (0, 0)
    wrong = ["a x", "c d e"]
    assert scoring.score("wer", references, wrong) == scoring.score("wer", references, wrong)


def test_nothing_to_score_is_an_error_not_a_zero():
    with pytest.raises(ValueError, match="nothing to count"):
        metrics.word_error_rate([], [])
    with pytest.raises(ValueError, match="nothing to count"):
        metrics.word_error_rate([""], ["a"])
    with pytest.raises(ValueError, match="2 references but 1 hypotheses"):
        metrics.accuracy(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="metric 'bleu' is unknown"):
        scoring.score("bleu", ["a"], ["a"])


def test_wer_as_evaluate_module(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    metric = evaluate.load(metrics.metric_path("wer"), cache_dir=str(tmp_path))
    metric.add_batch(predictions=["the red box"], references=["the red boxes"])
    metric.add(prediction="go", reference="go")
    result = metric.compute()
    assert result["wer"] == pytest.approx(1 / 4)
    assert result["count"] == 2
    assert result["interval"][0] <= result["wer"] <= result["interval"][1]
    assert metric.compute(predictions=["Go!"], references=["go"], normalizer="basic")["wer"] == 0
    with pytest.raises(ValueError):
        metric.compute(predictions=[1.5], references=["go"])


def test_metric_path_names_what_exists():
    with pytest.raises(ValueError, match="choose one of wer"):
        metrics.metric_path("bleu")
