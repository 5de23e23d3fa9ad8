"""The command `soundwave evaluate`: its list, its options, what it says, and what it refuses."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from soundwave.eval import results
from soundwave.eval.benchmarks import BENCHMARKS
from soundwave.eval.efficiency import EFFICIENCY
from soundwave.eval.evaluate import TestSet, _run, main, named_folders, summary, task_table
from soundwave.eval.rows import evaluate_ctc
from soundwave.eval.runner import Runner
from soundwave.training.data import load_rows
from tests.conftest import SAMPLING_RATE, tone
from tests.scripted import ScriptedModel, Words, word_items

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def saved(tiny_model, processor, tmp_path_factory):
    """A whole random model on disk."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    """A file of three spoken rows."""
    rows = []
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", tone(0.4 + 0.2 * i, 300 + 90 * i), SAMPLING_RATE)
        about = {"id": f"row-{i}", "audio": f"{i}.wav", "task": "asr", "instruction": "Transcribe the speech."}
        rows.append(about | {"answer": f"answer {i}", "transcript": f"answer {i}"})
    (tmp_path / "asr_seen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "asr_seen.jsonl"


def test_the_list_names_every_task_with_its_metric_and_data():
    lines = task_table().splitlines()
    assert lines[0].split() == ["TASK", "ITEMS", "METRIC", "LICENCE", "DATA"]
    assert [line.split()[0] for line in lines[1:]] == [*BENCHMARKS, *EFFICIENCY]
    for line, benchmark in zip(lines[1:], [*BENCHMARKS.values(), *EFFICIENCY.values()], strict=True):
        assert benchmark.metric in line and (benchmark.hub_id or "=FOLDER") in line
        assert (benchmark.licence or "not confirmed") in line


def test_list_and_help_compute_nothing():
    """They answer at once: nothing that takes seconds to import is imported."""
    code = (
        "import sys; from soundwave.eval.evaluate import main; main(['--list'])\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "librispeech_clean" in done.stdout
    assert done.stderr.strip() == "[]"


def test_rows_of_a_saved_model(saved, data, tmp_path, capsys):
    arguments = [
        "--model",
        str(saved),
        "--data",
        str(data),
        "--output",
        str(tmp_path / "out"),
        "--max-new-tokens",
        "3",
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    (entry,) = results.read_results(tmp_path / "out")
    assert said.startswith(f"asr_seen: wer {100 * entry['value']:.1f}% (") and "3 items, 0 failed" in said
    assert f"{entry['cut']} cut at 3 tokens" in said if entry["cut"] else "cut" not in said
    assert entry["model"]["name"] == "model" and entry["decoding"]["max_new_tokens"] == 3
    assert results.rescore(entry, results.read_answers(tmp_path / "out")) == []
    before = (tmp_path / "out" / "answers.jsonl").stat().st_mtime_ns
    assert main(arguments) == 0
    again = capsys.readouterr()
    assert again.out == said and "finished already" in again.err
    assert (tmp_path / "out" / "answers.jsonl").stat().st_mtime_ns == before
    with_other_bound = [*arguments[:-1], "4"]
    assert main(with_other_bound) == 1
    assert "decoding.max_new_tokens 3, now 4" in capsys.readouterr().err


def test_a_model_of_stage_one_is_asked_for_transcripts(tiny_ctc, processor, data, tmp_path, capsys):
    tiny_ctc.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    assert main(["--model", str(tmp_path / "model"), "--data", str(data), "--output", str(tmp_path / "out")]) == 0
    (entry,) = results.read_results(tmp_path / "out")
    assert (entry["task"], entry["decoding"]["max_new_tokens"]) == ("ctc", None)
    assert entry["value"] == evaluate_ctc(tiny_ctc, processor, list(load_rows(data)), progress=False).value


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--tasks", "song"], "benchmark 'song' is unknown; choose one of librispeech_clean"),
        (["--tasks", "melt"], "benchmark 'melt' is unknown; did you mean meld?"),
        (["--tasks", "meld", "--source", "meld"], "expected NAME=FOLDER"),
        (["--tasks", "meld", "--source", "mustc_en_de=here"], "mustc_en_de is not among --tasks meld"),
        (["--tasks", "librispeech_clean", "--source", "librispeech_clean=nowhere"], "nowhere"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_a_model_is_loaded(options, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        main(["--model", "there/is/no/such/model", "--output", str(tmp_path), *options])


def test_two_test_sets_of_one_name_are_refused(tmp_path):
    (tmp_path / "llama_questions_300.tsv").write_text("Questions\tAnswer\tWav Filename\nWho?\tHe\t1.wav\n")
    options = ["--tasks", "llama_questions,llama_questions", "--source", f"llama_questions={tmp_path}"]
    with pytest.raises(ValueError, match="several test sets are called llama_questions"):
        main(["--model", "there/is/no/such/model", "--output", str(tmp_path / "out"), *options])


@pytest.mark.parametrize("options", [[], ["--model", "m"], ["--model", "m", "--output", "o"], ["--limit", "0"]])
def test_an_incomplete_command_says_what_is_missing(options, capsys):
    with pytest.raises(SystemExit):
        main(options)
    said = capsys.readouterr().err
    assert any(words in said for words in ("missing", "nothing to ask", "at least 1"))


def test_a_damaged_model_is_one_clear_line(saved, data, tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged.*weights"):
        main(["--model", str(folder), "--data", str(data), "--output", str(tmp_path / "out")])


def test_one_test_set_that_fails_leaves_the_others(saved, data, tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(data.read_text().replace(".wav", ".gone"))
    arguments = ["--model", str(saved), "--data", str(broken), str(data), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--max-new-tokens", "2"]) == 1
    said = capsys.readouterr()
    assert "asr_seen: wer" in said.out and "broken: none of 3 items was answered" in said.err
    assert [entry["name"] for entry in results.read_results(tmp_path / "out")] == ["asr_seen"]


def test_the_summary_names_areas_notes_and_cut_answers(saved, data, tmp_path, capsys):
    main(["--model", str(saved), "--data", str(data), "--output", str(tmp_path), "--max-new-tokens", "1"])
    (entry,) = results.read_results(tmp_path)
    part = {"value": 0.5, "interval": [0.4, 0.6]}
    entry |= {"cut": 2, "notes": {"parse_failures": 1, "undefined": list("abcdefg")}, "areas": {"speech": part}}
    entry |= {"also": {"cer": {"value": 0.00067, "interval": None}}, "failures": 2, "failed": {"x": "gone", "y": "?"}}
    assert summary(results.TaskResult(**entry)).splitlines()[1:] == [
        "  cer: 0.067%",
        "  speech: 50.0% (40.0% to 60.0%)",
        "  failed: x: gone (the others in results.json)",
    ]
    first = summary(results.TaskResult(**entry)).splitlines()[0]
    assert first.endswith("2 cut at 1 tokens (--max-new-tokens), parse_failures: 1, undefined: 7 groups")
    stages = {"align": part, "shrink": part}  # a speed over all stages says little: each has its line
    assert "  shrink: 50.0% (40.0% to 60.0%)\n" in summary(
        results.TaskResult(**entry | {"areas": {}, "groups": stages})
    )


def test_a_test_set_without_a_figure_is_a_failure(tmp_path, capsys):
    class Choices(Words):
        metric, also = "choice_accuracy", ()

    items = [dataclasses.replace(item, reference="red", fields={"choices": ["red", "blue"]}) for item in word_items(2)]
    for name, said, scored in (("read", "A", True), ("unread", "no idea", False)):
        runner = Runner(ScriptedModel({"0": said, "1": said}), tmp_path, progress=False)
        assert _run(runner, TestSet(name, Choices(), items, {"name": name})) is scored
    assert "unread: choice_accuracy none, 2 items, 0 failed, parse_failures: 2" in capsys.readouterr().out


def test_a_measurement_reads_the_folder_of_its_data():
    tasks = ["ttft:meld", "meld@abc", "compression:meld"]
    assert named_folders(["meld=a", "compression:meld=b"], tasks) == {
        "ttft:meld": "a",
        "meld": "a",
        "compression:meld": "b",
    }
    assert named_folders(["meld=a"], ["ttft:meld"]) == {"ttft:meld": "a", "meld": "a"}
    with pytest.raises(ValueError, match="mustc is not among --tasks ttft:meld"):
        named_folders(["mustc=a"], ["ttft:meld"])


def test_recorded_digits_with_another_prompt(saved, shared_data, tmp_path, capsys):
    arguments = ["--model", str(saved), "--output", str(tmp_path), "--tasks", "spoken_digits", "--limit", "3"]
    arguments += ["--source", f"spoken_digits={shared_data}", "--max-new-tokens", "2"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("spoken_digits: ")
    (entry,) = results.read_results(tmp_path)
    assert entry["dataset"]["rows"] == 3 and entry["dataset"]["sampled_from"] > 3
    assert main([*arguments, "--prompt", "Which digit?"]) == 1
    assert "prompt 'Which number is spoken?', now 'Which digit?'" in capsys.readouterr().err
