"""The `soundwave` command: its help, its errors, and transcribe and ask on files of every kind."""

import os
import shutil
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import soundfile

from soundwave.apps import cli
from tests.conftest import SAMPLING_RATE, tone

ROOT = Path(__file__).parents[1]
COMMANDS = ("transcribe", "ask", "train", "evaluate", "merge", "card", "convert", "serve", "quickstart")


def test_help_needs_no_libraries():
    """Measured with the interpreter's own start; a second is ten times what it takes."""
    code = "import sys\nfrom soundwave.apps.cli import main\ntry: main(['-h'])\nfinally: print('torch' in sys.modules)"
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert time.perf_counter() - started < 1.0
    assert result.stdout.splitlines()[-1] == "False"
    for command in COMMANDS:
        assert f"\n    {command}" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: soundwave {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: COMMAND"),
        (["trancribe", "a.wav"], "invalid choice"),
        (["transcribe"], "required: FILE"),
        (["transcribe", "a.wav", "--modle", "m"], "unrecognized arguments: --modle"),
        (["transcribe", "a.wav", "--batch-size", "0"], "expected a number of at least 1, got 0"),
    ],
)
def test_usage_errors(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_errors_take_one_line(tmp_path, capsys):
    assert cli.main(["transcribe", "a.wav", "--model", str(tmp_path / "none")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("soundwave transcribe: ") and "none" in error


@pytest.mark.parametrize(
    ("command", "missing", "said"),
    [
        ("evaluate", "jiwer", 'jiwer is not installed: pip install "soundwave[eval]"'),
        ("quickstart", "matplotlib", 'matplotlib is not installed: pip install "soundwave[tiny]"'),
        ("quickstart", "soxr", 'soxr is not installed: pip install "soundwave[tiny]"'),
    ],
)
def test_a_missing_extra_is_named_before_anything_runs(command, missing, said, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, missing, None)  # an import of it fails as if it were not installed
    assert cli.main([command, "--help"]) == 1
    assert capsys.readouterr().err == f"soundwave {command}: {said}\n"


@pytest.mark.parametrize("place", [0, None])
def test_debug_shows_the_traceback(place, tmp_path, capsys):
    """Before the command or after it."""
    arguments = ["transcribe", "a.wav", "--model", str(tmp_path / "none")]
    arguments.insert(len(arguments) if place is None else place, "--debug")
    assert cli.main(arguments) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model_folder(tiny_model, processor, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def write(path: Path, seconds: float, rate: int = SAMPLING_RATE, channels: int = 1) -> str:
    samples = np.stack([tone(seconds, 300.0 + 100 * channel, rate) for channel in range(channels)], axis=1)
    soundfile.write(path, samples, rate)
    return str(path)


def test_transcribe_any_format(model_folder, tmp_path, capsys):
    files = [
        write(tmp_path / "a.wav", 0.5),
        write(tmp_path / "b.flac", 1.0, 8_000),
        write(tmp_path / "c.ogg", 0.7, 44_100, channels=2),
        write(tmp_path / "d.mp3", 0.6, 48_000),
    ]
    command = ["transcribe", *files, "--model", model_folder, "--max-new-tokens", "4", "--batch-size", "3"]
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == files


def test_transcribe_goes_on_after_a_broken_file(model_folder, tmp_path, capsys):
    good = [write(tmp_path / "a.wav", 0.5), write(tmp_path / "b.wav", 0.8)]
    text = tmp_path / "text.wav"
    text.write_text("no recording")
    empty = tmp_path / "empty.wav"
    empty.write_bytes(b"")
    folder = tmp_path / "folder"
    folder.mkdir()
    silent = write(tmp_path / "nothing.wav", 0.0)
    broken = [str(folder), str(text), str(empty), str(tmp_path / "absent.wav"), silent]
    files = [good[0], *broken, good[1]]
    assert cli.main(["transcribe", *files, "--model", model_folder, "--max-new-tokens", "4"]) == 1
    output = capsys.readouterr()
    assert [line.split("\t")[0] for line in output.out.splitlines()] == good
    lines = [line for line in output.err.splitlines() if "cut at" not in line and "to transcribe" not in line]
    assert len(lines) == len(broken)
    for line, file in zip(lines, broken, strict=True):
        assert line.startswith("soundwave transcribe: ") and file in line


def test_one_file_prints_its_text_alone_and_says_when_it_was_cut(model_folder, tmp_path, capsys):
    file = write(tmp_path / "a.wav", 0.5)
    command = ["transcribe", file, "--model", model_folder, "--max-new-tokens", "1", "--device", "cpu"]
    assert cli.main(command) == 0
    output = capsys.readouterr()
    assert "\t" not in output.out and output.out.count("\n") == 1
    assert output.err.splitlines() == [
        "soundwave transcribe: 1 to transcribe, on cpu in float32",
        f"soundwave transcribe: {file}: cut at the limit on new tokens; --max-new-tokens raises it",
    ]


def test_batched_answers_are_those_of_single_files(model_folder, tmp_path, capsys):
    files = [write(tmp_path / f"{index}.wav", 0.4 + 0.5 * index) for index in range(3)]
    options = ["--model", model_folder, "--max-new-tokens", "6"]
    assert cli.main(["transcribe", *files, *options]) == 0
    together = [line.split("\t")[1] for line in capsys.readouterr().out.splitlines()]
    alone = []
    for file in files:
        assert cli.main(["transcribe", file, *options]) == 0
        alone.append(capsys.readouterr().out.rstrip("\n"))
    assert together == alone


def test_ask(model_folder, tmp_path, capsys):
    file = write(tmp_path / "a.wav", 0.5)
    assert cli.main(["ask", file, "what is said?", "--model", model_folder, "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.endswith("\n")
    assert cli.main(["ask", str(tmp_path / "none.wav"), "what is said?", "--model", model_folder]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "none.wav" in error


def test_addresses_that_the_user_names(model_folder, tmp_path, capsys):
    """On this machine too: what a stranger may not have fetched, the user may."""
    write(tmp_path / "a.wav", 0.5)
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        options = ["--model", model_folder, "--max-new-tokens", "3"]
        assert cli.main(["ask", f"{address}/a.wav", "what is said?", *options]) == 0
        assert cli.main(["transcribe", f"{address}/a.wav", f"{address}/none.wav", *options]) == 1
        server.shutdown()
    output = capsys.readouterr()
    assert output.out.splitlines()[-1].startswith(f"{address}/a.wav\t") and f"{address}/none.wav" in output.err


def test_errors_of_the_libraries_take_one_line_too(capsys):
    assert cli.main(["ask", "a.wav", "what?", "--device", "toaster"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "toaster" in error and "--debug shows where" in error


def test_damaged_weights_are_named(model_folder, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    (broken / "model.safetensors").write_bytes(b"\xff" * 100)
    recording, model = write(tmp_path / "a.wav", 0.5), ["--model", str(broken), "--device", "cpu"]
    commands = [["transcribe", recording, *model], ["ask", recording, "what?", *model]]
    for command in (*commands, ["merge", str(broken), str(tmp_path / "merged")]):
        assert cli.main(command) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if "to transcribe" not in line]
        assert len(lines) == 1 and f"{broken / 'model.safetensors'} cannot be read" in lines[0]
    assert not (tmp_path / "merged").exists()


def test_a_model_without_llm(tiny_ctc, processor, tmp_path, capsys):
    tiny_ctc.save_pretrained(tmp_path / "align")
    processor.save_pretrained(tmp_path / "align")
    options = [write(tmp_path / "a.wav", 0.5), "--model", str(tmp_path / "align")]
    assert cli.main(["transcribe", *options]) == 1
    assert "without an LLM; give one of stage II or III" in capsys.readouterr().err
    assert cli.main(["serve", options[2]]) == 1
    assert "without an LLM; give one of stage II or III" in capsys.readouterr().err
    assert cli.main(["transcribe", *options, "--ctc-only"]) == 0


def test_installed_model_transcribes_recordings(shared_data, capsys):
    """Real recordings through the model of the package: any rate and length gives a line each, and no error."""
    files = sorted(str(path) for path in shared_data.rglob("*") if path.suffix in (".wav", ".flac", ".ogg", ".mp3"))[
        :3
    ]
    assert files
    assert cli.main(["transcribe", *files]) == 0
    assert [line.split("\t")[0] for line in capsys.readouterr().out.splitlines()] == files


def test_module_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "soundwave.apps.cli", "--version"]
    result = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stdout.startswith("soundwave ")


def test_a_folder_without_a_model(tmp_path, capsys):
    output = str(tmp_path / "out.jsonl")
    (tmp_path / "model").mkdir()
    file = write(tmp_path / "a.wav", 0.1)
    assert cli.main(["transcribe", file, "--model", str(tmp_path / "model"), "--output", output]) == 1
    assert str(tmp_path / "model") in capsys.readouterr().err
