"""A stage's repository on the Hub: fed while the training goes on, whole at its end, never in the training's way."""

import logging
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer

from soundwave.model_card.build_card import CARD, is_free, write_card
from soundwave.model_card.checks import check_card, check_licences
from soundwave.model_card.figures import CardError
from soundwave.model_card.push_to_hub import (
    CheckFailed,
    PushError,
    PushRefused,
    bound_requests,
    explain,
    gather,
    prepare_repository,
    push_stage,
)
from soundwave.training.incidents import report
from soundwave.training.stages import StageConfig

SNAPSHOT = "_push"  # in the run's folder: what is being pushed, while the run goes on beside it


class BackgroundPush:
    """One push at a time in a thread of its own; what it raises is said once, not raised.

    The thread is no daemon: a script that ends waits for it, so that what was begun is finished.

    Attributes:
        refused: why no push of this run can succeed, once the Hub has said so.
        kept_card: whether it was said that the repository keeps a README.md of somebody's own.
    """

    def __init__(self, repo_id: str):
        self.repo_id = repo_id
        self.refused: PushRefused | None = None
        self.kept_card = False
        self._failing = False
        self._thread: threading.Thread | None = None

    def busy(self) -> bool:
        """Whether a push is under way."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the push under way, if there is one."""
        if self._thread is not None:
            self._thread.join()

    def start(self, job: Callable[[], object]) -> None:
        """Run a job that pushes."""
        self._thread = threading.Thread(target=self._run, args=(job,), name="push")
        self._thread.start()

    def _run(self, job: Callable[[], object]) -> None:
        try:
            job()
            self._failing = False
        except Exception as error:  # noqa: BLE001 (nothing that a push meets may stop the training)
            failure = explain(error, self.repo_id)
            if isinstance(failure, PushRefused):
                self.refused = failure
                report(f"{failure} The training goes on; this run does not try again.")
            elif not self._failing:  # once per outage
                self._failing = True
                report(f"{failure} The training goes on; the next push tries again.")


class HubMixin(Trainer):
    """How the trainers push: one commit per push, without checkpoints and what belongs to this machine."""

    background: BackgroundPush

    def init_hf_repo(self, token=None, private=None):
        """Make the repository and its branch in the background: a Hub that is away does not keep a run from starting.

        Every push makes sure of them again; made here, a repository that will refuse the result says so at once.
        """
        if not self.is_world_process_zero():
            return
        bound_requests()
        shutil.rmtree(Path(self.args.output_dir) / SNAPSHOT, ignore_errors=True)  # what a killed run left
        # A line for each retry of each request; what comes of them is said once, by us.
        logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
        self.hub_model_id = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        self.background = BackgroundPush(self.hub_model_id)
        api = HfApi(token=token or self.args.hub_token)
        private = self.args.hub_private_repo if private is None else private
        self.background.start(
            partial(prepare_repository, api, self.hub_model_id, self.args.hub_revision, bool(private))
        )

    def create_model_card(self, *args, **kwargs):
        """Nothing: the card is made by `soundwave.model_card` from results, and a generic one would overwrite it."""

    def push_to_hub(
        self,
        commit_message="End of training",
        blocking=True,
        token=None,
        revision=None,
        private=None,
        patience_s=0.0,
        **kwargs,
    ):
        """Push the output folder, after the push under way; return the commit's address (`None` if not `blocking`).

        Raises:
            PushError: see `push_stage`; not raised, but logged, if not `blocking`.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if not self.is_world_process_zero():
            return None
        self.background.wait()
        job = partial(self._push, self.args.output_dir, commit_message, token, revision, private, patience_s)
        return job() if blocking else self.background.start(job)

    def _push_from_checkpoint(self, checkpoint_folder):
        """Push a checkpoint in a form that loads, in the background: weights, configuration, processor and code."""
        if not self.is_world_process_zero() or self.args.hub_strategy == "end":
            return
        if self.background.busy() or self.background.refused:
            return  # the next one, if there can be one, will carry more
        self.write_log()
        # Apart from the run's folder: checkpoints are rotated away and logs are written while the upload runs.
        snapshot = Path(self.args.output_dir) / SNAPSHOT
        try:
            gather(self.args.output_dir, checkpoint_folder, snapshot)
        except OSError as error:
            report(f"{checkpoint_folder} is not pushed: {error}. The training goes on.")
            return
        message = f"Training in progress, step {self.state.global_step}"
        self.background.start(partial(self._push_snapshot, snapshot, message))

    def _push_snapshot(self, snapshot: Path, message: str) -> None:
        try:
            if is_free(snapshot / CARD):  # that on the Hub may have the figures of earlier weights
                write_card(snapshot, self.hub_model_id)
        except CardError as error:
            report(f"{message}: pushed without a card. {error}")
        try:
            self._push(snapshot, message)
        finally:
            shutil.rmtree(snapshot, ignore_errors=True)

    def _push(self, folder, message, token=None, revision=None, private=None, patience_s=0.0) -> str:
        pushed = push_stage(
            folder,
            self.hub_model_id,
            revision=revision or self.args.hub_revision,
            private=bool(self.args.hub_private_repo if private is None else private),
            message=message,
            token=token or self.args.hub_token,
            patience_s=patience_s,
            own_card="keep",  # nobody is there who could be asked
        )
        if pushed.kept_card and not self.background.kept_card:
            self.background.kept_card = True
            report(
                f"{self.hub_model_id} keeps its {CARD}, which is somebody's own; to replace it by the card of this "
                f"run: soundwave push {self.args.output_dir} --overwrite-card"
            )
        return pushed.address

    def _finish_current_push(self) -> None:
        """Nothing: `push_to_hub` waits for it, and so does the end of the script; other processes need not."""


def push_result(trainer: Any, config: StageConfig) -> None:
    """Push what a run has saved, with `config.hub_patience_s`.

    Card and files are checked first; not that it loads in a process of its own, see `model_card.checks`. A check that
    fails, or a Hub that does not take it, is no failure of the run: the result is on disk, and one line on stderr
    names the command that pushes it. Nor does it wait for somebody to state licences: another line asks for them.
    """
    if config.hub_model_id is None or not trainer.is_world_process_zero():
        return
    trainer.background.wait()
    reason = ""
    if trainer.background.refused is None:  # what was refused was said when it was
        try:
            check_card(config.output_dir, config.hub_model_id)
            message = f"Stage {config.table.number}: {config.stage}"
            trainer.push_to_hub(commit_message=message, patience_s=config.hub_patience_s)
            _ask_for_licences(config)
            return
        except PushError as error:
            reason = f" {error}"
    report(
        f"the result is in {config.output_dir}, but not on the Hub.{reason} "
        f"Push it with: soundwave push {config.output_dir}"
    )


def _ask_for_licences(config: StageConfig) -> None:
    try:
        check_licences(config.output_dir)
    except CheckFailed as error:
        report(f"{config.hub_model_id} is pushed, but lacks a licence: {error}: soundwave push {config.output_dir}")
