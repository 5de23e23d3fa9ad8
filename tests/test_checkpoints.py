"""Which checkpoints count, and whether a run may go on from them."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from soundwave.training.checkpoints import (
    MANIFEST,
    IncompleteError,
    check_settings,
    deciding_settings,
    is_finished,
    last_complete_checkpoint,
    mark_complete,
    read_manifest,
)
from soundwave.training.data import load_rows
from soundwave.training.stages import ConfigError, StageConfig
from tests.training_rows import write_rows

SAVED = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def write_checkpoint(folder: Path, step: int, **settings: Any) -> Path:
    """A folder with the files of a checkpoint, marked as complete."""
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "sharded").mkdir(parents=True)
    for name in (*SAVED, "sharded/part.distcp"):
        (checkpoint / name).write_text(name * 9)
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    mark_complete(checkpoint, files, step=step, stopped_early=False, settings=settings)
    return checkpoint


@pytest.mark.parametrize(
    "name",
    [MANIFEST, "model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "sharded/part.distcp"],
)
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated"])
def test_a_damaged_checkpoint_does_not_count(tmp_path, caplog, name, damage):
    for step in (9, 12, 111):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-111"
    file = tmp_path / "checkpoint-111" / name
    file.unlink() if damage == "missing" else os.truncate(file, {"empty": 0, "truncated": 20}[damage])
    with pytest.raises(IncompleteError, match="cut short" if name == MANIFEST else f"{name} (is missing|has)"):
        read_manifest(tmp_path / "checkpoint-111")
    assert last_complete_checkpoint(tmp_path).name == "checkpoint-12"
    assert "checkpoint-111" in caplog.text and "going on from checkpoint-12" in caplog.text


def test_a_run_begins_anew_only_if_its_first_checkpoint_was_cut_short(tmp_path, caplog):
    assert last_complete_checkpoint(tmp_path) is None
    first = write_checkpoint(tmp_path, 3)
    (first / MANIFEST).unlink()
    assert last_complete_checkpoint(tmp_path) is None
    assert "the first of the run, which begins anew" in caplog.text
    (write_checkpoint(tmp_path, 6) / "optimizer.pt").unlink()
    with pytest.raises(ConfigError, match="none of the 2 checkpoints .* optimizer.pt is missing.* Put back"):
        last_complete_checkpoint(tmp_path)
    shutil.rmtree(first)
    with pytest.raises(ConfigError, match="none of the 1 checkpoints"):
        last_complete_checkpoint(tmp_path)


def test_a_result_without_checkpoints_is_not_begun_anew(tmp_path):
    """More steps cannot go on from it, and starting over would put another result in its place."""
    (tmp_path / "model.safetensors").write_text("weights")
    mark_complete(tmp_path, [tmp_path / "model.safetensors"], step=9, stopped_early=False, settings={})
    assert is_finished(tmp_path, {}, steps=9)
    with pytest.raises(ConfigError, match="result of 9 steps and no checkpoint to go on from; .* start="):
        is_finished(tmp_path, {}, steps=12)
    write_checkpoint(tmp_path, 6)
    assert not is_finished(tmp_path, {}, steps=12)


def test_a_best_figure_belongs_to_its_metric_and_rows(tmp_path):
    write_rows(tmp_path)
    kept = {"data": ["rows.jsonl"], "eval_data": ["rows.jsonl"], "eval_steps": 2, "save_steps": 2}

    def deciding(**changed: Any) -> dict[str, Any]:
        return deciding_settings(StageConfig.for_stage("shrink", **kept | changed), None)

    assert deciding() == deciding(eval_data=["other.jsonl"], eval_generate_rows=3)  # nothing is chosen by them
    best = deciding(best_metric="eval_loss")
    assert best != deciding(best_metric="eval_ce_loss")
    assert best != deciding(best_metric="eval_loss", eval_data=["other.jsonl"])
    assert best != deciding(best_metric="eval_loss", early_stopping_patience=2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"global_batch": 8}, "global_batch was 4 and is 8"),
        ({"trains": ["lora"]}, "trains was .*shrinking_adapter.* and is "),
        ({"learning_rate": 0.5, "spec_augment": False}, "learning_rate was 0.01 and is 0.5; spec_augment was True"),
        ({"data": ["spoken.jsonl"]}, r"data was 'rows.jsonl \(14 rows, .*' and is 'spoken.jsonl \(10 rows"),
        ({"data_root": "other"}, r"data was 'rows.jsonl \(14 rows, .*' and is 'rows.jsonl \(14 rows, "),
        ({"steps": 2}, "steps is 2, but .*checkpoint-3 has done 3 already"),
    ],
)
def test_changed_settings_are_named(tmp_path, changed, message):
    write_rows(tmp_path / "data")
    rows = (tmp_path / "data" / "rows.jsonl").read_text()
    (tmp_path / "data" / "spoken.jsonl").write_text("\n".join(rows.splitlines()[:10]))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "rows.jsonl").write_text(rows.replace('"t0"', '"another"').replace('"clip', '"../data/clip'))

    def deciding(**changed: Any) -> tuple[dict, int]:
        before = {"data_root": "data", "data": ["rows.jsonl"], "global_batch": 4, "learning_rate": 0.01, "steps": 12}
        config = StageConfig.for_stage("shrink", **before | changed)
        return deciding_settings(config, load_rows(config.data, str(tmp_path / config.data_root))), config.steps

    checkpoint = write_checkpoint(tmp_path, 3, **deciding()[0])
    with pytest.raises(ConfigError, match=message):
        check_settings(checkpoint, *deciding(**changed))
    moved = {
        "output_dir": "elsewhere",
        "per_device_batch": 1,
        "steps": 20,
        "save_steps": 5,
        "eval_data": ["rows.jsonl"],
        "eval_steps": 5,
    }
    assert check_settings(checkpoint, *deciding(**moved))["step"] == 3
