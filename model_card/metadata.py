"""What the Hub reads of a card: the YAML block at its head, and the headline figures as ``.eval_results/*.yaml``."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from soundwave.model_card.facts import CardFacts
from soundwave.model_card.figures import CardError, Figures, task_title
from soundwave.model_card.lineage import STAGES, Ancestor

EVAL_RESULTS = ".eval_results"
#: Beginning of the names of the files there that are ours: those of others are left alone.
OURS = "soundwave-"
#: The Hub's names for what the tasks are; all others answer a question about a recording.
HUB_TASKS = {
    "asr": "automatic-speech-recognition",
    "ctc": "automatic-speech-recognition",
    "sound": "automatic-speech-recognition",
    "librispeech_clean": "automatic-speech-recognition",
    "librispeech_other": "automatic-speech-recognition",
    "st": "translation",
    "covost2_en_de": "translation",
    "mustc_en_nl": "translation",
    "mustc_en_it": "translation",
    "mustc_en_ro": "translation",
    "mustc_en_es": "translation",
    "intent": "audio-classification",
    "sound_class": "audio-classification",
    "meld": "audio-classification",
    "vocalsound": "audio-classification",
    "text_qa": "question-answering",
}
#: Metrics that the Hub knows by a name of its own; others go by ours.
HUB_METRICS = {"sacrebleu": "bleu", "label_accuracy": "accuracy", "final_label_accuracy": "accuracy"}
COMMIT = re.compile(r"[0-9a-f]{40}")


def card_data(
    name: str,
    stage: str,
    config: Mapping[str, Any],
    lineage: Sequence[Ancestor],
    facts: CardFacts,
    figures: Figures,
    license_id: str | None,
) -> ModelCardData:
    """The metadata block of a stage's card.

    Raises:
        CardError: If the Hub would not take it.
    """
    start = [lineage[0].name] if lineage and lineage[0].on_hub else []
    bases = [*start, *(config[key] for key in ("audio_model_id", "text_model_id") if config[key])]
    try:
        return ModelCardData(
            model_name=name,
            language=facts.languages or None,
            license=license_id,
            library_name="transformers",
            # Stage I has no LLM and takes no text.
            pipeline_tag="automatic-speech-recognition" if stage == "align" else "audio-text-to-text",
            base_model=bases or None,
            base_model_relation="finetune" if bases else None,  # of several, the Hub would guess a merge
            datasets=facts.datasets or None,
            tags=["soundwave", f"stage-{STAGES[stage][0].lower()}", "speech", "audio", "custom_code"],
            eval_results=model_index(figures) or None,
        )
    except (ValueError, TypeError) as error:
        raise CardError(f"the Hub's client does not take the card's metadata: {error}") from error


def model_index(figures: Figures) -> list[EvalResult]:
    """The headline figures as a card's metadata states them, an entry per test set."""
    values = figures.headline_values()
    return [
        EvalResult(
            task_type=HUB_TASKS.get(entry["task"], "audio-text-to-text"),
            task_name=task_title(entry["task"]),
            dataset_type=entry["dataset"]["name"],
            dataset_name=entry["name"],
            # Of one data set, the Hub's client would put all figures under the name of the first.
            dataset_config=entry["name"],
            dataset_revision=entry["dataset"]["revision"],
            metric_type=HUB_METRICS.get(entry["metric"], entry["metric"]),
            metric_value=values[entry["name"]],
        )
        for entry in figures.entries
        if entry["name"] in values
    ]


def hub_entries(figures: Figures) -> dict[str, EvalResultEntry]:
    """Test set -> its entry of ``.eval_results``, for those that were read from the Hub at a commit.

    The Hub shows those whose data set is registered as a benchmark with a task of that name; the others it leaves.
    """
    values = figures.headline_values()
    entries = {}
    for entry in figures.entries:
        dataset, revision = entry["dataset"]["name"], str(entry["dataset"]["revision"])
        if entry["name"] not in values or dataset.count("/") != 1 or not COMMIT.fullmatch(revision):
            continue
        entries[entry["name"]] = EvalResultEntry(
            dataset_id=dataset,
            task_id=entry["task"],
            value=values[entry["name"]],
            dataset_revision=revision,
            date=entry["time"],
            notes=f"{entry['metric']}, {entry['count']} items, {entry['failures']} failed",
        )
    return entries


def eval_results(figures: Figures) -> dict[str, str]:
    """File in ``.eval_results`` -> its YAML, for the test sets of `hub_entries`."""
    files = {}
    for name, entry in hub_entries(figures).items():
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
        files[f"{OURS}{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.yaml"] = text
    return files


def write_eval_results(folder: str | Path, figures: Figures) -> None:
    """Write the files of `eval_results` below a folder, and remove ours of an earlier evaluation."""
    target = Path(folder) / EVAL_RESULTS
    files = eval_results(figures)
    for path in target.glob(f"{OURS}*.yaml"):
        if path.name not in files:
            path.unlink()
    for name, text in files.items():
        target.mkdir(exist_ok=True)
        (target / name).write_text(text, encoding="utf-8")
