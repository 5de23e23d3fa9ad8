"""Files of rows on a tiny random model: known scores, failures by name, the files, and what edits of them reveal."""

import copy
import json

import pytest
import soundfile
import torch
from datasets import Dataset

from soundwave.eval import results
from soundwave.eval.items import CellClip, FileClip
from soundwave.eval.models.soundwave import audio_inputs, generation_inputs
from soundwave.eval.rows import RowsBenchmark, evaluate_ctc, evaluate_files, evaluate_rows, read_rows, row_item
from soundwave.eval.tasks import TASKS, Task, get_task, reference_of
from soundwave.training.data import DataError, load_rows
from soundwave.training.encoder_cache import EncoderCache
from tests.conftest import SAMPLING_RATE, tone


@pytest.fixture(scope="module")
def model(tiny_model):
    # float64: a batch then gives the very ids that its rows give alone.
    return copy.deepcopy(tiny_model).double().eval()


@pytest.fixture
def rows(tmp_path):
    """Five spoken rows of different lengths with nonsense answers, read from a file as users keep them."""
    written = []
    for i, seconds in enumerate((0.4, 1.3, 0.9, 3.1, 0.6)):
        wave = tone(seconds, 300 + 90 * i)
        soundfile.write(tmp_path / f"{i}.wav", wave, SAMPLING_RATE)
        written.append(
            {
                "id": f"row-{i}",
                "audio": f"{i}.wav",
                "task": "asr",
                "instruction": "Transcribe the speech.",
                "answer": f"answer {i}",
                "transcript": f"answer {i}",
                "duration_s": seconds,
            }
        )
    (tmp_path / "asr.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    return list(load_rows(tmp_path / "asr.jsonl"))


def by_id(result):
    return {row["id"]: row["answer"] for row in result.answers}


def test_answers_of_a_batch_are_those_of_single_rows(model, processor, rows):
    together = evaluate_rows(model, processor, rows, "asr", batch_size=5, max_new_tokens=6, progress=False)
    for row in rows:
        inputs = generation_inputs(model, processor, [row])
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert by_id(together)[row["id"]] == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_scores_of_known_answers(model, processor, rows, tmp_path):
    task = Task("asr", "Speech recognition", "cer", ("sentence_accuracy",), max_new_tokens=6)
    answers = by_id(evaluate_rows(model, processor, rows, task, progress=False))
    assert any(answers.values()), "a random model is expected to say something"
    truth = [row | {"answer": answers[row["id"]]} for row in rows]
    right = evaluate_rows(model, processor, truth, task, progress=False)
    assert (right.value, right.also["sentence_accuracy"]["value"], right.count, right.failures) == (0, 1, 5, 0)
    truth[0]["answer"] = "zz" + truth[0]["answer"]  # two characters that were not said
    wrong = evaluate_rows(model, processor, truth, task, progress=False)
    assert wrong.value == pytest.approx(2 / sum(len(" ".join(row["answer"].split())) for row in truth))
    assert wrong.also["sentence_accuracy"]["value"] == pytest.approx(4 / 5)
    assert wrong.interval[0] <= wrong.value <= wrong.interval[1]


def test_ctc_answers_are_the_greedy_transcripts(model, tiny_ctc, processor, rows):
    for head in (model, copy.deepcopy(tiny_ctc).double()):
        result = evaluate_ctc(head, processor, rows, batch_size=2, progress=False)
        for row in rows:
            ids = head.transcribe_ids(**audio_inputs(head, processor, [row]))[0]
            assert by_id(result)[row["id"]] == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert result.decoding["strategy"] == "greedy CTC"


def test_rows_with_several_recordings_and_none(model, processor, rows):
    both = rows[0] | {
        "id": "two",
        "audio": [rows[0]["audio"], rows[1]["audio"]],
        "transcript": ["answer 0", "answer 1"],
    }
    result = evaluate_ctc(model, processor, [both], progress=False)
    single = by_id(evaluate_ctc(model, processor, rows[:2], progress=False))
    assert result.answers[0]["reference"] == "answer 0 answer 1"
    assert result.answers[0]["answer"] == f"{single['row-0']} {single['row-1']}"
    text = {"id": "t", "audio": None, "task": "text_qa", "instruction": "what is big", "answer": "small"}
    mixed = evaluate_rows(model, processor, [text, both], "asr", max_new_tokens=3, progress=False)
    assert mixed.count == 2


def test_text_rows_on_the_llm_alone(model, processor):
    row = {"id": "t", "audio": None, "task": "text_qa", "instruction": "what is big", "answer": "small"}
    alone = evaluate_rows(model.language_model, processor, [row], "text_qa", max_new_tokens=4, progress=False)
    whole = evaluate_rows(model, processor, [row], "text_qa", max_new_tokens=4, progress=False)
    assert by_id(alone) == by_id(whole)
    assert alone.model["class"] == "LlamaForCausalLM"


def test_features_from_the_cache_are_those_of_the_encoder(model, processor, rows, tmp_path):
    cache = EncoderCache.build(tmp_path / "cache", model, processor, [row["audio"] for row in rows], progress=False)
    cached = audio_inputs(model, processor, rows, cache)
    fresh = audio_inputs(model, processor, rows)
    assert cached["encoder_features"].dtype == torch.float64
    torch.testing.assert_close(cached["windows_per_audio"], fresh["windows_per_audio"])
    encoded = model.encode(fresh["input_features"], fresh["input_features_mask"])
    valid = cached["input_features_mask"][:, ::2].bool()
    assert valid.sum() > 0
    torch.testing.assert_close(
        cached["encoder_features"][valid], encoded[:, : valid.shape[1]][valid], atol=5e-3, rtol=5e-3
    )
    assert (
        evaluate_rows(model, processor, rows, "asr", encoder_cache=cache, max_new_tokens=3, progress=False).count == 5
    )


def test_failing_items_are_counted_and_named(model, processor, rows, tmp_path):
    (tmp_path / "broken.wav").write_bytes(b"RIFF but no sound")
    bad = [
        rows[0] | {"id": "missing", "audio": str(tmp_path / "nowhere.wav")},
        rows[0] | {"id": "broken", "audio": str(tmp_path / "broken.wav")},
        rows[0] | {"id": "no-reference", "answer": None},
    ]
    out = tmp_path / "out"
    result = evaluate_rows(model, processor, rows + bad, "asr", output_dir=out, max_new_tokens=3, progress=False)
    assert (result.count, result.failures) == (5, 3)
    assert set(result.failed) == {"missing", "broken", "no-reference"}
    assert "nowhere.wav" in result.failed["missing"]
    assert "'answer' is None" in result.failed["no-reference"]
    clean = evaluate_rows(model, processor, rows, "asr", max_new_tokens=3, progress=False)
    assert result.value == clean.value, "failed items must not move the figure"
    assert {row["id"] for row in results.read_answers(out) if row["error"]} == set(result.failed)
    assert str(tmp_path) not in (out / "results.json").read_text() + (out / "answers.jsonl").read_text()


BROKEN = {
    "nothing": {"answer": None, "transcript": None},
    "a-list": {"answer": ["a"]},
    "odd-audio": {"audio": {"file": "x.wav"}},
    "no-time": {"duration_s": "long"},
    "no-task": {"task": None},
}


def broken_rows(folder):
    """Appends broken rows, and one that is no object, to the file of the good ones."""
    file = folder / "asr.jsonl"
    good = json.loads(file.read_text().splitlines()[0])
    bad = [{**good, "id": name, **changes} for name, changes in BROKEN.items()]
    file.write_text(file.read_text() + "".join(json.dumps(row) + "\n" for row in [*bad, ["no", "object"]]))
    return file


def test_broken_rows_of_a_file_are_counted_and_named_and_the_rest_is_scored(model, processor, rows, tmp_path):
    clean = evaluate_rows(model, processor, rows, "asr", max_new_tokens=3, progress=False)
    file, out = broken_rows(tmp_path), tmp_path / "out"
    (result,) = evaluate_files(model, processor, [file], output_dir=out, max_new_tokens=3, progress=False)
    assert (result.value, result.count, result.failures) == (clean.value, 5, 6)
    assert set(result.failed) == {*BROKEN, "asr:11"}
    assert "'answer' is None, expected the reference of task 'asr'" in result.failed["nothing"]
    assert result.failed["a-list"] == "asr.jsonl, line 7, field 'answer': ['a'], expected text."
    assert "asr.jsonl, line 11: a list, expected an object" in result.failed["asr:11"]
    assert "learn" not in str(result.failed)
    assert str(tmp_path) not in (out / "results.json").read_text() + (out / "answers.jsonl").read_text()
    with pytest.raises(DataError, match="there is nothing to learn"):
        load_rows(file)


def test_broken_rows_are_counted_for_a_ctc_head(tiny_ctc, processor, rows, tmp_path):
    (result,) = evaluate_files(tiny_ctc, processor, [broken_rows(tmp_path)], progress=False)
    assert (result.task, result.count, set(result.failed)) == ("ctc", 5, {*BROKEN, "asr:11"} - {"nothing"})


def test_broken_rows_of_a_table_are_counted_and_named(model, processor, rows, tmp_path):
    columns = ("audio", "task", "instruction", "answer", "transcript")
    table = [{name: row[name] for name in columns} for row in rows]
    table[1] |= {"answer": None, "transcript": None}
    table[2] |= {"audio": {"path": None, "bytes": None}}
    Dataset.from_list(table).to_parquet(tmp_path / "table.parquet")
    (result,) = evaluate_files(model, processor, [tmp_path / "table.parquet"], max_new_tokens=2, progress=False)
    assert (result.count, set(result.failed)) == (3, {"table:1", "table:2"})
    assert "table.parquet, row 2, field 'audio'" in result.failed["table:2"]


@pytest.mark.parametrize("name", ["asr.jsonl", "rows.json", "rows.csv", "rows.parquet", "saved"])
def test_good_files_are_read_as_training_reads_them(name, rows, tmp_path):
    source = tmp_path / name
    flat = [{key: row[key] for key in ("task", "instruction", "answer")} for row in rows]
    if name == "rows.json":
        source.write_text(json.dumps(flat))
    elif name == "rows.csv":
        Dataset.from_list(flat).to_csv(source)
    elif name == "rows.parquet":
        Dataset.from_list(flat).to_parquet(source)
    elif name == "saved":
        Dataset.from_list(flat).save_to_disk(source)
    assert read_rows(str(source)) == list(load_rows(source))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"task": "asr", "anwser": "a"}\n', "field 'anwser': unknown; did you mean 'answer'"),
        (
            '{"id": "a", "answer": "b"}\n',
            "no row names its task; the first, a: x.jsonl, line 1, field 'task': missing",
        ),
        ("\n", "x.jsonl holds no rows"),
    ],
)
def test_files_that_cannot_be_used_are_refused(text, message, tmp_path):
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        RowsBenchmark.from_file(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match="does not exist"):
        RowsBenchmark.from_file(tmp_path / "nowhere.jsonl")


