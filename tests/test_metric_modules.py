"""Our metrics as `evaluate` users load them: by path, without a network, alone and combined."""

import subprocess
import sys

import evaluate
import jiwer
import pytest
import sacrebleu

from soundwave.eval.metrics import metric_path

MODULES = ("cer", "choice_accuracy", "grounding", "judge_score", "label_accuracy", "sacrebleu", "wer")


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
    return lambda name: evaluate.load(metric_path(name), cache_dir=str(tmp_path), experiment_id=name)


def test_wer(load):
    metric = load("wer")
    metric.add_batch(predictions=["the red box"], references=["the red boxes"])
    metric.add(prediction="go", reference="go")
    result = metric.compute()
    assert result["wer"] == pytest.approx(jiwer.wer(["the red boxes", "go"], ["the red box", "go"])) == 1 / 4
    assert result["count"] == 2
    assert result["interval"][0] <= result["wer"] <= result["interval"][1]
    assert metric.compute(predictions=["Go!"], references=["go"], normalizer="basic")["wer"] == 0
    with pytest.raises(ValueError):
        metric.compute(predictions=[1.5], references=["go"])


def test_cer(load):
    assert load("cer").compute(predictions=["abcd"], references=["ab cd"])["cer"] == pytest.approx(1 / 5)


def test_sacrebleu_takes_one_or_several_references(load):
    hypotheses, first, second = (
        ["ein Haus am See da", "er geht"],
        ["ein Haus am See", "er geht"],
        ["Haus am See", "er"],
    )
    metric = load("sacrebleu")
    one = metric.compute(predictions=hypotheses, references=first)
    assert one["sacrebleu"] == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [first]).score)
    assert one["signature"] == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"
    pairs = [list(pair) for pair in zip(first, second, strict=True)]
    several = load("sacrebleu").compute(predictions=hypotheses, references=pairs)
    assert several["sacrebleu"] == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [first, second]).score)
    assert several["signature"].startswith("nrefs:2|")
    characters = load("sacrebleu").compute(predictions=hypotheses, references=first, tokenize="char")
    assert "tok:char" in characters["signature"]


def test_choice_accuracy(load):
    columns = {
        "predictions": ["B", "The answer is A.", "who knows?"],
        "references": ["blue", "blue", "red"],
        "choices": [["red", "blue"], ["red", "blue", "green"], ["red", "blue"]],
    }
    result = load("choice_accuracy").compute(**columns)
    assert result.pop("interval")
    # One of two parsed answers is right; of three answers one was not parsed.
    assert result == {"choice_accuracy": 0.5, "choice_strict": 1 / 3, "parse_failures": 1 / 3, "count": 3}


def test_choice_accuracy_of_nothing_parsed_is_no_zero(load):
    result = load("choice_accuracy").compute(predictions=["?"], references=["red"], choices=[["red", "blue"]])
    assert result["choice_accuracy"] is None and result["parse_failures"] == 1


def test_label_accuracy(load):
    columns = {"predictions": ["joy", "I hear joy.", "joy or anger"], "references": ["joy"] * 3}
    result = load("label_accuracy").compute(**columns, labels=["joy", "anger"])
    assert (result["label_accuracy"], result["lenient_label_accuracy"]) == pytest.approx((1 / 3, 2 / 3))
    assert result["parse_failures"] == 1
    merry = load("label_accuracy").compute(predictions=["merry"], references=["joy"], synonyms={"merry": "joy"})
    assert merry["lenient_label_accuracy"] == 1


def test_judge_score(load):
    result = load("judge_score").compute(predictions=[[8, 6], [3.5], [9, None], []], scale=(1, 10))
    assert result.pop("interval")
    assert result == {"judge_score": pytest.approx((7 + 3.5) / 2), "count": 4, "judge_failures": 2}
    with pytest.raises(ValueError, match="expected 0 to 5"):
        load("judge_score").compute(predictions=[[6]], scale=(0, 5))


def test_grounding(load):
    choices = [["[1, 2]", "[2, 3]"], ["[1, 2]", "[2, 3]"]]
    columns = {"predictions": ["1 to 3", "B"], "references": ["[1, 2]", "[2, 3]"]}
    result = load("grounding").compute(**columns, choices=choices)
    # Half of the first answer's time is right and nothing of the second's; it chooses right, the first one not at all.
    assert (result["grounding"], result["grounding_choice"]) == (0.25, 0.5)
    assert result["parse_failures"] == 1
    assert "grounding_choice" not in load("grounding").compute(**columns)


def test_combined(load):
    both = evaluate.combine([load("wer"), load("cer"), load("sacrebleu")])
    result = both.compute(predictions=["a b c d"], references=["a b c e"])
    assert (result["wer"], result["cer"]) == (1 / 4, 1 / 7)
    assert result["wer_count"] == 1 and result["cer_interval"] and result["sacrebleu"] > 0
    mixed = evaluate.combine([load("label_accuracy"), load("choice_accuracy")])
    mixed.add_batch(predictions=["A", "B"], references=["A", "C"], choices=[["A", "B"], ["C", "D"]])
    result = mixed.compute()
    assert (result["label_accuracy"], result["choice_accuracy"]) == (0.5, 0.5)


def test_every_module_loads_in_a_fresh_process_without_network(tmp_path):
    script = (
        "import evaluate, json, sys\n"
        "from soundwave.eval.metrics import metric_path\n"
        "print(json.dumps([evaluate.load(metric_path(name)).name for name in sys.argv[1:]]))"
    )
    environment = {
        "HF_HOME": str(tmp_path),
        "HF_EVALUATE_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
    }
    environment["PYTHONPATH"] = metric_path("wer").removesuffix("/eval/metrics/wer")
    done = subprocess.run([sys.executable, "-c", script, *MODULES], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(list(MODULES)).replace("'", '"'), done.stderr


def test_metric_path_names_what_exists():
    with pytest.raises(ValueError, match=f"no metric 'bleu'; choose one of {', '.join(MODULES)}"):
        metric_path("bleu")
