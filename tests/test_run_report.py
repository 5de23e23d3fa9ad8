"""A run's own report: tables equal to its log, pictures, and nothing of the machine it ran on."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from soundwave.training import curves, report
from soundwave.training.checkpoints import LOG
from soundwave.training.stages import StageConfig
from soundwave.training.train import run_stage
from tests.training_rows import write_rows


def entry(step, **values):
    rates = {"steps_per_second": 0.5, "tokens_per_second": 10.0, "audio_seconds_per_second": 45.0}
    return {"loss": 5.0 / step, "ctc_loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3} | {
        "rows": 8,
        "target_tokens": 40,
        "audio_seconds": 180.0,
        "epoch": step / 10,
        "step": step,
        **rates,
        **values,
    }


@pytest.fixture
def run(tmp_path):
    """What a run of 40 steps leaves that the report reads."""
    lines = [{"temperature": 1.0, "draws/asr": 30, "shares/asr": 0.75, "shares/st": 0.25, "epoch": 0, "step": 0}]
    lines += [entry(step) for step in range(2, 41, 2)]
    lines.insert(8, {"temperature": 6.0, "shares/asr": 0.5, "shares/st": 0.5, "epoch": 1, "step": 14})
    for step, wer in ((20, 0.5), (30, 0.25), (40, 0.375)):
        lines.append({"eval_loss": 2.0, "eval_wer": wer, "eval_skipped": 0, "eval_runtime": 3.0, "step": step})
    lines.append({"train_runtime": 80.0, "train_loss": 1.0, "step": 40})
    (tmp_path / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = StageConfig.for_stage("shrink", start="/home/someone/one", steps=40, lora_r=8, data=["/data/a.jsonl"])
    config.save(tmp_path / "stage_config.yaml")
    return tmp_path


def test_the_tables_are_the_log(run):
    bad = [{"reason": "unreadable"}, {"reason": "unreadable"}, {"reason": "empty transcript"}]
    (run / "skipped.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bad))
    (run / "nonfinite.jsonl").write_text(json.dumps({"step": 3}) + "\n")
    text = report.write_run_report(run).read_text()
    for line in (
        "# Stage II: shrinking",
        "| Started from | one |",
        "| Steps | 40 of 40, 4 epochs |",
        "| Rows trained on | 160 |",
        "| Audio trained on | 1 h |",  # 20 lines x 180 s
        "| Target tokens trained on | 800 |",
        "| Time, without validation and saving | 1 min 20 s |",  # 40 steps at 0.5 per second
        "| Speed | 45 s of audio and 10 tokens per second |",
        "| Last losses | loss 0.125, ctc_loss 2 |",
        "| Bad rows, left out | 3: 2 unreadable, 1 empty transcript |",
        "| Updates left out, not finite | 1 |",
        "| wer | 0.5 (step 20) | 0.375 (step 40) | 0.25 (step 30) | 0.5 (step 20) |",
        "| `lora_r` | 8 |",
        '| `data` | ["a.jsonl"] |',
    ):
        assert line in text.splitlines(), line
    assert "skipped |" not in text and "`learning_rate`" not in text, "no news"
    assert "/home" not in text and "/data" not in text


def test_the_pictures_show_something(run):
    text = report.write_run_report(run).read_text()
    names = re.findall(r"!\[[^\]]+\]\((.+?)\)", text)
    assert names == ["curves/training.png", "curves/validation.png", "curves/mixture.png"]
    for name in names:
        with Image.open(run / name) as image:
            assert min(image.size) > 300
            assert np.asarray(image.convert("L")).std() > 10, "an empty picture"


def test_without_matplotlib_the_tables_come_alone(run, monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    text = report.write_run_report(run).read_text()
    assert "![" not in text and 'pip install "soundwave[train]"' in text and "| Rows trained on | 160 |" in text
    assert not (run / "curves").exists()


def test_a_run_ends_with_its_report_and_a_resumed_one_covers_all_of_it(encoder_folder, llm_folder, tmp_path):
    lines = write_rows(tmp_path / "data").read_text().splitlines()
    (tmp_path / "data" / "spoken.jsonl").write_text("\n".join(line for line in lines if json.loads(line)["audio"]))
    config = StageConfig.for_stage(
        "align",
        output_dir=str(tmp_path / "run"),
        audio_model=encoder_folder,
        text_model=llm_folder,
        model={"audio_padding": "longest"},
        data_root=str(tmp_path / "data"),
        data=["spoken.jsonl"],
        eval_data=["spoken.jsonl"],
        eval_steps=2,
        save_steps=2,
        steps=2,
        global_batch=4,
        per_device_batch=4,
        logging_steps=1,
        device="cpu",
        progress=False,
    )
    run_stage(config)
    first = (tmp_path / "run" / "report.md").read_text()
    config.steps, config.resume = 4, True
    run_stage(config)
    second = (tmp_path / "run" / "report.md").read_text()
    assert "| Rows trained on | 8 |" in first and "| Rows trained on | 16 |" in second
    assert "| Steps | 4 of 4, " in second and re.search(r"\| ctc_wer \| \S+ \(step 2\) \| \S+ \(step 4\) \|", second)
    assert str(tmp_path) not in second
    assert {path.name for path in (tmp_path / "run" / "curves").iterdir()} == {
        "training.png",
        "validation.png",
        "mixture.png",
    }


def test_curves_of_any_length_and_sign(tmp_path):
    drawn = {"none": [], "one": [(1, 2.0)], "nan": [(1, float("nan")), (2, 1.0)], "zero": [(1, 0.0), (2, 0.0)]}
    curves.draw_curves(tmp_path / "curves.png", drawn)
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize("epochs", [1, 40])
def test_a_mixture_of_many_tasks_and_epochs(tmp_path, epochs):
    shares = {f"task_{k}": 1 / 25 for k in range(25)}
    drawn = [{"epoch": k, "temperature": 1 + 5 * k, "shares": shares} for k in range(epochs)]
    curves.draw_mixture(tmp_path / "mixture.png", drawn)
    with Image.open(tmp_path / "mixture.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    colours, areas = np.unique(pixels, axis=0, return_counts=True)
    assert (areas > 300).sum() >= 20, "neighbours in the stack have colours of their own"


def test_reading_curves(tmp_path):
    lines = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 9.0}, {"step": 2, "loss": 1.5}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": lines}))
    for name in ("log.jsonl", "trainer_state.json"):
        assert report.read_curve(tmp_path / name) == [(1, 2.0), (2, 1.5)]


def test_durations():
    assert [report.duration(s) for s in (7.6, 65, 7380)] == ["8 s", "1 min 05 s", "2 h 03 min"]
