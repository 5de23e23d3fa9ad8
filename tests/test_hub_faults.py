"""A Hub that fails in every way: training goes on, each push is whole, the result arrives, and a download is right.

The Hub's client reads its endpoint at import, hence processes. In them the pauses between tries are cut to
milliseconds; everything else is real: client, HTTP, time-outs, training.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx2
import pytest
from huggingface_hub.utils import parse_ratelimit_headers
from safetensors.torch import load_file

from soundwave import SoundwaveForCTC, SoundwaveProcessor
from soundwave.model_card.build_card import CARD, is_free
from soundwave.model_card.push_to_hub import LONGEST_WAIT_S, PushRefused, _bound_wait
from soundwave.training.hub import SNAPSHOT, BackgroundPush
from tests.local_hub import KINDS, Faults, LocalHub
from tests.training_rows import write_rows

ROOT = Path(__file__).parents[1]

PREAMBLE = """
    import json, sys, time
    from pathlib import Path
    nap = time.sleep
    time.sleep = lambda seconds: nap(min(seconds, 0.01))
    import torch
    torch.set_num_threads(1)
    from soundwave.model_card import push_to_hub
    push_to_hub.REQUEST_TIMEOUT_S, push_to_hub.LONGEST_PAUSE_S = 0.4, 0.01
"""
TRAIN = """
    from soundwave.training.train import main
    audio_model, text_model, rows, *settings = sys.argv[1:]
    sys.exit(main([
        "align", f"audio_model={audio_model}", f"text_model={text_model}", f"data=[{rows}]", "global_batch=4",
        "per_device_batch=4", "warmup_steps=1", "device=cpu", "progress=false", "model.audio_padding=longest",
        "save_steps=1", "hub_strategy=every_save", *settings,
    ]))
"""


def run(hub: LocalHub | dict, script: str, *arguments: object, home: str = "home", timeout: float = 240):
    """Run a script after the preamble, against a Hub or with other variables."""
    variables = hub if isinstance(hub, dict) else hub.environment(home)
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PREAMBLE) + textwrap.dedent(script), *map(str, arguments)],
        env=os.environ | variables | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture
def stage(tmp_path, tiny_ctc, processor) -> Path:
    """A saved stage I, as a run leaves it."""
    folder = tmp_path / "stage"
    tiny_ctc.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "stage_config.yaml").write_text("stage: align\nhub_model_id: ours/align\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (folder / "skipped.jsonl").write_text('{"path": "/home/me/clip.wav"}\n')
    (folder / "logs").mkdir()
    (folder / "logs" / "events.out.tfevents.1").write_bytes(b"\0")
    return folder


def fetched(hub: LocalHub, name: str, target: Path, revision: str = "main") -> Path:
    """A commit's files, written to a folder."""
    for path in hub.listing(name, revision)[1]:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_bytes(hub.content(name, path, revision))
    return target


def test_a_hundred_faults_leave_every_commit_whole(stage, tmp_path):
    """Eight pushes through a Hub that breaks four requests of ten; the last one removes what became stale."""
    script = """
        from safetensors.torch import load_file, save_file
        stage = Path(sys.argv[1])
        tensors = load_file(stage / "model.safetensors")
        for k in range(8):
            tensors["ctc_head.blank"].fill_(k)
            save_file(tensors, stage / "model.safetensors", {"format": "pt"})
            (stage / "train_log.jsonl").write_text(json.dumps({"round": k}) + "\\n")
            (stage / ".eval_results").mkdir(exist_ok=True)
            for name in ("former_soundwave.py", "results.json", ".eval_results/soundwave-asr.yaml"):
                (stage / name).unlink(missing_ok=True)
                if k < 7:
                    (stage / name).write_text("# of a version before")
            push_to_hub.push_stage(stage, "ours/align", revision="tries", patience_s=60)
    """
    with LocalHub(tmp_path / "hub", Faults(rate=0.4)) as hub:
        done = run(hub, script, stage)
        assert done.returncode == 0, done.stderr[-3000:]
        assert sum(hub.faults.injected.values()) >= 100
        assert set(hub.faults.injected) == set(KINDS)
        repository = hub.read("ours/align")
        wanted = {path.name for path in stage.iterdir()} - {"skipped.jsonl", "logs", ".eval_results"}
        former = {"former_soundwave.py", "results.json", ".eval_results/soundwave-asr.yaml"}
        for number, (sha, listing) in enumerate(repository["commits"].items()):
            if not listing:
                continue  # as the repository was made
            whole = fetched(hub, "ours/align", tmp_path / f"commit{number}", sha)
            of_round = json.loads((whole / "train_log.jsonl").read_text())["round"]
            blank = load_file(whole / "model.safetensors")["ctc_head.blank"]
            assert (blank == of_round).all(), "weights and log of two pushes in one commit"
            assert set(listing) == wanted | (former if of_round < 7 else set())
    final = tmp_path / f"commit{number}"
    assert repository["branches"]["tries"] == sha and of_round == 7
    assert {path.name: path.read_bytes() for path in final.iterdir()} == {
        name: (stage / name).read_bytes() for name in wanted
    }
    assert (SoundwaveForCTC.from_pretrained(final).ctc_head.blank == 7).all()