def test_reasons_stay_short(model, processor, rows, tmp_path):
    bad = [
        rows[0] | {"id": "path", "audio": "a" * 5000 + ".wav"},
        rows[1] | {"id": "folder", "audio": "/".join(["b" * 200] * 30) + "/x.wav"},
    ]
    result = evaluate_rows(model, processor, rows + bad, "asr", max_new_tokens=2, progress=False)
    assert result.count == 5 and max(len(reason) for reason in result.failed.values()) < 300
    assert "aaa.wav is not there" in result.failed["path"] and "x.wav is not there" in result.failed["folder"]


def test_all_failing_is_an_error(model, processor, rows, tmp_path):
    bad = [row | {"audio": str(tmp_path / "nowhere.wav")} for row in rows]
    with pytest.raises(ValueError, match=r"none of 5 items was answered.*nowhere\.wav"):
        evaluate_rows(model, processor, bad, "asr", progress=False)
    with pytest.raises(ValueError, match="no rows"):
        evaluate_rows(model, processor, [], "asr", progress=False)


def test_files(model, processor, rows, tmp_path):
    out = tmp_path / "out"
    result = evaluate_rows(
        model,
        processor,
        rows,
        "asr",
        name="asr_seen",
        output_dir=out,
        max_new_tokens=3,
        progress=False,
        command="soundwave test",
    )
    evaluate_ctc(model, processor, rows, name="ctc_seen", output_dir=out, progress=False)
    entry, ctc = results.read_results(out)
    assert (entry["name"], ctc["name"]) == ("asr_seen", "ctc_seen")
    for key in (
        "task",
        "dataset",
        "metric",
        "settings",
        "value",
        "interval",
        "count",
        "failures",
        "model",
        "decoding",
    ):
        assert entry[key] == json.loads(json.dumps(result.to_dict()))[key]
    assert entry["dataset"]["revision"].startswith("sha256:") and entry["dataset"]["rows"] == 5
    assert entry["hardware"]["cores"] and torch.__version__.startswith(entry["packages"]["torch"])
    assert entry["time"].endswith("+00:00") and entry["command"] == "soundwave test"
    assert str(tmp_path) not in (out / "results.json").read_text() + (out / "answers.jsonl").read_text()
    answers = [row for row in results.read_answers(out) if row["name"] == "asr_seen"]
    assert sorted(row["id"] for row in answers) == [row["id"] for row in rows]
    assert all((out / row["audio"][0]).is_file() for row in answers), "paths start from the answers' folder"
    # A second run under the same name replaces the first, and leaves the others.
    evaluate_rows(model, processor, rows[:2], "asr", name="asr_seen", output_dir=out, max_new_tokens=3, progress=False)
    assert len([row for row in results.read_answers(out) if row["name"] == "asr_seen"]) == 2
    assert [(e["name"], e["count"]) for e in results.read_results(out)] == [("ctc_seen", 5), ("asr_seen", 2)]


