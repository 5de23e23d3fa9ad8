"""What a run trains on, for its card: a draft of `card.yaml`, in which people have only the licences to state."""

import os
from typing import Any

from datasets import Dataset

from soundwave.model_card.facts import UNKNOWN, UNSTATED, CardFacts, data_summary
from soundwave.training.data import rows_without_bytes
from soundwave.training.stages import portable_source
from soundwave.training.streaming import StreamedMixture

STREAMED = "streamed, not counted"


def draft_card_facts(folder: str | os.PathLike[str], rows: Any, mixture: Any = None) -> None:
    """Write `card.yaml` with rows and hours by source and task; one that a person wrote or changed is kept.

    Args:
        folder: of the run.
        rows: of `data.load_rows`, those that are trained on.
        mixture: `StreamedMixture` in place of rows that can be counted.
    """
    data = _streamed(mixture) if isinstance(mixture, StreamedMixture) else _counted(rows)
    CardFacts(data=data).save_draft(folder)


def _counted(rows: Dataset) -> list[dict[str, Any]]:
    return data_summary(rows_without_bytes(rows.select_columns(["source", "task", "duration_s", "audio"])))


def _streamed(mixture: StreamedMixture) -> list[dict[str, Any]]:
    return [
        {"name": portable_source(source), "task": task, "rows": STREAMED, "hours": UNKNOWN, "licence": UNSTATED}
        for task, sources in mixture.sources.items()
        for source in sources
    ]