def test_training_goes_on_while_the_hub_fails(encoder_folder, llm_folder, tmp_path):
    """Each checkpoint is pushed in the background; in the end the repository holds the result and nothing else."""
    rows, output = write_rows(tmp_path / "data", written=0), tmp_path / "out"
    with LocalHub(tmp_path / "hub", Faults(rate=0.4, seed=1)) as hub:
        settings = ("steps=6", f"output_dir={output}", "hub_model_id=ours/align", "hub_patience_s=100")
        done = run(hub, TRAIN, encoder_folder, llm_folder, rows, *settings)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Traceback" not in done.stderr and "not on the Hub" not in done.stderr
        commits = [sha for sha, listing in hub.read("ours/align")["commits"].items() if listing]
        folders = [fetched(hub, "ours/align", tmp_path / sha, sha) for sha in commits]
        assert sum(hub.faults.injected.values()) >= 10
    assert folders, "nothing arrived"
    for folder in folders:
        SoundwaveForCTC.from_pretrained(folder)
        SoundwaveProcessor.from_pretrained(folder)
        assert is_free(folder / CARD) and "has not been evaluated" in (folder / CARD).read_text()
    files = {str(path.relative_to(folders[-1])): path for path in folders[-1].rglob("*") if path.is_file()}
    assert {"README.md", "train_log.jsonl", "stage_config.yaml", "speech_soundwave.py"} <= files.keys()
    for name, path in files.items():
        content = path.read_bytes()
        assert content == (output / name).read_bytes()
        assert str(tmp_path).encode() not in content, f"a path of this machine is in {name}"
        assert b"hf_local" not in content, f"the token is in {name}"
    assert not (output / "_push").exists()


