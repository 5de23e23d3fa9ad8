"""Validation: figures of generated answers, equal to an evaluation's, and no trace of it in the training."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soundwave.eval.rows import evaluate_ctc, evaluate_rows
from soundwave.training import generating
from soundwave.training.checkpoints import LOG
from soundwave.training.data import load_rows
from soundwave.training.encoder_cache import EncoderCache
from soundwave.training.freezing import freeze
from soundwave.training.generating import AnswerCheck, figure_of, sample_rows
from soundwave.training.skipping import SkippingCollator
from soundwave.training.stages import ConfigError, StageConfig
from soundwave.training.train import run_stage
from tests.tiny_trainers import build_trainer
from tests.training_rows import write_rows

ROOT = Path(__file__).parents[1]
CHECK = AnswerCheck(rows=64, max_new_tokens=4)


def row(task, answer, transcript=None, messages=None):
    return {"id": "x", "task": task, "answer": answer, "transcript": transcript, "messages": messages}


@pytest.mark.parametrize(
    ("given_row", "figure", "metric"),
    [
        (row("asr", "Red boxes.", "red boxes"), "wer", "wer"),
        (row("dialect", "red boxes", "red boxes"), "wer", "wer"),
        (row("asr_two", "a b", ["a", "b"]), "wer", "wer"),
        (row("st", "rote Kisten", "red boxes"), "wer_st", "wer"),
        (row("intent", "order", "red boxes"), "accuracy_intent", "accuracy"),
        (row("spoken_qa", "what : three", "what"), "accuracy_spoken_qa", "final_label_accuracy"),
        (row("emotion", "happy", None), "accuracy_emotion", "accuracy"),
        (row("two_clips", "happy", ["a", None]), "accuracy_two_clips", "accuracy"),
        (row("story", "one two three four five six seven eight nine"), None, None),
        (row("asr", None, "red boxes"), None, None),
        (row("chat", None, None, [{"role": "user"}]), None, None),
    ],
)
def test_which_figure_a_row_counts_in(given_row, figure, metric):
    found = figure_of(given_row, ctc=False)
    assert (found and found[0], found and found[1].metric) == (figure, metric)


def test_in_stage_one_every_transcript_counts():
    assert figure_of(row("st", "rote Kisten", "red boxes"), ctc=True)[0] == "ctc_wer"
    assert figure_of(row("text_qa", "three"), ctc=True) is None
    assert figure_of(row("two", None, ["a", None]), ctc=True) is None


@given(
    figures=st.lists(st.sampled_from(["wer", "accuracy_a", "accuracy_b", None]), max_size=40),
    count=st.integers(0, 50),
    seed=st.integers(0, 3),
)
def test_the_sample_is_fixed_and_spread_over_the_figures(figures, count, seed):
    chosen = sample_rows(figures, count, seed)
    assert chosen == sample_rows(figures, count, seed)
    sizes, drawn = Counter(figures), Counter(figures[k] for k in chosen)
    sizes.pop(None, None)
    assert len(set(chosen)) == len(chosen) == min(count, sum(sizes.values())) and None not in drawn
    for figure, size in sizes.items():
        assert drawn[figure] >= min(size, count // len(sizes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model, processor):
    """Rows of which a random model gets a known share right: some of its own answers are taken for the reference."""
    folder = tmp_path_factory.mktemp("rows")
    plain = [dict(each) for each in load_rows(write_rows(folder))]
    for each in plain:
        each["task"] = "asr" if each["audio"] else "intent"
    own = {}
    for task in ("asr", "intent"):
        some = [each for each in plain if each["task"] == task]
        done = evaluate_rows(tiny_model, processor, some, task, max_new_tokens=4, batch_size=4, progress=False)
        own |= {answer["id"]: answer["answer"] for answer in done.answers}
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for k, line in enumerate(lines):
        line["task"] = "asr" if line["audio"] else "intent"
        if line["audio"] is None and k % 4:
            line["answer"] = own[line["id"]]
    (folder / "known.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    spoken = [json.dumps(line) for line in lines if line["audio"]]
    (folder / "spoken.jsonl").write_text("\n".join(spoken))
    return folder


@pytest.fixture
def known(folder):
    return load_rows(folder / "known.jsonl")


@pytest.mark.parametrize("stage", ["shrink", "instruct"])
def test_figures_are_those_of_an_evaluation(tiny_model, processor, known, tmp_path, stage):
    trainer = build_trainer(stage, tiny_model, processor, known, tmp_path, known, answer_check=CHECK)
    trainer.model.train()
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy_intent"] == 0.75, "one of the four written rows asks for another answer"
    spoken = [each for each in known if each["task"] == "asr"]
    done = evaluate_rows(trainer.model, processor, spoken, "asr", max_new_tokens=4, batch_size=4, progress=False)
    assert metrics["eval_wer"] == done.value and "eval_unanswered" not in metrics
    assert {"eval_ce_loss", "eval_compression_ratio"} <= metrics.keys()


def test_stage_one_scores_its_transcripts(tiny_ctc, processor, folder, tmp_path):
    rows = load_rows(folder / "spoken.jsonl")
    trainer = build_trainer("align", tiny_ctc, processor, rows, tmp_path, rows, answer_check=CHECK)
    metrics = trainer.evaluate()
    assert metrics["eval_ctc_wer"] == evaluate_ctc(tiny_ctc, processor, list(rows), progress=False).value
    assert {"eval_ctc_loss", "eval_token_error_rate"} <= metrics.keys() and metrics["eval_compression_ratio"] > 1


@pytest.mark.parametrize("stage", ["align", "shrink", "instruct"])
def test_a_run_with_validation_ends_with_the_same_bits(tiny_model, tiny_ctc, processor, folder, tmp_path, stage):
    """Dropout is on: a number that validation drew would show."""
    rows = load_rows(folder / ("spoken.jsonl" if stage == "align" else "known.jsonl"))
    model, ends = tiny_ctc if stage == "align" else tiny_model, []
    for name, settings in (
        ("with", {"eval_strategy": "steps", "eval_steps": 1, "answer_check": CHECK}),
        ("without", {}),
    ):
        trainer = build_trainer(stage, model, processor, rows, tmp_path / name, rows, max_steps=3, **settings)
        trainer.train()
        ends.append(trainer.model.state_dict())
        validated = sum("eval_loss" in entry for entry in trainer.state.log_history)
        assert validated == (3 if settings else 0)
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_one_that_cannot_be_read_is_counted_and_the_others_are_scored(tiny_model, processor, folder, tmp_path, capsys):
    lines = [json.loads(line) for line in (folder / "known.jsonl").read_text().splitlines()]
    lines[0]["audio"] = "gone.wav"
    for line in lines[1:]:
        line["audio"] = line["audio"] and str(folder / line["audio"])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = load_rows(tmp_path / "rows.jsonl")
    trainer = build_trainer("shrink", tiny_model, processor, rows, tmp_path / "run", rows, answer_check=CHECK)
    metrics = trainer.evaluate()
    assert metrics["eval_unanswered"] == 1 and metrics["eval_accuracy_intent"] == 0.75
    said = capsys.readouterr().err
    assert "no answer to 1 of 14 rows, the first 's0'" in said and "gone.wav" in said


def test_cached_features_stand_for_the_recordings(tiny_model, processor, folder, tmp_path):
    """The recordings are spoilt after the cache is made; a file of the same size and time counts as the same."""
    rows = load_rows(write_rows(tmp_path / "data", spoken=4))
    clips = [each for each in rows["audio"] if each]
    cache = EncoderCache.build(tmp_path / "cache", tiny_model, processor, clips, progress=False)
    for clip in clips:
        path = Path(clip["path"])
        times = path.stat()
        path.write_bytes(b"0" * times.st_size)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    collator = SkippingCollator(processor, ("answer",), cache)
    own = {"data_collator": collator, "answer_check": CHECK}
    metrics = build_trainer("instruct", tiny_model, processor, rows, tmp_path / "run", rows, **own).evaluate()
    assert "eval_wer" in metrics and "eval_unanswered" not in metrics


def test_frozen_parts_in_bfloat16_answer_too(tiny_model, processor, known, tmp_path):
    trainer = build_trainer("shrink", tiny_model, processor, known, tmp_path, known, bf16=True, answer_check=CHECK)
    trainer.model.to(torch.bfloat16)
    freeze(trainer.model, ["alignment_adapter", "shrinking_adapter", "lora"])
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16, torch.float32}
    metrics = trainer.evaluate()
    assert "eval_wer" in metrics and "eval_unanswered" not in metrics


def test_without_jiwer_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(generating.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'eval_generate_rows is 3.*pip install "soundwave\[train\]", or set'):
        AnswerCheck(rows=3)
    with pytest.raises(ConfigError, match="eval_generate_rows is -1"):
        StageConfig.for_stage("align", eval_generate_rows=-1)


def test_two_processes_count_every_row_once(encoder_folder, llm_folder, folder, tmp_path):
    """An odd number of rows, and one process's last batch smaller than the other's."""
    settings = {
        "audio_model": encoder_folder,
        "text_model": llm_folder,
        "model": {"audio_padding": "longest"},
        "data_root": str(folder),
        "data": ["known.jsonl"],
        "eval_data": ["known.jsonl"],
        "eval_steps": 1,
        "eval_generate_rows": 13,
        "eval_max_new_tokens": 4,
        "lora_r": 4,
        "lora_dropout": 0.0,
        "spec_augment": False,
        "global_batch": 4,
        "per_device_batch": 2,
        "steps": 1,
        "learning_rate": 0.0,
        "device": "cpu",
        "progress": False,
        "report_to": [],
    }
    run_stage(StageConfig.for_stage("shrink", output_dir=str(tmp_path / "alone"), **settings))
    arguments = [f"{name}={json.dumps(value)}" for name, value in settings.items()]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m"]
        + ["soundwave.training.train", "shrink", f"output_dir={tmp_path / 'two'}", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone, two = ([json.loads(line) for line in open(tmp_path / name / LOG)] for name in ("alone", "two"))
    names = ("rows", "target_tokens", "audio_seconds")
    assert [line[name] for line in alone for name in names if "rows" in line] == [
        line[name] for line in two for name in names if "rows" in line
    ]
    (one,), (other,) = ([line for line in log if "eval_loss" in line] for log in (alone, two))
    figures = {name for name in one if name.startswith(("eval_wer", "eval_accuracy"))}
    assert figures == {"eval_wer", "eval_accuracy_intent"}
    assert all(one[name] == other[name] for name in (*figures, "eval_compression_ratio"))
    assert done.stdout.split() == [str(tmp_path / "two")] and "answering" not in done.stderr
