"""Streamed sources: the rows of whole ones, shares of eq. 2, errors where they stand, and runs that resume exactly."""

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from soundwave.training.checkpoints import LOG
from soundwave.training.data import DataError, load_rows, recordings, transcripts
from soundwave.training.mixture import task_probabilities
from soundwave.training.stages import ConfigError, StageConfig
from soundwave.training.streaming import FEATURES, StreamedMixture, checked_rows
from soundwave.training.train import run_stage
from tests.training_rows import write_rows

TASKS = ("asr", "sound", "text_qa")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One file per task, and the recordings beside them."""
    folder = tmp_path_factory.mktemp("rows")
    lines = write_rows(folder).read_text().splitlines()
    for task in TASKS:
        (folder / f"{task}.jsonl").write_text(
            "".join(f"{line}\n" for line in lines if json.loads(line)["task"] == task)
        )
    return folder


def files(folder, tasks=TASKS) -> list[str]:
    return [str(folder / f"{task}.jsonl") for task in tasks]


def ids(mixture: StreamedMixture, count: int) -> list[str]:
    return [row["id"] for row in itertools.islice(mixture.dataset(), count)]


def test_a_stream_has_the_rows_of_the_whole_source(folder, tmp_path):
    path = folder / "rows.jsonl"
    whole = load_rows(path)
    whole.to_parquet(str(tmp_path / "rows.parquet"))
    whole.save_to_disk(str(tmp_path / "saved"))
    passed = IterableDataset.from_generator(lambda: iter(list(whole)))
    for source in (path, tmp_path / "rows.parquet", tmp_path / "saved", whole, passed):
        streamed, expected = list(checked_rows(source)), load_rows(str(source) if isinstance(source, Path) else whole)
        assert len(streamed) == len(whole)
        for row, other in zip(streamed, expected, strict=True):
            assert row.keys() == other.keys() == FEATURES.keys()
            assert recordings(row) == recordings(other) and transcripts(row) == transcripts(other)
            same = set(row) - {"audio", "transcript"}
            assert {name: row[name] for name in same} == {name: other[name] for name in same}


def test_relative_paths_start_from_the_file_or_the_root(tmp_path):
    row = {"id": "a", "task": "asr", "answer": "yes", "audio": "clip.wav"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    expected = str(tmp_path / "clip.wav")
    for source, root in ((tmp_path / "rows.jsonl", ""), (Dataset.from_list([row]), tmp_path)):
        assert next(checked_rows(source, root))["audio"] == [{"path": expected, "bytes": None}]


def test_a_folder_is_its_files(folder, tmp_path):
    for name in files(folder):
        shutil.copy(name, tmp_path)
    mixture = StreamedMixture(str(tmp_path), weights=dict.fromkeys(TASKS, 1))
    assert list(mixture.streams) == list(TASKS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no .jsonl"):
        StreamedMixture(str(tmp_path / "empty"), weights={"asr": 1})


def source(task: str, count: int) -> Dataset:
    return Dataset.from_list([{"id": f"{task}{k}", "task": task, "answer": "yes"} for k in range(count)])


def test_shares_are_those_of_the_equation_and_move_with_each_pass():
    sizes = {"asr": 40, "st": 10}
    mixture = StreamedMixture(
        [source(task, size) for task, size in sizes.items()], seed=3, sizes=sizes, temperature_step=5.0
    )
    assert mixture.probabilities(0) == pytest.approx({"asr": 0.8, "st": 0.2})
    assert mixture.probabilities(2) == pytest.approx(task_probabilities(sizes, 11.0))
    drawn = ids(mixture, 600)
    # A pass is over when each source came to its end once; each is read in its own order, and again from its start.
    asr = [int(name[3:]) for name in drawn if name.startswith("asr")]
    assert asr[:40] == list(range(40)) and set(Counter(drawn)) == {
        f"{t}{k}" for t, n in sizes.items() for k in range(n)
    }
    assert abs(len(asr[:40]) / (drawn.index("asr39") + 1) - 0.8) < 0.15
    late = Counter(name.rstrip("0123456789") for name in drawn[300:])
    assert late["asr"] < 0.7 * 300  # T = 11 and more: close to equal shares
    assert (
        drawn
        == ids(mixture, 600)
        != ids(StreamedMixture([source("asr", 40), source("st", 10)], seed=4, sizes=sizes), 600)
    )


def test_sources_of_one_task_follow_each_other_and_one_without_share_stays_out():
    parts = [source("asr", 3), source("st", 5), Dataset.from_list([{"id": "more", "task": "asr", "answer": "no"}])]
    mixture = StreamedMixture(parts, weights={"asr": 2, "st": 0})
    assert ids(mixture, 6) == ["asr0", "asr1", "asr2", "more", "asr0", "asr1"]


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 1])
def test_every_update_has_the_same_draws_on_any_number_of_devices(devices, workers):
    """`accelerate` itself deals the rows out: a batch for each device in turn."""
    sizes = {"asr": 9, "st": 4}
    mixture = StreamedMixture([source(*part) for part in sizes.items()], sizes=sizes)
    expected = ids(mixture, 24)
    dealt = []
    for rank in range(devices):
        loader = DataLoader(
            mixture.dataset(),
            batch_size=8 // devices,
            collate_fn=lambda rows: [row["id"] for row in rows],
            num_workers=workers,
        )
        shard = prepare_data_loader(
            loader, num_processes=devices, process_index=rank, put_on_device=False, dispatch_batches=False
        )
        dealt.append(list(itertools.islice(shard, 3)))
    for update in range(3):
        rows = [name for batches in dealt for name in batches[update]]
        assert rows == expected[8 * update : 8 * update + 8]


def test_draws_that_were_seen_are_passed_by():
    mixture = StreamedMixture([source("asr", 9), source("st", 4)], weights={"asr": 1, "st": 1})
    whole, rows = ids(mixture, 40), mixture.dataset()
    mixture.first_draw = 25  # set when training begins, after the trainer has got its rows
    assert [row["id"] for row in itertools.islice(rows, 15)] == whole[25:]


def test_what_is_wrong_with_a_source_is_said(folder, tmp_path):
    one = {"weights": {"asr": 1}}
    late = tmp_path / "late.jsonl"
    good = json.dumps({"task": "asr", "answer": "yes"}) + "\n"
    late.write_text(good * 3 + '{"task": "asr", "answer": 5}\n')
    with pytest.raises(DataError, match=r"late.jsonl, line 4, field 'answer': 5, expected text"):
        ids(StreamedMixture(str(late), **one), 9)
    late.write_text(good * 2 + '{"task": "asr"')
    with pytest.raises(DataError, match=r"late.jsonl, line 3: not JSON"):
        ids(StreamedMixture(str(late), **one), 9)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="empty.jsonl holds no rows"):
        StreamedMixture("empty.jsonl", tmp_path, **one)
    for missing in ("no.jsonl", "no", "a/b/c"):
        with pytest.raises(DataError, match="does not exist or is of another kind"):
            StreamedMixture(missing, tmp_path, **one)
    with pytest.raises(DataError, match="'sound', but the source began with 'asr'.*split it, or read it whole"):
        ids(StreamedMixture(str(folder / "rows.jsonl"), **one), 9)
    with pytest.raises(ConfigError, match="stream_rows is {'asr': 5}, but the sources hold the tasks asr, sound"):
        StreamedMixture(files(folder, ("asr", "sound")), sizes={"asr": 5})


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "the size of a stream is not known"),
        ({"stream_rows": {"asr": 5}, "task_weights": {"asr": 1}}, "give one of them"),
        ({"stream_rows": {"asr": 5}, "bucket_batches": 2}, "so is bucket_batches"),
        ({"stream_rows": {"asr": 5}, "max_seconds_per_batch": 9}, "so is max_seconds_per_batch"),
        ({"stream_rows": {"asr": 5}, "encoder_cache": "cache", "spec_augment": False}, "so is encoder_cache"),
        ({"stream_rows": {"asr": 5}, "draws_per_epoch": 5}, "so is draws_per_epoch"),
        ({"stream_rows": {"asr": 5}, "dataloader_workers": 2}, "set 0 or 1"),
        ({"streaming": False, "stream_rows": {"asr": 5}}, "only streaming=true reads"),
    ],
)
def test_settings_that_a_stream_excludes(settings, named):
    with pytest.raises(ConfigError, match=named):
        StageConfig.for_stage("shrink", **({"streaming": True} | settings))


@pytest.mark.parametrize("stage", ["align", "shrink", "instruct"])
def test_a_resumed_streamed_run_ends_with_the_same_bits(folder, tmp_path, encoder_folder, llm_folder, stage):
    """Cut short inside a pass; dropout, masks and optimizer go on too."""
    tasks = ("asr", "sound") if stage == "align" else TASKS
    config = StageConfig.for_stage(
        stage,
        output_dir=str(tmp_path / "whole"),
        audio_model=encoder_folder,
        text_model=llm_folder,
        model={"audio_padding": "longest"},
        data=files(folder, tasks),
        streaming=True,
        stream_rows=dict.fromkeys(tasks, 5),
        global_batch=4,
        per_device_batch=2,
        steps=5,
        save_steps=3,
        warmup_steps=0,
        learning_rate=1e-2,
        logging_steps=1,
        lora_r=4,
        resume=True,
        device="cpu",
        progress=False,
    )
    run_stage(config)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    config.output_dir = str(tmp_path / "cut")
    run_stage(config)
    cut = load_file(tmp_path / "cut" / "model.safetensors")
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    logs = [[json.loads(line) for line in open(tmp_path / name / LOG)] for name in ("whole", "cut")]
    steps = [[(e["step"], e["epoch"], e["loss"]) for e in log if "loss" in e] for log in logs]
    assert steps[0] == steps[1] and [entry[0] for entry in steps[0]] == [1, 2, 3, 4, 5]
    first = next(entry for entry in logs[0] if "temperature" in entry)
    assert first["shares/asr"] == pytest.approx(1 / len(tasks)) and first["temperature"] == 1.0
