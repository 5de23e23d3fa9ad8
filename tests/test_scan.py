"""What may not be published is found by what it holds, whatever it is called; what may be is left alone."""

import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from soundwave.assets import TINY
from soundwave.model_card import scan
from soundwave.model_card.push_to_hub import published_files
from soundwave.model_card.scan import find_problems

# Put together here, so that this file holds none itself.
TOKENS = {
    "a Hugging Face token": "hf_" + "aB3" * 11 + "x",
    "an API key": "sk-" + "proj-" + "aB3" * 8,
    "a GitHub token": "ghp_" + "aB3" * 12,
    "an AWS key": "AKIA" + "ABCD1234" * 2,
    "a Google key": "AIza" + "aB3-_" * 7,
    "a Slack token": "xoxb-" + "1234567890",
    "a private key": "-----BEGIN " + "OPENSSH PRIVATE KEY-----",
}


class Harm:
    """Runs a function when it is unpickled."""

    def __reduce__(self):
        return (print, ("unpickled",))


def problems(tmp_path, name: str, content: bytes | str) -> list[str]:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return find_problems({name: path})


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_any_protocol_under_any_name(protocol, tmp_path):
    for name in ("notes.txt", "model.safetensors", "config.json"):
        (line,) = problems(tmp_path, name, pickle.dumps(Harm(), protocol))
        assert line.startswith(f"{name} is a pickle") and "safetensors" in line


def test_pickles_inside_other_formats(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer)
    assert problems(tmp_path, "weights.dat", buffer.getvalue())
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=False)
    assert problems(tmp_path, "legacy.dat", buffer.getvalue())
    np.save(tmp_path / "objects", np.array([Harm(), None]), allow_pickle=True)
    np.savez(tmp_path / "archive", a=np.array([{}], dtype=object))
    for name in ("objects.npy", "archive.npz"):
        (line,) = find_problems({name: tmp_path / name})
        assert " is a pickle, which runs code" in line
    assert problems(tmp_path, "training_args.bin", b"") and problems(tmp_path, "x.zip", b"PK\x03\x04 damaged")


def zipped(members: dict[str, bytes | str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_in_an_archive(protocol, tmp_path):
    (line,) = problems(tmp_path, "notes.zip", zipped({"a.txt": "fine", "b": pickle.dumps(Harm(), protocol)}))
    assert line.startswith("notes.zip, member b is a pickle")


def test_a_secret_in_an_archive_is_named_by_member_and_line(tmp_path):
    token = TOKENS["a Hugging Face token"]
    (line,) = problems(tmp_path, "logs", zipped({"a/log.txt": f"fine\n{token}\n", "b.txt": "fine"}))
    assert line.startswith("logs, member a/log.txt, line 2, holds a Hugging Face token; revoke it")
    assert token not in line
    assert problems(tmp_path, "logs", zipped({"tokenizer.json": '{"/home/user/": 5}'})) == []


@pytest.mark.parametrize("dtype", ["S", "U"])
def test_a_path_among_the_texts_of_an_array(dtype, tmp_path):
    np.savez(tmp_path / "clips", names=np.array(["clips/1.wav", "/home/ada/clips/1.wav"], dtype))
    (line,) = find_problems({"clips.npz": tmp_path / "clips.npz"})
    assert line.startswith("clips.npz, member names.npy holds a path in a user's home folder")


def test_archives_that_nobody_looks_into_are_refused(tmp_path, monkeypatch):
    inner = zipped({"a.txt": TOKENS["an API key"]})
    (line,) = problems(tmp_path, "a.zip", zipped({"inner.zip": inner}))
    assert line == "a.zip holds another archive, inner.zip, which is not looked into; unpack it"
    torn = bytearray(zipped({"a.txt": "words " * 5000}))
    torn[60:90] = bytes(30)
    (line,) = problems(tmp_path, "torn.zip", bytes(torn))
    assert line.startswith("torn.zip is an archive that cannot be looked into (")
    monkeypatch.setattr(scan, "UNPACKED_BYTES", 10**6)
    (line,) = problems(tmp_path, "bomb.zip", zipped({"a.txt": "words " * 10**6}))
    assert line.startswith("bomb.zip unpacks to more than the 1 MB of text")
    assert problems(tmp_path, "arrays.zip", zipped({"zeros": bytes(5 * 10**6)})) == []  # of no text only the head


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_texts_with_several_bytes_a_character(encoding, tmp_path):
    """As editors and shells of Windows write them, with a mark in front or without."""
    text = f"stage: align\r\ntoken: {TOKENS['a Hugging Face token']}\r\n"
    for name, content in (("a.txt", text.encode(encoding)), ("a.zip", zipped({"a.txt": text.encode(encoding)}))):
        (line,) = problems(tmp_path, name, content)
        assert "line 2, holds a Hugging Face token" in line
    assert problems(tmp_path, "a.txt", "stage: align\n".encode(encoding)) == []


def test_what_is_no_pickle(tmp_path):
    np.savez(tmp_path / "archive", a=np.zeros(3))
    np.save(tmp_path / "array", np.zeros(3))
    with zipfile.ZipFile(tmp_path / "texts.zip", "w") as archive:
        archive.writestr("a.txt", "(dp0\n.")
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "model.safetensors", {"format": "pt"})
    for text in ("", ".", "N.", "]", "import pickle\n", "cat and dog.", "(lp0\n."):
        assert problems(tmp_path, "a.txt", text) == []
    assert find_problems({path.name: path for path in tmp_path.iterdir()}) == []


@pytest.mark.parametrize("kind", TOKENS)
def test_a_secret_is_named_by_file_and_line_and_not_repeated(kind, tmp_path):
    (line,) = problems(tmp_path, "stage_config.yaml", f"stage: align\ntoken: {TOKENS[kind]}\n")
    assert line.startswith(f"stage_config.yaml, line 2, holds {kind}; revoke it")
    assert TOKENS[kind] not in line


@pytest.mark.parametrize(
    "path",
    [
        "/home/ada/clips/1.wav",
        "/Users/Ada B/x",
        "C:\\\\Users\\\\Ada\\\\x",
        "C:/Users/Ada",
        "/root/run",
        '"/home/a.b-c/"',
    ],
)
def test_folders_of_a_user(path, tmp_path):
    (line,) = problems(tmp_path, "report.md", f"made of {path}\n")
    assert line.startswith("report.md, line 1, holds a path in a user's home folder; write")


def test_the_home_of_whoever_pushes_wherever_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/data/people/ada")
    assert problems(tmp_path, "a.json", '"/data/people/ada/clips"')
    assert problems(tmp_path, "a.json", '"/data/people/bea/clips"') == []


def test_weights_are_looked_at_in_their_head_alone(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.frombuffer(TOKENS["an AWS key"].encode() + b"  ", np.uint8)}, path)
    assert find_problems({path.name: path}) == []  # the bytes of a tensor may be anything
    save_file({"a": np.zeros(1)}, path, {"made_by": TOKENS["a Hugging Face token"]})
    assert find_problems({path.name: path}) == [
        "model.safetensors holds a Hugging Face token; revoke it, for it may have been seen already, and take it out"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org/home/ada/x and https://example.org/Users/ada/x",
        "the task-" + "a" * 30 + ", a mask-" + "b" * 30,
        "hf_local hf_hub_download sk-learn AKIA AIza",
        "home/ada/x and ~/x and /homes/x",
    ],
)
def test_what_is_no_secret(text, tmp_path):
    assert problems(tmp_path, "a.md", text) == []