def test_every_figure_follows_from_the_answers(model, processor, rows, tmp_path):
    evaluate_rows(model, processor, rows, "asr", output_dir=tmp_path, max_new_tokens=3, progress=False)
    (entry,), answers = results.read_results(tmp_path), results.read_answers(tmp_path)
    assert results.rescore(entry, answers) == []
    better = entry | {"value": entry["value"] / 2}
    assert "value is" in results.rescore(better, answers)[0]
    narrow = copy.deepcopy(entry)
    narrow["also"]["cer"]["value"] = 0.0
    assert "cer value" in results.rescore(narrow, answers)[0]
    assert "count is 5" in results.rescore(entry, answers[1:] + [answers[0] | {"error": "lost"}])[
        0
    ] or results.rescore(entry, answers[1:])
    assert "no answer" in results.rescore(entry, [])[0]


def test_files_by_name_and_task(tiny_model, tiny_ctc, processor, rows, tmp_path):
    (tmp_path / "asr.jsonl").rename(tmp_path / "asr_seen.jsonl")
    question = {"id": "q", "task": "text_qa", "instruction": "what is big", "answer": "small"}
    (tmp_path / "text_qa.jsonl").write_text(json.dumps(question) + "\n")
    files = [tmp_path / "asr_seen.jsonl", tmp_path / "text_qa.jsonl"]
    done = evaluate_files(tiny_model, processor, files, limit=2, max_new_tokens=2, progress=False)
    assert [(r.name, r.task, r.count) for r in done] == [("asr_seen", "asr", 2), ("text_qa", "text_qa", 1)]
    done = evaluate_files(tiny_ctc, processor, files, progress=False)
    assert [(r.name, r.task, r.count) for r in done] == [("asr_seen", "ctc", 5)]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(files[0].read_text() + files[1].read_text())
    with pytest.raises(ValueError, match="tasks asr, text_qa"):
        evaluate_files(tiny_model, processor, [mixed], progress=False)


