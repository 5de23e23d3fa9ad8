"""The README's Python blocks run in order, and its commands and files exist."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from soundwave.apps import cli
from soundwave.assets import TINY
from soundwave.training.stages import load_config
from tests.conftest import tone

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_python_blocks_run(tmp_path):
    """In one process, in order, where `assets/tiny` and a recording lie, with this package or without."""
    (tmp_path / "assets").mkdir()
    (tmp_path / "assets" / "tiny").symlink_to(TINY)
    soundfile.write(tmp_path / "speech.wav", tone(1.0), 16_000)
    snippets = blocks("python")
    assert len(snippets) >= 3
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(snippets)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert len(result.stdout.splitlines()) >= len(snippets) - 1  # each prints what it heard; a tone may be silence


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("soundwave ")]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_exist(command):
    """Every command parses, and every `field=value` of a training command is a setting of that stage."""
    arguments, rest = cli.build_parser().parse_known_args(command[1:])
    if arguments.command == "train":
        stage, flag, file, *settings = rest
        assert flag == "--config"
        assert load_config(ROOT / file, settings, stage).stage == stage
    elif arguments.command not in cli.DELEGATED:
        assert not rest


def test_training_commands_find_their_data(tmp_path, monkeypatch):
    """`data=[mine/train.jsonl]` is a file where the command is typed, whatever folder the settings file names."""
    from soundwave.training.data import load_rows

    (tmp_path / "mine").mkdir()
    row = {"task": "text_qa", "instruction": "what is big", "answer": "small"}
    (tmp_path / "mine" / "train.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    training = [command for command in commands() if command[1] == "train"]
    assert len(training) == 3
    for _, _, stage, _, file, *settings in training:
        config = load_config(ROOT / file, settings, stage)
        assert load_rows(config.data, config.data_root)["answer"][:] == ["small"]


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = set(re.findall(r"^make ([a-z-]+)", "\n".join(blocks("bash")), re.MULTILINE))
    assert named >= {"quickstart", "test", "install"}
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_tree_names_what_exists():
    tree = next(block for block in blocks("text") if "soundwave/  " in block)
    folder = ""
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder, name = name, ""
        assert (ROOT / folder / name).exists(), f"the README names {folder}{name}"


def test_data_row_is_one_that_training_reads(tmp_path):
    from soundwave.training.data import load_rows

    row = json.loads(blocks("json")[0])
    (tmp_path / "wav").mkdir()
    soundfile.write(tmp_path / row["audio"], tone(0.7), 16_000)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    rows = load_rows(str(tmp_path / "rows.jsonl"))
    assert rows["answer"][:] == [row["answer"]] and rows["task"][:] == ["asr"]


def test_results_are_those_of_the_results_file():
    from benchmarks.pool_quickstarts import RESULTS, table

    results = json.loads((RESULTS / "quickstart.json").read_text(encoding="utf-8"))
    shown = README.split("<!-- results: begin")[1].split("<!-- results: end -->")[0]
    assert table(results) in shown


def test_speed_is_that_of_the_results_files():
    from benchmarks.speed_table import table

    assert table() in README.split("<!-- speed: begin")[1].split("<!-- speed: end -->")[0]


def test_cost_of_training_is_that_of_the_results_files():
    from benchmarks.speed_table import training_table

    assert training_table() in README.split("<!-- training speed: begin")[1].split("<!-- training speed: end -->")[0]
