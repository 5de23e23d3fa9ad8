"""A stage's folder to the Hub, in one commit: a reader sees the whole of a push or the whole of the one before.

A broken answer is retried where that can help: five times per request by `huggingface_hub`, then the whole push, in
which nothing is sent twice, until its patience ends. What cannot succeed is refused at once, with the remedy.
"""

import json
import logging
import re
import shutil
import sys
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    get_session,
    set_client_factory,
)
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils._http import default_client_factory

from soundwave.model_card.build_card import CARD, is_free
from soundwave.model_card.scan import find_problems
from soundwave.training.checkpoints import PRIVATE

logger = logging.getLogger(__name__)

# Of a run's folder: what belongs to this machine, or lies there for whoever watches the run.
# Of evaluations: what only going on needs; `judgements.jsonl` holds every reply that counts.
UNPUBLISHED = [
    *PRIVATE,
    *("*tfevents*", "runs/*", "*.partial"),
    *("answers.settings.json", "*.jsonl.rank*", "*.jsonl.new", "*.json.new", "judge_replies/*"),
]
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
EVAL_RESULTS = ".eval_results/*.yaml"  # the one hidden folder that the Hub reads
FIGURES = ("results.json", "answers.jsonl", "judgements.jsonl")
# Of an earlier push, not in this one: a loader would take them for part of the model, a reader for its figures.
# Of code and of `.eval_results` ours alone, which their names tell: others may have added theirs.
STALE = (*WEIGHTS, "*_soundwave.py", "adapter_config.json", *FIGURES, ".eval_results/soundwave-*.yaml")

REQUEST_TIMEOUT_S = 120.0  # without a byte from the Hub; its client has no limit of its own for uploads
LONGEST_WAIT_S = 60  # that the Hub may ask for between two tries of a request
LONGEST_PAUSE_S = 30.0  # between two tries of a push

# Answers that trying again does not change -> what does.
REMEDIES = {
    401: "log in with `hf auth login`, or set HF_TOKEN to a token that may write",
    402: "its owner's plan or payment has to be settled on the Hub first",
    403: "use a token that may write there (and to a repository with space left), or name another repository",
    413: "the Hub takes no more there: free space, or name another repository",
    507: "the Hub has no space left there: free some, or name another repository",
}


class PushError(OSError):
    """The Hub did not take a push; it may take it later."""


class PushRefused(PushError):
    """The Hub will not take a push until somebody changes something; the message says what."""


class CheckFailed(PushRefused):
    """What was to be pushed must not be published as it is; the message names the file and the remedy."""


@dataclass(frozen=True)
class Pushed:
    """What became of a push; as a string, the line that says so.

    Attributes:
        address: of the commit that holds the stage.
        new: whether the push made that commit; else all was there already.
        kept_card: whether the repository kept a README.md of somebody's own in place of the folder's.
    """

    address: str
    new: bool
    kept_card: bool

    def __str__(self) -> str:
        return f"{'pushed' if self.new else 'already there'}: {self.address}"


