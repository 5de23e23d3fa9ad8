import copy
import csv
import json

import pytest

from soundwave.apps import cli
from soundwave.eval.benchmarks import BENCHMARKS
from soundwave.eval.compare import cell_text, main, markdown
from soundwave.eval.comparison import compare_runs
from soundwave.eval.comparison_runs import Run, read_runs
from soundwave.eval.results import ANSWERS_FILE, RESULTS_FILE

PNG = b"\x89PNG\r\n"


def entry(name, metric="wer", value=0.05, **fields):
    interval = None if value is None else [0.9 * value, 1.2 * value]
    size = BENCHMARKS[name].size if name in BENCHMARKS else 10
    return {
        "name": name,
        "task": name,
        "dataset": {"name": "data", "revision": "abc", "rows": size},
        "metric": metric,
        "settings": {"normalizer": "english", "resamples": 1000, "seed": 0},
        "value": value,
        "interval": interval,
        "count": size or 10,
        "failures": 0,
        "also": {},
        "model": {"name": "m"},
        "decoding": {"strategy": "greedy", "max_new_tokens": 256, "batch_size": 8},
        "packages": {"soundwave": "0.1.0", "torch": "2.11"},
        **fields,
    }


def part(value):
    return {"value": value, "interval": None if value is None else [value, value], "count": 5}


def run(label, *entries):
    return Run(label, {each["name"]: each for each in entries})


def foundation(shift=0.0):
    areas = BENCHMARKS["air_bench_foundation"].areas
    tasks = [task for area in areas.values() for task in area]
    groups = {task: part(0.3 + 0.02 * k + shift) for k, task in enumerate(tasks)}
    return entry(
        "air_bench_foundation",
        "choice_accuracy",
        0.5 + shift,
        groups=groups,
        areas={area: part(0.5 + shift) for area in areas},
        notes={"parse_failures": 7},
    )


def save(folder, *entries):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULTS_FILE).write_text(json.dumps({"results": entries}))
    return folder


def line_of(comparison, part="", metric=None):
    return next(line for line in comparison.lines if line.part == part and metric in (None, line.metric.name))


def notes_of(comparison, line, column):
    return [comparison.notes[n - 1] for n in line.cells[column].notes]


def test_a_run_stands_beside_the_papers_figures():
    also = {"cer": {"value": 0.02, "interval": [0.01, 0.03]}}
    ours = entry("librispeech_clean", value=0.05, failures=3, count=2617, also=also)
    comparison = compare_runs([run("mine", ours)], ["Soundwave", "Qwen2-Audio", "GAMA"])
    line = line_of(comparison)
    assert comparison.columns == [
        "mine",
        "Soundwave (published)",
        "Qwen2-Audio (published)",
    ]  # GAMA has no such figure
    assert cell_text(line, "mine") == "5.0 (4.5 to 6.0), 3 failed"
    assert line.cells["Soundwave (published)"].text == "2.1"
    assert line.cells["Qwen2-Audio (published)"].value == pytest.approx(0.016)
    assert list(line_of(comparison, metric="cer").cells) == ["mine"]  # the paper prints no CER


def test_what_the_paper_does_not_state_is_marked():
    comparison = compare_runs([run("mine", entry("librispeech_clean"))], ["Soundwave", "SiM (LibriSpeech 360)"])
    line = line_of(comparison)
    assert notes_of(comparison, line, "Soundwave (published)") == [
        "librispeech_clean: Soundwave paper, Table 5 does not state: prompt, decoding, normalizer"
    ]
    assert notes_of(comparison, line, "SiM (LibriSpeech 360) (published)") == [
        "librispeech_clean: SiM paper, Table 5 does not state: prompt, decoding"
    ]
    assert line.cells["mine"].notes == ()


def test_a_setting_that_the_paper_states_is_compared():
    ours = entry("librispeech_clean", settings={"normalizer": "basic"})
    comparison = compare_runs([run("mine", ours)], ["SiM (LibriSpeech 360)"])
    notes = notes_of(comparison, line_of(comparison), "SiM (LibriSpeech 360) (published)")
    assert "librispeech_clean: SiM paper, Table 5 has normalizer english, mine basic" in notes


