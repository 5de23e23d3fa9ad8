"""`soundwave push`: what it pushes, what it refuses, and that being killed in the middle loses nothing."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from soundwave.apps import push as command
from soundwave.model_card.build_card import MARK
from soundwave.model_card.facts import CardFacts
from soundwave.model_card.figures import CardError
from soundwave.model_card.push_to_hub import CheckFailed, PushRefused, gather, published_files, push_stage
from soundwave.training.checkpoints import mark_complete
from tests.local_hub import Faults, LocalHub

ROOT = Path(__file__).parents[1]


def save_stage(folder: Path, model, processor, **settings) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "train_log.jsonl").write_text('{"loss": 1.0, "step": 1}\n')
    settings = {"stage": "align", "trains": ["alignment_adapter"], **settings}
    (folder / "stage_config.yaml").write_text(yaml.safe_dump(settings))
    CardFacts(data=[{"name": "tones", "task": "asr", "rows": 3, "hours": 0.1, "licence": "CC0"}], license="mit").save(
        folder
    )
    return folder


@pytest.fixture
def run(tmp_path, tiny_ctc, processor) -> Path:
    """A finished run that knows its repository."""
    return save_stage(tmp_path / "align", tiny_ctc, processor, hub_model_id="ours/align", hub_revision="best")


@pytest.fixture
def cut_short(run) -> Path:
    """A run with two checkpoints, the newer one not whole, and no result."""
    for step in (1, 2):
        checkpoint = run / f"checkpoint-{step}"
        checkpoint.mkdir()
        for file in run.iterdir():
            if file.is_file() and file.name not in ("train_log.jsonl", "stage_config.yaml"):
                (checkpoint / file.name).write_bytes(file.read_bytes())
        tensors = {name: tensor + step for name, tensor in load_file(run / "model.safetensors").items()}
        save_file(tensors, checkpoint / "model.safetensors", {"format": "pt"})
        (checkpoint / "optimizer.pt").write_bytes(b"\0")
        (checkpoint / "trainer_state.json").write_text("{}")
        if step == 1:
            mark_complete(checkpoint, checkpoint.glob("*"), step=step, stopped_early=False, settings={})
    (run / "model.safetensors").unlink()
    return run


def soundwave_push(hub: LocalHub, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "soundwave.apps.cli", "push", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | hub.environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def pushed(hub: LocalHub, *arguments: object) -> str:
    process = soundwave_push(hub, *arguments)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output + errors


def test_what_belongs_to_this_machine_stays_here(run):
    private = (
        *("optimizer.pt", "trainer_state.json", "skipped.jsonl", "nonfinite.jsonl", ".env", "complete.json"),
        *("answers.settings.json", "answers.jsonl.rank0", "answers.jsonl.new", "results.json.new"),
    )
    for name in private:
        (run / name).write_text("{}")
    for folder in ("judge_replies/0a", "logs", "checkpoint-3", "_push", ".git", ".eval_results"):
        (run / folder).mkdir(parents=True)
        (run / folder / "config.json").write_text("{}")
    (run / ".eval_results" / "soundwave-asr.yaml").write_text("[]")
    (run / "curves").mkdir()
    (run / "curves" / "loss.png").write_bytes(b"\0")
    files = published_files(run)
    assert {"config.json", "model.safetensors", "speech_soundwave.py", "curves/loss.png"} <= files.keys()
    assert not any(path in private or path.startswith(("judge", "logs", "checkpoint", "_", ".git")) for path in files)
    assert [path for path in files if path.startswith(".")] == [".eval_results/soundwave-asr.yaml"]


def test_a_checkpoint_is_gathered_beside_the_run_that_goes_on(cut_short, tmp_path):
    """The run may delete the checkpoint and write its log on: what is being pushed stays as it was."""
    target = tmp_path / "snapshot"
    for name, text in (("results.json", "{}"), ("answers.jsonl", ""), ("README.md", MARK)):  # of an earlier result
        (cut_short / name).write_text(text)
    gather(cut_short, cut_short / "checkpoint-1", target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    assert {"model.safetensors", "config.json", "train_log.jsonl", "stage_config.yaml"} <= before.keys()
    assert not {"optimizer.pt", "trainer_state.json", "complete.json"} & before.keys()
    assert not {"results.json", "answers.jsonl", "README.md"} & before.keys()
    (cut_short / "train_log.jsonl").write_text("more\n")
    (cut_short / "checkpoint-1" / "model.safetensors").unlink()
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_a_damaged_file_is_named(run):
    for text, expected in (("{", "config.json of .* is not JSON"), ("{}", "config.json of .* is not of a saved")):
        (run / "config.json").write_text(text)
        with pytest.raises(CardError, match=expected):
            command.push(run)
    (run / "model.safetensors").rename(run / "model-00001-of-00001.safetensors")
    (run / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="model.safetensors.index.json is damaged"):
        command.push(run)


def test_a_damaged_file_beside_the_weights_is_named(run):
    (run / "extra.safetensors").write_bytes(b"")
    with pytest.raises(CardError, match="extra.safetensors cannot be read .*expected a whole safetensors file"):
        command.push(run)


def test_weights_that_are_no_numbers_are_not_pushed(run):
    """The model answers with them too, if with nonsense."""
    tensors = load_file(run / "model.safetensors")
    tensors["ctc_head.blank"].view(-1)[0] = float("nan")
    save_file(tensors, run / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckFailed, match="ctc_head.blank in model.safetensors holds NaN or infinity"):
        command.push(run)


def test_what_a_link_leads_to_is_not_published_but_for_weights(run, tmp_path):
    (tmp_path / "outside.txt").write_text("mine alone")
    weights = (run / "model.safetensors").rename(tmp_path / "model.safetensors")
    (run / "model.safetensors").symlink_to(weights)
    (run / "again.txt").symlink_to(run / "train_log.jsonl")
    assert {"model.safetensors", "again.txt"} <= published_files(run).keys()
    (run / "link.txt").symlink_to(tmp_path / "outside.txt")
    with pytest.raises(CheckFailed, match="link.txt in .* is a link to a file outside of it; copy the file there"):
        command.push(run, check=False)
    with pytest.raises(CheckFailed, match="link.txt"):
        gather(run, run, tmp_path / "snapshot")


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "model.safetensors"])
def test_a_folder_that_does_not_load_is_not_pushed(run, name):
    (run / name).unlink()
    with pytest.raises(ValueError, match=f"no finished run, and has no complete checkpoint: there is no {name}"):
        command.push(run)


def test_a_folder_without_weights_does_not_empty_the_repository(run):
    """Its push would delete the weights and the code that an earlier one left there."""
    (run / "model.safetensors").unlink()
    with pytest.raises(PushRefused, match="holds no weights to push to ours/align; save the model"):
        push_stage(run, "ours/align")


def test_weights_cut_short_are_not_pushed(run):
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        command.push(run)


def test_what_was_given_is_explained(run, tmp_path):
    with pytest.raises(ValueError, match="there is no folder .*none"):
        command.push(tmp_path / "none")
    with pytest.raises(ValueError, match="a folder of runs; push one of them: align"):
        command.push(tmp_path)
    (run / "stage_config.yaml").write_text("stage: align\n")
    with pytest.raises(ValueError, match="name the repository with --to OWNER/NAME"):
        command.push(run)
    with pytest.raises(ValueError, match="mine has no owner, .*give OWNER/mine"):
        command.push(run, to="mine")
    with pytest.raises(PushRefused, match="HF_HUB_OFFLINE is set"):  # as the tests run
        command.push(run, to="ours/align", check=False)


def test_a_name_that_the_licence_forbids_is_refused(run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"text_model_id": "meta-llama/Llama-3.1-8B-Instruct"}))
    (run / "README.md").write_text("# Written by hand\n")
    with pytest.raises(CardError, match="call it 'Llama-align'"):
        command.push(run)


def test_killed_in_the_middle_and_run_again(run, tmp_path):
    """A reader sees the old state until the new one is whole, and nothing that arrived is sent again."""
    with LocalHub(tmp_path / "hub") as hub:
        pushed(hub, run, "--no-check")
        first, listing = hub.listing("ours/align", "best")
        assert set(listing) == set(published_files(run))
        assert {"README.md", "stage_config.yaml"} <= set(listing)
        assert not hub.listing("ours/align", "main")[1], "it was pushed to the run's branch"

        tensors = {name: tensor + 1 for name, tensor in load_file(run / "model.safetensors").items()}
        save_file(tensors, run / "model.safetensors", {"format": "pt"})
        for step in ("PUT /lfs/", "/commit/"):  # the weights under way; all there, but not yet committed
            hub.faults = Faults(rate=1, kinds=("hang",), among=step)
            process = soundwave_push(hub, run, "--no-check")
            deadline = time.monotonic() + 100
            while not hub.faults.injected and time.monotonic() < deadline:
                time.sleep(0.05)
            process.kill()
            process.communicate()
            assert hub.faults.injected, "the push did not get so far"
            assert hub.listing("ours/align", "best")[0] == first

        hub.faults, hub.requests[:] = None, []
        said = pushed(hub, run, "--no-check")
        newest = hub.listing("ours/align", "best")[0]
        assert newest != first and f"\npushed: {hub.url}/ours/align/commit/{newest}\n" in f"\n{said}"
        assert f"already there: {hub.url}/ours/align/commit/{newest}\n" in pushed(hub, run, "--no-check")
        assert hub.content("ours/align", "model.safetensors", "best") == (run / "model.safetensors").read_bytes()
        assert set(hub.listing("ours/align", "best")[1]) == set(listing)
        assert not any(line.startswith('"PUT /lfs/') for line in hub.requests)


def test_a_run_cut_short_pushes_its_last_complete_checkpoint(cut_short, tmp_path):
    with LocalHub(tmp_path / "hub") as hub:
        said = pushed(hub, cut_short, "--to", "ours/other", "--private")  # with the check that it loads
        assert "NOT checked" not in said and not any("/resolve/" in line for line in hub.requests)
        assert "is not finished" in said and "pushing checkpoint-1" in said
        files = hub.listing("ours/other")[1]  # not the branch of the run's own repository
        weights = (cut_short / "checkpoint-1" / "model.safetensors").read_bytes()
        assert hub.content("ours/other", "model.safetensors") == weights
        assert {"README.md", "train_log.jsonl", "stage_config.yaml", "processor_config.json"} <= set(files)
        assert not any(path.startswith(("checkpoint", "optimizer", "trainer_state", "_")) for path in files)
    assert not list(cut_short.glob("_push*"))


def test_a_push_that_fails_is_one_line_and_exit_code_1(run, tmp_path):
    with LocalHub(tmp_path / "hub", Faults(rate=1, kinds=("401",))) as hub:
        process = soundwave_push(hub, run, "--no-check")
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and not output
    lines = [line for line in errors.splitlines() if line.startswith("soundwave push:")]
    assert len(lines) == 2 and "NOT checked" in lines[0]
    assert "refuses the push to ours/align (401" in lines[1] and "hf auth login" in lines[1]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "stage_config.yaml",
            "stage: align\nhub_model_id: ours/align\nt: hf_" + 11 * "aB3" + "x",
            "a Hugging Face token",
        ),
        ("notes.txt", "cprint\n(S'hi'\ntR.", "notes.txt is a pickle"),
        ("report.md", "from /home/ada/clips/1.wav", "a path in a user's home folder"),
        ("card.yaml", "data: [{name: tapes, task: asr, rows: 1, hours: 1, licence: }]", "no licence of tapes"),
        ("card.yaml", "limits: [Its BLEU is 31.4]", "31.4, not found in results.json"),
        ("speech_soundwave.py", "import soundwave", "does not load and answer"),
    ],
)
def test_what_must_not_be_published_uploads_nothing(name, content, expected, run):
    """Not with --no-check either, which leaves out the loading alone. The Hub is not asked for anything before: here,
    offline, that would be another error.
    """
    (run / name).write_text(content)
    with pytest.raises((CheckFailed, CardError), match=re.escape(expected)) as failure:
        command.push(run, check=name.endswith(".py"))
    assert "aB3aB3" not in str(failure.value)


def test_our_card_is_made_anew_and_somebodys_own_is_kept(run, capsys):
    """What changed since the training, an evaluation or a fact, is in the card that goes out."""
    card = run / "README.md"

    def card_of_a_push() -> str:
        with pytest.raises(PushRefused, match="HF_HUB_OFFLINE is set"):  # after all checks
            command.push(run, check=False)
        assert "that it loads and answers without this package was NOT checked (--no-check)" in capsys.readouterr().err
        return card.read_text()

    assert "It knows tones only." not in card_of_a_push()
    facts = CardFacts.read(run)
    facts.limits = ["It knows tones only."]
    facts.save(run)
    assert "- It knows tones only." in card_of_a_push()
    own = "---\nlicense: mit\n---\n\n# My own words\n"
    card.write_text(own)
    assert card_of_a_push() == own


def test_results_of_an_earlier_push_do_not_stay(run, tmp_path):
    """Ours of the Hub's leaderboards go with the figures they stated; those that others added stay."""
    results = run / ".eval_results"
    results.mkdir()
    for name in ("soundwave-old.yaml", "community.yaml"):
        (results / name).write_text("[]\n")
    script = """
import sys
from pathlib import Path
from soundwave.model_card.push_to_hub import push_stage

push_stage(sys.argv[1], "ours/align")
for path in Path(sys.argv[1], ".eval_results").iterdir():
    path.unlink()
push_stage(sys.argv[1], "ours/align")
"""
    with LocalHub(tmp_path / "hub") as hub:
        environment = os.environ | hub.environment() | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", script, str(run)], cwd=ROOT, env=environment, check=True, timeout=120)
        listing = {path for path in hub.listing("ours/align")[1] if path.startswith(".")}
    assert listing == {".eval_results/community.yaml"}