def test_a_hub_that_is_away_for_the_whole_run(encoder_folder, llm_folder, tmp_path):
    """It is said once that it is; the result is there, and one command pushes it when the Hub is back."""
    rows, output = write_rows(tmp_path / "data", written=0), tmp_path / "out"
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_local"}
    (output / SNAPSHOT).mkdir(parents=True)  # a run was killed in the middle of a push
    with LocalHub(tmp_path / "hub") as hub:
        away = hub.environment("home") | nobody
        settings = ("steps=3", f"output_dir={output}", "hub_model_id=ours/align", "hub_patience_s=1")
        done = run(away, TRAIN, encoder_folder, llm_folder, rows, *settings)
        assert done.returncode == 0, done.stderr[-3000:]
        said = [line for line in done.stderr.splitlines() if "ours/align" in line or "soundwave push" in line]
        assert len(said) == 3, done.stderr
        assert re.search(r"push to ours/align failed \(Connect.*The training goes on; the next push tries", said[0])
        assert re.search(r"push to ours/align failed \(Connect.* It is tried again for up to 1 s", said[1])
        assert f"the result is in {output}, but not on the Hub." in said[2]
        assert f"soundwave push {output}" in said[2]
        assert not (output / SNAPSHOT).exists()
        draft = (output / "card.yaml").read_text()
        (output / "card.yaml").write_text(draft.replace("licence: not stated", "licence: CC0-1.0"))
        command = [sys.executable, "-m", "soundwave.apps.cli", "push", str(output)]
        pushed = subprocess.run(
            command, env=os.environ | hub.environment(), cwd=ROOT, capture_output=True, text=True, timeout=120
        )
        assert pushed.returncode == 0, pushed.stderr
        assert "pushed: http" in pushed.stdout
        assert sum(bool(listing) for listing in hub.read("ours/align")["commits"].values()) == 1
        whole = fetched(hub, "ours/align", tmp_path / "whole")
    assert (whole / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    SoundwaveForCTC.from_pretrained(whole)


def test_a_refusal_is_said_once(encoder_folder, llm_folder, tmp_path):
    rows, output = write_rows(tmp_path / "data", written=0), tmp_path / "out"
    with LocalHub(tmp_path / "hub", Faults(rate=1, kinds=("403",))) as hub:
        settings = ("steps=3", f"output_dir={output}", "hub_model_id=ours/align")
        done = run(hub, TRAIN, encoder_folder, llm_folder, rows, *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("refuses the push to ours/align (403") == 1
    assert "use a token that may write there" in done.stderr
    assert done.stderr.count(f"Push it with: soundwave push {output}") == 1
    assert (output / "model.safetensors").is_file()


@dataclass
class Refusals(Faults):
    """A repository called refuses-403 answers everything with 403."""

    def draw(self, request: str) -> str | None:
        found = re.search(r"refuses-(\d+)", request)
        return found and found[1]


def test_what_cannot_succeed_is_not_tried_again(stage, tmp_path):
    script = """
        said = {}
        for status in ("401", "402", "403", "413", "507", "500"):
            try:
                push_to_hub.push_stage(sys.argv[1], f"ours/refuses-{status}", patience_s=3)
            except push_to_hub.PushError as error:
                said[status] = [type(error).__name__, str(error)]
        for name in ("no good name", "ours/a--b"):
            try:
                push_to_hub.push_stage(sys.argv[1], name, patience_s=3)
            except push_to_hub.PushError as error:
                said[name] = [type(error).__name__, str(error)]
        print(json.dumps(said))
    """
    with LocalHub(tmp_path / "hub", Refusals()) as hub:
        done = run(hub, script, stage)
        assert done.returncode == 0, done.stderr[-3000:]
        asked = {status: sum(f"refuses-{status}" in line for line in hub.requests) for status in ("403", "507", "500")}
    said = json.loads(done.stdout.splitlines()[-1])
    assert {status: kind for status, (kind, _) in said.items()} == dict.fromkeys(
        ("401", "402", "403", "413", "507", "no good name", "ours/a--b"), "PushRefused"
    ) | {"500": "PushError"}
    assert "hf auth login" in said["401"][1]
    assert "no space left" in said["507"][1]
    assert "Name another one" in said["no good name"][1]
    assert asked["403"] == asked["507"] == 1 < asked["500"]


def test_pushes_in_the_background_keep_out_of_the_way(capsys):
    """`start` returns at once, one runs at a time, an outage is said once, a refusal ends them."""
    background, go_on = BackgroundPush("ours/align"), threading.Event()
    done = []
    background.start(lambda: done.append(go_on.wait(60)))
    assert background.busy() and not done
    go_on.set()
    background.wait()
    assert not background.busy() and done == [True]

    def fail(error: Exception) -> str:
        background.start(partial(_raise, error))
        background.wait()
        return capsys.readouterr().err

    assert "push to ours/align failed (KeyError: 'url'). The training goes on; the next push tries" in fail(
        KeyError("url")
    )
    assert fail(TimeoutError()) == ""  # the same outage
    background.start(lambda: None)
    background.wait()
    assert "TimeoutError: no answer" in fail(TimeoutError())
    assert background.refused is None
    assert "this run does not try again" in fail(PushRefused("No."))
    assert str(background.refused) == "No."


def _raise(error: Exception) -> None:
    raise error


def test_a_wait_of_a_day_is_not_obeyed():
    """The client sleeps for as long as an answer tells it to."""
    headers = {"Retry-After": "86400", "RateLimit": '"api";r=0;t=86400'}
    response = httpx2.Response(429, headers=headers)
    _bound_wait(response)
    assert response.headers["Retry-After"] == str(LONGEST_WAIT_S)
    assert parse_ratelimit_headers(response.headers).reset_in_seconds == LONGEST_WAIT_S
    soon = httpx2.Response(503, headers={"Retry-After": "7"})
    _bound_wait(soon)
    assert soon.headers["Retry-After"] == "7"


def test_a_broken_download_is_never_a_wrong_model(stage, llm_folder, tmp_path):
    """Stage II starts from a Hub id at a branch: with the very tensors of stage I, or not at all."""
    script = """
        import shutil
        from huggingface_hub import constants
        from soundwave.training.building import build_model
        from soundwave.training.stages import StageConfig
        stage, llm, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
        config = dict(text_model=llm, device="cpu")
        def parts(start, **settings):
            torch.manual_seed(0)
            model, processor = build_model(StageConfig.for_stage("shrink", start=start, **config, **settings))
            prompt = processor.apply_chat_template(
                [{"role": "user", "content": "hello"}], tokenize=True, return_dict=True, add_generation_prompt=True
            )
            return model.state_dict(), processor.to_dict(), prompt["input_ids"]
        tensors, settings, ids = parts(stage)
        outcomes = []
        for _ in range(rounds):
            shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
            try:
                found, found_settings, found_ids = parts("ours/align", start_revision="best")
            except Exception as error:
                outcomes.append(f"{type(error).__name__}: {error}")
                continue
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[name], tensors[name]) for name in tensors)
            assert torch.equal(torch.as_tensor(found_ids), torch.as_tensor(ids))
            differing = {k for k in settings if settings[k] != found_settings.get(k)}
            assert not differing, differing
            outcomes.append("same")
        print(json.dumps(outcomes))
    """
    quick = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    with LocalHub(tmp_path / "hub") as hub:
        upload = "print(push_to_hub.push_stage(sys.argv[1], 'ours/align', revision='best').address)\n"
        done = run(hub, upload * 2, stage)
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(set(done.stdout.split())) == 1, "a push of what is there already made a commit"
        hub.faults = Faults(rate=0.25, seed=3)
        done = run(hub.environment() | quick, script, stage, llm_folder, 4)
        faults = sum(hub.faults.injected.values())
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert faults >= 5 and "same" in outcomes