def test_a_figure_that_the_paper_prints_in_two_ways_has_no_single_value():
    chat = entry("air_bench_chat", "judge_score", 6.0, areas={"Speech": part(6.2)})
    comparison = compare_runs([run("mine", chat)], ["Soundwave", "SALMONN"])
    cell = line_of(comparison, "Speech").cells["Soundwave (published)"]
    assert (cell.value, cell.text) == (None, "6.41 (Table 17), 6.51 (Table 7)")
    assert any("contradicts itself" in comparison.notes[n - 1] for n in cell.notes)
    salmonn = notes_of(comparison, line_of(comparison), "SALMONN (published)")
    assert any("truncated, not rounded" in note for note in salmonn)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"settings": {"normalizer": "basic"}}, "normalizer basic (there english)"),
        ({"count": 90}, "items 90 (there 100)"),
        ({"metric": "cer"}, "metric cer (there wer)"),
        ({"dataset": {"name": "data", "revision": "xyz"}}, "data revision xyz (there abc)"),
        ({"decoding": {"strategy": "greedy", "max_new_tokens": 64}}, "decoding max_new_tokens 64 (there 256)"),
        ({"judge": {"model": "small"}}, "judge model small (there not stated)"),
        ({"packages": {"soundwave": "0.2.0"}}, "soundwave version 0.2.0 (there 0.1.0)"),
    ],
)
def test_runs_that_cannot_be_compared_are_marked(changes, said):
    first, second = entry("set", count=100), entry("set", **{"count": 100} | changes)
    comparison = compare_runs([run("a", first), run("b", second)])
    line = next(line for line in comparison.lines if "b" in line.cells)
    (note,) = notes_of(comparison, line, "b")
    assert note.startswith("set: b is not comparable with a: ") and said in note


def test_what_does_not_change_a_figure_is_no_difference():
    second = entry("set", settings={"normalizer": "english", "resamples": 50, "seed": 1})
    second["decoding"] = {"strategy": "greedy", "max_new_tokens": 256, "batch_size": 1, "system_prompt": "x"}
    second["packages"] = {"soundwave": "0.1.0", "torch": "2.12"}
    comparison = compare_runs([run("a", entry("set")), run("b", second)])
    assert comparison.notes == []


def test_failed_items_are_asked_items():
    comparison = compare_runs([run("a", entry("set", count=100)), run("b", entry("set", count=98, failures=2))])
    assert comparison.notes == []
    assert "2 failed" in cell_text(line_of(comparison), "b")


def test_a_part_of_a_benchmark_is_marked():
    comparison = compare_runs([run("mine", entry("librispeech_clean", count=20))])
    assert comparison.notes == ["librispeech_clean: mine was asked 20 items, of 2620 that it has"]


def test_a_benchmark_of_unknown_size_says_how_many_items_were_asked():
    dataset = {"name": "data", "revision": "abc", "rows": 24, "sampled_from": 300}
    entries = entry("vocalsound", "label_accuracy", 0.5, count=24, dataset=dataset), entry("meld", "label_accuracy")
    comparison = compare_runs([run("mine", *entries)])
    assert comparison.notes == [
        "vocalsound: mine was given 24 of the 300 items of its data",
        "vocalsound: mine was asked 24 items; how many the whole set has is not known here",
    ]


def test_a_measurement_on_a_part_of_the_papers_data_is_marked():
    ttft, drawn = entry("ttft", "ttft", 80.0, count=30), entry("similarity", "similarity", 0.3, count=200)
    assert compare_runs([run("mine", ttft, drawn)]).notes == ["ttft: mine was asked 30 items, of 2620 that it has"]


def test_training_speed_stands_by_stage():
    stages = {"align": part(9.0), "instruct": part(3.0), "shrink": part(4.0)}
    also = {"audio_seconds_per_second": part(30.0) | {"groups": {stage: part(60.0) for stage in stages}}}
    speed = entry("training_speed", "steps_per_second", 5.0, groups=stages, also=also, failures=1)
    comparison = compare_runs([run("mine", speed)])
    shown = {(line.metric.name, line.part): cell_text(line, "mine") for line in comparison.lines}
    assert list(shown) == [(m, s) for m in (speed["metric"], *also) for s in ("align", "shrink", "instruct")]
    assert shown["steps_per_second", "shrink"] == "4.00 (4.00 to 4.00), 1 failed"  # and the pooled 5.00 nowhere
    assert shown["audio_seconds_per_second", "align"] == "60.00 (60.00 to 60.00)"


