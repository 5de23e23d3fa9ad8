"""What gets installed, under which names, and that the lists of versions agree with each other."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import soundwave

ROOT = Path(__file__).parents[1]
NOT_INSTALLED = {"tests", "benchmarks", ".ci"}


def run_python(code: str, cwd: Path, **environment: str) -> str:
    """Return what `python -c code` prints in a fresh process."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def sources() -> list[Path]:
    """Return the Python files that belong into an installation, relative to the repository."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in NOT_INSTALLED]
    folders = [path for path in folders if not path.name.startswith(".") and not (path / "pyvenv.cfg").is_file()]
    found = [file.relative_to(ROOT) for folder in folders for file in folder.rglob("*.py")]
    return [file for file in found if file.parts[0] not in ("build", "dist", "runs", "quickstart", "assets")]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The tree that an installation puts into site-packages."""
    build = tmp_path_factory.mktemp("build")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(build)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return build


def test_every_source_file_is_installed(installed):
    files = sources()
    assert len(files) > 20
    missing = [file for file in files if not (installed / "soundwave" / file).is_file()]
    missing = [file for file in missing if file.parts[0] != "soundwave"]
    assert not missing, "list their folder in PACKAGES of setup.py"


def test_data_files_are_installed(installed):
    for pattern in ("training/configs/**/*.yaml", "model_card/*.md", "assets/tiny/*"):
        expected = [path.relative_to(ROOT) for path in ROOT.glob(pattern) if path.is_file()]
        assert expected, f"no {pattern} in the repository"
        for file in expected:
            assert (installed / "soundwave" / file).is_file(), f"{file}: see package_data in setup.py"


def test_installed_tree_imports_without_the_checkout(installed, tmp_path):
    """From another folder, and from the checkout itself, whose `soundwave` folder then comes first."""
    code = "import soundwave.training.tiny as t, soundwave.assets as a; print(t.__file__, a.TINY.is_dir())"
    elsewhere = run_python(code, tmp_path, PYTHONPATH=str(installed))
    assert elsewhere == f"{installed}/soundwave/training/tiny/__init__.py True"
    assert run_python(code, ROOT, PYTHONPATH=str(installed)) == f"{ROOT}/training/tiny/__init__.py True"


def test_import_is_cheap():
    code = "import sys, soundwave.apps.cli; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    assert run_python(code, ROOT) == "set()"


@pytest.mark.parametrize("name", [name for name in soundwave.__all__ if name != "__version__"])
def test_exports(name):
    assert getattr(soundwave, name).__name__ == name
    assert name in dir(soundwave)


def test_unknown_export_names_the_known_ones():
    with pytest.raises(AttributeError, match="SoundwaveModle.*SoundwaveModel"):
        soundwave.SoundwaveModle  # noqa: B018


def test_one_export_registers_model_and_processor():
    """Otherwise `AutoProcessor` would ask for permission to run the checkpoint's own code."""
    code = """if True:
        from soundwave import SoundwaveConfig
        from transformers import AutoConfig
        from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING as MODELS
        print(AutoConfig.for_model("soundwave").__class__ is SoundwaveConfig, MODELS[SoundwaveConfig].__name__,
              PROCESSOR_MAPPING[SoundwaveConfig].__name__)"""
    assert run_python(code, ROOT) == "True SoundwaveForConditionalGeneration SoundwaveProcessor"


def test_constraints_meet_the_requirements():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pins = {canonicalize_name(name): version for name, version in pins.items()}
    lists = re.findall(r'"([a-z][\w.\[\]-]*[><=]=[^"]+)"', (ROOT / "setup.py").read_text())
    requirements = {canonicalize_name(Requirement(text).name): Requirement(text).specifier for text in lists}
    # gradio is not among the tested versions; setuptools builds, and pip brings it.
    for name in requirements.keys() - {"gradio", "setuptools"}:
        assert requirements[name].contains(pins[name]), name
    assert pins["torch"] == pins["torchaudio"], "torchaudio is built for one torch"


def test_one_ruff_version():
    pins = [
        re.search(r'"ruff==([\d.]+)"', (ROOT / "setup.py").read_text()),
        re.search(r"^ruff==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE),
        re.search(r"ruff-pre-commit\n\s+rev: v([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text()),
    ]
    assert len({match.group(1) for match in pins if match}) == 1 and all(pins)


def test_make_prints_its_targets():
    result = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=30)
    for target in ("quickstart", "install", "style", "check", "test", "test-slow", "card", "clean"):
        assert f"make {target}" in result.stdout


PYTHON_STUB = """#!/bin/sh
case "$1 $2" in
    "-c import sys; sys.exit"*) exit {too_old} ;;
    "-m venv") mkdir -p "$4/bin" && ln -s "/bin/true" "$4/bin/python" && echo "{name}" > "$4/made-by" ;;
esac
"""


@pytest.mark.parametrize(("asked", "made_by"), [("python3", "python3.11"), ("python3.9", None)])
def test_a_newer_python_beside_an_old_python3_is_found(asked, made_by, tmp_path):
    """As on Ubuntu 22.04; a Python that was named is taken or refused, never replaced."""
    (tmp_path / "bin").mkdir()
    for name, too_old in {"python3": 1, "python3.9": 1, "python3.11": 0}.items():
        stub = tmp_path / "bin" / name
        stub.write_text(PYTHON_STUB.format(name=name, too_old=too_old))
        stub.chmod(0o755)
    result = subprocess.run(
        ["bash", str(ROOT / ".ci" / "make_venv"), asked, str(tmp_path / "venv")],
        env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    if made_by is None:
        assert result.returncode == 1 and "Python 3.11 or newer is needed" in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "venv" / "made-by").read_text() == f"{made_by}\n"
