"""The run: known answers give known figures, failures are named and left out, and interrupted runs lose nothing."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from soundwave.eval.items import CutAnswer, FileClip, Item
from soundwave.eval.judge import Judge, JudgeError, Prompt, mark, no_mark
from soundwave.eval.logs import read_answers, read_judgements
from soundwave.eval.models.base import ModelUnavailableError
from soundwave.eval.results import read_results, rescore
from soundwave.eval.resuming import SETTINGS_FILE, claim
from soundwave.eval.runner import Runner, RunStoppedError
from tests.judge_server import judge_server
from tests.scripted import ScriptedModel, Words, right_answers, word_items

ROOT = Path(__file__).parents[1]


def run(model, items, output_dir=None, **options):
    return Runner(model, output_dir, progress=False, **{"batch_size": 4, **options}).run(Words(), items)


def asked_by(model):
    return sorted(name for batch in model.asked for name in batch)


def test_known_answers_give_known_figures(tmp_path):
    items = word_items(10, tmp_path)
    model = ScriptedModel(right_answers(10) | {"3": "word", "4": "a word 4"})
    result = run(model, items, tmp_path / "out")
    assert (result.value, result.count, result.failures, result.cut) == (2 / 20, 10, 0, 0)
    assert result.groups["odd"]["value"] == 1 / 10
    assert [len(batch) for batch in model.asked] == [4, 4, 2]
    assert model.asked[0] == ["9", "8", "7", "6"]  # the longest first
    (entry,), rows = read_results(tmp_path / "out"), read_answers(tmp_path / "out")
    assert rescore(entry, rows) == []
    assert entry["decoding"] == {"strategy": "scripted", "max_new_tokens": 8, "batch_size": 4}
    assert entry["dataset"]["rows"] == 10 and entry["dataset"]["revision"].startswith("sha256:")
    row = next(row for row in rows if row["id"] == "3")
    assert row["answer"] == "word" and row["reference"] == "word 3" and row["group"] == "odd"
    assert row["audio"] == ["../3.wav"] and row["duration_s"] == pytest.approx(0.08)


def test_what_fails_is_named_and_in_no_figure(tmp_path):
    items = word_items(6, tmp_path)
    (tmp_path / "1.wav").write_bytes(b"RIFF but no sound")
    items[2].clips = [FileClip(tmp_path / "gone" / "2.wav")]
    items[3].fields["error"] = "the answer 'blue' is none of the choices"
    items[4].reference = None
    model = ScriptedModel(right_answers(6) | {"5": RuntimeError("no such thing"), "0": "word"})
    result = run(model, items, tmp_path / "out")
    assert (result.count, result.failures, result.value) == (1, 5, 1 / 2)
    assert "RuntimeError: no such thing" in result.failed["5"]
    assert "2.wav" in result.failed["2"] and "1.wav" in result.failed["1"]
    assert result.failed["3"] == "the answer 'blue' is none of the choices"
    assert "no reference" in result.failed["4"]
    assert not {"3", "4"} & set(asked_by(model))
    assert str(tmp_path) not in (tmp_path / "out" / "answers.jsonl").read_text()


@pytest.mark.parametrize("answer", [None, 3, ["word"], {"text": "word"}])
def test_an_answer_of_another_type_is_a_failure_not_a_zero(answer):
    result = run(ScriptedModel(right_answers(3) | {"1": answer}), word_items(3))
    assert (result.value, result.count) == (0, 2)
    assert "expected text" in result.failed["1"]


def test_nothing_answered_is_no_figure():
    with pytest.raises(ValueError, match=r"none of 2 items was answered.*broken"):
        run(ScriptedModel({"0": ValueError("broken"), "1": ValueError("broken")}), word_items(2))
    with pytest.raises(ValueError, match="no rows"):
        run(ScriptedModel({}), [])
    with pytest.raises(ValueError, match="two items have the id '0'"):
        run(ScriptedModel({}), [*word_items(1), *word_items(1)])


def test_answers_at_the_bound_are_counted(tmp_path):
    result = run(ScriptedModel(right_answers(3) | {"1": CutAnswer("word 1")}), word_items(3), tmp_path)
    assert result.cut == 1
    assert [row["id"] for row in read_answers(tmp_path) if row["cut"]] == ["1"]


def test_a_model_that_always_fails_stops_the_run(tmp_path):
    model = ScriptedModel({str(i): ConnectionError("refused") for i in range(50)})
    with pytest.raises(RunStoppedError, match="5 items in a row failed alike.*ConnectionError: refused"):
        run(model, word_items(50), tmp_path, max_failures_in_a_row=5)
    assert sum(len(batch) == 1 for batch in model.asked) == 5
    # The cause is gone: the same run asks all of them.
    model = ScriptedModel(right_answers(50))
    assert run(model, word_items(50), tmp_path).count == 50
    assert asked_by(model) == sorted(map(str, range(50)))


def test_broken_recordings_in_a_row_stop_nothing(tmp_path):
    items = word_items(12, tmp_path)
    for item in items[:10]:
        item.clips = [FileClip(tmp_path / f"gone-{item.id}.wav")]
    result = run(ScriptedModel(right_answers(12)), items, max_failures_in_a_row=3)
    assert (result.count, result.failures) == (2, 10)


def test_failures_of_two_kinds_are_no_streak():
    kinds = {str(i): (ValueError if i % 2 else KeyError)("x") for i in range(8)}
    assert run(ScriptedModel(right_answers(12) | kinds), word_items(12), max_failures_in_a_row=3).failures == 8


@pytest.mark.parametrize("gone", [ModelUnavailableError("the server is away"), KeyboardInterrupt()])
def test_what_is_no_items_fault_ends_the_run_and_the_next_goes_on(gone, tmp_path):
    items = word_items(12)
    interrupted = ScriptedModel(right_answers(12) | {"7": gone})
    with pytest.raises(type(gone)):
        run(interrupted, items, tmp_path)
    before = {row["id"] for row in read_answers(tmp_path)}
    assert before and "7" not in before and read_results(tmp_path) == []
    model = ScriptedModel(right_answers(12))
    result = run(model, items, tmp_path)
    assert set(asked_by(model)) == {item.id for item in items} - before
    assert (result.count, result.failures, result.value) == (12, 0, 0)


def test_a_finished_set_is_not_asked_again_unless_overwritten(tmp_path, capsys):
    first = run(ScriptedModel(right_answers(3)), word_items(3), tmp_path)
    model = ScriptedModel({})
    again = Runner(model, tmp_path, 4, progress=True).run(Words(), word_items(3))
    assert model.asked == [] and again.value == first.value and again.count == 3
    assert "finished already; --overwrite starts anew" in capsys.readouterr().err
    worse = run(ScriptedModel(right_answers(3) | {"0": ""}), word_items(3), tmp_path, overwrite=True)
    assert worse.value == 2 / 6
    assert len(read_answers(tmp_path)) == 3 and len(read_results(tmp_path)) == 1


def test_a_finished_set_whose_answers_are_gone_is_asked_again(tmp_path):
    run(ScriptedModel(right_answers(6)), word_items(6), tmp_path)
    lines = (tmp_path / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "answers.jsonl").write_text("".join(lines[:4]))
    model = ScriptedModel(right_answers(6))
    again = run(model, word_items(6), tmp_path)
    assert asked_by(model) == sorted(json.loads(line)["id"] for line in lines[4:])
    assert (again.count, again.resumed) == (6, 4)


class Others(Words):
    name = "others"


def test_other_settings_are_refused_with_the_reason(tmp_path):
    items = word_items(8)
    with pytest.raises(KeyboardInterrupt):
        run(ScriptedModel(right_answers(8) | {"6": KeyboardInterrupt()}), items, tmp_path)
    written = (tmp_path / "answers.jsonl").read_bytes()
    right = right_answers(8)
    asked_otherwise = [Item(i.id, "What?", [], i.reference, i.group) for i in items]
    for model, what, options, reason in (
        (ScriptedModel(right, "another"), items, {}, "model.name 'scripted', now 'another'"),
        (ScriptedModel(right), items, {"max_new_tokens": 9}, "decoding.max_new_tokens 8, now 9"),
        (ScriptedModel(right), items, {"limit": 4}, "dataset.rows 8, now 4"),
        (ScriptedModel(right), asked_otherwise, {}, "dataset.content"),
    ):
        with pytest.raises(ValueError, match=f"unfinished answers of 'words'.*{reason}.*--overwrite"):
            run(model, what, tmp_path, **options)
    assert (tmp_path / "answers.jsonl").read_bytes() == written
    # Another test set in the same folder is nobody's business, and the first goes on after it.
    Runner(ScriptedModel(right), tmp_path, 4, progress=False).run(Others(), items)
    assert run(ScriptedModel(right), items, tmp_path, batch_size=3).count == 8
    assert [entry["name"] for entry in read_results(tmp_path)] == ["others", "words"]
    with pytest.raises(ValueError, match="finished answers of 'words'.*model.name"):
        run(ScriptedModel(right, "another"), items, tmp_path)
    (tmp_path / SETTINGS_FILE).unlink()
    with pytest.raises(ValueError, match="does not say how they were made"):
        run(ScriptedModel(right), items, tmp_path)


def test_a_sample_is_fixed_and_spread_over_the_groups(tmp_path):
    items = [item for item in word_items(40) if item.group == "even" or item.id in ("1", "3")]
    one = run(ScriptedModel(right_answers(40)), items, tmp_path / "a", limit=6)
    two = run(ScriptedModel(right_answers(40)), items[::-1][::-1], tmp_path / "b", limit=6)
    ids = [sorted(row["id"] for row in result.answers) for result in (one, two)]
    assert ids[0] == ids[1] and {"1", "3"} < set(ids[0]) and len(ids[0]) == 6
    assert one.dataset["rows"] == 6 and one.dataset["sampled_from"] == len(items)


def test_two_runs_in_one_folder_at_once(tmp_path):
    with claim(tmp_path), pytest.raises(ValueError, match="another run is writing"):
        run(ScriptedModel(right_answers(2)), word_items(2), tmp_path)


class Judged(Words):
    """One question to the judge per answer, whose reply is the mark."""

    name, metric, also, judged = "judged", "judge_score", (), True

    def prompts(self, row, official=False):
        messages = [{"role": "user", "content": row["answer"]}]
        return [Prompt("only", messages, {"max_tokens": 4}, "1")]

    def verdict(self, reply, order):
        return mark(float(reply)) if reply.isdigit() else no_mark("expected a number")


def test_answers_wait_for_a_judge_and_a_failed_judgement_is_no_zero(tmp_path):
    items = word_items(4)
    assert Runner(ScriptedModel(right_answers(4)), tmp_path, progress=False).run(Judged(), items) is None
    assert len(read_answers(tmp_path)) == 4 and read_results(tmp_path) == []
    with judge_server(lambda answer: "a fine one" if answer == "word 2" else answer[-1]) as server:

        def score(judge_model):
            model = ScriptedModel({})
            judge = Judge(judge_model, tmp_path / "replies", server.url)
            result = Runner(model, tmp_path, judge=judge, progress=False).run(Judged(), items)
            assert model.asked == []
            return result

        result = score("one")
        assert (result.value, result.count, result.failures) == (pytest.approx((0 + 1 + 3) / 3), 4, 0)
        assert result.notes == {"judge_failures": 1} and result.judge["model"] == "one"
        (entry,), judgements = read_results(tmp_path), read_judgements(tmp_path)
        assert rescore(entry, read_answers(tmp_path), judgements) == []
        assert [row["reply"] for row in judgements if row["error"]] == ["a fine one"]
        asked = len(server.requests)
        assert score("one").value == result.value and len(server.requests) == asked + 1  # what held no mark
        assert score("two").judge["model"] == "two" and len(server.requests) == asked + 5
        server.say(lambda answer: answer[-1])  # it has come to its senses
        assert score("two").notes == {"judge_failures": 0} and len(server.requests) == asked + 6
        assert score("two").value == 1.5 and len(server.requests) == asked + 6  # finished
    assert {row["model"] for row in read_judgements(tmp_path)} == {"two"}


def test_a_judge_that_goes_away_leaves_no_figures_of_another_judges_marks(tmp_path):
    items = word_items(2)
    with judge_server(lambda answer: answer[-1]) as server:

        def score(judge_model):
            judge = Judge(judge_model, tmp_path / "replies", server.url, attempts=1)
            return Runner(ScriptedModel(right_answers(2)), tmp_path, judge=judge, progress=False).run(Judged(), items)

        first = score("one")
        server.answer = lambda request: (404, b"{}", 0.0)
        with pytest.raises(JudgeError):
            score("two")
        assert read_results(tmp_path) == []
        asked = len(server.requests)
        assert score("one").value == first.value
        assert len(server.requests) == asked  # its replies were kept
        assert rescore(read_results(tmp_path)[0], read_answers(tmp_path), read_judgements(tmp_path)) == []


def test_what_failed_in_a_finished_test_set_is_asked_again_on_request(tmp_path):
    items, said = word_items(4), right_answers(4)
    before = Runner(ScriptedModel(said | {"2": ValueError("broken")}), tmp_path, progress=False).run(Words(), items)
    assert (before.count, before.failures) == (3, 1)
    again = ScriptedModel(said)
    assert Runner(again, tmp_path, progress=False).run(Words(), items).failures == 1 and again.asked == []
    after = Runner(again, tmp_path, retry_failed=True, progress=False).run(Words(), items)
    assert (again.asked, after.count, after.failures, after.value) == ([["2"]], 4, 0, 0.0)
    assert len(read_answers(tmp_path)) == 4
    assert rescore(read_results(tmp_path)[0], read_answers(tmp_path)) == []


RUN = """
import sys, time
from pathlib import Path
from soundwave.apps.processes import Processes
from soundwave.eval.runner import Runner
from tests.scripted import ScriptedModel, Words, right_answers, word_items