@pytest.mark.parametrize(
    ("name", "metric", "others"),
    [
        ("similarity", "similarity", ("similarity_std", "shuffled_similarity")),
        ("compression", "ratio_padded", ("ratio_padded_mean", "ratio_speech")),
    ],
)
def test_a_headline_has_its_baseline_or_other_reading_beside_it(name, metric, others):
    measured = entry(name, metric, 0.025, also={other: part(0.12) for other in others})
    comparison = compare_runs([run("mine", measured)], ["Shrinking adapter (Table 8)"])
    assert [line.metric.name for line in comparison.lines] == [metric, others[1], others[0]]
    assert list(comparison.lines[1].cells) == ["mine"]  # a published figure is of the headline's reading


def test_another_version_of_the_data_and_figures_that_are_lost_are_marked():
    mmau = entry("mmau_mini_2025_08", "string_match", 0.5, areas={"speech": part(0.5)})
    comparison = compare_runs([run("mine", mmau, entry("llama_questions", "contained_answer"))], ["Soundwave"])
    speech = notes_of(comparison, line_of(comparison, "speech"), "Soundwave (published)")
    assert any("is of mmau_mini_2025_01" in note for note in speech)
    assert any(note.startswith("llama_questions: SiM paper, Table 7 reports it") for note in comparison.notes)


def test_lines_come_headline_first_then_areas_groups_and_further_metrics():
    also = {"choice_strict": {"value": 0.4, "interval": [0.3, 0.5]}}
    comparison = compare_runs([run("a", foundation() | {"also": also}), run("b", foundation(0.1))])
    kinds = [line.kind for line in comparison.lines]
    assert kinds == ["headline"] + ["area"] * 3 + ["group"] * 19 + ["also"]
    assert cell_text(comparison.lines[0], "a").startswith("50.0 (45.0 to 60.0), 7 unread")


def test_an_undefined_figure_is_none():
    groups = {"easy": part(0.5) | {"unread": 2}, "hard": part(None)}
    comparison = compare_runs([run("a", entry("set", "choice_accuracy", None, groups=groups, areas={}))])
    assert cell_text(line_of(comparison), "a") == "none [1]"
    assert cell_text(line_of(comparison, "easy"), "a") == "50.0 (50.0 to 50.0), 2 unread"
    assert "| none" in markdown(comparison)
    assert comparison.notes[0].startswith("set: undefined (none) for a: choice_accuracy, hard; no answer")


def test_a_set_is_compared_under_the_name_of_its_benchmark():
    ours = entry("librispeech_clean") | {"name": "my_copy"}
    comparison = compare_runs([run("mine", ours)], ["Soundwave"])
    assert line_of(comparison).cells["Soundwave (published)"].text == "2.1"


def test_a_measurement_on_other_recordings_has_no_published_figure():
    runs = [run("mine", *(entry(name, "ttft", 80.0) | {"task": "ttft"} for name in ("ttft", "ttft:meld")))]
    ours, other = compare_runs(runs, ["Shrinking adapter (Table 8)"]).lines
    assert ours.cells["Shrinking adapter (Table 8) (published)"].text == "72"
    assert other.benchmark == "ttft:meld" and list(other.cells) == ["mine"]


