"""Intervals, groups and areas of figures: against formulas, and against values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from soundwave.eval.scoring import METRICS, score_rows, score_texts


def rows_of(groups, metric_answer=lambda right: "a" if right else "b"):
    """Rows of groups of right (1) and wrong (0) answers."""
    return [
        {"id": f"{group}{i}", "group": group, "reference": "a", "answer": metric_answer(right)}
        for group, rights in groups.items()
        for i, right in enumerate(rights)
    ]


def test_interval_covers_the_value_and_shrinks_with_the_data():
    rng = np.random.default_rng(0)

    def score(n):
        return score_texts("accuracy", ["a"] * n, ["a" if right else "b" for right in rng.random(n) < 0.9])

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
    assert score_texts("wer", references, references).interval == (0, 0)
    wrong = ["a x", "c d e"]
    assert score_texts("wer", references, wrong) == score_texts("wer", references, wrong)
    assert score_texts("wer", references, wrong, seed=0, resamples=3) != score_texts(
        "wer", references, wrong, seed=0, resamples=1000
    )


def test_bleu_is_resampled_by_its_counts():
    texts = ["ein Haus am See steht da", "er geht nach Hause und schläft", "das Wetter ist heute schön genug"]
    found = score_texts("sacrebleu", texts, [texts[0], "er geht heim", texts[2]], resamples=200)
    low, high = found.interval
    # The worst draw is the wrong sentence three times, the best the others alone.
    assert 0 <= low < found.value < high == pytest.approx(100)


@given(
    st.dictionaries(st.sampled_from("xyz"), st.lists(st.booleans(), min_size=1, max_size=5), min_size=1),
    st.randoms(use_true_random=False),
)
def test_figures_do_not_depend_on_the_order_of_the_rows(groups, random):
    rows = rows_of(groups)
    shuffled = random.sample(rows, len(rows))
    options = {"settings": {"resamples": 20}, "average": "groups", "areas": {"all": tuple(groups)}}
    found = score_rows(rows, "accuracy", **options)
    assert found == score_rows(shuffled, "accuracy", **options)
    assert found.value == pytest.approx(np.mean([np.mean(rights) for rights in groups.values()]))
    assert found.areas["all"]["value"] == pytest.approx(found.value)
    assert found.interval[0] - 1e-9 <= found.value <= found.interval[1] + 1e-9 or len(rows) > 1


def test_mean_over_items_groups_and_areas():
    rows = rows_of({"x": [1, 1, 1, 0], "y": [0, 1], "z": [1]})
    areas = {"first": ("x", "y"), "second": ("z",)}

    def value(average):
        return score_rows(rows, "accuracy", average=average, areas=areas).value

    assert value("items") == pytest.approx(5 / 7)
    assert value("groups") == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)
    assert value("areas") == pytest.approx(((3 / 4 + 1 / 2) / 2 + 1) / 2)
    found = score_rows(rows, "accuracy", areas=areas)
    assert {name: (group["value"], group["count"]) for name, group in found.groups.items()} == {
        "x": (0.75, 4),
        "y": (0.5, 2),
        "z": (1, 1),
    }
    assert found.areas["first"]["value"] == pytest.approx(0.625)
    assert found.areas["second"] == {"value": 1, "interval": (1, 1), "count": 1}


def test_interval_of_a_mean_over_groups_is_that_of_its_formula():
    rng = np.random.default_rng(1)
    groups = {"many": rng.random(900) < 0.5, "few": rng.random(100) < 0.5}
    found = score_rows(rows_of(groups), "accuracy", average="groups")
    # The variance of a mean of two groups is a quarter of the sum of theirs; the small group dominates it.
    variance = sum(np.mean(g) * (1 - np.mean(g)) / len(g) for g in groups.values()) / 4
    assert found.interval[1] - found.interval[0] == pytest.approx(2 * 1.96 * np.sqrt(variance), rel=0.15)
    pooled = score_rows(rows_of(groups), "accuracy")
    assert pooled.interval[1] - pooled.interval[0] < found.interval[1] - found.interval[0]


def test_groups_missing_from_an_area_are_named():
    found = score_rows(rows_of({"x": [1]}), "accuracy", areas={"one": ("x", "y"), "none": ("z",)})
    assert found.areas == {"one": {"value": 1, "interval": (1, 1), "count": 1, "missing": ["y"]}}
    with pytest.raises(ValueError, match="averages nothing"):
        score_rows(rows_of({"x": [1]}), "accuracy", average="areas", areas={"none": ("z",)})
    with pytest.raises(ValueError, match="choose 'items', 'groups'"):
        score_rows(rows_of({"x": [1]}), "accuracy", average="mean")


def test_sources_of_a_group_are_pooled_and_given_apart():
    rows = rows_of({"gender": [1, 1, 0, 0, 0], "age": [1]})
    for row, source in zip(rows, ["meld", "meld", "voice", "voice", "voice", "voice"], strict=True):
        row["source"] = source
    found = score_rows(rows, "accuracy", average="groups")
    sources = found.groups["gender"]["sources"]
    assert {name: (source["value"], source["count"]) for name, source in sources.items()} == {
        "meld": (1, 2),
        "voice": (0, 3),
    }
    assert found.groups["gender"]["value"] == pytest.approx(2 / 5)
    assert "sources" not in found.groups["age"]


def test_a_mean_over_groups_of_which_one_is_undefined_is_undefined():
    choices = {"choices": ["a", "b"]}
    rows = rows_of({"x": [1, 1], "y": [0]}, lambda right: "A" if right else "no idea")
    found = score_rows([row | {"fields": choices} for row in rows], "choice_accuracy", average="groups")
    assert (found.value, found.interval) == (None, None)
    assert found.notes == {"parse_failures": 1, "undefined": ["y"]}
    assert found.groups["x"]["value"] == 1
    assert (found.groups["y"]["unread"], found.groups["y"]["count"]) == (1, 1) and "unread" not in found.groups["x"]


def test_an_interval_where_hardly_any_draw_has_an_answer_in_every_group():
    """In each of 60 groups one of two answers can be read: hardly one draw in ten million has a figure in all."""
    rows = rows_of({f"group {i:02}": [1, 0] for i in range(60)}, lambda right: "A" if right else "no idea")
    rows = [row | {"fields": {"choices": ["a", "b"]}} for row in rows]
    found = score_rows(rows, "choice_accuracy", average="groups")
    assert (found.value, found.interval) == (1, (1, 1))


def test_groups_that_lost_all_their_items_are_named():
    rows = rows_of({"x": [1, 0], "y": [1]})
    rows[2] |= {"answer": None, "error": "OSError: gone"}
    found = score_rows(rows, "accuracy", average="groups", areas={"one": ("x",), "two": ("z",)})
    assert (found.value, found.notes) == (1 / 2, {"missing": ["y", "z"]})
    assert score_rows(rows[:2], "accuracy", average="groups").notes == {}


def test_failed_items_are_in_no_figure_and_the_first_is_named_if_all_failed():
    rows = rows_of({"x": [1, 0]})
    broken = {"id": "bad", "group": "x", "reference": "a", "answer": None, "error": "OSError: gone"}
    assert score_rows([*rows, broken], "accuracy") == score_rows(rows, "accuracy")
    with pytest.raises(ValueError, match="none of 1 items was answered.*bad: OSError: gone"):
        score_rows([broken], "accuracy")


def test_a_row_without_its_group_cannot_enter_a_mean_over_groups():
    with pytest.raises(ValueError, match="item 'b' has no group"):
        score_rows([*rows_of({"x": [1]}), {"id": "b", "reference": "a", "answer": "a"}], "accuracy", average="groups")


def test_metrics_print_their_figures():
    assert METRICS["wer"].format(0.0468) == "4.7%"
    assert METRICS["sacrebleu"].format(25.307) == "25.31"
    assert METRICS["ttft"].format(72.0) == "72.00 ms"
