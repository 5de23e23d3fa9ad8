"""Metrics against values worked out by hand, and against jiwer and sacrebleu called directly."""

import json

import jiwer
import pytest
import sacrebleu
from hypothesis import assume, given
from hypothesis import strategies as st

from soundwave.eval.choices import letter_of, matches_choice, official_letter, spelled_out
from soundwave.eval.grounding import interval_iou, nearest_choice, spans_in
from soundwave.eval.scoring import METRICS, format_figure, get_metric, score_rows, score_texts
from soundwave.eval.text import contains_answer, final_label, labels_in, normalize

WORDS = st.lists(st.sampled_from(["red", "box", "the", "to", "garage"]), min_size=1, max_size=6).map(" ".join)
EMOTIONS = ["neutral", "joy", "anger", "surprise", "sadness", "disgust", "fear"]


def value(metric, references, hypotheses, **settings):
    return score_texts(metric, references, hypotheses, **settings).value


def choice_rows(answers, reference="blue", choices=("red", "blue", "green", "grey")):
    rows = enumerate(answers)
    return [{"id": i, "reference": reference, "answer": a, "fields": {"choices": list(choices)}} for i, a in rows]


# -- words and characters


def test_word_error_rate_is_of_the_corpus_not_a_mean_of_sentences():
    references = ["a b c d e f g h", "x"]
    hypotheses = ["a b c d e f g h", "y z"]
    # One substitution and one insertion over nine words; the mean of the sentences would be (0 + 2) / 2.
    assert value("wer", references, hypotheses) == pytest.approx(2 / 9)


def test_character_error_rate_counts_spaces():
    assert value("cer", ["ab cd"], ["abcd"]) == pytest.approx(1 / 5)


def test_words_in_silence_are_insertions():
    assert value("wer", ["a b", ""], ["a b", "c"]) == pytest.approx(1 / 2)
    assert value("cer", ["ab", ""], ["ab", "c"]) == pytest.approx(1 / 2)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6))
def test_rates_equal_jiwer_over_the_whole_corpus(pairs):
    references, hypotheses = [list(side) for side in zip(*pairs, strict=True)]
    assert value("wer", references, hypotheses) == pytest.approx(jiwer.wer(references, hypotheses))
    assert value("cer", references, hypotheses) == pytest.approx(jiwer.cer(references, hypotheses))


def test_normalisers():
    assert value("wer", ["Hello, World!"], ["hello world"]) == 1
    assert value("wer", ["Hello, World!"], ["hello world"], normalizer="basic") == 0
    # The English one also writes numbers as digits and drops fillers; the basic one does not.
    assert value("wer", ["um it's twenty one"], ["it is 21"], normalizer="english") == 0
    assert value("wer", ["um it's twenty one"], ["it is 21"], normalizer="basic") > 0
    with pytest.raises(ValueError, match="'none', 'basic' or 'english'"):
        value("wer", ["a"], ["a"], normalizer="whisper")


def test_spellings_are_unified_only_with_a_whisper_models_list(tmp_path):
    (tmp_path / "normalizer.json").write_text(json.dumps({"colour": "color"}))
    assert value("wer", ["the colour"], ["the color"], normalizer="english") == 0.5
    assert value("wer", ["the colour"], ["the color"], normalizer="english", spellings=str(tmp_path)) == 0
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no normalizer.json"):
        normalize("a", "english", str(tmp_path / "empty"))


@given(st.text(max_size=30), st.sampled_from(["none", "basic", "english"]))
def test_a_text_always_equals_itself_and_has_no_surplus_space(text, normalizer):
    once = normalize(text, normalizer)
    assert once == " ".join(once.split())
    rows = [{"id": "a", "reference": text, "answer": text}]
    for metric in ("wer", "cer"):
        assert METRICS[metric].statistics(rows[0], {"normalizer": normalizer})[0] == 0


def test_german_nouns_keep_their_capitals_in_the_strict_form():
    assert value("wer", ["die Kiste"], ["die kiste"]) == 0.5


def test_accuracies():
    assert value("accuracy", ["switch", "phone"], [" Switch.", "digits"]) == 0.5
    assert value("sentence_accuracy", ["a b", "a  c"], ["a b", "a c"]) == 1
    assert value("sentence_accuracy", ["a b"], ["A b"]) == 0