def push_stage(
    folder: str | Path,
    repo_id: str,
    revision: str | None = None,
    private: bool = False,
    message: str = "Stage",
    token: str | None = None,
    patience_s: float = 0.0,
    own_card: Literal["refuse", "keep", "overwrite"] = "refuse",
) -> Pushed:
    """Upload a saved stage: weights, code, processor, card, results.

    Pushing again what is there already changes nothing. Weights, code and results of an earlier push that the folder
    does not hold are removed in the same commit; other files of the repository stay.

    Args:
        folder: of the stage.
        repo_id: made if need be.
        revision: branch, made if need be; `None` = main.
        private: of a repository that is made.
        message: of the commit.
        token: of the Hub; `None` = that of the environment.
        patience_s: seconds within which a push that failed is tried again. Each request of a try ends after
            `REQUEST_TIMEOUT_S` of silence, so that the last one does not go on for ever either.
        own_card: what to do where the folder's card is a generated one, and the repository's somebody's own.

    Raises:
        CheckFailed: for a pickle, a secret, a link out of the folder, or a file over the Hub's limits; nothing is
            sent then.
        PushRefused: when no further try would help: no rights, no space, an impossible name, metadata that the Hub
            does not take, a README.md of somebody's own there.
        PushError: when the Hub does not take it within `patience_s`.
    """
    files = published_files(folder)
    if problems := find_problems(files):
        raise CheckFailed(f"Nothing was pushed to {repo_id}: {'; '.join(problems)}.")
    if not any(fnmatch(path, pattern) for path in files for pattern in WEIGHTS):  # those on the Hub would be deleted
        raise PushRefused(f"{folder} holds no weights to push to {repo_id}; save the model there first (save_model).")
    bound_requests()
    end, pause, said, checked = time.monotonic() + patience_s, 1.0, False, CARD not in files
    while True:
        try:
            if not checked:  # before a repository is made for it, and once
                _check_metadata(files[CARD])
                checked = True
            return _push(HfApi(token=token), files, repo_id, revision, private, message, own_card)
        except Exception as error:  # noqa: BLE001 (a broken answer may raise anything in the client)
            failure = explain(error, repo_id)
            left_s = end - time.monotonic()
            if isinstance(failure, PushRefused) or left_s <= 0:
                raise failure from error
        if not said:  # once: minutes may pass
            said = True
            sys.stderr.write(f"{failure} It is tried again for up to {left_s:.0f} s.\n")
        pause = min(pause, left_s)
        logger.info("%s Trying again in %.0f s.", failure, pause)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def prepare_repository(api: HfApi, repo_id: str, revision: str | None = None, private: bool = False) -> str:
    """Make the repository and the branch where they do not exist; return the full id, owner included.

    Raises:
        PushRefused: for a name that the Hub does not allow.
    """
    try:
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(full_id, branch=revision, exist_ok=True)
    except (BadRequestError, HFValidationError) as error:
        where = repo_id if revision is None else f"{repo_id} (branch {revision})"
        raise PushRefused(f"The Hub does not allow the name {where}: {_reason(error)} Name another one.") from error
    return full_id


def _push(
    api: HfApi,
    files: dict[str, Path],
    repo_id: str,
    revision: str | None,
    private: bool,
    message: str,
    own_card: str,
) -> Pushed:
    repo_id = prepare_repository(api, repo_id, revision, private)
    head = api.model_info(repo_id, revision=revision, timeout=REQUEST_TIMEOUT_S)  # or it would have none
    if head.sha is None:
        raise ValueError("the Hub's answer names no commit")
    present = {sibling.rfilename for sibling in head.siblings or ()}
    kept_card = own_card != "overwrite" and {CARD} <= present & set(files) and is_free(files[CARD])
    kept_card = kept_card and not is_free(api.hf_hub_download(repo_id, CARD, revision=head.sha))
    if kept_card:
        if own_card == "refuse":
            raise PushRefused(
                f"{repo_id} has a {CARD} of somebody's own, and this push would replace it by a generated one. Copy "
                "it into the run, where it is kept and checked, or replace it: soundwave push --overwrite-card."
            )
        files = {path: file for path, file in files.items() if path != CARD}
    gone = sorted(present - set(files))
    stale = [path for path in gone if any(_matches(path, pattern) for pattern in STALE)]
    operations: list[Any] = [CommitOperationAdd(path, file) for path, file in files.items()]
    operations += [CommitOperationDelete(path) for path in stale]
    # Not `upload_folder`, which may cut a slow push into several commits. With the parent named, a request that was
    # given up and arrives after all cannot put an older state over a newer one.
    commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision, parent_commit=head.sha)
    return Pushed(str(commit.commit_url), commit.oid != head.sha, kept_card)


def _check_metadata(card: Path) -> None:
    """Have the Hub read a card's metadata: of licences and languages it takes only those it knows.

    Raises:
        PushRefused: with its reasons.
    """
    try:
        ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).validate()
    except ValueError as error:
        raise PushRefused(
            f"The Hub does not take the metadata of {CARD} ({_messages(str(error))[:300]}). Correct it in card.yaml, "
            "or in a card of your own, and push again."
        ) from error


def _messages(answer: str) -> str:
    """What is wrong, out of the Hub's answer on metadata."""
    try:
        return "; ".join(error["message"] for error in json.loads(answer)["errors"])
    except (ValueError, KeyError, TypeError):
        return " ".join(answer.split())


