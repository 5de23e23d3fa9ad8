"""Eq. 2 and its sampler: shares, exact counts, and draws that depend on seed and epoch alone."""

import math
from collections import Counter

import numpy as np
import pytest
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from soundwave.training.mixture import MixtureSampler, apportion, task_probabilities
from soundwave.training.stages import ConfigError

sizes = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 40), min_size=1)


def rows_of(task_sizes: dict[str, int]) -> list[str]:
    return [task for task, size in task_sizes.items() for _ in range(size)]


@given(sizes, st.floats(0.5, 100))
def test_probabilities_sum_to_one_and_keep_the_order_of_sizes(task_sizes, temperature):
    shares = task_probabilities(task_sizes, temperature)
    assert math.isclose(sum(shares.values()), 1.0)
    for a in task_sizes:
        for b in task_sizes:
            if task_sizes[a] > task_sizes[b]:
                assert shares[a] > shares[b]


@given(sizes)
def test_temperature_one_is_proportional_and_infinity_uniform(task_sizes):
    total = sum(task_sizes.values())
    for task, share in task_probabilities(task_sizes, 1.0).items():
        assert math.isclose(share, task_sizes[task] / total)
    for share in task_probabilities(task_sizes, 1e9).values():
        assert math.isclose(share, 1 / len(task_sizes), rel_tol=1e-6)


def test_the_papers_table_2():
    # Thousands of rows; equation 2 by hand at T = 6, the second epoch.
    table = {"qa": 78, "asr": 3012, "st": 460, "sound": 25}
    powers = {task: (size / 3575) ** (1 / 6) for task, size in table.items()}
    expected = {task: power / sum(powers.values()) for task, power in powers.items()}
    assert task_probabilities(table, 6.0) == pytest.approx(expected)


@given(sizes, st.floats(0.5, 20), st.integers(0, 500))
def test_counts_are_whole_and_within_one_of_their_share(task_sizes, temperature, draws):
    shares = task_probabilities(task_sizes, temperature)
    counts = apportion(shares, draws)
    assert sum(counts.values()) == draws
    assert all(abs(counts[task] - shares[task] * draws) < 1 for task in counts)


