"""Efficiency as the paper reports it (Table 8, Fig. 6), measured on a benchmark's recordings.

    EFFICIENCY["ttft"](model, items, dataset={"name": "librispeech_clean", "revision": commit}, output_dir=folder)

``ttft``: time to the first token. ``compression``: LLM positions per encoder position, in both readings.
``similarity``: how close recordings come to their transcripts. ``training_speed``: steps per second by stage.
Every measured number is a row of ``answers.jsonl``, and the figures follow from the rows like all others. They hold
for the hardware and the sizes that stand beside them, and for no others.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soundwave.eval.benchmarks import Benchmark, get_benchmark, require_transcripts
from soundwave.eval.items import Item
from soundwave.training.stage_table import STAGES

if TYPE_CHECKING:  # what computes is imported when it is needed
    from soundwave.eval.efficiency_inference import Measurement
    from soundwave.eval.models import AudioModel
    from soundwave.eval.results import TaskResult
    from soundwave.eval.runner import Runner

Row = dict[str, Any]
#: Rows of an update, updates that are timed, and updates before them that are not.
TRAINING = {"most_rows": 8, "steps": 10, "warm_up": 2}
#: Items of Fig. 6 (§5.2), drawn at random; the paper names no seed.
SIMILARITY = {"sample": 200, "seed": 0}
TEXT = {"transcripts": "as given; all capitals in lower case"}
#: Metrics with a figure per stage: pooled over stages they are the speed of nothing.
BY_STAGE = ("steps_per_second", "audio_seconds_per_second")
#: The paper measures on LibriSpeech (Table 8; §5.2: test-clean).
PAPERS_DATA = "librispeech_clean"


class Efficiency(Benchmark):
    """A measurement as a task of ``soundwave evaluate``, on the recordings of a benchmark.

    Args:
        name: As on the command line.
        title: For tables.
        metrics: Names of ``scoring.METRICS``, the headline first; all follow from the same rows.
        measure: (model, items) -> measurements.
        measured: How it is measured, for ``results.json``.
    """

    own_questions = True  # another prompt would change nothing

    def __init__(
        self,
        name: str,
        title: str,
        metrics: Sequence[str],
        measure: "Callable[[AudioModel, Sequence[Item]], Iterator[Measurement]]",
        measured: Row,
    ) -> None:
        self.name, self.task, self.title = name, name, title
        self.metric, *also = metrics
        self.also = tuple(also)
        self._measure, self._measured = measure, measured
        self._take(get_benchmark(PAPERS_DATA))

    def on(self, benchmark: str) -> "Efficiency":
        """The same on the recordings of another benchmark; it is then called ``ttft:meld``.

        Raises:
            ValueError: If there is no such benchmark, or it has not the transcripts that this measurement needs.
        """
        other = copy(self)
        other.name = f"{self.task}:{benchmark}"
        other._take(get_benchmark(benchmark))
        if "transcripts" in self._measured:
            require_transcripts(other._data)
        return other

    def _take(self, data: Benchmark) -> None:
        self._data = data
        self.licence, self.hub_id, self.homepage, self.size = data.licence, data.hub_id, data.homepage, data.size

    def load(self, source: str | Path | None = None, revision: str | None = None) -> list[Item]:
        """The items of the benchmark that is measured on, as its own ``load``."""
        return self._data.load(source, revision)

    def run(self, runner: "Runner", items: Sequence[Item], dataset: Row) -> "TaskResult":
        """Measure as a runner is set up: its model, folder and limit.

        Raises:
            ValueError: With several processes, which would measure each other; or as a call.
        """
        from soundwave.eval.selecting import describe_dataset, sample_items

        if runner.processes.count > 1:
            raise ValueError(f"{self.name} is measured by one process; start it without accelerate")
        chosen = sample_items(items, runner.limit)
        return self(
            runner.model,
            chosen,
            dataset=describe_dataset(dataset, chosen, len(items)),
            output_dir=runner.output_dir,
            command=runner.command,
            progress=runner.progress,
        )

    def __call__(
        self,
        model: "AudioModel",
        items: Sequence[Item],
        *,
        dataset: Row,
        output_dir: str | os.PathLike[str] | None = None,
        command: str | None = None,
        progress: bool = True,
    ) -> "TaskResult":
        """Measure on a benchmark's items, and put rows and figures into the files of a folder.

        Args:
            model: Any that generates for ``ttft``; a whole Soundwave model for the others.
            items: With recordings, and for ``similarity`` and ``training_speed`` with transcripts.
            dataset: ``name`` and ``revision`` of the benchmark's data.
            output_dir: Of ``answers.jsonl`` and ``results.json``; ``None`` writes nothing.
            command: What was run; the process's command line if not given.
            progress: Show a bar.

        Raises:
            ValueError: If the model is of a kind that this cannot be measured on, not one item could be measured, or
                another run writes to the folder.
        """
        from soundwave.eval import results
        from soundwave.eval.resuming import claim

        if not items:
            raise ValueError(f"{self.name} needs recordings to measure on; {dataset['name']} has no items")
        # Before the measurement: whoever finds the folder taken has not waited for it.
        with nullcontext() if output_dir is None else claim(output_dir):
            result = self._result(model, items, {"rows": len(items), **dataset}, command, progress)
            if output_dir is not None:
                results.forget_result(output_dir, self.name)
                results.AnswerLog(output_dir, self.name).append(result.answers)
                results.save_result(output_dir, result)
        return result

    def _result(
        self, model: "AudioModel", items: Sequence[Item], dataset: Row, command: str | None, progress: bool
    ) -> "TaskResult":
        from tqdm.auto import tqdm

        from soundwave.eval import results

        started = time.perf_counter()
        bar = tqdm(self._measure(model, items), desc=self.name, unit="item", disable=not progress, leave=False)
        rows = [self._row(measurement) for measurement in bar]
        settings = results.metric_settings() | {"measured": self._measured | _where(model)}
        headline, also = results.score_answers(rows, self.metric, self.also, settings)
        failed = {row["id"]: row["error"] for row in rows if row["error"] is not None}
        return results.TaskResult(
            name=self.name,
            task=self.task,
            dataset=dataset,
            metric=self.metric,
            settings=settings,
            value=headline.value,
            interval=headline.interval,
            count=headline.count,
            groups=headline.groups,
            failures=len(failed),
            failed=failed,
            also=also,
            model=model.describe(),
            decoding=model.decoding,
            seconds=round(time.perf_counter() - started, 2),
            command=command or results.command_line(),
            answers=rows,
            **results.environment(),
        )

    def _row(self, measurement: "Measurement") -> Row:
        """A row of ``answers.jsonl``: what was measured stands in ``fields``; there is no answer."""
        item = measurement.item
        return {
            "name": self.name,
            "task": self.task,
            "id": measurement.id,
            "instruction": item.instruction if item else None,
            "reference": item.reference if item else None,
            "answer": None,
            "error": measurement.error,
            "audio": [clip.name for clip in item.clips] if item else [],
            "duration_s": item.duration_s if item else None,
            "source": item.fields.get("source") if item else None,
            "group": measurement.group,
            "fields": measurement.numbers or {},
        }


def get_efficiency(name: str) -> Efficiency | None:
    """The measurement of a task's name, ``"ttft"`` or ``"ttft:meld"``; ``None`` for any other name.

    Raises:
        ValueError: For a benchmark after the colon that ``Efficiency.on`` refuses.
    """
    task, _, benchmark = name.partition(":")
    efficiency = EFFICIENCY.get(task)
    return efficiency.on(benchmark) if efficiency is not None and benchmark else efficiency


def by_stage(metric: str, figure: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The figures of the stages in their order where a metric has such, else the one figure."""
    stages = figure.get("groups") or {} if metric in BY_STAGE else {}
    return {stage: stages[stage] for stage in (*STAGES, *stages) if stage in stages} or {"": figure}