def test_pooling_runs(model, processor, rows, tmp_path):
    for seed, some in enumerate((rows[:2], rows)):
        evaluate_ctc(model, processor, some, name="a", output_dir=tmp_path / str(seed), progress=False)
    first, second = (results.read_results(tmp_path / str(seed))[0] for seed in (0, 1))
    pooled = results.pool([tmp_path / "0", tmp_path / "1"])["a"]
    # Two words in every reference: the pooled rate is the mean weighted by items.
    assert pooled.count == 7
    assert pooled.value == pytest.approx((2 * first["value"] + 5 * second["value"]) / 7)
    evaluate_ctc(model, processor, rows, name="a", normalizer="basic", output_dir=tmp_path / "0", progress=False)
    with pytest.raises(ValueError, match="evaluate both alike"):
        results.pool([tmp_path / "0", tmp_path / "1"])


def test_the_model_keeps_its_mode(model, processor, rows):
    model.train()
    evaluate_rows(model, processor, rows[:1], "asr", max_new_tokens=2, progress=False)
    assert model.training
    model.eval()


def test_tasks():
    assert set(TASKS) == {"asr", "st", "sound", "intent", "sound_class", "spoken_qa", "text_qa", "ctc"}
    assert reference_of({"id": "a", "transcript": "x"}, get_task("ctc")) == "x"
    with pytest.raises(ValueError, match="task 'song' is unknown; choose one of asr"):
        get_task("song")


