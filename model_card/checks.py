"""What is checked before a stage is published. A check that fails names the file and the remedy, and nothing goes out.

    every push         no pickle, no secret, no file over the Hub's limits (`push_to_hub.push_stage`)
    a run's result     and: a card that the Hub takes, its figures scored again, licences stated (`check_card`)
    `soundwave push`   and: it loads and answers in a process without this package (`check_stage`)

A training's own last push leaves the loading out: its process still holds the model, and a second one would need the
memory once more at the moment when a failure costs most.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from soundwave.model_card.build_card import CARD, own_words
from soundwave.model_card.facts import CARD_FACTS, UNSTATED, CardFacts
from soundwave.model_card.figures import CardError, Figures
from soundwave.model_card.loading import LoadError, check_loading
from soundwave.model_card.metadata import EVAL_RESULTS
from soundwave.model_card.push_to_hub import CheckFailed, published_files

METADATA = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def check_stage(folder: str | Path, repo_id: str, load: bool = True) -> list[str]:
    """Check a stage's card, and that it loads and answers in a process without this package.

    Args:
        folder: What is about to be pushed.
        repo_id: Where to.
        load: Whether to load it.

    Returns:
        What was not checked, a line each.

    Raises:
        CheckFailed: Naming the file and the remedy.
    """
    check_card(folder, repo_id)
    if not load:
        return ["that it loads and answers without this package was NOT checked (--no-check)"]
    try:
        return check_loading(published_files(folder))
    except LoadError as error:
        raise CheckFailed(
            f"{Path(folder).name} does not load and answer in a process without this package: {error} Save it again "
            "(save_pretrained of model and processor), or push it as it is with --no-check."
        ) from error


def check_card(folder: str | Path, repo_id: str) -> None:
    """Check a folder's card: the Hub takes it, every figure is measured, every licence is stated.

    Raises:
        CheckFailed: Naming the file and the remedy.
    """
    folder = Path(folder)
    again = f"soundwave card {folder} --repo-id {repo_id}"
    path = folder / CARD
    if not path.is_file():
        raise CheckFailed(f"{CARD} is missing: {again}")
    try:
        text = path.read_text(encoding="utf-8")
        metadata = _metadata(text)
        facts = CardFacts.read(folder)
        figures = Figures(folder)
        figures.show_all()
        figures.check(own_words(METADATA.sub("", text), facts))
        _check_values(folder, metadata, figures)
    except (CardError, UnicodeDecodeError) as error:
        raise CheckFailed(f"{CARD} is not published: {error}. Write it anew: {again}") from error
    if not metadata.get("license"):
        raise CheckFailed(f"{CARD} states no licence: add license: to its metadata, or write it anew: {again}")
    unstated = [row["name"] for row in facts.data if not row["licence"] or row["licence"] == UNSTATED]
    if unstated:
        raise CheckFailed(
            f"{CARD_FACTS} states no licence of {', '.join(dict.fromkeys(unstated))}: write each into its licence: "
            f"field, then {again}"
        )


def _metadata(text: str) -> dict[str, Any]:
    """The metadata block as the Hub's client reads it."""
    try:
        return ModelCard(text).data.to_dict()
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise CardError(f"the Hub's client cannot read its metadata: {' '.join(str(error).split())}") from error


def _check_values(folder: Path, metadata: dict[str, Any], figures: Figures) -> None:
    """Figures outside the text: the model index, and the files in ``.eval_results``."""
    measured = set(figures.headline_values().values())
    stated = {
        CARD: [
            metric["value"]
            for model in metadata.get("model-index") or []
            for result in model["results"]
            for metric in result["metrics"]
        ]
    }
    for path in sorted((folder / EVAL_RESULTS).glob("*.yaml")):
        name = f"{EVAL_RESULTS}/{path.name}"
        try:
            entries = parse_eval_result_entries(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
            raise CardError(f"{name} is not in the Hub's format: {type(error).__name__}: {error}") from error
        stated[name] = [entry.value for entry in entries]
    for name, values in stated.items():
        if unknown := [str(value) for value in values if value not in measured]:
            raise CardError(f"{name} states {', '.join(unknown)}, not a headline figure of the results")
