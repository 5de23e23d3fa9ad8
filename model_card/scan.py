"""What must not leave this machine with a push: pickles, secrets, folders of its user, files over the Hub's limits.

Files are judged by what they hold, whatever they are called; the members of a zip archive (numpy's and torch's are
some) as files of their own. Of weights only the head is read, so that a push of many gigabytes waits for nothing.
"""

import codecs
import io
import json
import os
import pickletools
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

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
    "a password or key": rb"%b(?:%b%b|%b)|%b%b%b"
    % (
        rb"(?i:pass(?:word|wd|phrase)|api[_-]?key|secret(?:[_-]?key)?|(?:access|auth|api|hub|hf)[_-]?token)",
        (called := rb"[\\\"']*\s*[:=]\s*"),  # the quotes around a name in JSON, also in JSON inside of JSON
        # A value in quotes; not the name of an environment variable, nor a placeholder: <...>, ${...}, ***.
        rb"\\?[\"'](?![A-Z][A-Z_]*\\?[\"'])[^\s\"'<>{}$*\\]{6,}\\?[\"']",
        rb"\s*[:=]\s*(?=\S*\d)[\w.+/=@-]{6,}\s*$",  # both without, in YAML or .env: a line's end, no plain word
        rb"(?i:(?<![\w-])token)",  # of a text, more often than not
        called,
        rb"(?:\\?[\"'])?(?=\S*\d)(?=\S*[A-Za-z])[\w.+/=-]{16,}(?:\\?[\"']|\s*$)",
    ),
}
#: Names of files that hold nothing but secrets, in small letters.
SECRET_FILES = (
    *("credentials*", "secrets.*", "*.pem", "*.key", "*.p12", "*.pfx", "*.kdbx"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*"),
)
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

ZIP = b"PK\x03\x04"
#: What is read of an archive's members in all: a few bytes can unpack to a full disk.
UNPACKED_BYTES = 100 * 10**6
NUMPY = b"\x93NUMPY"
OBJECTS = re.compile(rb"'\|O")  # in numpy's header: pickled inside its own format
TEXTS = re.compile(rb"'descr': '[|<>][SU]")
#: The longer first: the marks of UTF-32 begin like those of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


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
        with path.open("rb") as file:
            problems += [f"{name}{problem}" for problem in _in_file(path.name, file, size)]
    folders = Counter(Path(name).parent.as_posix() for name in files)
    problems += [
        f"the folder {folder} has {count:,} files, more than the {MAX_FOLDER_ENTRIES:,} that the Hub takes; pack them"
        for folder, count in folders.items()
        if count > MAX_FOLDER_ENTRIES
    ]
    return problems


def _in_file(name: str, file: IO[bytes], size: int) -> Iterator[str]:
    """What is wrong with a file, or with a member of an archive: the ends of sentences that begin with its name."""
    if any(fnmatch(PurePosixPath(name).name.lower(), pattern) for pattern in SECRET_FILES):
        yield " has the name of a file of secrets; remove it, or rename it if it holds none"
    elif _is_pickle(name, file, size):
        yield " is a pickle, which runs code when it is loaded; save tensors as safetensors, or remove it"
    elif _head(file).startswith(ZIP):
        yield from _in_archive(file)
    else:
        yield from (f"{where} holds {what}; {remedy}" for where, what, remedy in _private(name, file))


def _in_archive(file: IO[bytes]) -> Iterator[str]:
    """As `_in_file`, of a zip's members one after the other, within `UNPACKED_BYTES`."""
    left = UNPACKED_BYTES
    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                name = info.filename
                with archive.open(info) as member:
                    head = _head(member)
                    if head.startswith(ZIP):
                        yield f" holds another archive, {name}, which is not looked into; unpack it"
                        continue
                    left -= info.file_size if _reader(name, head) else HEAD_BYTES  # zipfile reads no more than it says
                    if left < 0:
                        yield (
                            f" unpacks to more than the {UNPACKED_BYTES / 1e6:.0f} MB of text that are looked at; "
                            "publish its files unpacked"
                        )
                        return
                    yield from (f", member {name}{problem}" for problem in _in_file(name, member, info.file_size))
    except Exception as error:  # noqa: BLE001 (damaged, encrypted, packed otherwise: each has errors of its own)
        yield f" is an archive that cannot be looked into ({error}); repair it, or publish its files unpacked"


def _is_pickle(name: str, file: IO[bytes], size: int) -> bool:
    """Whether a file is a pickle, or holds one: by its bytes, and by a name that says so."""
    head = _head(file)
    if name.endswith(PICKLE_SUFFIXES) or BINARY_PICKLE.match(head):
        return True
    if head.startswith(NUMPY):
        return OBJECTS.search(_numpy_header(head)) is not None
    return not head.startswith(ZIP) and size <= TEXT_PICKLE_BYTES and _is_text_pickle(file)


def _head(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read(HEAD_BYTES)


def _numpy_header(head: bytes) -> bytes:
    return head[len(NUMPY) :].partition(b"\n")[0]


def _is_text_pickle(file: IO[bytes]) -> bool:
    names = set()
    file.seek(0)
    try:
        for operation, _, _ in pickletools.genops(file):
            names.add(operation.name)
    except Exception:  # noqa: BLE001 (whatever the bytes of another format make of it)
        return False
    return bool(names & RUNS_CODE)


def _private(name: str, file: IO[bytes]) -> Iterator[tuple[str, str, str]]:
    """Where in a file something private is, what it is, and what to do; the secret itself is not repeated."""
    found = set()
    for number, line in _lines(name, file):
        where = f", line {number}," if number else ""
        for what, pattern in SECRETS.items():
            if what not in found and re.search(pattern, line):
                found.add(what)
                yield where, what, "revoke it, for it may have been seen already, and take it out"
                break  # `token: hf_...` is one secret, not two
        if "home" not in found and PurePosixPath(name).name not in VOCABULARIES and _names_home(line):
            found.add("home")
            yield where, "a path in a user's home folder", "write a path from the run's own folder, or a file name"


def _names_home(line: bytes) -> bool:
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 ("~" where a container's user has none)
    own = len(home.parts) > 2 and f"{home}/".encode() in line  # wherever homes are on this machine
    return own or HOME.search(line) is not None


def _lines(name: str, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file, see `_reader`; a line without a number has number 0."""
    read = _reader(name, _head(file))
    file.seek(0)
    return read(file) if read is not None else iter(())


def _reader(name: str, head: bytes) -> Callable[[IO[bytes]], Iterator[tuple[int, bytes]]] | None:
    """What reads the lines: of a text all, of weights their header, of an array its texts; `None`: there are none."""
    if name.endswith(".safetensors"):
        return _weights_metadata
    if head.startswith(NUMPY):
        return _array_texts if TEXTS.search(_numpy_header(head)) else None
    if encoding := _wide_encoding(head):
        return partial(_wide_lines, encoding=encoding)
    return partial(enumerate, start=1) if b"\0" not in head else None


def _weights_metadata(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    length = int.from_bytes(file.read(8), "little")
    size = file.seek(0, io.SEEK_END)
    file.seek(8)
    header = file.read(length) if length < size else b""
    try:
        yield 0, json.dumps(json.loads(header).get("__metadata__", {})).encode()
    except (ValueError, AttributeError):  # damaged: all of it is looked at
        yield 0, header


def _array_texts(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    try:
        texts = np.load(file)
    except (ValueError, EOFError, MemoryError):  # damaged: all of it is looked at
        file.seek(0)
        yield from enumerate(file, 1)
    else:
        yield from ((0, text if isinstance(text, bytes) else text.encode(errors="replace")) for text in texts.flat)


def _wide_lines(file: IO[bytes], encoding: str) -> Iterator[tuple[int, bytes]]:
    text = io.TextIOWrapper(file, encoding, errors="replace")
    yield from ((number, line.encode()) for number, line in enumerate(text, 1))
    text.detach()  # or it would close the file with itself


def _wide_encoding(head: bytes) -> str | None:
    """The encoding of a text whose characters have several bytes each, if it is one: by its mark, or by its zeros."""
    for mark, encoding in MARKS.items():
        if head.startswith(mark):
            return encoding
    even, odd = head[::2].count(0), head[1::2].count(0)
    if 4 * max(even, odd) < len(head) or min(even, odd):  # half of the bytes are 0 where most of it is ASCII
        return None
    return "utf-16-be" if even else "utf-16-le" if odd else None
