"""What the commands take: files, folders, URLs and data sets become jobs, each recording once."""

import json
import os
from pathlib import Path

import pytest
import soundfile
from datasets import Audio, Dataset, Features, List, Value

from soundwave.apps.inputs import find_jobs, longest_first, recording, with_duration
from soundwave.processing import load_audio
from tests.conftest import SAMPLING_RATE, tone


def write(path: Path, seconds: float = 0.1) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds), SAMPLING_RATE)
    return str(path)


def names(jobs) -> list[str]:
    return [job.name for job in jobs]


def test_a_folder_gives_its_audio_files_at_any_depth_sorted(tmp_path):
    files = [write(tmp_path / name) for name in ("a.wav", "b.FLAC", "deep/er/c.ogg", "deep/d.mp3")]
    write(tmp_path / "._a.wav")
    write(tmp_path / ".hidden" / "e.wav")
    (tmp_path / "notes.txt").write_text("no audio")
    os.symlink(tmp_path, tmp_path / "deep" / "loop")
    jobs, errors = find_jobs([str(tmp_path)])
    assert sorted(names(jobs)) == sorted(files) and not errors
    assert [job.target for job in jobs] == ["a", "b", "deep/d", "deep/er/c"]


def test_each_recording_once_however_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x" / "a.wav")
    jobs, _ = find_jobs(["./x/a.wav", "x", str(tmp_path / "x" / "a.wav"), "none.wav", "http://h/a.wav"])
    assert names(jobs) == ["./x/a.wav", "none.wav", "http://h/a.wav"]


