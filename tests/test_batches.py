"""Batches: every item once, whatever fails; a batch too large for the memory is halved, not counted as failures."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soundwave.eval.batches import answer_in_batches, describe_error, longest_first, shortened


@given(
    count=st.integers(0, 40),
    size=st.integers(1, 12),
    broken=st.sets(st.integers(0, 39)),
)
def test_every_item_comes_once_and_only_the_broken_ones_fail(count, size, broken):
    asked = []

    def answer(batch):
        asked.append(list(batch))
        if broken & set(batch):
            raise KeyError(f"one of {len(batch)}")
        return [str(number) for number in batch]

    done = [each for batch in answer_in_batches(answer, range(count), size) for each in batch]
    assert [each.item for each in done] == list(range(count))
    assert {each.item for each in done if each.error is not None} == broken & set(range(count))
    assert all(each.answer == str(each.item) for each in done if each.error is None)
    assert max(map(len, asked), default=0) <= size


def test_a_broken_item_costs_few_more_calls():
    calls = []

    def answer(batch):
        calls.append(len(batch))
        if 17 in batch:
            raise ValueError("broken")
        return ["x"] * len(batch)

    list(answer_in_batches(answer, range(64), 64))
    assert calls[:3] == [64, 32, 16] and len(calls) == 13  # two halves at each of six steps


def test_memory_bounds_the_batches_after_it():
    sizes, said = [], []

    def answer(batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return ["x"] * len(batch)

    done = [each for batch in answer_in_batches(answer, range(10), 8, said.append) for each in batch]
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    assert len(done) == 10 and all(each.error is None for each in done)
    assert said == [
        "out of memory with 8 items at once; going on with batches of 4",
        "out of memory with 4 items at once; going on with batches of 2",
    ]


def test_an_item_too_large_alone_is_a_failure():
    def answer(batch):
        raise MemoryError("too long")

    (batch,) = answer_in_batches(answer, ["a"], 4)
    assert isinstance(batch[0].error, MemoryError)


@pytest.mark.parametrize(("answers", "reason"), [([None], "NoneType"), ([], "0 answers to 1"), ([3], "int")])
def test_what_is_no_text_is_a_failure(answers, reason):
    (batch,) = answer_in_batches(lambda batch: answers, ["a"], 4)
    assert reason in describe_error(batch[0].error)


def test_an_error_is_told_without_the_keys_in_an_address():
    error = OSError("'https://me:hidden@host/a.wav?sig=hidden'\ncannot be read")
    assert describe_error(error) == "OSError: 'https://host/a.wav' cannot be read"


def test_some_errors_are_nobodys():
    def answer(batch):
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        list(answer_in_batches(answer, ["a"], 4, fatal=(ConnectionError,)))

    def interrupted(batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(answer_in_batches(interrupted, ["a"], 4))


def test_the_longest_first_and_the_first_of_equals_first():
    assert longest_first(["aa", "b", "cc", "ddd"], len) == ["ddd", "aa", "cc", "b"]


def test_reasons_are_one_short_line():
    assert shortened("a\n reason") == "a reason"
    assert shortened(f"{'x' * 5000}.wav is not there") == f"…{'x' * 96}.wav is not there"
    long = shortened("many words " * 500)
    assert len(long) <= 1000 and long.endswith(" …")
    assert len(describe_error(OSError(36, "File name too long", "y" * 5000))) < 200
