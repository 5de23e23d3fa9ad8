"""The training benchmarks at toy shapes: both sides of a comparison compute the same, and figures add up."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Imports a script as it sees itself: its neighbours are modules of their own."""
    monkeypatch.syspath_prepend(SCRIPTS)
    before = set(sys.modules)

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"{name}_benchmark", SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or ".").parent == SCRIPTS:
            del sys.modules[name]


@pytest.fixture
def shape(script):
    contenders = script("contenders")
    return contenders.Shape(2, 32, 2, 2, 64, 4, 2, 128, 300)


def test_both_ctc_losses_are_the_same(script):
    ctc_loss = script("ctc_loss")
    naive, ours = (ctc_loss.Step(name, 2, 16, 40, frames=20) for name in (ctc_loss.NAIVE, ctc_loss.OURS))
    torch.testing.assert_close(ours(), naive())
    torch.testing.assert_close(ours.hidden.grad, naive.hidden.grad)
    torch.testing.assert_close(ours.log_scale.grad, naive.log_scale.grad)
    assert ours.blank.grad.norm() > 0 and naive.matrix.grad is None


def test_both_cross_entropies_are_the_same(script, shape):
    cross_entropy = script("cross_entropy")
    case = "question about 30 s"
    ways = (cross_entropy.LABELLED, cross_entropy.ALL)
    ours, naive = (cross_entropy.Step(way, case, 2, shape=shape) for way in ways)
    naive.model = ours.model
    torch.testing.assert_close(ours(), naive())
    gradient = ours.inputs["audio_embeds"].grad
    naive()
    assert gradient.norm() > 0
    torch.testing.assert_close(naive.inputs["audio_embeds"].grad, gradient)


def test_ways_of_padding_hold_the_same_rows(script):
    padding = script("padding")
    tasks, seconds = padding.rows_like({"asr": [(4000, 10.0)], "sound": [(800, 1.0)]})
    assert len(tasks) == len(seconds) == 480 and seconds.max() <= 30
    taken = {way: padding.micro_batches(way, tasks, seconds, 8, 32, 2, 4) for way in padding.WAYS}
    for batches in taken.values():
        assert sorted(np.concatenate(batches)) == list(range(480))
    figures = padding.shares(tasks, seconds, at_once=8, global_batch=32, devices=2)["ways"]
    share = {way: figures[way]["padding_share"] for way in padding.WAYS}
    assert share[padding.FULL_WINDOWS] == pytest.approx(1 - seconds.mean() / 30)
    assert max(share[padding.BUCKETED], share[padding.BY_SECONDS]) < share[padding.DRAWN] < share[padding.FULL_WINDOWS]
    assert figures[padding.DRAWN]["passes_per_update"] == 2


def test_padding_is_timed_for_every_way(script, shape):
    padding = script("padding")
    times = padding.times(np.linspace(0.5, 2.0, 40), repeats=1, at_once=2, updates=2, accumulated=2, shape=shape)
    assert set(times["seconds_per_update"]) == set(padding.WAYS) and min(times["seconds_per_update"].values()) > 0
    assert times["ratio"][padding.DRAWN] == 1


def test_trainers_run_every_contender(script, shape):
    training = script("training")

    def run(name, checkpointing=False):
        return training.run(name, shape, "cpu", 2, 2, 2.0, 1, checkpointing)

    runs = {name: [run(name)] for name in training.CONTENDERS}
    assert all(len(parts[0]["seconds"]) == 1 for parts in runs.values())
    figures = training.summary(runs, audio_s=8.0, rate=1e9)
    assert figures[training.BASELINE]["times_faster_than_llm_on_all_frames"] == 1
    work = {name: figure["tflops_per_step"] for name, figure in figures.items()}
    assert work["stage I"] < work["stage III"] < work["stage II"]
    again = run("stage II", checkpointing=True)
    assert again["flops"] == runs["stage II"][0]["flops"]  # what is computed twice counts once
