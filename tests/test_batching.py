"""Micro-batches by seconds: bounds, draws that stay what they are, and padding saved."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from soundwave.training.batching import (
    SHORTEST_S,
    LengthBatches,
    micro_batches_needed,
    padding_share,
    row_seconds,
    split_by_length,
)
from soundwave.training.checkpoints import LOG
from soundwave.training.data import load_rows
from soundwave.training.mixture import MixtureSampler
from soundwave.training.stages import ConfigError, StageConfig
from soundwave.training.train import make_batches, make_sampler, run_stage
from tests.training_rows import write_rows

lengths = st.lists(st.floats(0, 40), min_size=1, max_size=60).map(np.array)


def padded(seconds: np.ndarray, rows) -> float:
    return len(rows) * max(SHORTEST_S, seconds[rows].max())


@given(lengths, st.data())
def test_a_split_holds_every_row_once_in_as_many_parts_as_asked(seconds, data):
    n_batches = data.draw(st.integers(1, len(seconds)))
    parts = split_by_length(seconds, n_batches)
    assert len(parts) == n_batches and all(len(part) for part in parts)
    assert sorted(np.concatenate(parts)) == list(range(len(seconds)))
    longest = [seconds[part].max() for part in parts]
    assert longest == sorted(longest, reverse=True)
    assert all(a.min() >= b.max() for a, b in itertools.pairwise(seconds[part] for part in parts))


@given(lengths, st.floats(1, 200))
def test_the_bound_holds_but_for_single_rows(seconds, bound):
    needed = micro_batches_needed(seconds, bound)
    parts = split_by_length(seconds, needed)
    assert all(len(part) == 1 or padded(seconds, part) <= bound * (1 + 1e-5) for part in parts)
    if needed > 1:  # with one less, it cannot hold: each of any that few would have to hold more
        fewer = split_by_length(seconds, needed - 1)
        assert max(padded(seconds, part) for part in fewer) > bound


@given(st.lists(st.floats(0.1, 9), min_size=1, max_size=7).map(np.array), st.data())
def test_no_other_split_into_runs_of_similar_length_has_a_smaller_largest(seconds, data):
    n_batches = data.draw(st.integers(1, len(seconds)))
    ordered = -np.sort(-seconds)

    def best(start: int, parts: int) -> float:
        if parts == 1:
            return padded(ordered, np.arange(start, len(ordered)))
        ends = range(start + 1, len(ordered) - parts + 2)
        return min(max(padded(ordered, np.arange(start, end)), best(end, parts - 1)) for end in ends)

    largest = max(padded(seconds, part) for part in split_by_length(seconds, n_batches))
    assert largest == pytest.approx(best(0, n_batches), rel=1e-5)


def mixture(batch: int, rows: int = 90, seed: int = 1) -> tuple[MixtureSampler, np.ndarray]:
    rng = np.random.default_rng(seed)
    seconds = np.where(np.arange(rows) % 5 == 0, 0.0, rng.lognormal(1.5, 0.8, rows).clip(0.4, 30))
    tasks = ["text" if second == 0 else "asr" for second in seconds]
    return MixtureSampler(tasks, seed, draws_per_epoch=60, temperature_step=5, multiple_of=batch), seconds


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_every_update_has_its_own_draws_on_any_number_of_devices(devices):
    """`accelerate` itself deals the micro-batches out: as many for each device, within the bound, none lost."""
    sampler, seconds = mixture(batch=12)
    batches = LengthBatches(sampler, seconds, max_seconds=30, devices=devices, steps=15)
    assert len(batches) % devices == 0
    for epoch in (0, 2):
        batches.set_epoch(epoch)
        shards = [
            list(BatchSamplerShard(batches, num_processes=devices, process_index=rank)) for rank in range(devices)
        ]
        assert {len(shard) for shard in shards} == {len(batches) // devices} == {5 * batches.passes}
        expected = sampler.order(epoch).reshape(-1, 12)
        for update, rows in enumerate(expected):
            parts = [shard[update * batches.passes : (update + 1) * batches.passes] for shard in shards]
            dealt = [row for part in parts for batch in part for row in batch]
            assert sorted(dealt) == sorted(rows)
            assert all(len(b) == 1 or padded(seconds, np.array(b)) <= 30 * 1.00001 for part in parts for b in part)


def test_the_passes_are_those_of_the_fullest_update_of_the_run():
    sampler, seconds = mixture(batch=12)
    needed = [
        micro_batches_needed(seconds[rows], 30) for epoch in (0, 1) for rows in sampler.order(epoch).reshape(-1, 12)
    ]
    assert len(set(needed)) > 1
    for steps in (1, 4, 7, 10):
        assert LengthBatches(sampler, seconds, 30, steps=steps).passes == max(needed[:steps])
        assert LengthBatches(sampler, seconds, 30, devices=2, steps=steps).passes == -(-max(needed[:steps]) // 2)
    assert LengthBatches(sampler, seconds, 1e9, devices=4, steps=10).passes == 1
    assert LengthBatches(sampler, seconds, 0.1, devices=4, steps=10).passes == 3  # a row each
    with pytest.raises(ConfigError, match="global_batch is 12 rows, which 5 devices cannot share"):
        LengthBatches(sampler, seconds, 30, devices=5)


def test_a_resumed_epoch_goes_on_where_it_was_left():
    sampler, seconds = mixture(batch=12)
    batches = LengthBatches(sampler, seconds, 30, steps=10)
    batches.set_epoch(1)
    loader = DataLoader(list(range(len(seconds))), batch_sampler=batches, collate_fn=list)
    whole = list(loader)
    assert list(skip_first_batches(loader, 2 * batches.passes)) == whole[2 * batches.passes :]


def test_padding_is_a_fraction_of_what_rows_in_drawn_order_need():
    sampler, seconds = mixture(batch=30)
    batches = LengthBatches(sampler, seconds, 60, steps=2)
    drawn = padding_share(sampler.order(0).reshape(-1, 6), seconds)
    assert batches.padding_share(0) < 0.5 * drawn
    assert padding_share([[0, 1], [2]], [4.0, 2.0, 8.0]) == pytest.approx(2 / 16)
    assert padding_share([[0, 1]], [0.0, 0.0]) == padding_share([[0, 1]], [0.0, 3.0]) == 0.0  # text is not padded


def test_lengths_of_rows(tmp_path):
    rows = load_rows(write_rows(tmp_path / "rows"))
    with pytest.raises(ConfigError, match="10 of 14 rows have audio of unknown length; give them their `duration_s`"):
        row_seconds(rows)
    timed = rows.remove_columns("duration_s").add_column("duration_s", [k / 2 + 0.5 for k in range(14)])
    picked = timed.select([3, 13, 0])
    assert row_seconds(picked).tolist() == [2.0, 0.0, 0.5]  # the last has no audio
    config = StageConfig.for_stage("shrink", global_batch=6, steps=3, max_seconds_per_batch=8.0)
    batches = make_batches(config, timed, make_sampler(config, timed), devices=2)
    assert len(batches) == 3 * batches.passes * 2
    with pytest.raises(ConfigError, match="every recording fills whole windows.*audio_padding=longest"):
        make_batches(config, timed, make_sampler(config, timed), audio_padding="max_length")
    assert make_batches(StageConfig.for_stage("shrink"), timed, make_sampler(config, timed)) is None


def test_settings_that_contradict_the_bound():
    for settings, named in (
        ({"max_seconds_per_batch": 0}, "expected seconds above 0"),
        ({"max_seconds_per_batch": 9, "bucket_batches": 2}, "set one of them"),
    ):
        with pytest.raises(ConfigError, match=named):
            StageConfig.for_stage("shrink", **settings)
    # Rows per device do not count, so they need not fit the global batch.
    config = StageConfig.for_stage("shrink", global_batch=12, per_device_batch=32, max_seconds_per_batch=9)
    assert config.accumulation(2) == 6  # at most: a row each
    with pytest.raises(ConfigError, match="make global_batch a multiple"):
        config.accumulation(5)


def test_a_run_by_seconds_resumes_inside_an_epoch_with_the_same_bits(tmp_path, encoder_folder, llm_folder):
    path = write_rows(tmp_path / "rows")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for k, row in enumerate(rows):
        row["duration_s"] = 0.2 + 2.8 * k / 9 if row["audio"] else None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = StageConfig.for_stage(
        "shrink",
        output_dir=str(tmp_path / "whole"),
        audio_model=encoder_folder,
        text_model=llm_folder,
        model={"audio_padding": "longest"},
        data=[str(path)],
        max_seconds_per_batch=7.0,
        global_batch=4,
        draws_per_epoch=12,
        steps=7,
        save_steps=4,
        warmup_steps=0,
        learning_rate=1e-2,
        logging_steps=1,
        lora_r=4,
        resume=True,
        device="cpu",
        progress=False,
    )
    run_stage(config)
    log = [json.loads(line) for line in open(tmp_path / "whole" / LOG)]
    epochs = [entry for entry in log if "temperature" in entry]
    assert [entry["temperature"] for entry in epochs] == [1.0, 6.0, 11.0]
    assert all(entry["passes"] > 1 and 0 < entry["padding_share"] < 0.5 for entry in epochs)
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "cut" / "checkpoint-4")
    config.output_dir = str(tmp_path / "cut")
    run_stage(config)
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
