"""Rows from every kind of source, one schema, and errors that name file, line and field."""

import json

import pytest
from datasets import Audio, Dataset, Features, List, Value

from soundwave.training.data import FIELDS, DataError, concatenate_rows, load_rows, recordings, transcripts

SPOKEN = {
    "id": "a",
    "audio": "wav/a.wav",
    "task": "asr",
    "instruction": "Write.",
    "answer": "one",
    "transcript": "one",
}
TEXT = {"id": "b", "audio": None, "task": "text_qa", "instruction": "1+1?", "answer": "two", "duration_s": 1.5}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jsonl_rows_have_the_schema_and_absolute_paths(tmp_path):
    rows = load_rows(write(tmp_path / "rows.jsonl", [SPOKEN, TEXT]))
    assert isinstance(rows, Dataset) and rows.column_names == list(FIELDS)
    assert rows.features["audio"] == Audio(decode=False)
    assert rows[0]["audio"] == {"bytes": None, "path": str(tmp_path / "wav/a.wav")}
    assert recordings(rows[0]) == [rows[0]["audio"]] and transcripts(rows[0]) == ["one"]
    assert rows[1]["audio"] is None and recordings(rows[1]) == [] == transcripts(rows[1])
    assert rows[1]["duration_s"] == 1.5


def test_every_source_gives_the_same_rows(tmp_path):
    (tmp_path / "wav").mkdir()
    (tmp_path / "wav" / "a.wav").write_bytes(b"RIFF")
    expected = load_rows(write(tmp_path / "rows.jsonl", [SPOKEN, TEXT])).to_list()
    (tmp_path / "rows.json").write_text(json.dumps([SPOKEN, TEXT]))
    assert load_rows("rows.json", tmp_path).to_list() == expected
    (tmp_path / "rows.csv").write_text(
        "id,audio,task,instruction,answer,transcript,duration_s\na,wav/a.wav,asr,Write.,one,one,\n"
    )
    assert load_rows(tmp_path / "rows.csv").to_list() == expected[:1]
    # Parquet with paths as plain text, without the columns that are all null; then as audio with bytes.
    names = ("id", "audio", "task", "instruction", "answer", "transcript")
    Dataset.from_list([{name: row.get(name) for name in names} for row in (SPOKEN, TEXT)]).to_parquet(
        tmp_path / "rows.parquet"
    )
    assert load_rows(tmp_path / "rows.parquet").to_list() == [expected[0], {**expected[1], "duration_s": None}]
    load_rows(tmp_path / "rows.jsonl").save_to_disk(tmp_path / "saved")
    embedded = {"bytes": b"RIFF", "path": "a.wav"}  # save_to_disk takes the files along
    assert load_rows(tmp_path / "saved").to_list() == [{**expected[0], "audio": embedded}, expected[1]]
    assert load_rows(load_rows(tmp_path / "rows.jsonl")).to_list() == expected
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "1.jsonl", [SPOKEN]), write(folder / "2.jsonl", [TEXT])
    assert [row["id"] for row in load_rows(folder)] == ["a", "b"]
    assert [row["id"] for row in load_rows(["folder/2.jsonl", "rows.csv"], tmp_path)] == ["b", "a"]


def test_audio_bytes_stay_as_they_are():
    features = Features(
        {
            "audio": {"bytes": Value("binary"), "path": Value("string")},
            "task": Value("string"),
            "answer": Value("string"),
        }
    )
    rows = Dataset.from_dict(
        {"audio": [{"bytes": b"RIFF", "path": None}], "task": ["asr"], "answer": ["x"]}, features=features
    )
    loaded = load_rows(rows.cast_column("audio", Audio(decode=False)))
    assert loaded[0]["audio"] == {"bytes": b"RIFF", "path": None} and loaded[0]["id"]


def test_several_recordings_and_conversations(tmp_path):
    pair = {
        "task": "compare",
        "audio": ["a.wav", "b.wav"],
        "transcript": ["one", None],
        "instruction": "?",
        "answer": "no",
    }
    talk = {
        "task": "chat",
        "messages": [
            {"role": "user", "content": [{"type": "audio", "path": "c.wav"}, {"type": "text", "text": "and?"}]},
            {"role": "assistant", "content": "yes"},
        ],
    }
    rows = load_rows([write(tmp_path / "one.jsonl", [SPOKEN]), write(tmp_path / "more.jsonl", [pair, talk])])
    assert rows.features["audio"] == List(Audio(decode=False))
    assert [[clip["path"].rpartition("/")[2] for clip in recordings(row)] for row in rows] == [
        ["a.wav"],
        ["a.wav", "b.wav"],
        ["c.wav"],
    ]
    assert [transcripts(row) for row in rows] == [["one"], ["one", None], [None]]
    assert rows[2]["messages"][1]["content"] == [{"type": "text", "text": "yes"}]
    assert concatenate_rows([rows, rows]).num_rows == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": None}, "line 2, field 'task': missing"),
        ({"answer": 5}, "line 2, field 'answer': 5, expected text"),
        ({"answer": None, "transcript": None}, "line 2, field 'answer': missing"),
        ({"trancript": "x", "transcript": ...}, "line 2, field 'trancript': unknown; did you mean 'transcript'"),
        ({"audio": 3}, "line 2, field 'audio': 3, expected a path"),
        ({"audio": None}, "line 2, field 'transcript': given, but the row has no audio"),
        ({"audio": ["a.wav", "b.wav"]}, "line 2, field 'transcript': one text for 2 recordings"),
        ({"audio": ["a.wav"], "transcript": ["x", "y"]}, "line 2, field 'transcript': 2 texts for 1 recordings"),
        ({"duration_s": "long"}, "line 2, field 'duration_s': 'long', expected seconds"),
        ({"messages": [{"role": "user", "content": "x"}]}, "line 2, field 'messages': the last turn is the user's"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "needs a role"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "expected an item of type audio"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, change, message):
    wrong = {name: value for name, value in {**SPOKEN, **change}.items() if value is not ...}
    path = write(tmp_path / "rows.jsonl", [SPOKEN, wrong])
    with pytest.raises(DataError, match=message) as error:
        load_rows(path)
    assert str(path) in str(error.value)


def test_sources_that_cannot_be_read(tmp_path):
    for source, message in (("absent.jsonl", "does not exist"), ("rows.txt", "unknown kind '.txt'")):
        (tmp_path / "rows.txt").write_text("x")
        with pytest.raises(DataError, match=message):
            load_rows(source, tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n{')
    with pytest.raises(DataError, match="line 1, field 'task'"):
        load_rows(tmp_path / "bad.jsonl")
    (tmp_path / "cut.jsonl").write_text(json.dumps(TEXT) + "\n{")
    with pytest.raises(DataError, match="line 2: not JSON"):
        load_rows(tmp_path / "cut.jsonl")
    (tmp_path / "wide.csv").write_text("id,task,answer\n1,asr,x,y\n")
    with pytest.raises(DataError, match="line 2: as many values"):
        load_rows(tmp_path / "wide.csv")
    with pytest.raises(DataError, match="column 'task' is missing"):
        load_rows(Dataset.from_dict({"answer": ["x"]}))
    with pytest.raises(DataError, match="no data source"):
        load_rows([])
