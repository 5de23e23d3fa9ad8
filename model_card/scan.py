"""What must not leave this machine with a push: pickles, secrets, folders of its user, files over the Hub's limits.

Files are judged by what they hold, whatever they are called. Of weights only the head is read, so that a push of many
gigabytes waits for nothing.
"""

import io
import json
import os
import pickletools
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

#: The Hub's documented limits: a file, and the entries of a folder.
MAX_FILE_BYTES = 50 * 10**9
MAX_FOLDER_ENTRIES = 10_000

#: Of a word, after an escaped line end of JSON too.
START = rb"(?:\b|(?<=\\[nrt]))"
SECRETS = {
    "a Hugging Face token": START + rb"hf_[A-Za-z0-9]{30,}\b",
    "an API key": START + rb"sk-[\w-]*[A-Za-z0-9]{20}",  # OpenAI's and Anthropic's
    "a GitHub token": START + rb"(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22})",
    "an AWS key": START + rb"(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a Google key": START + rb"AIza[\w-]{35}",
    "a Slack token": START + rb"xox[abprs]-[\w-]{10}",
    "a private key": rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----",
}
#: Not after a host's name, where it is part of an address.
HOME = re.compile(
    rb"(?:(?<![\w.~-])|(?<=\\[nrt]))(?:/(?:home|Users)/[^/\\\s\"'][^/\\\"']*/|/root/[\w.-]"
    rb"|[A-Za-z]:(?:\\{1,2}|/)Users(?:\\{1,2}|/)[\w.-]+)"
)
#: Pieces of text that the base model's authors chose; nothing of this machine gets into them.
VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")

PICKLE_SUFFIXES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".dill")
BINARY_PICKLE = re.compile(rb"\x80[\x02-\x05]")  # protocols 2 to 5
RUNS_CODE = {"GLOBAL", "INST", "REDUCE", "OBJ", "STACK_GLOBAL"}  # the operations that make a pickle dangerous
TEXT_PICKLE_BYTES = 10**6  # protocols 0 and 1 are looked for up to here
HEAD_BYTES = 8192


def find_problems(files: Mapping[str, Path]) -> list[str]:
    """One line per file that must not be published, with what to do about it; none if all may go.

    Args:
        files: Path in the repository -> file.
    """
    problems = []
    for name, path in files.items():
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            problems.append(
                f"{name} has {size / 1e9:.0f} GB, more than the {MAX_FILE_BYTES / 1e9:.0f} GB that the Hub takes; "
                "save it in shards (save_pretrained with max_shard_size)"
            )
        if is_pickle(path):
            problems.append(
                f"{name} is a pickle, which runs code when it is loaded; save tensors as safetensors, or remove it"
            )
        else:
            problems += [f"{name}{where} holds {what}; {remedy}" for where, what, remedy in _private(path)]
    folders = Counter(Path(name).parent.as_posix() for name in files)
    problems += [
        f"the folder {folder} has {count:,} files, more than the {MAX_FOLDER_ENTRIES:,} that the Hub takes; pack them"
        for folder, count in folders.items()
        if count > MAX_FOLDER_ENTRIES
    ]
    return problems


def is_pickle(path: Path) -> bool:
    """Whether a file is a pickle, or holds one: by its bytes, and by a name that says so."""
    if path.name.endswith(PICKLE_SUFFIXES):
        return True
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(b"PK\x03\x04"):
        return _holds_pickle(path)
    if path.stat().st_size > TEXT_PICKLE_BYTES:
        return _starts_pickle(head)
    return _starts_pickle(head) or _is_text_pickle(path.read_bytes())


def _starts_pickle(head: bytes) -> bool:
    # An array of objects is pickled inside numpy's own format.
    return BINARY_PICKLE.match(head) is not None or (
        head.startswith(b"\x93NUMPY") and b"'|O" in head[12:].partition(b"\n")[0]
    )


def _holds_pickle(path: Path) -> bool:
    """Whether a zip (torch's format, numpy's archives) holds one."""
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                with archive.open(member) as file:
                    if member.endswith(PICKLE_SUFFIXES) or _starts_pickle(file.read(HEAD_BYTES)):
                        return True
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError):  # damaged, encrypted, unknown compression
        return True  # what cannot be looked into is not vouched for
    return False


def _is_text_pickle(content: bytes) -> bool:
    names = set()
    stream = io.BytesIO(content)
    try:
        for operation, _, _ in pickletools.genops(stream):
            names.add(operation.name)
    except Exception:  # noqa: BLE001 (whatever the bytes of another format make of it)
        return False
    return bool(names & RUNS_CODE)


def _private(path: Path) -> Iterator[tuple[str, str, str]]:
    """Where in a file something private is, what it is, and what to do; the secret itself is not repeated."""
    found = set()
    for number, line in _lines(path):
        where = f", line {number}," if number else ""
        for what, pattern in SECRETS.items():
            if what not in found and re.search(pattern, line):
                found.add(what)
                yield where, what, "revoke it, for it may have been seen already, and take it out"
        if "home" not in found and path.name not in VOCABULARIES and _names_home(line):
            found.add("home")
            yield where, "a path in a user's home folder", "write a path from the run's own folder, or a file name"


def _names_home(line: bytes) -> bool:
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 ("~" where a container's user has none)
    own = len(home.parts) > 2 and f"{home}/".encode() in line  # wherever homes are on this machine
    return own or HOME.search(line) is not None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a text; of weights their header, of other binary files nothing (numbered 0)."""
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if length < path.stat().st_size else b""
            try:
                metadata = json.loads(header).get("__metadata__", {})
            except (ValueError, AttributeError):  # damaged: all of it is looked at
                yield 0, header
            else:
                yield 0, json.dumps(metadata).encode()
            return
        if b"\0" in file.read(HEAD_BYTES):
            return
        file.seek(0)
        yield from enumerate(file, 1)