def test_final_label_is_what_follows_the_last_separator():
    references = ["what is two plus two : four", "what is big : small", "Berlin"]
    hypotheses = ["what is two plus you : four.", "what is big : big", "berlin"]
    assert value("final_label_accuracy", references, hypotheses) == pytest.approx(2 / 3)
    assert final_label("a : b : C d!") == "c d"
    # A colon inside a word, such as a time, does not separate.
    assert final_label("at 10:30") == "at 10:30"


def test_sound_accuracy_looks_at_labels_only():
    references = ["<cough> open the door", "close it <laugh>", "no sound"]
    hypotheses = ["<cough> open a door", "<laugh> <laugh>", "no sound"]
    assert value("sound_accuracy", references, hypotheses) == pytest.approx(2 / 3)


# -- BLEU

SENTENCES = st.lists(st.sampled_from(["ein", "Haus", "steht,", "am", "See", "."]), max_size=8).map(" ".join)


@given(st.lists(st.tuples(SENTENCES, SENTENCES), min_size=1, max_size=5))
def test_bleu_equals_sacrebleu_over_the_whole_corpus(pairs):
    references, hypotheses = [list(side) for side in zip(*pairs, strict=True)]
    wanted = sacrebleu.corpus_bleu(hypotheses, [references]).score
    assert value("sacrebleu", references, hypotheses, resamples=1) == pytest.approx(wanted)


def test_bleu_of_several_references_and_other_tokenizers():
    references = [
        ["ein Haus am See steht hier", "ein kleines Haus am See steht da"],
        ["er geht nach Hause", "er geht"],
    ]
    hypotheses = ["ein Haus am See steht da", "er geht heim nach Hause"]
    streams = [list(stream) for stream in zip(*references, strict=True)]
    found = score_texts("sacrebleu", references, hypotheses)
    assert found.value == pytest.approx(sacrebleu.corpus_bleu(hypotheses, streams).score)
    assert found.signature == f"nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    assert value("sacrebleu", ["他走了很远"], ["他走得很远"], tokenize="zh") == pytest.approx(
        sacrebleu.corpus_bleu(["他走得很远"], [["他走了很远"]], tokenize="zh").score
    )
    with pytest.raises(ValueError, match="'14a' is unknown to sacrebleu"):
        value("sacrebleu", ["a"], ["a"], tokenize="14a")


def test_an_empty_translation_shortens_the_corpus():
    pairs = ["ein Haus am See", "er geht nach Hause"], ["ein Haus am See", ""]
    # All n-grams there are right; four words of eight give the brevity penalty exp(1 - 8 / 4).
    assert value("sacrebleu", *pairs) == pytest.approx(100 * 2.718281828**-1)


# -- labels


def test_strict_label_is_the_published_equality():
    # Qwen2-Audio's scripts: white space before the answer is ignored, nothing else.
    assert value("label_accuracy", ["joy"] * 4, [" joy", "Joy", "joy.", "joy "]) == 0.25


def test_lenient_label_is_the_only_known_one_in_the_answer():
    answers = ["The emotion is Joy.", "joy or anger", "joyful", "anger", ""]
    found = score_texts("lenient_label_accuracy", ["joy"] * 5, answers, labels=EMOTIONS)
    assert found.value == pytest.approx(1 / 5)
    assert found.notes == {"parse_failures": 3}  # two labels, none, none
    with pytest.raises(ValueError, match="'happy' is none of neutral, joy"):
        value("lenient_label_accuracy", ["happy"], ["joy"], labels=EMOTIONS)
    with pytest.raises(ValueError, match="fields\\['choices'\\] is None"):
        value("lenient_label_accuracy", ["joy"], ["joy"])


def test_labels_are_found_as_whole_words_and_the_longest_first():
    assert labels_in("That was throat  clearing.", ["throat clearing", "clearing", "cough"]) == {"throat clearing"}
    assert labels_in("female", ["male", "female"]) == {"female"}
    assert labels_in("a 7!", ["seven"], {"7": "seven"}) == {"seven"}
    with pytest.raises(ValueError, match="no labels"):
        labels_in("a", [])


# -- multiple choice


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" B. blue", "B"),
        ("\nB", "B"),
        ("A man speaks", "A"),  # the rule looks at nothing but the first character
        ("The answer is B.", "B"),  # the last but one
        ("It is (B)", "B"),
        ("the answer is B", None),  # last, and not last but one
        ("b", None),
        ("E", None),
        ("None", None),
        ("  ", None),
        ("", None),
    ],
)
def test_official_letter(answer, letter):
    assert official_letter(answer) == letter


