"""A stage's folder to the Hub, in one commit."""

from pathlib import Path

from huggingface_hub import HfApi

from soundwave.training.checkpoints import PRIVATE


def push_stage(folder: str | Path, repo_id: str, revision: str | None = None, private: bool = False) -> str:
    """Upload a saved stage (weights, code, processor, card, results) and return the commit's address.

    Args:
        folder: of the stage.
        repo_id: made if need be.
        revision: branch, made if need be; ``None`` = main.
        private: of a repository that is made.
    """
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=str(folder), revision=revision, ignore_patterns=PRIVATE, commit_message="Stage"
    )
    return str(commit.commit_url)
