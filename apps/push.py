"""A run to the Hub: `soundwave push RUN`, after a training whose Hub was away, or at any time.

The exit code is 0 when the Hub holds the run, also when it held it before. The push is one commit; a push that was cut
short is completed by the same command, without sending again what has arrived. Before it, everything is checked that
a reader relies on (`model_card.checks`); a check that fails names the file and the remedy, and uploads nothing.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from soundwave.model_card.build_card import CARD, is_free, write_card
from soundwave.model_card.checks import check_stage
from soundwave.model_card.licences import check_name, llama_version
from soundwave.model_card.lineage import read_config, read_stage_settings
from soundwave.model_card.push_to_hub import Pushed, PushError, PushRefused, gather, push_stage
from soundwave.training.checkpoints import MANIFEST, checkpoints, last_complete_checkpoint

PATIENCE_S = 120.0  # seconds within which a failed push is tried again
NEEDED = ("config.json", "processor_config.json")


def push(
    run: str | Path,
    to: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    check: bool = True,
    overwrite_card: bool = False,
) -> Pushed:
    """Push a run: its result or, of one cut short, its last complete checkpoint.

    The model card is written from the run's files as they are now; a README.md of somebody's own is kept, and checked
    like ours. One on the Hub is not replaced by a generated card.

    Args:
        run: the `output_dir` of a training.
        to: repository; `None` = the run's `hub_model_id`.
        revision: branch; `None` = the run's `hub_revision` if `to` is the run's, else main.
        private: of a repository that is made; `None` = as the run's `hub_private` says.
        check: whether to load it in a process without this package first; the other checks are always made.
        overwrite_card: whether a README.md of somebody's own on the Hub may be replaced by a generated one.

    Raises:
        CheckFailed: when it must not be published as it is.
        ValueError: when there is nothing to push, no place to push it to, or a name that a licence forbids.
        PushError: see `push_stage`.
    """
    run = Path(run)
    with _publishable(run) as folder:
        settings = read_stage_settings(folder) or read_stage_settings(run)
        recorded = settings.get("hub_model_id")
        repo_id = to or recorded
        if repo_id is None:
            raise ValueError(f"{run} does not say where it belongs: name the repository with --to OWNER/NAME.")
        if "/" not in repo_id:
            raise ValueError(f"{repo_id} has no owner, and its card could not say what to load: give OWNER/{repo_id}.")
        if revision is None and repo_id == recorded:
            revision = settings.get("hub_revision")
        check_name(repo_id.rsplit("/", 1)[-1], llama_version(read_config(folder)))
        if is_free(folder / CARD):
            write_card(folder, repo_id)
        for remark in check_stage(folder, repo_id, load=check):
            print(f"soundwave push: {remark}", file=sys.stderr)
        try:
            return push_stage(
                folder,
                repo_id,
                revision=revision,
                private=bool(settings.get("hub_private")) if private is None else private,
                message=f"Stage: {settings.get('stage', run.resolve().name)}",
                patience_s=PATIENCE_S,
                own_card="overwrite" if overwrite_card else "refuse",
            )
        except PushRefused:
            raise
        except PushError as error:
            raise PushError(f"{error} Nothing is lost: the same command goes on where this one stopped.") from error


@contextmanager
def _publishable(run: Path) -> Iterator[Path]:
    """The folder that a run is pushed from: its own, or one made for a checkpoint of a run cut short."""
    missing = what_is_missing(run)
    if missing is None and checkpoints(run) and not (run / MANIFEST).exists():
        missing = "its result is not saved yet"  # what lies there is of an earlier, shorter one
    if missing is None:
        yield run
        return
    checkpoint = last_complete_checkpoint(run) if run.is_dir() else None
    if checkpoint is None or what_is_missing(checkpoint) is not None:
        stages = sorted(path.name for path in run.glob("*/") if what_is_missing(path) is None)
        hint = f" It is a folder of runs; push one of them: {', '.join(stages)}." if stages else ""
        raise ValueError(f"{run} is no finished run, and has no complete checkpoint: {missing}.{hint}")
    print(f"soundwave push: {run} is not finished ({missing}); pushing {checkpoint.name}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=run, prefix="_push-") as folder:
        gather(run, checkpoint, folder)
        yield Path(folder)


def what_is_missing(folder: Path) -> str | None:
    """Why a folder cannot be loaded as a stage; `None` when its files are there and its weights whole."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    for name in NEEDED:
        if not (folder / name).is_file():
            return f"there is no {name}"
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{index.name} is damaged"
    for name in names:
        if not (folder / name).is_file():
            return f"there is no {name}"
        try:
            with safe_open(folder / name, framework="numpy"):
                pass
        except SafetensorError as error:
            return f"{name} is damaged: {error}"
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; `argv` without the program's name."""
    parser = argparse.ArgumentParser(
        prog="soundwave push",
        description="Push a run to the Hub, in one commit. Run again, it goes on where it was cut short.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the output_dir of a training")
    parser.add_argument("--to", metavar="REPO", help="repository (default: the run's hub_model_id)")
    parser.add_argument("--revision", metavar="BRANCH", help="branch, made if need be (default: the run's, else main)")
    parser.add_argument("--private", action="store_true", default=None, help="if the repository has to be made")
    parser.add_argument(
        "--no-check", action="store_true", help="do not load it in a process of its own first; files are still checked"
    )
    parser.add_argument(
        "--overwrite-card", action="store_true", help="replace a README.md of somebody's own on the Hub by ours"
    )
    a = parser.parse_args(argv)
    print(push(a.run, a.to, a.revision, a.private, not a.no_check, a.overwrite_card))
    return 0


if __name__ == "__main__":
    sys.exit(main())