def test_failures_leave_the_official_denominator_and_not_the_strict_one():
    rows = choice_rows(["B", "The answer is B.", "A", "blue?"])
    assert score_rows(rows, "choice_accuracy").value == pytest.approx(2 / 3)
    assert score_rows(rows, "choice_accuracy").notes == {"parse_failures": 1}
    assert score_rows(rows, "choice_strict").value == 0.5
    assert score_rows(rows, "parse_failures").value == 0.25


def test_an_accuracy_of_nothing_parsed_is_undefined_and_said_so():
    rows = choice_rows(["no idea", ""])
    found = score_rows(rows, "choice_accuracy")
    assert (found.value, found.interval, found.count, found.notes) == (None, None, 2, {"parse_failures": 2})
    assert found.to_dict() == {"value": None, "interval": None, "count": 2, "notes": {"parse_failures": 2}}
    assert score_rows(rows, "choice_strict").value == 0
    assert format_figure("choice_accuracy", None) == "none"


def test_the_right_option_is_the_first_equal_one_and_must_be_there():
    rows = choice_rows(["A", "B"], "same", ["same", "same", None, None])
    assert score_rows(rows, "choice_accuracy").value == 0.5
    with pytest.raises(ValueError, match=r"item 0: reference 'pink' is none of the choices \['red'"):
        score_rows(choice_rows(["A"], "pink"), "choice_accuracy")


def test_string_match_wants_every_word_and_none_of_the_others():
    choices = ["A dog barks", "A cat meows", "Rain"]
    assert matches_choice("a DOG barks, loudly", "A dog barks", choices)
    assert not matches_choice("a dog", "A dog barks", choices)  # a word is missing
    assert not matches_choice("A dog barks. Rain", "A dog barks", choices)  # a word of another option
    assert not matches_choice("A dog barks A cat meows Rain", "A dog barks", choices)  # an echo of the options
    assert not matches_choice("", "A dog barks", choices)
    # "a" is a word of the right option, so another option does not exclude it.
    assert matches_choice("a cat meows", "A cat meows", choices)


def test_a_bare_letter_counts_in_string_match_only_if_it_may():
    rows = choice_rows(["B", "(b)", "b.", "blue", "C", "E"])
    assert score_rows(rows, "string_match").value == pytest.approx(1 / 6)
    assert score_rows(rows, "string_match", {"letters": True}).value == pytest.approx(4 / 6)
    assert spelled_out("A dog", ["x", "y"]) == "A dog"
    assert spelled_out("C", ["x", "y"]) == "C"


def test_contained_answer():
    assert contains_answer("The capital is Paris, of course.", "Paris")
    assert not contains_answer("Parisian", "Paris")
    assert contains_answer("It has 21 letters", "twenty one")  # Whisper's English form on both sides
    assert contains_answer("red, and then the blue", "blue, red")  # every part, in any order
    assert not contains_answer("only red", "blue, red")
    assert contains_answer("Franklin Roosevelt", "Kennedy ||| Roosevelt")
    with pytest.raises(ValueError, match="item 0: nothing is left of the answer 'the'"):
        value("contained_answer", ["the"], ["the"])


# -- times


def test_spans_in_answers():
    assert spans_in("[1.2, 1.5]") == [(1.2, 1.5)]
    assert spans_in("from 1.2s to 1.5 seconds") == [(1.2, 1.5)]
    assert spans_in("0-3, then 4 and 5.5") == [(0, 3), (4, 5.5)]
    assert spans_in("between 2.0 and 2.5s.") == [(2.0, 2.5)]
    assert spans_in("at 1.2 seconds") == spans_in("5 to 3") == spans_in("") == []


def test_overlap_of_spans_by_hand():
    assert interval_iou([(0, 2)], [(1, 3)]) == pytest.approx(1 / 3)
    assert interval_iou([(0, 1)], [(2, 3)]) == 0
    # Two spans that overlap each other cover 0 to 3; the other side covers 2 to 4: one second of four.
    assert interval_iou([(0, 2), (1, 3)], [(2, 4)]) == pytest.approx(1 / 4)
    with pytest.raises(ValueError, match="no time"):
        interval_iou([], [])


TIMES = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9)).map(lambda p: (p[0], p[0] + p[1])), max_size=5)


