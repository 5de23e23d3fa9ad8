"""Rows from every kind of source, one schema, and errors that name file, line and field."""

import json

import pytest
from datasets import Audio, Dataset, Features, List, Value

from soundwave.training.data import FIELDS, DataError, concatenate_rows, load_rows, recordings, transcripts, with_audio

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
        "b,,text_qa,1+1?,two,,1.5\n"
    )
    assert load_rows(tmp_path / "rows.csv").to_list() == expected
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
    assert [row["id"] for row in load_rows(["folder/2.jsonl", "rows.csv"], tmp_path)] == ["b", "a", "b"]


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


@pytest.mark.parametrize(
    ("source", "name", "split", "revision"),
    [
        ("openslr/librispeech_asr:train.clean.100", "openslr/librispeech_asr", "train.clean.100", None),
        ("me/rows@v1.0:train", "me/rows", "train", "v1.0"),
        ("me/rows.v2@refs/convert/parquet", "me/rows.v2", "train", "refs/convert/parquet"),
    ],
)
def test_hub_ids_may_hold_dots(source, name, split, revision, monkeypatch, tmp_path):
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options))
        return Dataset.from_list([TEXT])

    monkeypatch.setattr("soundwave.training.data.load_dataset", load_dataset)
    assert load_rows(source, tmp_path)[0]["answer"] == "two"
    assert asked == [(name, {"split": split, "revision": revision})]
    for file in ("absent/rows.jsonl", "absent/rows.parquet", "a/b/c.wav", "./rows"):
        with pytest.raises(DataError, match="does not exist"):
            load_rows(file, tmp_path)
    assert len(asked) == 1


RECORDING = {"bytes": Value("binary"), "path": Value("string")}


def table(tmp_path, audio, feature, **columns):
    """A Parquet file of rows with these recordings."""
    values = {"task": "asr", "answer": "one", **columns}
    columns = {name: value if isinstance(value, list) else [value] * len(audio) for name, value in values.items()}
    features = {name: Value("string") for name in columns} | {"audio": feature}
    features |= {"transcript": List(Value("string"))} if isinstance(columns.get("transcript", [0])[0], list) else {}
    Dataset.from_dict({**columns, "audio": audio}, features=Features(features)).to_parquet(tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


@pytest.mark.parametrize("kind", ["text", "path alone", "struct", "list of texts", "list of structs"])
def test_relative_paths_of_tables_start_from_their_folder(tmp_path, kind):
    paths = ["wav/a.wav", "/abs/b.wav", "https://c.org/c.wav", None]
    feature = {"path": Value("string")} if kind == "path alone" else RECORDING
    if kind.endswith(("text", "texts")):
        feature, audio = Value("string"), paths
    else:
        audio = [path and dict.fromkeys(feature) | {"path": path} for path in paths]
    if kind.startswith("list"):
        feature, audio = List(feature), [one and [one, one] for one in audio]
    rows = load_rows(table(tmp_path, audio, feature))
    copies = 2 if kind.startswith("list") else 1
    expected = [str(tmp_path / "wav/a.wav"), *paths[1:3]]
    resolved = [[clip["path"] for clip in recordings(row)] for row in rows]
    assert resolved == [*([path] * copies for path in expected), []]
    assert rows.features["audio"] == (List(Audio(decode=False)) if copies == 2 else Audio(decode=False))


def test_bytes_of_tables_stay_beside_paths(tmp_path):
    audio = [{"bytes": b"RIFF", "path": "a.wav"}, {"bytes": None, "path": "b.wav"}, {"bytes": b"x", "path": None}]
    path = table(tmp_path, audio, RECORDING)
    rows = load_rows(path)
    assert rows["audio"][:] == [audio[0], {"bytes": None, "path": str(tmp_path / "b.wav")}, audio[2]]
    chosen = load_rows(Dataset.from_parquet(str(path)).select([2, 0]))
    assert chosen["audio"][:] == [audio[2], audio[0]]


@pytest.mark.parametrize(
    ("audio", "columns", "message"),
    [
        (["a", "b"], {"task": ["asr", None]}, "row 1, field 'task': missing"),
        (["a", "b"], {"task": ["asr", ""]}, "row 1, field 'task': missing"),
        (["a", "b"], {"answer": ["one", None]}, "row 1, field 'answer': missing"),
        (["a", "b"], {"trancript": "x"}, "field 'trancript': unknown; did you mean 'transcript'"),
        (["a", None], {"transcript": "x"}, "row 1, field 'transcript': given, but the row has no audio"),
        (["a", "b"], {"transcript": [["x"], ["x", "y"]]}, "row 0, field 'transcript': 1 texts for 1 recordings"),
        (["a", "b"], {"duration_s": "long"}, "row 0, field 'duration_s': 'long', expected seconds"),
        ([{"path": "a", "bytes": None}, {"path": None, "bytes": b""}], {}, "row 1, field 'audio'"),
        ([["a"], ["b"]], {"transcript": "x"}, "row 0, field 'transcript': one text for 1 recordings"),
    ],
)
def test_a_wrong_row_of_a_table_is_named(tmp_path, audio, columns, message):
    feature = RECORDING if isinstance(audio[0], dict) else Value("string")
    path = table(tmp_path, audio, List(feature) if isinstance(audio[0], list) else feature, **columns)
    with pytest.raises(DataError, match=message) as error:
        load_rows(path)
    assert str(path) in str(error.value)


def test_rows_with_audio(tmp_path, caplog):
    """Lists, single recordings and none, in selected rows too; how many are left out is said."""
    rows = [
        {"id": "0", "task": "asr", "audio": "a.wav", "answer": "a"},
        {"id": "1", "task": "text_qa", "answer": "b"},
        {"id": "2", "task": "asr", "audio": ["a.wav", "b.wav"], "answer": "c"},
        {"id": "3", "task": "asr", "audio": "c.wav", "answer": "d"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert with_audio(load_rows(path))["id"][:] == ["0", "2", "3"]
    assert "1 of 4 rows have no audio" in caplog.text
    assert with_audio(load_rows(path).select([3, 1]))["id"][:] == ["3"]
    with pytest.raises(DataError, match="none of the 1 rows has audio"):
        with_audio(load_rows(path).select([1]))
