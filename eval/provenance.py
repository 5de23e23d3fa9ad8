"""Where figures come from: the model, the machine, the command; nothing that names a folder of it."""

import hashlib
import os
import platform
import re
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from soundwave import __version__

_BLOCK = 2**24  # bytes of a weight file that are hashed at a time
PACKAGES = ("torch", "transformers", "tokenizers", "peft", "jiwer", "sacrebleu", "numpy")


def describe_model(
    model: Any, name: str | None = None, revision: str | None = None, weights: str | None = None
) -> dict[str, Any]:
    """Name, revision, class, size and dtype of a model, and the hash of the files that it was read from.

    Without a revision it is the hash of the weights in memory: a model that was trained since it was loaded
    still names the folder and the commit it came from.
    """
    return {
        "name": name or type(model).__name__,
        "revision": revision or "sha256:" + _hash_of_memory(model),
        "weights": weights,
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def weights_hash(folder: str | os.PathLike[str]) -> str | None:
    """SHA-256 of a folder's weight files, one after the other; ``None`` if it has none.

    Of a single file it is what the Hub shows for that file.
    """
    digest = hashlib.sha256()
    files = sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")])
    for path in files:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest() if files else None


def _hash_of_memory(model: Any) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def environment() -> dict[str, Any]:
    """``hardware``, ``packages`` and ``time`` of an entry."""
    versions = {"soundwave": __version__, **{package: version(package) for package in PACKAGES}}
    hardware = {
        "machine": platform.machine(),
        "system": platform.system(),
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    }
    time = datetime.now(UTC).isoformat(timespec="seconds")
    return {"hardware": hardware, "packages": versions, "time": time}


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")  # Linux alone has it; elsewhere the platform module knows the name
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def command_line() -> str:
    """The running command, without folders of this machine (`portable_argument`)."""
    return shlex.join([Path(sys.argv[0]).name, *map(portable_argument, sys.argv[1:])])


def portable_argument(argument: str) -> str:
    """An argument whose paths outside the working folder are cut to their last part, in ``name=[a, b]`` too.

    Of addresses goes what may be secret (`portable_address`).
    """

    def name(part: str) -> str:
        path = Path(part.strip())
        return path.name if path.is_absolute() or ".." in path.parts else part

    return "".join(name(part) for part in re.split(r"([=,\[\]])", portable_address(argument)))


def portable_address(text: str) -> str:
    """A text whose addresses have lost user, password, query and fragment: there keys stand."""
    text = re.sub(r"://[^/?#\s]*@", "://", text)
    # Up to the next address of a list, or what closes a list or a quotation: a key may hold any other sign.
    return re.sub(r"(://[^?#\s]*)[?#](?:(?!,\s*\w+://|[]'\"](?:\s|$))\S)*", r"\1", text)


def portable_path(path: str, folder: str | os.PathLike[str]) -> str:
    """A recording's path from a folder of answers, so that both can be moved together and name no machine.

    Only what lies in the folder or beside it moves with it; of any other recording the file name is kept.
    """
    if "://" in path:
        return portable_address(path)
    near = Path(os.path.abspath(path)).is_relative_to(Path(os.path.abspath(folder)).parent)
    return os.path.relpath(path, folder) if near else Path(path).name