@given(TIMES, TIMES)
def test_overlap_of_spans_equals_a_count_of_seconds(found, wanted):
    assume(found or wanted)
    said, right = ({s for start, end in spans for s in range(start, end)} for spans in (found, wanted))
    assert interval_iou(found, wanted) == pytest.approx(len(said & right) / len(said | right))


def test_grounding_is_the_mean_overlap_with_unread_answers_as_none():
    found = score_texts("grounding", ["[1, 3]"] * 4, ["1 to 3 s", "[2, 4]", "at the end", "5-6"])
    assert found.value == pytest.approx((1 + 1 / 3 + 0 + 0) / 4)
    assert found.notes == {"parse_failures": 1}
    with pytest.raises(ValueError, match="'soon' states no time span"):
        value("grounding", ["soon"], ["1 to 2"])


def test_grounding_choice_takes_a_letter_or_the_nearest_span():
    choices = ["[0.0, 1.0]", "[1.0, 2.0]", "[2.0, 3.0]", "[3.0, 4.0]"]
    answers = ["B", "1.2 to 2.0", "from 0 to 1", "0.5 to 1.5", "later"]  # the fourth lies between two options
    found = score_rows(choice_rows(answers, choices[1], choices), "grounding_choice")
    assert found.value == pytest.approx(2 / 5)
    assert found.notes == {"parse_failures": 2}
    assert nearest_choice("2.9-3.9", choices) == 3
    assert letter_of(3) == "D"


# -- judges


def judged_row(name, *marks, **more):
    judgements = [{"order": i, "score": m, "error": "prose" if m is None else None} for i, m in enumerate(marks)]
    return {"id": name, "answer": "x", "judgements": [each | more for each in judgements]}


def test_judge_score_is_the_mean_of_both_orders_and_leaves_failures_out():
    rows = [judged_row("a", 8, 6), judged_row("b", 3, 4), judged_row("c", 9, None), judged_row("d")]
    found = score_rows(rows, "judge_score", {"scale": [1, 10]})
    assert found.value == pytest.approx((7 + 3.5) / 2)
    assert (found.count, found.notes) == (4, {"judge_failures": 2})
    assert METRICS["judge_score"].format(found.value) == "5.25"
    # An item judged in one order only is none where two are wanted.
    one = score_rows([judged_row("a", 8), judged_row("b", 2, 4)], "judge_score", {"judgements": 2})
    assert (one.value, one.notes) == (3, {"judge_failures": 1})


@pytest.mark.parametrize("mark", [11, 0, "8", True])
def test_a_mark_off_the_scale_is_an_error(mark):
    with pytest.raises(ValueError, match="a judge's score is .*expected 1 to 10"):
        score_rows([judged_row("a", mark)], "judge_score", {"scale": [1, 10]})


def test_win_rate_counts_means_above_the_references():
    rows = [judged_row("a", 8, 6, reference_score=6.5), judged_row("b", 5, 5, reference_score=5)]
    assert score_rows(rows, "judge_win_rate").value == 0.5


# -- bad input


def test_nothing_to_score_is_an_error_not_a_zero():
    with pytest.raises(ValueError, match="none of 0 items"):
        value("wer", [], [])
    with pytest.raises(ValueError, match="nothing to count"):
        value("wer", [""], ["a"])
    with pytest.raises(ValueError, match="2 references but 1 hypotheses"):
        value("accuracy", ["a", "b"], ["a"])
    with pytest.raises(ValueError, match="metric 'bleu' is unknown; choose one of wer"):
        get_metric("bleu")


@pytest.mark.parametrize("metric", ["wer", "sacrebleu", "label_accuracy", "choice_accuracy", "contained_answer"])
@pytest.mark.parametrize("answer", [3, None, ["a"]])
def test_an_answer_of_another_type_is_named_and_no_wrong_answer(metric, answer):
    with pytest.raises(ValueError, match="item 0: 'answer' is .*expected text"):
        score_rows(choice_rows([answer]), metric)


@given(st.text(max_size=12))
def test_any_text_can_be_scored_by_every_metric_of_texts(answer):
    rows = choice_rows([answer], "[1, 2]", ["[1, 2]", "[3, 4]"])
    for name in ("wer", "sacrebleu", "label_accuracy", "lenient_label_accuracy", "choice_accuracy", "string_match"):
        score_rows(rows, name, {"resamples": 2})
    for name in ("grounding", "grounding_choice"):
        assert 0 <= score_rows(rows, name, {"resamples": 2}).value <= 1
