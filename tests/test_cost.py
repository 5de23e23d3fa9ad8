"""GPU hours and energy: what the log and a meter say, and nothing else."""

import json

import pytest

from soundwave.model_card.cost import training_cost
from soundwave.model_card.facts import CardFacts


@pytest.fixture
def cost_of(tmp_path):
    def cost_of(*lines, **facts):
        (tmp_path / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return dict(training_cost(tmp_path, CardFacts(**facts)))

    return cost_of


def test_hours_of_each_kind_of_device(cost_of):
    """Ten steps at 1/360 a second are an hour; the run went on with other devices after the first."""
    cost = cost_of(
        {"accelerator": "NVIDIA H100", "devices": 8, "step": 0},
        {"loss": 2.0, "steps_per_second": 1 / 360, "audio_seconds": 3600.0, "step": 10},
        {"accelerator": "CPU", "devices": 2, "step": 10},
        {"eval_loss": 2.0, "step": 10},
        {"loss": 1.0, "steps_per_second": 1 / 180, "audio_seconds": 5400.0, "step": 20},
    )
    assert cost == {
        "training time, without validation and saving": "1 h 30 min",
        "GPU hours, NVIDIA H100": "8",
        "processor hours": "1",
        "audio trained on, repeats included": "2.5 h",
        "energy": "not measured",
    }


def test_what_was_not_measured_is_said(cost_of, tmp_path):
    assert dict(training_cost(tmp_path, CardFacts())) == {"training time": "not measured", "energy": "not measured"}
    no_device = cost_of({"steps_per_second": 0.5, "step": 30})
    assert no_device["GPU hours"] == "not known for 1 min 00 s of it: the log names no device"
    old = cost_of({"train_runtime": 61.0, "step": 30})
    assert old["training time of the last part of the run, validation and saving included"] == "1 min 01 s"


def test_energy_names_its_meter(cost_of):
    assert (
        cost_of(energy_kwh=12.5, energy_meter="the rack's meter")["energy"] == "12.5 kWh, read from the rack's meter"
    )
