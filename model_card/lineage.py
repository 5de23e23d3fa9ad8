"""What a stage was trained from: stage III names II, II names I, each by a commit or by the hash of its weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download

from soundwave.eval.provenance import weights_hash
from soundwave.model_card.figures import CardError

STAGE_CONFIG = "stage_config.yaml"
#: Name in the stage table -> number, title, what the model does after it.
STAGES = {
    "align": ("I", "alignment", "It turns speech into vectors of the LLM's space and spells them with its CTC head."),
    "shrink": ("II", "shrinking", "It shrinks speech to about one vector per token, from which the LLM goes on."),
    "instruct": ("III", "instruction", "It follows written and spoken instructions about speech and sound."),
}
#: What a stage begins with where nobody can look: the stage before it.
BEFORE = {"shrink": "align", "instruct": "shrink"}
LONGEST_LINEAGE = 10  # the paper's is three long; settings that name each other would have no end


@dataclass(frozen=True)
class Ancestor:
    """A stage that another one went on from.

    Attributes:
        stage: Name in the stage table; ``None`` where it is not known.
        name: Hub id, also of a folder whose settings say where it belongs; else the folder's name.
        on_hub: Whether the name is a Hub id.
        commit: Of the Hub repository.
        weights: Where it was a folder, ``weights_hash`` of it.
    """

    stage: str | None
    name: str
    on_hub: bool
    commit: str | None = None
    weights: str | None = None

    def __str__(self) -> str:
        where = f"[{self.name}](https://huggingface.co/{self.name})" if self.on_hub else f"`{self.name}`"
        if self.commit:
            where += f" at `{self.commit}`"
        if self.weights:
            where += f" (SHA-256 of its weights: `{self.weights}`)"
        return f"the result of stage {STAGES[self.stage][0]}, {where}" if self.stage else where


def read_stage_settings(folder: str | Path) -> dict[str, Any]:
    """Settings of a stage's folder; none if it has no ``stage_config.yaml``.

    Raises:
        CardError: If the file does not hold settings.
    """
    path = Path(folder) / STAGE_CONFIG
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CardError(f"{STAGE_CONFIG} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict) or settings.get("stage") not in (None, *STAGES):
        raise CardError(f"{STAGE_CONFIG} holds no settings of a stage ({', '.join(STAGES)}); was it written by hand?")
    return settings


def read_config(folder: str | Path) -> dict[str, Any]:
    """A stage's ``config.json``.

    Raises:
        CardError: If it is missing, damaged, or not of a Soundwave model.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CardError(f"{folder} holds no config.json; give the folder of a saved stage")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CardError(f"config.json of {folder} is not JSON ({error}); save the model again") from error
    needed = ("architectures", "audio_config", "text_config")
    if not isinstance(config, dict) or config.get("model_type") != "soundwave" or not all(map(config.get, needed)):
        raise CardError(
            f"config.json of {folder} is not of a saved Soundwave model: expected model_type 'soundwave', and "
            f"{', '.join(needed)}; give the folder of a saved stage, or save the model again"
        )
    return config


def stage_of(folder: str | Path, settings: Mapping[str, Any]) -> str:
    """A folder's stage: as its settings say, else by its model's class."""
    if settings.get("stage"):
        return settings["stage"]
    config = read_config(folder)
    return "align" if config["architectures"] == ["SoundwaveForCTC"] else "instruct"


def read_lineage(folder: str | Path) -> list[Ancestor]:
    """The stages before a saved one, the nearest first, as far back as their settings can be read.

    Training notes the commit of a start on the Hub, so one without a revision is a folder. That is looked for where
    the settings say and beside the stage's own; of a repository, ``stage_config.yaml`` is read at the commit.
    """
    here: Path | None = Path(folder)
    settings = read_stage_settings(folder)
    ancestors: list[Ancestor] = []
    while settings.get("start") and len(ancestors) < LONGEST_LINEAGE:
        start, commit, stage = str(settings["start"]), settings.get("start_revision"), settings.get("stage")
        before = BEFORE.get(stage or "", stage)  # stage I goes on from a stage I
        if commit is not None:
            here, settings = None, _settings_on_hub(start, commit)
            ancestors.append(Ancestor(settings.get("stage", before), start, True, commit))
        elif here is not None and (found := _find_folder(start, here)) is not None:
            here, settings = found, read_stage_settings(found)
            repo_id = settings.get("hub_model_id")  # a folder's name says nothing to anybody else
            name = repo_id or found.name
            ancestors.append(
                Ancestor(settings.get("stage", before), name, repo_id is not None, weights=weights_hash(found))
            )
        else:
            ancestors.append(Ancestor(before, Path(start).name, False))
            break
    return ancestors


def _find_folder(start: str, folder: Path) -> Path | None:
    own = folder.resolve()
    run = own.parent if own.name.startswith("_push") else own  # what a push put together within the run's folder
    for path in (Path(start), run.parent / Path(start).name):
        if path.resolve() not in (own, run) and (path / STAGE_CONFIG).is_file():
            return path.resolve()
    return None


def _settings_on_hub(repo_id: str, commit: str) -> dict[str, Any]:
    """Settings in a Hub repository; none where it cannot be reached, or has none."""
    try:
        path = hf_hub_download(repo_id, STAGE_CONFIG, revision=commit)
    except Exception:  # noqa: BLE001 (away, not cached, no such file; a broken answer may raise anything)
        return {}
    return read_stage_settings(Path(path).parent)
