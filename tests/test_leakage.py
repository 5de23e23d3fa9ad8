"""Training rows that overlap a benchmark."""

import json

from soundwave.eval.benchmarks.leakage import main, overlaps
from soundwave.eval.items import FileClip, Item


def item(name: str, *paths: str) -> Item:
    return Item(name, None, [FileClip(path) for path in paths], "text")


def test_ids_and_files_are_compared_by_name():
    items = [item("8-0001", "test/8-0001.flac"), item("q7", "7.v2.wav"), item("ted_9_0", "wav/ted_9.wav"), item("x")]
    trained = ["train/8-0001.wav", "8-0001", "C:\\clips\\7.V2.mp3", "ted_9.mp4", "other.wav", "7"]
    assert overlaps(trained, items) == {
        "8-0001": ["train/8-0001.wav", "8-0001"],
        "q7": ["C:\\clips\\7.V2.mp3"],
        "ted_9_0": ["ted_9.mp4"],
    }


def test_nothing_in_common():
    assert overlaps([], [item("a", "a.wav")]) == overlaps(["b"], [item("a", "a.wav")]) == {}


def test_rows_against_a_benchmark(tmp_path, capsys):
    clips = [{"path": f"digits/{k}_a.wav", "kind": "digit", "labels": {"digit": k}} for k in range(3)]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(clip) + "\n" for clip in clips))
    rows = [{"id": f"r{k}", "task": "asr", "answer": "x", "audio": f"copy/{k}_a.flac"} for k in (1, 5)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--benchmark", "spoken_digits", "--source", str(tmp_path), "--train", str(tmp_path / "rows.jsonl")]
    assert main(arguments) == 1
    assert capsys.readouterr().out == (
        "digits/1_a.wav: 1_a.flac\n1 of 3 items of spoken_digits share a name with a training row\n"
    )
