"""Stage III names II, II names I: by folders that lie there, by the Hub at a commit, and no further than is known."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from soundwave.model_card.figures import CardError
from soundwave.model_card.lineage import read_lineage
from tests.local_hub import LocalHub

ROOT = Path(__file__).parents[1]


def stage(folder: Path, name: str, **settings) -> Path:
    folder.mkdir()
    (folder / "stage_config.yaml").write_text(yaml.safe_dump({"stage": name, **settings}))
    (folder / "model.safetensors").write_bytes(name.encode())
    return folder


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def run_python(code: str, folder: Path, variables: dict) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder,
        env=os.environ | variables | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_folders_beside_each_other_by_the_hash_of_their_weights(tmp_path):
    """The settings hold the last part of a path only: the folder is looked for beside the stage's own."""
    stage(tmp_path / "align", "align")
    stage(tmp_path / "shrink", "shrink", start="align", start_revision=None)
    three = stage(tmp_path / "instruct", "instruct", start="runs/shrink", start_revision=None)
    second, first = read_lineage(three)
    assert (second.stage, second.name, second.weights) == ("shrink", "shrink", sha256("shrink"))
    assert (first.stage, first.name, first.weights) == ("align", "align", sha256("align"))
    assert f"the result of stage II, `shrink` (SHA-256 of its weights: `{second.weights}`)" == str(second)


def test_a_folder_that_belongs_to_a_repository_is_named_by_it(tmp_path):
    """Its own name says nothing to anybody else."""
    stage(tmp_path / "shrink", "shrink", hub_model_id="ours/two")
    (second,) = read_lineage(stage(tmp_path / "instruct", "instruct", start="shrink"))
    where = f"[ours/two](https://huggingface.co/ours/two) (SHA-256 of its weights: `{sha256('shrink')}`)"
    assert str(second) == f"the result of stage II, {where}"


def test_a_checkpoint_that_is_pushed_from_within_its_run(tmp_path):
    stage(tmp_path / "align", "align")
    stage(tmp_path / "shrink", "shrink", start="align")
    snapshot = stage(tmp_path / "shrink" / "_push-x", "shrink", start="align")
    assert [ancestor.weights for ancestor in read_lineage(snapshot)] == [sha256("align")]


def test_a_folder_that_is_gone_is_still_named(tmp_path):
    three = stage(tmp_path / "instruct", "instruct", start="shrink")
    assert [str(ancestor) for ancestor in read_lineage(three)] == ["the result of stage II, `shrink`"]
    assert read_lineage(stage(tmp_path / "align", "align", start=None)) == []


def test_settings_that_name_each_other_end(tmp_path):
    stage(tmp_path / "a", "instruct", start="b")
    assert len(read_lineage(stage(tmp_path / "b", "instruct", start="a"))) == 10


@pytest.mark.parametrize("text", ["- a\n", "stage: [\n", "stage: fly\n"])
def test_settings_that_are_none_are_refused(text, tmp_path):
    (tmp_path / "stage_config.yaml").write_text(text)
    with pytest.raises(CardError, match="stage_config.yaml"):
        read_lineage(tmp_path)


def test_a_chain_on_the_hub_by_its_commits(tmp_path):
    """At the commits that were used, whatever the branches hold by now; offline, as far as the cache goes."""
    script = """
        import json, os, sys
        from pathlib import Path
        from huggingface_hub import HfApi
        from soundwave.model_card.lineage import read_lineage

        hub = HfApi()
        def publish(name, settings):
            hub.create_repo(name, exist_ok=True)
            return hub.upload_file(
                path_or_fileobj=json.dumps(settings).encode(), path_in_repo="stage_config.yaml", repo_id=name
            ).oid

        one = publish("ours/align", {"stage": "align"})
        two = publish("ours/shrink", {"stage": "shrink", "start": "ours/align", "start_revision": one})
        publish("ours/shrink", {"stage": "align"})
        run = Path("instruct")
        run.mkdir()
        settings = {"stage": "instruct", "start": "ours/shrink", "start_revision": two}
        (run / "stage_config.yaml").write_text(json.dumps(settings))
        print(json.dumps([one, two, *map(str, read_lineage(run))]))
    """
    known = "from soundwave.model_card.lineage import read_lineage; print(*read_lineage('instruct'), sep='; ')"

    with LocalHub(tmp_path / "hub") as hub:
        one, two, *said = json.loads(run_python(script, tmp_path, hub.environment()))
        second = f"the result of stage II, [ours/shrink](https://huggingface.co/ours/shrink) at `{two}`"
        assert said == [second, f"the result of stage I, [ours/align](https://huggingface.co/ours/align) at `{one}`"]
        assert run_python(known, tmp_path, hub.environment("home") | {"HF_HUB_OFFLINE": "1"}) == "; ".join(said)
        assert run_python(known, tmp_path, hub.environment("another") | {"HF_HUB_OFFLINE": "1"}) == second


def test_a_resumed_run_keeps_the_commit_it_began_with(tmp_path):
    """Whatever its start's branch holds by now; a new run takes that."""
    script = """
        from dataclasses import replace
        from huggingface_hub import HfApi
        from soundwave.training.building import pin_start
        from soundwave.training.stages import StageConfig

        hub = HfApi()
        def publish(content):
            hub.create_repo("ours/align", exist_ok=True)
            return hub.upload_file(
                path_or_fileobj=content, path_in_repo="config.json", repo_id="ours/align"
            ).oid

        config = StageConfig.for_stage("shrink", start="ours/align", output_dir="run", resume=True)
        first = publish(b"{}")
        assert pin_start(config).start_revision == first
        pin_start(config).save("run/stage_config.yaml")
        second = publish(b"{} ")
        assert pin_start(config).start_revision == first
        assert pin_start(replace(config, resume=False)).start_revision == second != first
    """
    (tmp_path / "run").mkdir()
    with LocalHub(tmp_path / "hub") as hub:
        run_python(script, tmp_path, hub.environment())
