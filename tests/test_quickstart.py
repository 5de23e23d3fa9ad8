"""The main job at smoke size, from nothing to three repositories on a Hub: every part runs, no figure is looked at."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from soundwave.apps.quickstart import CONFIGS, output_folder
from soundwave.training.stages import load_config
from tests.local_hub import LocalHub


def quickstart(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "soundwave.apps.cli", "quickstart", "--smoke", "--quiet", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], **options)


def test_from_nothing_to_a_hub(tmp_path):
    output = tmp_path / "run"
    with LocalHub(tmp_path / "hub") as hub:
        done = quickstart("--output", str(output), "--push", "me", env=os.environ | hub.environment())
        assert done.returncode == 0, done.stderr
        for stage in ("align", "shrink", "instruct"):
            names = set(hub.listing(f"me/soundwave-tiny-{stage}")[1])
            assert {"README.md", "config.json", "model.safetensors", "speech_soundwave.py", "results.json"} <= names
            assert not any(name.startswith(("checkpoint", "optimizer")) for name in names)
    report = (output / "report.md").read_text(encoding="utf-8")
    for part in (
        "espeak-ng",
        "Stage 0a",
        "Stage III",
        "Asked in a fresh process",
        "learning_curves.png",
        "utterance.png",
    ):
        assert part in report
    assert (output / "learning_curves.png").stat().st_size > 10_000
    assert (output / "utterance.png").stat().st_size > 10_000
    assert list((output / "samples").glob("*.wav"))
    names = {entry["name"] for entry in json.loads((output / "instruct" / "results.json").read_text())["results"]}
    assert {"asr_seen", "asr_unseen", "asr_accent", "st_seen", "sound", "intent", "spoken_qa", "text_qa"} <= names
    assert "fresh process was asked" in done.stdout
    assert str(tmp_path) not in (output / "instruct" / "config.json").read_text()
    assert str(tmp_path) not in (output / "instruct" / "README.md").read_text(encoding="utf-8")


def test_on_recordings(tmp_path, shared_data):
    done = quickstart("--output", str(tmp_path / "run"), "--recordings", str(shared_data / "manifest.jsonl"))
    assert done.returncode == 0, done.stderr
    assert "CC BY" in (tmp_path / "run" / "instruct" / "README.md").read_text(encoding="utf-8")


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    done = quickstart("--output", str(tmp_path))
    assert done.returncode == 1
    assert "exists and is not empty" in done.stderr and len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert "no such manifest" in quickstart("--recordings", str(tmp_path / "none.jsonl")).stderr


def test_the_default_folder_is_a_free_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert output_folder(None) == Path("runs/quickstart")
    assert output_folder(None) == Path("runs/quickstart-2")


@pytest.mark.parametrize("stage", ["align", "shrink", "instruct"])
def test_settings_of_the_stages_are_read(stage):
    config = load_config(CONFIGS / f"{stage}.yaml", [], stage)
    assert config.steps > 0 and config.data
