"""Where figures come from: revisions that follow the weights, and nothing that names a folder of this machine."""

import copy
import shlex

import pytest
import torch

from soundwave.eval import results


def test_model_revision_follows_the_weights(tiny_model):
    before = results.describe_model(tiny_model)["revision"]
    changed = copy.deepcopy(tiny_model)
    with torch.no_grad():
        changed.ctc_head.log_scale.add_(1)
    assert results.describe_model(copy.deepcopy(tiny_model))["revision"] == before
    assert results.describe_model(changed)["revision"] != before
    assert results.describe_model(changed, "m", "abc")["revision"] == "abc"


@pytest.mark.parametrize(
    ("argument", "published"),
    [
        ("/home/name/my run", "my run"),
        ("--output=/home/name/run", "--output=run"),
        ("data=[/home/name/a b.jsonl,c/d.jsonl]", "data=[a b.jsonl,c/d.jsonl]"),
        ("../../home/name/run", "run"),
        ("runs/instruct", "runs/instruct"),
        ("owner/model", "owner/model"),
        ("--endpoint=http://user:secret@host:8000/v1", "--endpoint=http://host:8000/v1"),
        ("http://user:a@b@host/v1", "http://host/v1"),
        ("https://host/v1?api-key=a/b=,[c]&x=/home/name#d", "https://host/v1"),
        ("--judge-endpoint=HTTPS://host?api-key=abc", "--judge-endpoint=HTTPS://host"),
        ("https://host/v1#secret", "https://host/v1"),
        ("data=[https://host/a.jsonl?key=1,s3://b/c.jsonl?key=2]", "data=[https://host/a.jsonl,s3://b/c.jsonl]"),
        ("What is said, and by whom?", "What is said, and by whom?"),
    ],
)
def test_the_published_command_names_no_folder_of_this_machine(argument, published, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/soundwave", "evaluate", argument])
    assert shlex.split(results.command_line()) == ["soundwave", "evaluate", published]


def test_recordings_elsewhere_keep_their_file_name_only(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "one"
    assert results.portable_path(str(tmp_path / "runs" / "wav" / "a.wav"), run) == "../wav/a.wav"
    assert results.portable_path(str(run / "a.wav"), run) == "a.wav"
    assert results.portable_path(str(tmp_path / "data" / "a.wav"), run) == "a.wav"
    monkeypatch.chdir(tmp_path)
    assert results.portable_path(str(tmp_path / "runs" / "wav" / "a.wav"), "runs/one") == "../wav/a.wav"
    assert results.portable_path("https://me:secret@host/a.wav?key=b", "runs/one") == "https://host/a.wav"
