"""A stage's repository on the Hub: made before the training, fed while it goes on, whole at its end."""

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.utils import PushInProgress

from soundwave.training.checkpoints import PRIVATE


class HubMixin(Trainer):
    """How the trainers push: the output folder, without checkpoints and what belongs to this machine."""

    push_in_progress: Any  # of the library's Trainer

    def init_hf_repo(self, token=None, private=None):
        """Create the repository, and a named branch: the library leaves that out, and pushes fail in silence."""
        super().init_hf_repo(token=token, private=private)
        if self.is_world_process_zero() and self.args.hub_revision:
            api = HfApi(token=self.args.hub_token)
            api.create_branch(self.hub_model_id, branch=self.args.hub_revision, exist_ok=True)

    def create_model_card(self, *args, **kwargs):
        """Nothing: the card is made by `soundwave.model_card` from results, and a generic one would overwrite it."""

    def push_to_hub(
        self, commit_message="End of training", blocking=True, token=None, revision=None, private=None, **kwargs
    ):
        """Upload the output folder, without checkpoints and what belongs to this machine."""
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return self._upload(commit_message, revision, run_as_future=not blocking)

    def _push_from_checkpoint(self, checkpoint_folder):
        """Push a checkpoint in a form that loads: weights, configuration, processor and code files."""
        if not self.is_world_process_zero() or self.args.hub_strategy == "end":
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            return  # the next one will carry more
        # Copied: the checkpoint may be rotated away while the upload runs.
        for file in Path(checkpoint_folder).iterdir():
            if file.is_file() and not any(file.match(pattern) for pattern in PRIVATE):
                shutil.copy2(file, self.args.output_dir)
        self.write_log()
        job = self._upload(f"Training in progress, step {self.state.global_step}", None, run_as_future=True)
        self.push_in_progress = PushInProgress([job])

    def _upload(self, message: str, revision: str | None, run_as_future: bool) -> Any:
        api: Any = HfApi(token=self.args.hub_token)  # its overloads do not know a bool variable
        return api.upload_folder(
            repo_id=self.hub_model_id,
            folder_path=self.args.output_dir,
            commit_message=message,
            revision=revision or self.args.hub_revision,
            ignore_patterns=PRIVATE,
            run_as_future=run_as_future,
        )