output, count, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
failing = sys.argv[4:]

class Slow(ScriptedModel):
    def answer(self, items, max_new_tokens):
        time.sleep(pause)
        with open(output / f"asked.{processes.rank}", "a") as file:
            file.write("".join(f"{item.id}\\n" for item in items))
        return super().answer(items, max_new_tokens)

processes = Processes("cpu")
model = Slow(right_answers(count) | {"3": "word"})
runner = Runner(model, output, 3, processes=processes, progress=False, max_failures_in_a_row=2)
if failing:
    class Fails(Words):
        name = "fails"
    model.answers = right_answers(8) | {name: OSError("gone") for name in failing}
    try:
        runner.run(Fails(), word_items(8))
    except ValueError as error:
        (output / f"failed.{processes.rank}").write_text(f"{type(error).__name__}: {error}")
    model.answers = right_answers(count) | {"3": "word"}
runner.run(Words(), word_items(count))
processes.leave()
"""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_a_run_killed_at_any_moment_repeats_and_loses_nothing(tmp_path):
    """A real SIGKILL, then ends of the file as a kill leaves them."""
    count = 60
    process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path), str(count), "0.05"], env=ENVIRONMENT)
    answers = tmp_path / "answers.jsonl"
    patience = time.monotonic() + 30
    while not answers.is_file() or answers.read_bytes().count(b"\n") < 9:
        assert process.poll() is None and time.monotonic() < patience
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    whole = answers.read_bytes()
    rng = random.Random(0)
    lines = whole.count(b"\n")
    assert 9 <= lines < count
    for cut in [len(whole), *(rng.randrange(1, len(whole)) for _ in range(8))]:
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "answers.jsonl").write_bytes(whole[:cut])
        (folder / SETTINGS_FILE).write_bytes((tmp_path / SETTINGS_FILE).read_bytes())
        model = ScriptedModel(right_answers(count) | {"3": "word"})
        result = run(model, word_items(count), folder, batch_size=3)
        kept = {json.loads(line)["id"] for line in whole[:cut].split(b"\n")[:-1]}
        # A line that lacks nothing but its end is whole.
        assert count - len(kept) - 1 <= len(asked_by(model)) <= count - len(kept)
        assert not kept & set(asked_by(model))
        assert sorted(row["id"] for row in read_answers(folder)) == sorted(map(str, range(count)))
        assert (result.value, result.count) == (1 / (2 * count), count)


def in_two_processes(folder, *arguments):
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", RUN, str(folder), *arguments]
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [subprocess.Popen(command, env=ENVIRONMENT | group | rank) for rank in ranks]
    assert [process.wait(timeout=100) for process in processes] == [0, 0]


def test_a_set_that_fails_in_one_of_two_processes_leaves_the_others(tmp_path):
    in_two_processes(tmp_path / "two", "5", "0", "1", "3", "5", "7")  # all in the share of the second
    assert (tmp_path / "two" / "failed.1").read_text().startswith("RunStoppedError: 2 items in a row failed alike")
    assert (tmp_path / "two" / "failed.0").read_text().startswith("OtherProcessError: process 1 of 2 failed")
    (entry,) = read_results(tmp_path / "two")
    assert (entry["name"], entry["count"]) == ("words", 5)


def test_two_processes_answer_every_item_once_with_the_score_of_one(tmp_path):
    in_two_processes(tmp_path / "two", "25", "0")
    shares = [(tmp_path / "two" / f"asked.{rank}").read_text().split() for rank in range(2)]
    assert [len(share) for share in shares] == [13, 12]
    assert sorted(shares[0] + shares[1]) == sorted(map(str, range(25)))
    one = run(ScriptedModel(right_answers(25) | {"3": "word"}), word_items(25), tmp_path / "one", batch_size=3)
    (two,) = read_results(tmp_path / "two")
    assert sorted(row["id"] for row in read_answers(tmp_path / "two")) == sorted(map(str, range(25)))
    assert two["value"] == one.value == 1 / 50 and two["interval"] == list(one.interval) and two["count"] == 25
    assert not list((tmp_path / "two").glob("*.rank*"))


def test_parts_of_a_killed_run_of_several_processes_are_taken_up(tmp_path):
    """Also where the kill came between the merging and the removal of the parts."""
    with pytest.raises(KeyboardInterrupt):
        run(ScriptedModel(right_answers(12) | {"5": KeyboardInterrupt()}), word_items(12), tmp_path, batch_size=2)
    lines = (tmp_path / "answers.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) >= 4
    (tmp_path / "answers.jsonl").write_bytes(b"".join(lines[:2]))
    (tmp_path / "answers.jsonl.rank0").write_bytes(b"".join(lines[1:3]))
    (tmp_path / "answers.jsonl.rank1").write_bytes(b"".join(lines[3:]) + b'{"name": "words", "id"')
    model = ScriptedModel(right_answers(12))
    assert run(model, word_items(12), tmp_path).count == 12
    assert len(asked_by(model)) == 12 - len(lines)
    assert len(read_answers(tmp_path)) == 12 and not list(tmp_path.glob("*.rank*"))