def test_a_folder_without_audio_is_named(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    jobs, errors = find_jobs([str(empty), write(tmp_path / "a.wav")])
    assert len(jobs) == 1 and "holds no audio file" in errors[str(empty)] and ".wav" in errors[str(empty)]


def test_written_files_mirror_the_inputs_and_never_meet(tmp_path):
    files = ["x/a.wav", "x/a.flac", "y/a.wav", "y/b.1.wav", "y/A.WAV"]
    jobs, _ = find_jobs([write(tmp_path / name) for name in files])
    assert [job.target for job in jobs] == ["x/a.wav", "x/a.flac", "y/a.wav", "y/b.1", "y/A.WAV-2"]
    jobs, _ = find_jobs(["http://h/talks/a%20b.wav?key=1", "http://i/a b.wav", str(tmp_path / "x" / "a.wav")])
    assert [job.target for job in jobs] == ["a_b.wav", "a_b.wav-2", "a"]


def test_lengths_come_from_headers_and_unknown_ones_last(tmp_path):
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no audio")
    jobs, _ = find_jobs([write(tmp_path / "short.wav", 0.1), str(broken), write(tmp_path / "long.flac", 0.5)])
    ordered = longest_first(map(with_duration, jobs))
    assert [job.duration for job in ordered] == [0.5, 0.1, None]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_text_manifests(suffix, tmp_path):
    """Rows as for training; paths are relative to the manifest."""
    file = write(tmp_path / "wav" / "a.wav", 0.3)
    manifest = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        manifest.write_text("id,audio,task\none,wav/a.wav,asr\n2,http://h/b.wav,asr\n")
    else:
        rows = [{"id": "one", "audio": "wav/a.wav", "task": "asr"}, {"id": 2, "audio": "http://h/b.wav"}]
        manifest.write_text("\n".join(map(json.dumps, rows)) if suffix == "jsonl" else json.dumps(rows))
    jobs, errors = find_jobs([str(manifest)])
    assert not errors and [job.key for job in jobs] == [(str(manifest), "one"), (str(manifest), "2")]
    assert len(load_audio(recording(jobs[0]))) == len(load_audio(file))
    assert with_duration(jobs[0]).duration == 0.3 and recording(jobs[1]) == "http://h/b.wav"


def test_rows_with_several_recordings_none_or_none_named(tmp_path):
    rows = [
        {"id": "two", "audio": ["a.wav", "b.wav"], "answer": "x"},
        {"id": "text", "audio": None},
        {"audio": "c.wav", "duration_s": 2.5},
    ]
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    jobs, _ = find_jobs([str(manifest)])
    assert names(jobs) == ["two#0", "two#1", "rows:2"] and jobs[2].duration == 2.5
    assert jobs[0].path == str(tmp_path / "a.wav")


@pytest.mark.parametrize("kind", ["parquet", "folder of parquet", "saved"])
@pytest.mark.parametrize("lists", [False, True])
def test_data_sets_with_recordings_inside(kind, lists, tmp_path):
    """Bytes stay where they are until a row is read; no FFmpeg is needed."""
    clips = [Path(write(tmp_path / "source" / f"{k}.wav", 0.1 + 0.1 * k)).read_bytes() for k in range(3)]
    column = [{"bytes": clip, "path": None} for clip in clips] + [None]
    plain = {"bytes": Value("binary"), "path": Value("string")}
    audio = List(plain) if lists else plain
    features = Features({"id": Value("string"), "speech": audio, "text": Value("string")})
    rows = {"id": ["../a", "b", "c", "d"], "speech": [[x, x] if x and lists else x for x in column], "text": [""] * 4}
    table = Dataset.from_dict(rows, features=features)
    table = table.cast_column("speech", List(Audio(decode=False)) if lists else Audio(decode=False))
    if lists:
        table = table.rename_column("speech", "audio")
    folder = tmp_path / "data"
    if kind == "saved":
        table.save_to_disk(str(folder))
    else:
        folder.mkdir()
        table.to_parquet(str(folder / "rows.parquet"))
    jobs, errors = find_jobs([str(folder / "rows.parquet") if kind == "parquet" else str(folder)])
    assert not errors
    assert names(jobs) == (["../a#0", "../a#1", "b#0", "b#1", "c#0", "c#1"] if lists else ["../a", "b", "c"])
    assert jobs[0].target.startswith(".._a")
    assert len(load_audio(recording(jobs[-1]))) == pytest.approx(0.3 * SAMPLING_RATE)


def test_what_is_wrong_with_a_data_set_is_said(tmp_path):
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text('{"id": "1", "sound": "a.wav"}\n')
    _, errors = find_jobs([str(manifest), "data/none", "data/none.wav"])
    assert "line 1" in errors[str(manifest)] and "audio" in errors[str(manifest)]
    assert "no file or folder here, and no data set on the Hub" in errors["data/none"]
    assert "data/none.wav" not in errors  # a file, which may be there when it is read
    manifest.write_text('{"id": "1", "audio": "a.wav"}\n{"id": "1", "audio": "b.wav"}\n')
    with pytest.raises(ValueError, match="have the id '1'"):
        find_jobs([str(manifest)])


def test_a_damaged_data_set_does_not_stop_the_others(tmp_path):
    damaged = {"rows.parquet": "no parquet", "rows.jsonl": "5\n", "rows.json": '{"audio": "a.wav"}'}
    for name, content in damaged.items():
        (tmp_path / name).write_text(content)
    sources = [str(tmp_path / name) for name in damaged]
    jobs, errors = find_jobs([*sources, write(tmp_path / "a.wav")])
    assert list(errors) == sources and names(jobs) == [str(tmp_path / "a.wav")]


def test_a_row_that_says_nonsense_does_not_stop_the_others(tmp_path):
    rows = [{"id": "a", "audio": {"array": [0.0]}}, {"id": "b", "audio": "b.wav", "duration_s": "long"}]
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    jobs, errors = find_jobs([str(manifest)])
    assert not errors and names(jobs) == ["a", "b"] and [job.duration for job in jobs] == [None, None]


def test_only_the_recordings_of_a_row_are_read(tmp_path):
    """Others beside them would be decoded, which needs FFmpeg."""
    clip = {"bytes": Path(write(tmp_path / "a.wav")).read_bytes(), "path": None}
    plain = {"bytes": Value("binary"), "path": Value("string")}
    table = Dataset.from_dict({"audio": [clip], "noisy": [clip]}, features=Features({"audio": plain, "noisy": plain}))
    table.cast_column("audio", Audio()).cast_column("noisy", Audio()).save_to_disk(str(tmp_path / "data"))
    jobs, errors = find_jobs([str(tmp_path / "data")])
    assert not errors and len(load_audio(recording(jobs[0]))) == pytest.approx(0.1 * SAMPLING_RATE)


@pytest.mark.parametrize("name", ["", ".", "..", "中" * 200, "http://h/", "http://h/.."])
def test_written_files_have_names_of_their_own(name, tmp_path):
    """Whatever an id or an address says: never a folder, and none too long for the file system."""
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text(json.dumps({"id": name, "audio": "a.wav"}))
    source = name if name.startswith("http") else str(manifest)
    (job,) = find_jobs([source])[0]
    assert job.target.strip(".") and "/" not in job.target and len(f".{job.target}.TextGrid.tmp".encode()) < 256


def test_a_subset_is_of_a_data_set_on_the_hub(tmp_path):
    with pytest.raises(ValueError, match="--subset en is for data sets on the Hub"):
        find_jobs([write(tmp_path / "a.wav")], subset="en")