@pytest.mark.parametrize(
    "text",
    [
        '"password": "hunter2"',
        '{\\"api_key\\": \\"swordfish\\"}',
        "password: hunter2",
        "export OPENAI_API_KEY=abc123def456\r",
        "'client_secret' = 'swordfish'",
        '"hub_token": "abcdefgh"',
        '"token": "0123456789abcdefghij"',
    ],
)
def test_a_password_is_known_by_what_it_is_called(text, tmp_path):
    (line,) = problems(tmp_path, "notes.json", f"first\n{text}\n")
    assert line.startswith("notes.json, line 2, holds a password or key; revoke it")


@pytest.mark.parametrize(
    "text",
    [
        '"eos_token": "<|im_end|>", "pad_token": "reserved_special_token_1234", "eos_token_id": 128001',
        '"password": 512345, "token": 1234567890123456',  # of a vocabulary
        '"api_key": "OPENAI_API_KEY", "secret": "${SECRET_1}", "password": "********", "api_key": "<yours 123>"',
        "password: required",
        "hub_token: null",
        "cached_file(token=token, max_new_tokens=128000000)",
        '"token": "hello", "answer": "the password: a secret word"',
    ],
)
def test_what_is_called_so_and_is_no_password(text, tmp_path):
    assert problems(tmp_path, "a.json", text) == []


@pytest.mark.parametrize("name", ["credentials.json", "Credentials", "host.pem", "id_rsa", "id_ed25519.bak"])
def test_a_file_of_secrets_is_known_by_its_name(name, tmp_path):
    (line,) = problems(tmp_path, name, "{}")
    assert line == f"{name} has the name of a file of secrets; remove it, or rename it if it holds none"
    (line,) = problems(tmp_path, "a.zip", zipped({f"keys/{name}": "{}"}))
    assert line.startswith(f"a.zip, member keys/{name} has the name of a file of secrets")


def test_a_vocabulary_may_hold_any_piece(tmp_path):
    assert problems(tmp_path, "tokenizer.json", '{"/home/user/": 5}') == []
    assert problems(tmp_path, "tokenizer.json", TOKENS["a Hugging Face token"])


def test_limits_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(scan, "MAX_FILE_BYTES", 10)
    monkeypatch.setattr(scan, "MAX_FOLDER_ENTRIES", 1)
    for name in ("a", "b"):
        (tmp_path / name).write_text("x" * (5 if name == "a" else 11))
    large, many = find_problems({name: tmp_path / name for name in ("a", "b")})
    assert large.startswith("b has ") and "save it in shards" in large
    assert many.startswith("the folder . has 2 files")


def test_the_models_own_files_may_all_go():
    assert find_problems(published_files(TINY)) == []
    assert Path(TINY / "model.safetensors").is_file()


def test_behind_an_escaped_line_end_of_json(tmp_path):
    """In JSON the n of a line end stands right before what follows it, as a letter of the same word would."""
    for text in ("said:\n" + TOKENS["a Hugging Face token"], "from\n/home/ada/clips/1.wav"):
        assert len(problems(tmp_path, "answers.jsonl", json.dumps({"answer": text}))) == 1


def test_damaged_weights_and_a_user_without_a_home(tmp_path, monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    (line,) = problems(
        tmp_path, "a.safetensors", (99).to_bytes(8, "little") + TOKENS["an API key"].encode() + b" " * 99
    )
    assert "an API key" in line


def test_a_damaged_array_of_texts(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([TOKENS["an API key"], "a" * 60], "S"))
    (line,) = problems(tmp_path, "names.npy", buffer.getvalue()[:-1])
    assert "holds an API key" in line
