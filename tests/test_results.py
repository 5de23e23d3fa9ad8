"""``results.json``: what it holds follows from the answers, and a figure that does not is found."""

import copy
import json

import pytest
import sacrebleu

from soundwave.eval.logs import AnswerLog, JudgementLog, read_answers, read_judgements
from soundwave.eval.results import (
    TaskResult,
    metric_settings,
    pool,
    read_results,
    rescore,
    save_result,
    score_answers,
    with_judgements,
)

AREAS = {"speech": ["x", "y"], "sound": ["z"]}


def answer_rows():
    rows = []
    for group, answers in {"x": ["A", "B", "A"], "y": ["B", "what?"], "z": ["A"]}.items():
        for i, answer in enumerate(answers):
            rows.append({"name": "t", "task": "t", "id": f"{group}{i}", "instruction": "?", "reference": "yes"})
            rows[-1] |= {"answer": answer, "error": None, "audio": [], "duration_s": 1.0, "source": f"s{i % 2}"}
            rows[-1] |= {"group": group, "fields": {"choices": ["yes", "no"]}}
    return [*rows, rows[0] | {"id": "bad", "answer": None, "error": "OSError: gone"}]


def result_of(rows, metric="choice_accuracy", also=("choice_strict", "parse_failures"), settings=None, **more):
    settings = settings or metric_settings({}, "groups", AREAS)
    headline, others = score_answers(rows, metric, also, settings)
    figures = {key: getattr(headline, key) for key in ("value", "interval", "count", "groups", "areas", "notes")}
    return TaskResult(
        name="t",
        task="t",
        dataset={"name": "t", "revision": "1", "rows": len(rows)},
        metric=metric,
        settings=settings,
        **figures,
        signature=headline.signature,
        failures=sum(row["error"] is not None for row in rows),
        failed={row["id"]: row["error"] for row in rows if row["error"] is not None},
        also=others,
        model={},
        decoding={},
        hardware={},
        packages={},
        time="",
        seconds=1.0,
        command="",
        **more,
    )


@pytest.fixture
def folder(tmp_path):
    """A folder with the files of a scored benchmark of groups and areas."""
    AnswerLog(tmp_path, "t").append(answer_rows())
    save_result(tmp_path, result_of(answer_rows()))
    return tmp_path


def test_an_entry_holds_groups_areas_and_notes(folder):
    (entry,) = read_results(folder)
    # x: 2 of 3, y: 0 of 1 parsed, z: 1 of 1; by hand.
    assert entry["value"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert {name: group["value"] for name, group in entry["groups"].items()} == pytest.approx(
        {"x": 2 / 3, "y": 0, "z": 1}
    )
    assert entry["areas"]["speech"]["value"] == pytest.approx(1 / 3)
    assert (entry["count"], entry["failures"], entry["failed"]) == (6, 1, {"bad": "OSError: gone"})
    assert entry["notes"] == {"parse_failures": 1}
    assert entry["also"]["choice_strict"]["areas"]["speech"]["value"] == pytest.approx((2 / 3 + 0) / 2)
    assert entry["groups"]["x"]["sources"]["s0"]["count"] == 2
    assert entry["judge"] is None and "answers" not in entry
    assert rescore(entry, read_answers(folder)) == []


@pytest.mark.parametrize(
    ("path", "named"),
    [
        (("value",), "value"),
        (("interval", 1), "interval"),
        (("count",), "count"),
        (("failures",), "failures"),
        (("cut",), "cut"),
        (("notes", "parse_failures"), "notes parse_failures"),
        (("groups", "y", "value"), "groups y value"),
        (("groups", "x", "sources", "s1", "count"), "groups x sources s1 count"),
        (("areas", "speech", "interval", 0), "areas speech interval"),
        (("also", "choice_strict", "areas", "sound", "value"), "choice_strict areas sound value"),
    ],
)
def test_any_figure_that_was_changed_is_found(folder, path, named):
    (entry,) = read_results(folder)
    place = entry
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] += 0.1
    lines = rescore(entry, read_answers(folder))
    assert [line.split(" is ")[0] for line in lines] == [f"t: {named}"]


def test_figures_that_were_added_or_taken_away_are_found(folder):
    (entry,) = read_results(folder)
    added = copy.deepcopy(entry)
    added["groups"]["w"] = {"value": 1.0, "interval": [1.0, 1.0], "count": 3}
    assert any("groups w value is 1.0" in line for line in rescore(added, read_answers(folder)))
    gone = copy.deepcopy(entry)
    del gone["areas"]["sound"]
    assert any("areas sound value is None" in line for line in rescore(gone, read_answers(folder)))
    hidden = copy.deepcopy(entry)
    for failed in ({"another": "OSError: gone"}, {"bad": "the item's own fault"}):
        hidden["failed"] = failed
        assert [line.split(" is ")[0] for line in rescore(hidden, read_answers(folder))] == ["t: failed"]
    assert rescore(entry, []) == ["t: answers.jsonl holds no answer for it"]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"task": "librispeech_clean"}, "t: task is librispeech_clean in results.json, but the answers are of t"),
        (
            {"dataset": {"name": "openslr/librispeech_asr", "revision": "1", "rows": 7}},
            "t: dataset name is openslr/librispeech_asr in results.json, but t in answers.settings.json",
        ),
        (
            {"decoding": {"num_beams": 10, "batch_size": 4}},
            "t: decoding num_beams is 10 in results.json, but None in answers.settings.json",
        ),
        ({"model": {"name": "other"}}, "t: model name is other in results.json, but None in answers.settings.json"),
    ],
)
def test_a_label_that_the_answers_do_not_have_is_found(changed, expected, folder):
    (entry,) = read_results(folder)
    made_with = {key: entry[key] for key in ("task", "metric", "settings", "dataset", "model", "decoding")}
    answers = read_answers(folder)
    assert rescore(entry | {"decoding": {"batch_size": 4}}, answers, (), made_with) == []
    assert rescore(entry | changed, answers, (), made_with) == [expected]


