"""What is checked before a stage is published. A check that fails names the file and the remedy, and nothing goes out.

    every push         no pickle, no secret, no file over the Hub's limits (`push_to_hub.push_stage`)
    a run's result     and: a card that the Hub takes, its figures scored again, a Llama's terms (`check_card`)
    `soundwave push`   and: licences stated (`check_licences`), and it loads and answers in a process without this
                       package (`check_stage`)

A training's own last push leaves the loading out: its process still holds the model, and a second one would need the
memory once more at the moment when a failure costs most. Nor does it wait for a person to state licences: the card
says which are not stated.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, parse_eval_result_entries

from soundwave.model_card.build_card import CARD
from soundwave.model_card.facts import CARD_FACTS, UNSTATED, CardFacts
from soundwave.model_card.figures import CardError, Figures
from soundwave.model_card.licences import PARTS, base_licence, check_terms, llama_version
from soundwave.model_card.lineage import read_config
from soundwave.model_card.loading import LoadError, check_loading
from soundwave.model_card.metadata import EVAL_RESULTS, hub_entries, model_index
from soundwave.model_card.push_to_hub import CheckFailed, published_files

METADATA = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def check_stage(folder: str | Path, repo_id: str, load: bool = True) -> list[str]:
    """Check a stage's card and licences, and that it loads and answers in a process without this package.

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
    check_licences(folder)
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
    """Check a folder's card: the Hub takes it, every figure is measured, it says what a Llama's licence asks for.

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
        metadata, words = _metadata(text), METADATA.sub("", text)
        figures = Figures(folder)
        figures.show_all()
        figures.check(words)
        _check_values(folder, metadata, figures)
        check_terms(words, metadata.license, llama_version(read_config(folder)))
    except (CardError, UnicodeDecodeError) as error:
        raise CheckFailed(f"{CARD} is not published: {error}. Write it anew: {again}") from error


def check_licences(folder: str | Path) -> None:
    """Check that the licences of the data, of the base models and of the weights are stated.

    Args:
        folder: Of a stage whose card passes `check_card`.

    Raises:
        CheckFailed: Naming the rows and fields that people have to fill in.
    """
    try:
        facts, config = CardFacts.read(folder), read_config(folder)
        bases = [part for part in PARTS if base_licence(config, facts, part) is None]
    except CardError as error:
        raise CheckFailed(f"the licences cannot be checked: {error}") from error
    if not facts.data:
        raise CheckFailed(
            f"{CARD_FACTS} states no data: write what this stage was trained on into data:, for each source its name, "
            "task, rows, hours and licence, and push again"
        )
    if rows := [f"{row['name']} ({row['task']})" for row in facts.data if row["licence"] in (None, "", UNSTATED)]:
        raise CheckFailed(
            f"{CARD_FACTS} states no licence of {', '.join(rows)}: write each into the licence: field of its row in "
            "data:, and push again"
        )
    if bases:
        named = ", ".join(f"{config[f'{PARTS[part][1]}_model_id']} ({part}: LICENCE)" for part in bases)
        raise CheckFailed(f"{CARD_FACTS} states no licence of {named}: write it into base_licences:, and push again")
    if not _metadata((Path(folder) / CARD).read_text(encoding="utf-8")).license:
        raise CheckFailed(
            f"{CARD} states no licence: write license: into {CARD_FACTS}, or into the metadata of a {CARD} of your "
            "own, and push again"
        )


def _metadata(text: str) -> ModelCardData:
    """The metadata block as the Hub's client reads it."""
    try:
        return cast(ModelCardData, ModelCard(text).data)
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        raise CardError(f"the Hub's client cannot read its metadata: {' '.join(str(error).split())}") from error


def _check_values(folder: Path, metadata: ModelCardData, figures: Figures) -> None:
    """Figures outside the text, each under its own test set: the model index, and the files in ``.eval_results``."""
    _compare(CARD, map(_indexed, metadata.eval_results or []), map(_indexed, model_index(figures)))
    measured = [_entered(entry) for entry in hub_entries(figures).values()]
    for path in sorted((folder / EVAL_RESULTS).glob("*.yaml")):
        name = f"{EVAL_RESULTS}/{path.name}"
        try:
            entries = parse_eval_result_entries(yaml.safe_load(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
            raise CardError(f"{name} is not in the Hub's format: {type(error).__name__}: {error}") from error
        _compare(name, map(_entered, entries), measured)


def _indexed(result: EvalResult) -> tuple[Any, ...]:
    return result.dataset_type, result.dataset_name, result.metric_type, result.metric_value


def _entered(entry: EvalResultEntry) -> tuple[Any, ...]:
    return entry.dataset_id, entry.task_id, entry.value


def _compare(name: str, stated: Iterable[tuple[Any, ...]], measured: Iterable[tuple[Any, ...]]) -> None:
    known = list(measured)
    if unknown := [" ".join(map(str, labelled)) for labelled in stated if labelled not in known]:
        raise CardError(f"{name} states {'; '.join(unknown)}: not a headline figure of the results under that name")