@given(sizes, st.integers(0, 5), st.integers(1, 120), st.integers(0, 3), st.sampled_from([1, 4, 7]))
def test_an_epoch_draws_what_its_plan_says(task_sizes, seed, draws, epoch, multiple):
    tasks = rows_of(task_sizes)
    sampler = MixtureSampler(tasks, seed, draws, temperature_step=2.0, multiple_of=multiple)
    sampler.set_epoch(epoch)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == -(-draws // multiple) * multiple
    plan = sampler.plan(epoch)
    assert plan.temperature == 1 + 2.0 * epoch
    assert Counter(tasks[k] for k in drawn) == Counter({t: n for t, n in plan.counts.items() if n})
    part = draws // 2
    assert Counter(sampler.counts(epoch, part)) == Counter(
        {t: 0 for t in task_sizes} | Counter(tasks[k] for k in drawn[:part])
    )


@given(sizes, st.integers(0, 5), st.integers(1, 60))
def test_no_row_comes_again_before_all_of_its_task_came(task_sizes, seed, draws):
    tasks = rows_of(task_sizes)
    sampler = MixtureSampler(tasks, seed, draws, temperature_step=3.0)
    times = Counter()
    for epoch in range(4):
        times.update(sampler.order(epoch).tolist())
        for task in task_sizes:
            counts = [times[k] for k, other in enumerate(tasks) if other == task]
            assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("bucket", [0, 2])
@pytest.mark.parametrize("per_device", [1, 2])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_every_update_has_the_same_draws_on_any_number_of_devices(devices, per_device, bucket):
    """`accelerate` itself deals the batches out, and skips what a resumed run has seen; the counts are those drawn."""
    tasks = rows_of({"asr": 30, "st": 7, "sound": 3})
    durations = [1.0 + k % 7 for k in range(40)]
    settings = {"seed": 5, "draws_per_epoch": 24, "temperature_step": 5, "multiple_of": 8}
    sampler = MixtureSampler(tasks, **settings, durations=durations, bucket_batches=bucket)
    passes = 8 // (devices * per_device)
    for epoch, done in ((0, 0), (2, 1)):
        shards = []
        for rank in range(devices):
            loader = DataLoader(list(range(40)), batch_size=per_device, sampler=sampler, collate_fn=list)
            shard = prepare_data_loader(loader, num_processes=devices, process_index=rank, put_on_device=False)
            shard = skip_first_batches(shard, done * passes)
            shard.set_epoch(epoch)
            sampler.set_epoch(epoch)  # as `StageCallback`: a loader that skips does not pass it on
            shards.append(list(shard))
        drawn = []
        for update, expected in enumerate(sampler.order(epoch).reshape(-1, 8)[done:]):
            dealt = [batch for shard in shards for batch in shard[update * passes : (update + 1) * passes]]
            rows = [row for batch in dealt for row in batch]
            assert sorted(rows) == sorted(expected) and {len(batch) for batch in dealt} == {per_device}
            drawn += rows
        if not done:
            assert Counter(tasks[row] for row in drawn) == Counter(sampler.counts(epoch, 24))
            assert Counter(tasks[row] for row in drawn[:8]) == Counter(
                {task: count for task, count in sampler.counts(epoch, 8).items() if count}
            )


def test_draws_are_a_function_of_seed_and_epoch():
    tasks = rows_of({"asr": 30, "st": 7})
    first, second = MixtureSampler(tasks, seed=3), MixtureSampler(tasks, seed=3)
    second.set_epoch(5)
    list(second)  # what was drawn before leaves no trace
    assert np.array_equal(first.order(2), second.order(2))
    assert not np.array_equal(first.order(2), first.order(3))
    assert not np.array_equal(first.order(2), MixtureSampler(tasks, seed=4).order(2))


def test_one_epoch_at_temperature_one_is_every_row_once():
    sampler = MixtureSampler(rows_of({"asr": 30, "st": 7, "sound": 1}))
    assert sorted(sampler) == list(range(38))


def test_weights_by_hand_replace_the_equation():
    sampler = MixtureSampler(
        rows_of({"asr": 30, "st": 10}), draws_per_epoch=40, temperature_step=5, weights={"asr": 1, "st": 3}
    )
    assert sampler.plan(0).counts == sampler.plan(7).counts == {"asr": 10, "st": 30}
    with pytest.raises(ConfigError, match="give each of these a weight"):
        MixtureSampler(["asr", "st"], weights={"asr": 1})
    with pytest.raises(ConfigError, match="no rows"):
        MixtureSampler([])
    with pytest.raises(ConfigError, match="no rows"):
        task_probabilities({"asr": 0}, 1.0)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 99))
def test_bucketing_keeps_the_draws_and_groups_lengths(batch, bucket, seed):
    tasks = ["asr"] * 23 + ["text"] * 9
    durations = [0.1 * (i * 7 % 23 + 1) for i in range(23)] + [None] * 9
    plain = MixtureSampler(tasks, seed=seed, multiple_of=batch)
    grouped = MixtureSampler(tasks, seed=seed, multiple_of=batch, durations=durations, bucket_batches=bucket)
    assert sorted(plain.order(1)) == sorted(grouped.order(1))
    assert np.array_equal(grouped.order(1), grouped.order(1))
    one_bucket = MixtureSampler(tasks[:23], seed=seed, multiple_of=batch, durations=durations[:23], bucket_batches=99)
    lengths = np.array(durations[:23])[one_bucket.order(0).reshape(-1, batch)]
    edges = sorted((row.min(), row.max()) for row in lengths)
    assert all(left[1] <= right[0] + 1e-9 for left, right in zip(edges, edges[1:], strict=False))


def test_bucketing_needs_durations():
    for durations in (None, [None, 0.0], [None, None]):
        with pytest.raises(ConfigError, match="duration_s"):
            MixtureSampler(["asr", "st"], durations=durations, bucket_batches=2)
    assert sorted(MixtureSampler(["asr", "st"], durations=[None, 1.0], bucket_batches=2)) == [0, 1]
