"""Whether what is about to be published loads where this package is not installed, and answers."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from soundwave.modeling_soundwave.weights_soundwave import WeightsError, find_shards, open_shard

LOAD_TIMEOUT_S = 1800.0  # an LLM of many billion parameters on a slow disk

#: What a stranger does with a repository; None in `sys.modules` makes an import fail as if it were not installed.
ANSWER = """
import sys
sys.modules |= dict.fromkeys(("soundwave", "peft", "trl", "soundfile", "torchaudio"))
import numpy
import torch
from transformers import AutoModel, AutoModelForCTC, AutoProcessor

folder, kind = sys.argv[1:]
time_s = numpy.arange(16_000) / 16_000
clip = (0.1 * numpy.sin(2 * numpy.pi * 440 * time_s)).astype(numpy.float32)
device = "cuda" if torch.cuda.is_available() else "cpu"
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
auto = AutoModelForCTC if kind == "SoundwaveForCTC" else AutoModel
model = auto.from_pretrained(folder, trust_remote_code=True).eval().to(device)
if kind == "SoundwaveForCTC":
    features = {name: value.to(device) for name, value in processor.audio_features([clip]).items()}
    processor.tokenizer.batch_decode(model.transcribe_ids(**features))
else:
    inputs = processor(audio=[clip], sampling_rate=16_000).to(device)
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    if ids.shape[1] <= inputs["input_ids"].shape[1]:
        sys.exit("it generates nothing")
"""
#: As far as one gets without the base models' weights: configuration, processor, every class of the code.
PARTS = """
import sys
sys.modules |= dict.fromkeys(("soundwave", "peft", "trl", "soundfile", "torchaudio"))
from transformers import AutoConfig, AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

folder, kind = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
AutoProcessor.from_pretrained(folder, trust_remote_code=True)
for reference in set(config.auto_map.values()):
    get_class_from_dynamic_module(reference, folder)
"""


class LoadError(ValueError):
    """A folder that does not load, or does not answer, in a process without this package."""


def missing_components(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Hub id and commit of the encoder and the LLM, where their weights are not in this machine's cache."""
    missing = []
    for key in ("audio", "text"):
        hub_id, commit = config[f"{key}_model_id"], config[f"{key}_model_revision"]
        if hub_id is None or commit is None:
            continue  # its weights are saved with ours
        try:
            find_shards(hub_id, revision=commit, local_files_only=True)
        except (OSError, WeightsError):
            missing.append((hub_id, commit))
    return missing


def check_loading(files: Mapping[str, Path]) -> list[str]:
    """Load a repository's files, and these alone, in a process of its own, offline, and let the model answer.

    Args:
        files: Path in the repository -> file.

    Returns:
        What could not be checked, a line each.

    Raises:
        LoadError: If it does not load or answer, with the error's last line; or if a weight is no finite number,
            with which it would still answer.
    """
    for name, file in files.items():
        if name.endswith(".safetensors"):
            _check_finite(name, file)
    config = json.loads(files["config.json"].read_text(encoding="utf-8"))
    missing = missing_components(config)
    with tempfile.TemporaryDirectory() as temporary:
        repository = Path(temporary) / "repository"
        for name, file in files.items():
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            (repository / name).symlink_to(file.resolve())
        _run(PARTS if missing else ANSWER, repository, config["architectures"][0])
    return [
        f"loading and answering were not checked: {hub_id} at {commit} is not in this machine's cache. Configuration, "
        f"processor and code load. For the whole check: hf download {hub_id} --revision {commit}"
        for hub_id, commit in missing
    ]


def _check_finite(name: str, path: Path) -> None:
    try:
        with open_shard(str(path)) as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_tensor(key)
                numbers = tensor if tensor.element_size() > 1 else tensor.float()  # there is no `isfinite` of float8
                if not torch.isfinite(numbers).all():
                    raise LoadError(
                        f"{key} in {name} holds NaN or infinity, so its training went wrong; go back to a checkpoint "
                        "before that."
                    )
    except WeightsError as error:
        raise LoadError(str(error)) from error


def _run(script: str, repository: Path, kind: str) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(repository.parent / "modules")}
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, str(repository), kind],
            cwd=repository.parent,
            env=variables,
            capture_output=True,
            text=True,
            timeout=LOAD_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise LoadError(f"after {LOAD_TIMEOUT_S:.0f} s it had not answered") from None
    if done.returncode < 0:
        raise LoadError(f"the process was ended by signal {-done.returncode}; was there memory enough for the model?")
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise LoadError(lines[-1].replace(str(repository), "the repository") if lines else "it said nothing")