def _where(model: "AudioModel") -> Row:
    """Device, type and attention kernels of a local model: no figure of time means anything without them."""
    import torch

    inner = getattr(model, "model", None)
    if not isinstance(inner, torch.nn.Module):
        return {"device": "not known: several models, or a server"}
    device = inner.device
    parts = {type(inner).__name__: inner, **dict(inner.named_children())}
    kernels = {
        name: getattr(getattr(part, "config", None), "_attn_implementation", None) for name, part in parts.items()
    }
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "dtype": str(inner.dtype).removeprefix("torch."),
        "attention": {name: kernel for name, kernel in kernels.items() if kernel is not None},
    }


def _function(name: str, **settings: Any) -> "Callable[[AudioModel, Sequence[Item]], Iterator[Measurement]]":
    """A function of the two modules beside this one, which are imported when something is measured."""

    def measure(model: "AudioModel", items: Sequence[Item]) -> "Iterator[Measurement]":
        module, _, function = name.partition(".")
        return getattr(import_module(f"soundwave.eval.{module}"), function)(model, items, **settings)

    return measure


EFFICIENCY: dict[str, Efficiency] = {
    efficiency.name: efficiency
    for efficiency in (
        Efficiency(
            "ttft",
            "Time to first token",
            ("ttft", "ttft_mean", "features_time", "features_time_mean"),
            _function("efficiency_inference.measure_ttft"),
            {"batch_size": 1, "new_tokens": 1, "warm_up": 1, "clock": "perf_counter, device synchronised"},
        ),
        Efficiency(
            "compression",
            "Compression ratio",
            ("ratio_padded", "ratio_padded_mean", "ratio_speech", "ratio_speech_mean"),
            _function("efficiency_inference.measure_compression"),
            {"padded": "positions of whole encoder windows", "speech": "50 positions per second, rounded up"},
        ),
        Efficiency(
            "similarity",
            "Similarity of speech and text",
            ("similarity", "similarity_std", "shuffled_similarity", "shuffled_similarity_std"),
            _function("efficiency_inference.measure_similarity", **SIMILARITY),
            {"measure": "cosine of means over positions", **TEXT, **SIMILARITY},
        ),
        Efficiency(
            "training_speed",
            "Training speed by stage",
            ("steps_per_second", "audio_seconds_per_second"),
            _function("efficiency_training.measure_training_speed", **TRAINING),
            {**TRAINING, **TEXT, "learning_rate": 0.0},
        ),
    )
}