def _matches(path: str, pattern: str) -> bool:
    """Whether a pattern describes a path, in the pattern's own folder only."""
    return path.count("/") == pattern.count("/") and fnmatch(path, pattern)


def published_files(folder: str | Path) -> dict[str, Path]:
    """What of a folder goes to the Hub: path in the repository -> file.

    Raises:
        CheckFailed: for a link to a file outside it, other than weights: who made it may not mean to publish that.
    """
    folder = Path(folder)
    files = {}
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in path.parts) and not fnmatch(path.as_posix(), EVAL_RESULTS)
        if file.is_file() and not hidden and not any(fnmatch(path.as_posix(), pattern) for pattern in UNPUBLISHED):
            files[path.as_posix()] = file
    for name, file in files.items():
        if not file.resolve().is_relative_to(folder.resolve()) and not any(fnmatch(name, p) for p in WEIGHTS):
            raise CheckFailed(
                f"{name} in {folder} is a link to a file outside of it; copy the file there, or remove the link"
            )
    return files


def gather(run: str | Path, checkpoint: str | Path, target: str | Path) -> None:
    """Put together in `target`, a new folder, what a push of a checkpoint holds, so that the run may go on meanwhile.

    That is the checkpoint's model and processor, and log and settings of the run's own folder. Figures that lie there
    are not: they were measured on an earlier result.
    """
    target = Path(target)
    shutil.rmtree(target, ignore_errors=True)
    whole = published_files(run)
    earlier = (*WEIGHTS, *FIGURES, EVAL_RESULTS, *([CARD] if is_free(Path(run) / CARD) else []))
    files = {path: file for path, file in whole.items() if not any(fnmatch(path, pattern) for pattern in earlier)}
    for path, file in (files | published_files(checkpoint)).items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            _link(file, target / path)
        else:
            shutil.copy2(file, target / path)


def _link(file: Path, target: Path) -> None:
    """A second name for a checkpoint's weights, which nobody writes to again; a copy where there are no links."""
    try:
        target.hardlink_to(file)
    except OSError:
        shutil.copy2(file, target)


def explain(error: Exception, repo_id: str) -> PushError:
    """What went wrong with a push, as one of the two errors of this module."""
    if isinstance(error, PushError):
        return error
    if isinstance(error, OfflineModeIsEnabled):
        return PushRefused(f"Nothing is pushed to {repo_id} while HF_HUB_OFFLINE is set; unset it.")
    if isinstance(error, LocalTokenNotFoundError):
        return PushRefused(f"Pushing to {repo_id} needs a login: {REMEDIES[401]}.")
    cause: BaseException | None = error  # the upload of one file wraps what went wrong
    while cause is not None:
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        if status in REMEDIES:
            return PushRefused(
                f"The Hub refuses the push to {repo_id} ({status}: {_reason(cause)}); {REMEDIES[status]}."
            )
        cause = cause.__cause__
    return PushError(f"The push to {repo_id} failed ({_reason(error)}).")


def _reason(error: BaseException) -> str:
    """An error in one short line; the server's own words where it sent any."""
    said = getattr(error, "server_message", None) or str(error) or "no answer"
    line = " ".join(said.split())
    return f"{type(error).__name__}: {line[:300]}"


def bound_requests() -> None:
    """Give the Hub's client a time-out, unless a `set_client_factory` of the user's has set one."""
    if get_session().timeout.read is None:
        set_client_factory(_bounded_client)


def _bounded_client() -> Any:
    client = default_client_factory()
    client.timeout = REQUEST_TIMEOUT_S
    client.event_hooks["response"].append(_bound_wait)
    return client


def _bound_wait(response: Any) -> None:
    """Shorten the wait that an answer asks for: the client obeys, be it a day."""
    for name, seconds in (("Retry-After", r"^\d+$"), ("RateLimit", r"(?<=;t=)\d+")):
        if name in response.headers:
            response.headers[name] = re.sub(
                seconds, lambda match: str(min(int(match[0]), LONGEST_WAIT_S)), response.headers[name].strip()
            )
