"""`soundwave transcribe` over many recordings: outputs that resume, timed files, several processes, the edges."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
import torch

from soundwave import SoundwaveForConditionalGeneration
from soundwave.apps import cli, transcriber
from soundwave.apps.inputs import Job
from soundwave.apps.transcribe import Transcription
from soundwave.apps.transcriber import Transcriber, Unreadable, read, read_ahead
from tests.conftest import SAMPLING_RATE, tone

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """30 short clips in two folders, one of which cannot be read."""
    pytest.importorskip("espeakng_loader", reason='needs the embedded synthesizer: pip install "soundwave[tiny]"')
    from soundwave.training.tiny.grammar import DIGITS
    from soundwave.training.tiny.synthesizer import SYNTHESIZER_RATE, UNSEEN_VOICES, synthesizer

    folder = tmp_path_factory.mktemp("clips")
    (folder / "b").mkdir()
    for k in range(29):
        spoken = synthesizer().speak(" ".join(DIGITS[k % 10 :][: 1 + k % 3]), UNSEEN_VOICES[k % 4])
        path = folder / ("b" if k % 3 else "") / f"{k:02}.wav"
        soundfile.write(path, spoken.samples, SYNTHESIZER_RATE)
    (folder / "b" / "broken.wav").write_bytes(b"no recording")
    return folder


def records(path: Path) -> dict[str, dict]:
    """By name, after a look whether each name is there once."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    named = {row.get("file", row.get("id")): row for row in rows}
    assert len(named) == len(rows)
    return named


def texts(rows: dict[str, dict]) -> dict[str, str]:
    """What was heard in each, or that nothing could be; confidences differ in the last digits between batches."""
    return {name: row.get("text", "an error") for name, row in rows.items()}


