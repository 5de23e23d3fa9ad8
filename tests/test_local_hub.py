"""The test endpoint against the real client, which reads its endpoint at import, so it gets its own process."""

import json
import os
import subprocess
import sys
import textwrap

import pytest

from tests.local_hub import HubError, LocalHub


def run_client(hub: LocalHub, script: str, home: str = "home") -> dict:
    """Run a script that prints one JSON object on its last line."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | hub.environment(home),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_client_round_trip(tmp_path):
    """Create, upload (both ways), branch, list, read back old and new, delete, and the errors a client tells apart."""
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "config.json").write_text('{"a": 1}')
    (source / "sub" / "notes.md").write_text("---\nlicense: apache-2.0\n---\n")
    (source / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    with LocalHub(tmp_path / "hub") as hub:
        seen = run_client(
            hub,
            f"""
            import json
            from pathlib import Path
            from huggingface_hub import HfApi, errors, hf_hub_download, snapshot_download
            api, repo = HfApi(), "ours/first"
            seen = {{"name": api.whoami()["name"]}}
            api.create_repo(repo)
            api.create_repo(repo, exist_ok=True)
            first = api.upload_folder(repo_id=repo, folder_path={str(source)!r}).oid
            api.create_branch(repo, branch="stage/one")
            api.create_branch(repo, branch="stage/one", exist_ok=True)
            api.upload_file(repo_id=repo, path_in_repo="config.json", path_or_fileobj=b'{{"a": 2}}')
            api.delete_file("sub/notes.md", repo)
            info = api.model_info(repo)
            seen["moved"] = info.sha != first
            seen["files"] = sorted(api.list_repo_files(repo))
            seen["branches"] = sorted(branch.name for branch in api.list_repo_refs(repo).branches)
            seen["new"] = Path(hf_hub_download(repo, "config.json")).read_text()
            seen["old"] = Path(hf_hub_download(repo, "config.json", revision=first)).read_text()
            folder = Path(snapshot_download(repo, revision="stage/one"))
            seen["snapshot"] = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
            seen["weights"] = (folder / "model.safetensors").stat().st_size
            wrong = {{"repo": ("ours/none", "main"), "file": (repo, "main"), "revision": (repo, "none")}}
            for key, (name, revision) in wrong.items():
                try:
                    hf_hub_download(name, "none.txt", revision=revision)
                except errors.HfHubHTTPError as error:
                    seen[key] = type(error).__name__
            print(json.dumps(seen))
            """,
        )
        assert hub.content("ours/first", "config.json") == b'{"a": 2}'
    assert seen == {
        "name": "local",
        "moved": True,
        "files": ["config.json", "model.safetensors"],
        "branches": ["main", "stage/one"],
        "new": '{"a": 2}',
        "old": '{"a": 1}',
        "snapshot": ["config.json", "model.safetensors", "sub/notes.md"],
        "weights": 25600,
        "repo": "RepositoryNotFoundError",
        "file": "RemoteEntryNotFoundError",
        "revision": "RevisionNotFoundError",
    }


def test_repositories_outlive_the_server(tmp_path):
    """A second server on the same folder serves what the first one stored; unknown repositories are an error."""
    with LocalHub(tmp_path) as hub:
        run_client(
            hub,
            """
            from huggingface_hub import HfApi
            HfApi().create_repo("ours/kept")
            HfApi().upload_file(repo_id="ours/kept", path_in_repo="a.txt", path_or_fileobj=b"kept")
            print("{}")
            """,
        )
    with LocalHub(tmp_path) as again:
        assert again.content("ours/kept", "a.txt") == b"kept"
        with pytest.raises(HubError, match="RepoNotFound"):
            again.listing("ours/other")