def test_a_failed_check_is_a_refusal(run):
    (run / "weights.pt").write_bytes(b"")
    with pytest.raises(CheckFailed, match="Nothing was pushed to ours/align: weights.pt is a pickle"):
        push_stage(run, "ours/align", patience_s=60)


def test_metadata_that_the_hub_does_not_take(run, tmp_path):
    """It is said at once and in its words, before there is a repository."""
    (run / "card.yaml").write_text((run / "card.yaml").read_text().replace("license: mit", "license: my-own"))
    with LocalHub(tmp_path / "hub") as hub:
        process = soundwave_push(hub, run, "--no-check")
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 1
        assert 'the metadata of README.md ("license" must be one of [apache-2.0, mit' in errors
        assert "Correct it in card.yaml" in errors
        assert not hub.repository_path("ours/align").exists()


def test_what_somebody_wrote_on_the_hub_stays_there(run, tmp_path):
    """A README.md by hand, and a program of theirs; code of an earlier version of ours goes."""
    script = """
import sys
from huggingface_hub import HfApi, CommitOperationAdd
files = {"README.md": b"# By hand", "my_demo.py": b"print()", "former_soundwave.py": b"# of an earlier version"}
HfApi().create_repo("ours/align")
HfApi().create_commit("ours/align", [CommitOperationAdd(*file) for file in files.items()], commit_message="By hand")
"""
    keep = """
import sys
from soundwave.model_card.push_to_hub import push_stage
print(push_stage(sys.argv[1], "ours/align", own_card="keep"))
print(push_stage(sys.argv[1], "ours/align", own_card="keep").kept_card)
"""
    with LocalHub(tmp_path / "hub") as hub:
        environment = os.environ | hub.environment() | {"OMP_NUM_THREADS": "1"}
        arguments = {"cwd": ROOT, "env": environment, "check": True, "timeout": 120}
        subprocess.run([sys.executable, "-c", script], **arguments)
        first, there = hub.listing("ours/align")[0], ("--revision", "main", "--no-check")

        process = soundwave_push(hub, run, *there)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 1 and hub.listing("ours/align")[0] == first
        assert "ours/align has a README.md of somebody's own" in errors and "--overwrite-card" in errors

        done = subprocess.run([sys.executable, "-c", keep, str(run)], stdout=subprocess.PIPE, text=True, **arguments)
        assert done.stdout.startswith("pushed: ") and done.stdout.endswith("\nTrue\n")
        assert hub.content("ours/align", "README.md") == b"# By hand"
        files = hub.listing("ours/align")[1]
        assert "my_demo.py" in files and "model.safetensors" in files and "former_soundwave.py" not in files

        pushed(hub, run, *there, "--overwrite-card")
        assert hub.content("ours/align", "README.md") == (run / "README.md").read_bytes()


def test_a_hub_that_is_away_is_said_at_once_and_nothing_is_lost(run):
    script = """
import sys
from soundwave.apps import push
push.PATIENCE_S = 3
sys.exit(push.main([sys.argv[1], "--no-check"]))
"""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_local"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(run)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and not done.stdout
    assert len(re.findall(r"failed \(Connect.* It is tried again for up to [23] s\.", done.stderr)) == 1
    assert "Nothing is lost: the same command goes on where this one stopped." in done.stderr.splitlines()[-1]
