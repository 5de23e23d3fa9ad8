"""Two processes against one: the same draws, losses and updates, whoever gets the rows without audio.

One process with four accumulated passes and two with two each, over gloo, started once for all cases.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from soundwave.training.batching import LengthBatches
from soundwave.training.checkpoints import LOG
from soundwave.training.data import load_rows
from soundwave.training.stages import StageConfig
from soundwave.training.train import make_batches, make_sampler
from soundwave.training.validation import share_of
from tests.training_rows import write_rows

ROOT = Path(__file__).parents[1]
TASKS = ("asr", "sound", "text_qa")
BY_SECONDS = {"max_seconds_per_batch": 6.0, "spec_augment": False}  # masks go by micro-batch, whose number may differ
STREAM = {"streaming": True, "stream_rows": {"asr": 8, "sound": 2, "text_qa": 4}}
VALIDATED = {"eval_data": ["odd.jsonl"], "eval_steps": 2}  # two processes do not share it evenly
CASES = {
    "align": {"stage": "align", **VALIDATED},
    "shrink": {"stage": "shrink", **VALIDATED},
    "instruct": {"stage": "instruct"},
    "align-seconds": {"stage": "align", **BY_SECONDS},
    "shrink-seconds": {"stage": "shrink", **BY_SECONDS},
    "instruct-stream": {"stage": "instruct", **STREAM},
}
SCRIPT = """
    import json, sys
    import torch
    from soundwave.training import train
    from soundwave.training.stages import StageConfig

    build = train.build_model
    def without_dropout(*arguments, **settings):
        model, processor = build(*arguments, **settings)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        return model, processor
    train.build_model = without_dropout
    for name, settings in json.load(open(sys.argv[1])).items():
        train.run_stage(StageConfig.for_stage(settings.pop("stage"), output_dir=sys.argv[2] + name, **settings))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def cases(tmp_path_factory, encoder_folder, llm_folder) -> dict[str, dict]:
    """The cases over 14 rows: recordings of 0.2 to 3 s (the last of them silent), and four without audio."""
    folder = tmp_path_factory.mktemp("rows")
    lines = [json.loads(line) for line in write_rows(folder).read_text().splitlines()]
    for k, row in enumerate(lines):
        row["duration_s"] = 0.2 + 2.8 * k / 9 if row["audio"] else None
    for name in (*TASKS, "spoken", "all"):
        chosen = [row for row in lines if name in ("all", row["task"]) or (name == "spoken" and row["audio"])]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    spoken, written = ([row for row in lines if bool(row["audio"]) == heard] for heard in (True, False))
    (folder / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in spoken[:5] + written[:2]))
    common = {
        "audio_model": encoder_folder,
        "text_model": llm_folder,
        "model": {"audio_padding": "longest"},
        "data_root": str(folder),
        "global_batch": 4,
        "per_device_batch": 1,
        "steps": 4,
        "warmup_steps": 0,
        "learning_rate": 1e-2,
        "adam_epsilon": 1.0,  # so that updates go by the gradient's size, not only its sign
        "logging_steps": 1,
        "lora_r": 4,
        "device": "cpu",
        "progress": False,
    }
    sources = {"align": ["spoken"], "shrink": ["all"], "instruct": ["all"], "instruct-stream": TASKS}
    return {
        name: common | case | {"data": [f"{source}.jsonl" for source in sources.get(name, sources[case["stage"]])]}
        for name, case in CASES.items()
    }


@pytest.fixture(scope="module")
def results(cases, tmp_path_factory) -> tuple[Path, Path]:
    """Folders with the results of all cases by one process and by two."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "script.py").write_text(textwrap.dedent(SCRIPT))
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name, launcher in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]),
    ):
        command = [sys.executable, *launcher, "script.py", "cases.json", f"{name}/"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder / "one", folder / "two"


@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_the_updates_of_one(results, case):
    logs = [[json.loads(line) for line in open(folder / case / LOG)] for folder in results]
    steps = [[entry for entry in log if "loss" in entry] for log in logs]
    assert len(steps[0]) == len(steps[1]) == 4
    for one, two in zip(*steps, strict=True):
        losses = {"loss", "ce_loss", "ctc_loss"} & one.keys()
        assert losses == {"loss", "ce_loss", "ctc_loss"} & two.keys()
        for name in losses:
            assert one[name] == pytest.approx(two[name], rel=1e-6, abs=1e-6), name
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
    drawn = [
        [
            {k: v for k, v in entry.items() if k.startswith(("draws/", "shares/", "temperature"))}
            for entry in log
            if "temperature" in entry
        ]
        for log in logs
    ]
    assert drawn[0] == drawn[1] and drawn[0]
    alone, together = (load_file(folder / case / "model.safetensors") for folder in results)
    assert max(float((alone[name] - together[name]).abs().max()) for name in alone) < 1e-6


@pytest.mark.parametrize("case", ["align", "shrink"])
def test_two_processes_validate_as_one_does(results, case):
    """No row counts twice, where two processes do not share them evenly."""
    logs = [[json.loads(line) for line in open(folder / case / LOG)] for folder in results]
    one, two = ([entry for entry in log if "eval_loss" in entry] for log in logs)
    assert len(one) == len(two) == 2
    for alone, together in zip(one, two, strict=True):
        names = {name for name in alone if name.startswith("eval_") and not name.endswith(("runtime", "_per_second"))}
        assert {"eval_ctc_loss", "eval_compression_ratio", "eval_skipped"} <= names <= together.keys()
        for name in names:
            assert alone[name] == pytest.approx(together[name], rel=1e-6, abs=1e-6), name


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 6))
def test_every_row_is_validated_once(n_rows, batch_size, world_size):
    shares = [share_of(n_rows, batch_size, rank, world_size) for rank in range(world_size)]
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(n_rows))
    assert len({len(share) for share in shares}) == 1, "a device without a batch would leave the others waiting"
    assert all(len(batch) <= batch_size for share in shares for batch in share)


def test_one_of_two_processes_gets_a_pass_without_audio(cases):
    """What the cases must hold for the test above to show anything: text beside speech in the same pass."""
    config = StageConfig.for_stage(**cases["shrink"])
    rows = load_rows(config.data, config.data_root)
    spoken = [row["audio"] is not None for row in rows]
    order = make_sampler(config, rows).order(0)[: config.global_batch * config.steps]
    passes = [(spoken[a], spoken[b]) for a, b in order.reshape(-1, 2)]
    assert (True, False) in passes and (False, True) in passes and (True, True) in passes
    config = StageConfig.for_stage(**cases["shrink-seconds"])
    batches = make_batches(config, rows, make_sampler(config, rows), devices=2)
    assert isinstance(batches, LengthBatches)
    heard = [any(spoken[row] for row in batch) for batch in batches]
    assert any(a != b for a, b in zip(heard[::2], heard[1::2], strict=True))


def test_a_model_cut_over_two_processes_learns_as_the_whole_one(tmp_path):
    """FSDP2 by the launch file: losses, gradients, updates and the saved result of all stages (`sharding.py`)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-m", "tests.sharding", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name for path in tmp_path.iterdir()} == {"align", "shrink", "instruct", "tied"}