def run_command(*arguments: str, launcher: tuple[str, ...] = (), wait: bool = True):
    command = [sys.executable, *launcher, "-m", "soundwave.apps.cli", "transcribe", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not wait:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def kill_when(process: subprocess.Popen, ready) -> None:
    """Kill a process and its children, as soon as it is ready and in any case."""
    deadline = time.monotonic() + 120
    try:
        while not ready():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        if process.poll() is None:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for pid in (*map(int, children), process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def uninterrupted(clips, tmp_path_factory) -> dict[str, dict]:
    """What one process writes about the clips."""
    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert cli.main(["transcribe", str(clips), "--output", str(output)]) == 1
    return records(output)


def test_output_has_a_line_for_each_recording(clips, uninterrupted, capsys):
    assert len(uninterrupted) == 30
    heard = dict(uninterrupted)
    broken = heard.pop(str(clips / "b" / "broken.wav"))
    assert set(broken) == {"file", "error"} and "broken.wav" in broken["error"]
    for name, row in heard.items():
        assert row["duration"] == pytest.approx(soundfile.info(name).duration, abs=0.001)
        assert row["segments"][-1]["end"] <= row["duration"] + 0.04
    assert len({row["text"] for row in heard.values()}) > 20  # or the comparisons below would say little
    assert cli.main(["transcribe", str(clips / "00.wav")]) == 0
    assert capsys.readouterr().out == uninterrupted[str(clips / "00.wav")]["text"] + "\n"


def test_killed_and_run_again_each_file_is_there_once(clips, uninterrupted, tmp_path):
    output = tmp_path / "out.jsonl"
    options = [str(clips), "--output", str(output), "--batch-size", "2"]
    process = run_command(*options, wait=False)
    kill_when(process, lambda: output.is_file() and output.read_bytes().count(b"\n") >= 2)
    before = output.read_bytes()
    assert before.count(b"\n") < 30
    output.write_bytes(before + b'{"file": "half a li')  # a kill within a write, which is rare
    assert cli.main(["transcribe", *options]) == 1
    assert output.read_bytes().startswith(before[: before.rfind(b"\n") + 1])  # what was done is not done again
    assert texts(records(output)) == texts(uninterrupted)


@pytest.mark.slow
def test_two_processes_do_each_file_once_and_one_goes_on(clips, uninterrupted, tmp_path):
    """Also when they are killed: a single process then takes over what each of them did."""
    output = tmp_path / "out.jsonl"
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    options = [str(clips), "--output", str(output), "--batch-size", "2"]
    process = run_command(*options, launcher=launcher, wait=False)
    parts = [tmp_path / f"out.jsonl.rank{rank}" for rank in range(2)]
    kill_when(process, lambda: all(part.is_file() and part.stat().st_size for part in parts))
    done = sum(part.read_bytes().count(b"\n") for part in parts)
    assert 2 <= done < 30
    assert cli.main(["transcribe", *options]) == 1
    assert texts(records(output)) == texts(uninterrupted) and not any(part.exists() for part in parts)

    output.unlink()
    result = run_command(*options, launcher=launcher)
    assert result.returncode == 1 and "29 of 30 recordings are in" in result.stderr
    assert texts(records(output)) == texts(uninterrupted) and not any(part.exists() for part in parts)


def test_failed_files_are_tried_again_and_other_settings_are_refused(clips, tmp_path, capsys):
    late = tmp_path / "late.wav"
    output = tmp_path / "out.jsonl"
    options = ["transcribe", str(late), str(clips / "00.wav"), "--output", str(output)]
    assert cli.main(options) == 1
    soundfile.write(late, tone(0.3), SAMPLING_RATE)
    assert cli.main([*options, "--language", "German"]) == 1
    assert "made with other settings (language None, now 'German')" in capsys.readouterr().err
    assert cli.main([*options, "--batch-size", "1"]) == 0
    assert list(records(output)) == [str(clips / "00.wav"), str(late)]
    written = output.stat().st_mtime_ns
    assert cli.main(options) == 0
    assert output.stat().st_mtime_ns == written  # all done: nothing is loaded, nothing written


def test_a_data_set(clips, tmp_path):
    rows = [{"id": f"row {k}", "audio": str(clips / f"{3 * k:02}.wav"), "task": "asr"} for k in range(3)]
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "out.jsonl"
    assert cli.main(["transcribe", str(manifest), "--output", str(output), "--ctc-only"]) == 0
    assert set(records(output)) == {"row 0", "row 1", "row 2"}


def test_rows_of_another_data_set_are_not_taken_for_done(clips, tmp_path):
    output = tmp_path / "out.jsonl"
    for name, clip in (("a.jsonl", "00.wav"), ("b.jsonl", "03.wav")):
        (tmp_path / name).write_text(json.dumps({"id": "1", "audio": str(clips / clip)}))
        assert cli.main(["transcribe", str(tmp_path / name), "--output", str(output), "--ctc-only"]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [Path(row["data"]).name for row in rows] == ["a.jsonl", "b.jsonl"] and rows[0]["text"] != rows[1]["text"]


def test_a_run_with_nothing_to_do_leaves_nothing(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.main(["transcribe", str(tmp_path / "empty"), "--output", str(tmp_path / "new" / "out.jsonl")]) == 1
    assert "holds no audio file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_file_that_cannot_be_written_does_not_stop_the_others(clips, tmp_path, capsys):
    (tmp_path / "00.srt").mkdir()
    files = [str(clips / "00.wav"), str(clips / "03.wav")]
    options = ["--ctc-only", "--timestamps", "srt", "--output-dir", str(tmp_path)]
    assert cli.main(["transcribe", *files, *options]) == 1
    output = capsys.readouterr()
    assert files[0] in output.err and "00.srt" in output.err and [files[1]] == [output.out.split("\t")[0]]
    assert (tmp_path / "03.srt").is_file()


@pytest.mark.parametrize("format", ["srt", "vtt", "json", "TextGrid"])
def test_files_with_times_mirror_the_inputs(format, clips, tmp_path):
    files = [clips / "00.wav", clips / "b" / "01.wav", tmp_path / "00.wav"]
    files[2].write_bytes(files[0].read_bytes())
    command = ["transcribe", *map(str, files[:2]), "--timestamps", format.lower(), "--output-dir", str(tmp_path / "o")]
    assert cli.main(command) == 0
    written = {str(path.relative_to(tmp_path / "o")) for path in (tmp_path / "o").rglob("*.*")}
    assert written == {f"00.{format}", f"b/01.{format}"}


def test_files_of_one_name_do_not_meet(clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        for name in ("a.wav", "a.flac"):
            soundfile.write(tmp_path / folder / name, tone(0.2), SAMPLING_RATE)
    assert cli.main(["transcribe", "x", "y", "--timestamps", "srt", "--ctc-only"]) == 0
    written = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.srt"))
    assert written == ["x/a.flac.srt", "x/a.wav.srt", "y/a.flac.srt", "y/a.wav.srt"]


def test_lines_keep_the_order_of_the_inputs_and_ctc_only_loads_no_llm(clips, capsys, monkeypatch):
    monkeypatch.setattr(SoundwaveForConditionalGeneration, "from_pretrained", None)  # calling it would fail
    files = [str(clips / name) for name in ("18.wav", "b/01.wav", "b/20.wav", "00.wav", "b/13.wav")]
    assert cli.main(["transcribe", *files, "--ctc-only", "--batch-size", "2"]) == 0
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == files


def test_the_reader_may_leave(clips):
    """As in `soundwave transcribe ... | head -1`."""
    command = [sys.executable, "-m", "soundwave.apps.cli", "transcribe", str(clips), "--batch-size", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(60) == 141
    assert "Traceback" not in error and "BrokenPipe" not in error


class Listener:
    """A model that hears the lengths, and has room for three recordings at a time."""

    def __init__(self):
        self.batches = []

    def transcribe_ctc(self, batch, processor, sampling_rate, windows_per_batch):
        self.batches.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("no room")
        if any(len(one) == 13 for one in batch):
            raise RuntimeError("thirteen")
        return [len(one) for one in batch]


def test_too_large_a_batch_is_halved_for_good_and_a_broken_one_is_found(capsys):
    listener = Listener()
    run = Transcriber(listener, None, Transcription([], ctc_only=True))
    assert run(["x" * k for k in range(8)]) == list(range(8))
    assert "out of memory with 8 recordings at a time; trying 4" in capsys.readouterr().err
    assert listener.batches == [8, 4, 2, 2, 2, 2]
    assert run(["x" * k for k in (12, 13)]) == [12, "RuntimeError: thirteen"]


def test_reading_ahead_is_bounded_and_names_what_cannot_be_read(processor, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", tone(0.5), SAMPLING_RATE)
    taken = []

    def batches():
        for k in range(10):
            taken.append(k)
            yield [Job("a", str(tmp_path / "a.wav"), ""), Job("b", str(tmp_path / "none.wav"), "")]

    for number, (jobs, (samples, error)) in enumerate(read_ahead(batches(), processor)):
        assert len(jobs) == 2 and len(samples) == SAMPLING_RATE // 2
        assert isinstance(error, Unreadable) and "none.wav" in error
        assert len(taken) <= number + 1 + transcriber.AHEAD
    assert number == 9
    monkeypatch.setattr(transcriber, "HELD_S", 0.4)  # a longer one stays where it is, whatever its header says
    job = Job("a", str(tmp_path / "a.wav"), "")
    assert read(job, processor) == job.path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.wav", "--ctc-only", "--bias", "word", "--draft"], "--ctc-only loads no LLM, which --draft, --bias would"),
        (["a.wav", "--output-dir", "x"], "--output-dir is for the files of --timestamps"),
        (["a.wav", "--device", "cuda:9"], "PyTorch sees no CUDA device here"),
        (["{empty}"], "holds no audio file"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(arguments, said, tmp_path, capsys):
    if torch.cuda.is_available() and "cuda:9" in arguments:
        pytest.skip("there is a GPU")
    assert cli.main(["transcribe", *(argument.format(empty=tmp_path) for argument in arguments)]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