DAMAGED = {
    "cut": ('{"results": [{"name"', "results.json is damaged (JSONDecodeError"),
    "list": ("[]", "results.json is damaged (TypeError"),
    "empty": ('{"results": []}', "holds no results"),
    "no value": ({"value": ...}, "set is left out: it has no value"),
    "NaN": ({"value": float("nan")}, "the figure of the headline is"),
    "text": ({"value": "5%"}, "the figure of the headline is"),
    "interval": ({"interval": [0.1]}, "expected a finite value and an interval of two"),
    "group": ({"groups": {"g": {"value": 1.0}}}, "the figure of g is"),
    "count": ({"count": "many"}, "its count is 'many', expected int"),
    "settings": ({"settings": None}, "its settings is None, expected dict"),
    "groups": ({"groups": ["g"]}, "its groups is ['g'], expected dict"),
    "stages": (
        {"also": {"steps_per_second": part(1.0) | {"groups": ["align"]}}},
        "the figure of steps_per_second, its",
    ),
    "judge": ({"judge": "gpt"}, "its judge is 'gpt', expected dict"),
    "metric": ({"metric": "bleurt"}, "its metric 'bleurt' is unknown to this version"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_results_are_named_and_the_others_compared(damage, said, tmp_path, capsys):
    whole = save(tmp_path / "whole", entry("set"))
    broken = save(tmp_path / "broken")
    if isinstance(damage, str):
        (broken / RESULTS_FILE).write_text(damage)
    else:
        changed = {key: value for key, value in (entry("set") | damage).items() if value is not ...}
        save(broken, changed, entry("other"))
    assert main([str(whole), str(broken)]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("soundwave compare: broken: ") and said in err
    assert said in out and "5.0 (4.5 to 6.0)" in out
    assert ("| other" in out) == (not isinstance(damage, str))


def test_a_result_that_is_there_twice_is_named(tmp_path):
    runs, problems = read_runs([save(tmp_path / "a", entry("set", value=0.1), entry("set", value=0.2))])
    assert problems == ["a: set is there 2 times; the last one counts"]
    assert runs[0].entries["set"]["value"] == 0.2


def test_missing_results_are_named(tmp_path, capsys):
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / ANSWERS_FILE).write_text("{}\n")
    assert main([str(save(tmp_path / "a", entry("set"))), str(unfinished), str(tmp_path / "nowhere")]) == 1
    err = capsys.readouterr().err
    assert "unfinished: there is no results.json, only answers.jsonl: the evaluation was cut short" in err
    assert "nowhere: it does not exist" in err
    with pytest.raises(ValueError, match="none of the 1 results could be read: nowhere: it does not exist"):
        main([str(tmp_path / "nowhere")])


def test_runs_are_called_by_the_shortest_ends_that_tell_them_apart(tmp_path):
    folders = [save(tmp_path / kind / "instruct", entry("set")) for kind in ("one", "two")]
    runs, _ = read_runs([*folders, folders[0] / RESULTS_FILE])
    assert [run.label for run in runs] == ["one/instruct", "two/instruct", "one/instruct (2)"]


def test_the_command_writes_table_and_pictures(tmp_path, capsys):
    folder = save(tmp_path / "mine", foundation(), entry("meld", "label_accuracy", 0.5))
    other = save(tmp_path / "other", foundation(0.1))
    output = tmp_path / "out"
    arguments = ["compare", str(folder), str(other), "--output", str(output), "--published", "all"]
    assert cli.main(arguments) == 0
    table = capsys.readouterr().out
    assert (output / "compare.md").read_text() == table
    assert "| air_bench_foundation | speech" in table and "PandaGPT (published)" in table
    for name in ("radar.png", "bars.png"):
        assert (output / name).read_bytes().startswith(PNG)
    with (output / "compare.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    (meld,) = [row for row in rows if row["benchmark"] == "meld" and row["column"] == "Soundwave (published)"]
    assert (meld["value"], meld["printed"], meld["published"], meld["count"]) == ("0.635", "63.5", "True", "")
    assert "does not state" in meld["notes"]
    (mine,) = [r for r in rows if (r["column"], r["benchmark"]) == ("mine", "meld")]
    assert float(mine["low"]) == pytest.approx(0.45)


def test_published_none_and_unknown_models(tmp_path, capsys):
    folder = save(tmp_path / "mine", entry("meld", "label_accuracy"))
    main([str(folder), "--published", "none"])
    assert "published" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="no published figures of 'GPT-9'"):
        main([str(folder), "--published", "GPT-9"])


def test_entries_are_not_changed(tmp_path):
    ours = foundation()
    before = copy.deepcopy(ours)
    compare_runs([run("a", ours)], ["Soundwave"])
    assert ours == before