def test_an_answer_that_was_taken_away_is_found(folder):
    """The figures of those that are left follow from them, all but their number."""
    rows = [row for row in answer_rows() if row["id"] != "y0"]
    entry = result_of(rows).to_dict()
    entry["dataset"]["rows"] = len(answer_rows())
    assert rescore(entry, rows) == ["t: dataset rows is 7 in results.json, but the answers give 6"]


@pytest.mark.parametrize("content", ["[]", '{"results": {}}', '{"results": [1]}', '{"results": [{}]}', "{"])
def test_a_file_that_holds_no_results_is_said(content, folder):
    (folder / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r'results.json .*expected {"results": \[entries.*remove results.json'):
        read_results(folder)


def test_the_order_of_the_answers_changes_nothing(folder):
    (entry,) = read_results(folder)
    assert rescore(entry, read_answers(folder)[::-1]) == []


def test_judgements_are_joined_and_rescored(tmp_path):
    rows = [row | {"group": None} for row in answer_rows() if row["error"] is None][:2]

    def judgement(row, order, score):
        error = None if score is not None else "prose"
        return {"name": "t", "id": row["id"], "model": "j", "order": order, "score": score, "error": error}

    judgements = [
        judgement(rows[0], "reference_first", 7),
        judgement(rows[0], "answer_first", 4),
        judgement(rows[1], "reference_first", None),
        judgement(rows[1], "answer_first", 9),
        judgement(rows[0], "answer_first", 5),  # judged again: the later one counts
        judgement(rows[0], "answer_first", 1) | {"name": "other", "model": "k"},
    ]
    AnswerLog(tmp_path, "t").append(rows)
    JudgementLog(tmp_path, "t").append(judgements)
    settings = metric_settings({"scale": (1, 10), "judgements": 2})
    joined = with_judgements(rows, judgements)
    save_result(tmp_path, result_of(joined, "judge_score", (), settings, judge={"model": "j"}))
    (entry,) = read_results(tmp_path)
    assert (entry["value"], entry["notes"], entry["judge"]) == (6, {"judge_failures": 1}, {"model": "j"})
    assert rescore(entry, read_answers(tmp_path), read_judgements(tmp_path)) == []
    assert pool([tmp_path, tmp_path])["t"].value == 6
    other = rescore(entry | {"judge": {"model": "a better one"}}, read_answers(tmp_path), read_judgements(tmp_path))
    assert other == ["t: judge is ['a better one'] in results.json, but the answers give ['j']"]
    without = rescore(entry, read_answers(tmp_path))
    assert any("value is 6.0 in results.json, but the answers give None" in line for line in without)


def test_a_mark_that_the_judge_did_not_give_is_found():
    row = answer_rows()[0] | {"group": None}
    said = {"name": "t", "id": row["id"], "model": "j", "order": "once", "reply": "Rating: 1", "error": None}

    def lines(**marks):
        judgements = [said | {"score": 1.0, "lenient_score": 1.0} | marks]
        answers = [row | {"task": "alpaca_audio"}]
        result = result_of(
            with_judgements([row], judgements), "judge_score", (), metric_settings({}), judge={"model": "j"}
        )
        return rescore(result.to_dict() | {"task": "alpaca_audio"}, answers, judgements)

    assert lines() == []
    assert lines(score=5.0) == ["t: x0 once: score is 5.0 in judgements.jsonl, but the reply says 1.0"]
    (hidden,) = lines(score=None, error="expected a number")
    assert "score is None" in hidden


def test_an_undefined_figure_is_null_and_stays_so(tmp_path):
    rows = [row | {"answer": "?"} for row in answer_rows()]
    AnswerLog(tmp_path, "t").append(rows)
    save_result(tmp_path, result_of([row for row in rows if row["error"] is None]))
    (entry,) = read_results(tmp_path)
    assert (entry["value"], entry["interval"]) == (None, None)
    assert entry["notes"]["undefined"] == ["x", "y", "z"]
    assert entry["also"]["parse_failures"]["value"] == 1
    entry["value"] = 0.0
    assert any("value is 0.0" in line for line in rescore(entry, read_answers(tmp_path)))


def test_a_signature_stands_in_the_entry_and_needs_no_same_version(tmp_path):
    rows = [row | {"answer": "yes it is so", "reference": "yes it is so"} for row in answer_rows()[:2]]
    AnswerLog(tmp_path, "t").append(rows)
    save_result(tmp_path, result_of(rows, "sacrebleu", (), metric_settings({"tokenize": "13a"})))
    (entry,) = read_results(tmp_path)
    assert entry["value"] == pytest.approx(100)
    assert entry["signature"].endswith(f"version:{sacrebleu.__version__}")
    entry["signature"] = entry["signature"].replace(sacrebleu.__version__, "1.5.1")
    assert rescore(entry, rows) == []


def test_a_setting_that_no_metric_knows_is_an_error():
    with pytest.raises(ValueError, match="no metric knows the setting normaliser; known are normalizer"):
        metric_settings({"normaliser": "english"})
    settings = metric_settings({"scale": (0, 5)}, "areas", {"all": ("x",)})
    assert settings["normalizer"] == "none" and settings["average"] == "areas" and settings["areas"] == {"all": ["x"]}
    assert json.loads(json.dumps(settings))["scale"] == [0, 5]