def test_two_files_of_one_name_are_refused(tmp_path):
    """The answers of one would take the place of the other's."""
    with pytest.raises(ValueError, match="several files are called asr"):
        evaluate_files(None, None, [tmp_path / "a" / "asr.jsonl", tmp_path / "b" / "asr.jsonl"])


def test_a_conversation_is_asked_up_to_its_last_turn(model, processor, rows, tmp_path):
    """Its reference is the last turn, and its prompt that of the training row."""
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Listen."}, {"type": "audio", "path": "0.wav"}]},
        {"role": "assistant", "content": "I heard it."},
        {"role": "user", "content": "What was it?"},
        {"role": "assistant", "content": "a tone"},
    ]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"id": "t", "task": "spoken_qa", "messages": turns}) + "\n")
    (row,) = load_rows(tmp_path / "talk.jsonl")
    (result,) = evaluate_files(model, processor, [tmp_path / "talk.jsonl"], max_new_tokens=6, progress=False)
    inputs = generation_inputs(model, processor, [row])
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert result.answers[0]["answer"] == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert result.answers[0]["reference"] == "a tone" and result.answers[0]["audio"] == ["0.wav"]


def test_rows_as_items(rows):
    item = row_item(rows[1] | {"source": "mine"}, get_task("asr"))
    assert (item.id, item.instruction, item.reference) == ("row-1", "Transcribe the speech.", "answer 1")
    assert isinstance(item.clips[0], FileClip) and item.duration_s == 1.3 and item.fields == {"source": "mine"}
    embedded = row_item(rows[0] | {"audio": {"path": "x.wav", "bytes": b"..."}}, get_task("asr"))
    assert isinstance(embedded.clips[0], CellClip) and embedded.clips[0].name == "x.wav"
    assert "expected the reference" in row_item(rows[0] | {"answer": None}, get_task("asr")).fields["error"]


def test_revision_of_rows_depends_on_content_not_on_the_machine(model, processor, rows, tmp_path):
    def revision(some):
        return evaluate_ctc(model, processor, some, progress=False).dataset["revision"]

    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in tmp_path.glob("*.wav"):
        path.rename(moved / path.name)
    elsewhere = [row | {"audio": {"path": str(moved / f"{i}.wav"), "bytes": None}} for i, row in enumerate(rows)]
    assert revision(elsewhere) == revision(elsewhere[:]) and revision(elsewhere).startswith("sha256:")
    before = revision(elsewhere)
    for path in moved.glob("*.wav"):
        path.rename(tmp_path / path.name)
    assert revision(rows) == before
    rows[0]["transcript"] += "!"
    assert revision(rows) != before


def test_answers_at_the_bound_are_counted(model, processor, rows):
    result = evaluate_rows(model, processor, rows, "asr", max_new_tokens=1, progress=False)
    assert result.cut == sum(row["cut"] for row in result.answers) > 0
