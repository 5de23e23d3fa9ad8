"""Both versions of MMAU test-mini, on small sets in the layouts of the repository and of the Hub."""

import json
import re

import pytest
from datasets import Dataset

from soundwave.eval.benchmarks import get_benchmark
from soundwave.eval.benchmarks.mmau import BENCHMARKS, FILE
from soundwave.eval.selecting import sample_items
from soundwave.training.data import DataError
from tests.benchmark_sets import errors, scored, write_wav
from tests.sounds import encoded, tone

JANUARY, AUGUST = BENCHMARKS


def entry(name, task, answer, *choices):
    return {
        "id": name,
        "audio_id": f"./test-mini-audios/{name}.wav",
        "question": f"What of {name}?",
        "choices": list(choices),
        "answer": answer,
        "dataset": "muchomusic",
        "task": task,
        "split": "test-mini",
        "category": "Reasoning",
        "sub-category": "Event",
        "difficulty": "easy",
    }


ENTRIES = [
    entry("s1", "speech", "the man", "the man", "the woman", "a child", "nobody"),
    entry("s2", "speech", "angry", "angry", "glad"),
    entry("n1", "sound", "dog barking", "dog barking", "cat", "car horn", "rain"),
    entry("n2", "sound", "rain", "dog barking", "cat", "car horn", "rain"),
    entry("m1", "music", "A minor", "A", "B", "A minor", "B minor"),
]
ANSWERS = {
    "s1": "(A)",  # a letter stands for its option
    "s2": "angry or glad",  # names both
    "n1": "It is a dog barking.",
    "n2": "B",
    "m1": "A minor",
}


def write_json(folder, entries=ENTRIES):
    for item in entries:
        write_wav(folder / "test-mini-audios" / f"{item['id']}.wav")
    (folder / FILE).write_text(json.dumps(entries))
    return folder


def write_hub(folder, entries=ENTRIES, **changes):
    cells = [{"bytes": encoded(tone(0.2)), "path": f"{item['id']}.wav"} for item in entries]
    columns = {
        "context": cells,
        "instruction": [item["question"] for item in entries],
        "choices": [item["choices"] for item in entries],
        "answer": [item["answer"] for item in entries],
        "other_attributes": [json.dumps({key: item[key] for key in ("id", "task", "difficulty")}) for item in entries],
        **changes,
    }
    (folder / "data").mkdir()
    Dataset.from_dict(columns).to_parquet(str(folder / "data" / "test-00000-of-00001.parquet"))
    return folder


@pytest.mark.parametrize("write", [write_json, write_hub])
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_known_score(write, benchmark, tmp_path):
    figures = scored(benchmark, benchmark.load(write(tmp_path)), ANSWERS)
    assert {area: figure["value"] for area, figure in figures.areas.items()} == {
        "speech": 0.5,
        "sound": 0.5,
        "music": 1.0,
        "speech and sound": 0.5,  # as Table 12 averages
    }
    assert figures.value == pytest.approx(3 / 5) and figures.count == 5


def test_prompt(tmp_path):
    first = JANUARY.load(write_json(tmp_path))[0]
    assert first.instruction == (
        "What of s1?\n(A) the man\n(B) the woman\n(C) a child\n(D) nobody\nReply with the letter of the right option."
    )
    assert JANUARY.with_instruction("Choose!").load(tmp_path)[1].instruction == (
        "What of s2?\n(A) angry\n(B) glad\nChoose!"
    )


@pytest.mark.parametrize(
    ("answer", "right"),
    [("(A) the man", 1), ("A. The man.", 1), ("a: the man", 1), ("A. a child", 0)],
)
def test_a_letter_before_its_option_is_no_article(answer, right, tmp_path):
    items = JANUARY.load(write_json(tmp_path, ENTRIES[:1]))  # another option is "a child"
    assert scored(JANUARY, items, {"s1": answer}).groups["speech"]["value"] == right


def test_the_versions_are_pinned():
    assert get_benchmark("mmau_mini_2025_01") is JANUARY and get_benchmark("mmau_mini_2025_08") is AUGUST
    assert (JANUARY.commit, JANUARY.date, AUGUST.commit, AUGUST.date) == (
        *("a5cd89a", "2025-01-28"),
        *("f0a4a97", "2025-08-09"),
    )
    assert {sum(benchmark.choices.values()) for benchmark in BENCHMARKS} == {1000}


def test_the_other_version_is_refused(tmp_path):
    options = {count: [f"option {k}" for k in range(count)] for count in (2, 4)}
    entries = [entry(str(number), "sound", "option 0", *options[2 if number < 10 else 4]) for number in range(1000)]
    (tmp_path / FILE).write_text(json.dumps(entries))
    assert len(JANUARY.load(tmp_path)) == 1000
    with pytest.raises(DataError, match="that is mmau_mini_2025_01.*at commit f0a4a97"):
        AUGUST.load(tmp_path)


def test_broken_items_are_kept_and_named(tmp_path):
    broken = [
        entry("b1", "sound", "wolf", "dog", "cat"),
        entry("b2", "noise", "dog", "dog", "cat"),
        entry("b3", "sound", "dog") | {"choices": "dog, cat"},
    ]
    write_json(tmp_path, ENTRIES + broken)
    nowhere = entry("b4", "sound", "dog", "dog", "cat") | {"audio_id": None}
    (tmp_path / FILE).write_text(json.dumps([*ENTRIES, *broken, nowhere]))
    *items, last = JANUARY.load(tmp_path)
    with pytest.raises(ValueError, match="None"):
        last.clips[0].read()
    found = errors(items)
    assert found["b1"] == "the right answer 'wolf' is none of the options ['dog', 'cat']"
    assert "'noise', expected speech, sound, music" in found["b2"] and "expected a list of texts" in found["b3"]
    assert scored(JANUARY, items, ANSWERS).count == len(ENTRIES)


@pytest.mark.parametrize("found", [None, 7, {"items": []}])
def test_a_file_that_is_no_list_says_what_it_is(found, tmp_path):
    (tmp_path / FILE).write_text(json.dumps(found))
    with pytest.raises(DataError, match=re.escape(f"{FILE}: found {found!r}, expected a list")):
        JANUARY.load(tmp_path)


def test_an_item_of_wrong_types_is_broken_and_the_rest_is_asked(tmp_path):
    broken = [
        entry("b1", {"name": "sound"}, "dog", "dog", "cat"),
        entry("b2", "sound", ["dog"], "dog", "cat"),
        entry("b3", "sound", "dog", "dog", "cat") | {"question": None},
    ]
    items = JANUARY.load(write_json(tmp_path, ENTRIES + broken))
    found = errors(items)
    assert list(found) == ["b1", "b2", "b3"] and found["b3"] == "the question is None, expected text"
    assert all(isinstance(item.reference, str | None) for item in items)
    assert len(sample_items(items, 2)) == 2, "groups are names, whatever the file holds"


def test_a_changed_schema(tmp_path):
    without = [{key: value for key, value in item.items() if key != "answer"} for item in ENTRIES]
    (tmp_path / "json").mkdir()
    with pytest.raises(DataError, match="item 0: answer missing, found id, audio_id"):
        JANUARY.load(write_json(tmp_path / "json", without))
    (tmp_path / "hub").mkdir()
    with pytest.raises(DataError, match="row 0: other_attributes: found 'prose', expected an object with id, task"):
        JANUARY.load(write_hub(tmp_path / "hub", other_attributes=["prose"] * len(ENTRIES)))
    with pytest.raises(DataError, match=str(tmp_path / "nowhere")):
        JANUARY.load(tmp_path / "nowhere")
