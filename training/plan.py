"""What a run would do, without doing it: `soundwave train STAGE --dry-run`.

Settings, configurations, processor and rows are read and checked as the run does; weights are not, so that an 8B
model is planned on a laptop. Nothing is written.
"""

import itertools
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from soundwave.model_card.licences import check_name, llama_version
from soundwave.processing.messages_soundwave import ChatError
from soundwave.training.arguments import check_best_metric, resolve_dtype, training_arguments
from soundwave.training.batching import SHORTEST_S
from soundwave.training.building import build_processor, build_skeleton, check_start, pin_start
from soundwave.training.checkpoints import Beginning, beginning, deciding_settings, refuse_old_checkpoints
from soundwave.training.data import load_rows, transcripts, with_audio
from soundwave.training.freezing import freeze
from soundwave.training.generating import AnswerCheck
from soundwave.training.memory import POSITIONS_PER_SECOND, MicroBatch, Part, memory, parts_of
from soundwave.training.quantization import check_installed
from soundwave.training.stages import ConfigError, StageConfig
from soundwave.training.streaming import StreamedMixture

SAMPLED_ROWS = 64  # whose tokens are counted
EPOCHS_SHOWN = 6  # the first ones; then the last


@dataclass(frozen=True)
class TaskRows:
    """The rows of one task; `None` = not known."""

    rows: float | None
    hours: float | None  # 0 without audio
    without_length: int = 0  # rows with audio that state no duration


@dataclass(frozen=True)
class Epoch:
    """Shares of the tasks in an epoch."""

    number: int  # from 1
    temperature: float | None  # None = shares by hand
    shares: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """What a run trains, on what, for how long, in how much memory. `str(plan)` is the page that is printed."""

    config: StageConfig
    parts: list[Part]
    tasks: dict[str, TaskRows]
    epochs: list[Epoch]
    epochs_in_all: float | None  # None = of a stream without a known size
    devices: int
    passes: int  # forward passes per update and device
    batch: MicroBatch
    tokens: dict[str, float]  # mean per row, by what they are
    memory: dict[str, int]  # bytes
    notes: list[str]

    def __str__(self) -> str:
        config = self.config
        begins = config.start or f"{config.audio_model} + {config.text_model}"
        title = f"stage {'I' * config.table.number} ({config.stage}): {begins} -> {config.output_dir}"
        notes = [textwrap.fill(f"note: {note}", 110, subsequent_indent="      ") for note in self.notes]
        return "\n".join([title, *self._modules(), *self._data(), *self._length(), *self._memory(), "", *notes]) + "\n"

    def _modules(self) -> list[str]:
        rows = [["what trains", "parameters", "trains", "type"]]
        rows += [[part.name, f"{part.parameters:,}", f"{part.trained:,}", part.dtype] for part in self.parts]
        total, trained = (sum(getattr(part, name) for part in self.parts) for name in ("parameters", "trained"))
        rows.append(["in all", f"{total:,}", f"{trained:,}", ""])
        return ["", *_aligned(rows)]

    def _data(self) -> list[str]:
        head = ["data", "rows", "hours", *(f"epoch {epoch.number}" for epoch in self.epochs)]
        rows = [head]
        if any(epoch.temperature is not None for epoch in self.epochs):
            rows.append(["", "", "", *(f"T = {epoch.temperature:g}" for epoch in self.epochs)])
        for task, found in self.tasks.items():
            shares = [f"{100 * epoch.shares.get(task, 0):.1f} %" for epoch in self.epochs]
            rows.append([task, _number(found.rows), _hours(found.hours), *shares])
        counts = [found.rows for found in self.tasks.values() if found.rows is not None]
        hours = [found.hours for found in self.tasks.values() if found.hours is not None]
        if len(counts) == len(self.tasks):
            rows.append(
                ["in all", _number(sum(counts)), _hours(sum(hours) or (0.0 if len(hours) == len(counts) else None))]
            )
        return ["", *_aligned(rows)]

    def _length(self) -> list[str]:
        config = self.config
        draws = config.steps * config.global_batch
        in_all = "" if self.epochs_in_all is None else f", {self.epochs_in_all:.2f} epochs"
        a_pass = (
            f"{config.per_device_batch} rows"
            if config.max_seconds_per_batch is None
            else f"up to {config.max_seconds_per_batch:g} s"
        )
        tokens = ", ".join(f"{count:.0f} {name}" for name, count in self.tokens.items())
        rows = [
            ["steps", f"{config.steps:,} updates of {config.global_batch:,} rows: {draws:,} draws{in_all}"],
            ["an update", f"{a_pass} x {self.passes} passes x {self.devices} device(s)"],
            ["a pass", f"up to {self.batch.audio_s:,.0f} s of audio, {self.batch.text_tokens:,} tokens of text"],
            ["tokens", f"{tokens or 'none'} per row, the mean of up to {SAMPLED_ROWS}"],
        ]
        return ["", *_aligned(rows, left=2)]

    def _memory(self) -> list[str]:
        sizes = self.memory | {"in all": sum(self.memory.values())}
        rows = [["memory of a device", ""], *([name, _size(size)] for name, size in sizes.items())]
        return ["", *_aligned(rows)]


def make_plan(config: StageConfig) -> Plan:
    """The plan of a run, which fails for whatever settings and rows the run would refuse before its first step.

    Raises:
        ValueError: as `train.train_stage` (`ConfigError`, `DataError`, `WeightsError`, `CardError`).
    """
    config = pin_start(config)
    if not config.resume:
        refuse_old_checkpoints(config.output_dir)
    args, dtype = training_arguments(config), resolve_dtype(config)
    model = build_skeleton(config, dtype)
    processor = build_processor(config, check_start(config))
    freeze(model, config.trains)
    if config.hub_model_id is not None:
        check_name(config.hub_model_id.rsplit("/", 1)[-1], llama_version(model.config.to_dict()))
    eval_rows = load_rows(config.eval_data, config.data_root) if config.eval_data else None
    check_best_metric(
        config, with_audio(eval_rows) if eval_rows is not None and config.table.needs_audio else eval_rows
    )
    AnswerCheck.from_config(config)
    draws = _streamed(config) if config.streaming else _drawn(config, args.world_size, model)
    begin = beginning(config, deciding_settings(config, draws.rows))
    parts = parts_of(model, config.quantization)
    tokens = _tokens(draws.sample, processor, config.table.losses)
    batch = _largest_pass(config, draws.longest_s, tokens)
    return Plan(
        config=config,
        parts=parts,
        tasks=draws.tasks,
        epochs=draws.epochs,
        epochs_in_all=draws.epochs_in_all,
        devices=args.world_size,
        passes=draws.passes or args.gradient_accumulation_steps,
        batch=batch,
        tokens={name: float(np.mean(counts)) for name, counts in tokens.items()},
        memory=memory(model, parts, batch, dtype != torch.float32, config.gradient_checkpointing),
        notes=_begun(begin) + _notes(config, draws.tasks, dtype),
    )


@dataclass(frozen=True)
class _Draws:
    rows: Any
    tasks: dict[str, TaskRows]
    epochs: list[Epoch]
    epochs_in_all: float | None
    passes: int | None  # per update, where batches go by seconds
    sample: Iterable[dict[str, Any]]  # rows
    longest_s: float  # audio of a row, padding included


def _drawn(config: StageConfig, devices: int, model: Any) -> _Draws:
    """The rows of a run that reads them whole."""
    from soundwave.training.train import make_batches, make_sampler  # which imports this module for `--dry-run`

    rows = load_rows(config.data, config.data_root)
    rows = with_audio(rows) if config.table.needs_audio else rows
    sampler = make_sampler(config, rows)
    batches = make_batches(config, rows, sampler, devices, model.config.audio_padding)
    spoken = ~np.concatenate([table.column("audio").is_null().to_numpy() for table in _tables(rows, "audio")])
    seconds = np.concatenate([table.column("duration_s").fill_null(0.0).to_numpy() for table in _tables(rows)])
    tasks = {
        task: TaskRows(
            rows=len(numbers),
            hours=None if _unknown(spoken[numbers], seconds[numbers]).all() else float(seconds[numbers].sum() / 3600),
            without_length=int(_unknown(spoken[numbers], seconds[numbers]).sum()),
        )
        for task, numbers in sampler.rows.items()
    }
    window_s = model.config.window_mel_frames / 100
    longest_s = float(seconds.max()) or (window_s if spoken.any() else 0.0)
    if model.config.audio_padding == "max_length":
        longest_s = math.ceil(longest_s / window_s) * window_s
    epochs_in_all = config.steps * config.global_batch / sampler.draws
    plans = (sampler.plan(number) for number in _shown(epochs_in_all))
    return _Draws(
        rows=rows,
        tasks=tasks,
        epochs=[Epoch(p.epoch + 1, None if config.task_weights else p.temperature, p.probabilities) for p in plans],
        epochs_in_all=epochs_in_all,
        passes=batches.passes if batches is not None else None,
        sample=rows.select(np.linspace(0, len(rows) - 1, min(len(rows), SAMPLED_ROWS)).astype(int)),
        longest_s=longest_s,
    )


def _streamed(config: StageConfig) -> _Draws:
    """The rows of a run that reads them as they come: what the settings say of them."""
    sampler = StreamedMixture.from_config(config)
    in_all = config.steps * config.global_batch / sum(config.stream_rows.values()) if config.stream_rows else None
    numbers = _shown(in_all or 1.0)
    rows = sampler.dataset()
    sample = list(itertools.islice(rows, SAMPLED_ROWS))
    return _Draws(
        rows=rows,
        tasks={task: TaskRows(config.stream_rows.get(task), None) for task in sampler.streams},
        epochs=[
            Epoch(
                number=number + 1,
                temperature=None
                if config.task_weights
                else sampler.temperature_start + sampler.temperature_step * number,
                shares=sampler.probabilities(number),
            )
            for number in numbers
        ],
        epochs_in_all=in_all,
        passes=None,
        sample=sample,
        longest_s=max((row["duration_s"] or 0.0 for row in sample), default=0.0),
    )


def _unknown(spoken: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    return spoken & (seconds <= 0)


def _tables(rows: Dataset, column: str = "duration_s") -> Iterable[Any]:
    return rows.select_columns([column]).with_format("arrow").iter(1000)


def _shown(epochs_in_all: float) -> list[int]:
    """Numbers of the epochs whose shares are printed, from 0: the first ones and the last."""
    last = math.ceil(epochs_in_all - 1e-9) - 1
    return [*range(min(last, EPOCHS_SHOWN)), last]


def _tokens(sample: Iterable[dict[str, Any]], processor: Any, losses: Sequence[str]) -> dict[str, list[int]]:
    """Tokens of each sampled row, by what they are; rows that a run would skip are left out."""
    counts: dict[str, list[int]] = {}
    for row in sample:
        try:
            if "answer" in losses:
                prompt, answer = processor.prompt_and_answer_ids(processor.example_messages(row))
                counts.setdefault("of the prompt", []).append(len(prompt))
                counts.setdefault("of the answer", []).append(len(answer))
            if "ctc" in losses and (texts := transcripts(row)):
                targets = sum(len(processor.ctc_label_ids(text)) for text in texts if text is not None)
                counts.setdefault("of the transcript", []).append(targets)
        except (ChatError, KeyError, TypeError):
            continue
    return counts


def _largest_pass(config: StageConfig, longest_s: float, tokens: dict[str, list[int]]) -> MicroBatch:
    """A pass of the longest rows, audio and text."""
    most = config.max_seconds_per_batch
    rows = config.per_device_batch if most is None else max(1, round(most / max(longest_s, SHORTEST_S)))
    prompt, answer = (max(tokens.get(name, [0])) for name in ("of the prompt", "of the answer"))
    return MicroBatch(most or rows * longest_s, rows * (prompt + answer), rows * answer)


def _begun(begin: Beginning) -> list[str]:
    if begin.finished:
        return [f"{begin.folder} holds the result of this run; nothing is left to train."]
    return [f"goes on from {begin.folder}, after {begin.step:,} updates."] if begin.folder else []


def _notes(config: StageConfig, tasks: dict[str, TaskRows], dtype: torch.dtype) -> list[str]:
    notes = [
        f"activations are a rough estimate: the longest recordings in one pass, {POSITIONS_PER_SECOND} positions of "
        "the LLM per second of audio; add about 1 GB for the device's own. Nothing is sharded."
    ]
    if unknown := sum(found.without_length for found in tasks.values()):
        notes.append(f"{unknown:,} rows with audio state no duration_s; the hours leave them out.")
    if config.streaming:
        notes.append("streams are not counted: their rows are what stream_rows says, their hours are not known.")
    if config.dtype == "auto" and dtype == torch.float32:
        notes.append("dtype auto is float32 here; dtype=bfloat16 plans for a GPU.")
    if config.quantization is not None:
        try:
            check_installed(config.quantization)
        except ConfigError as error:
            notes.append(f"on this machine the run would stop: {error}")
    return notes


def _number(count: float | None) -> str:
    return "?" if count is None else f"{count:,.0f}"


def _hours(hours: float | None) -> str:
    return "?" if hours is None else f"{hours:,.2f}" if hours else "-"


def _size(count: float) -> str:
    """Bytes as GB, or MB where they are few."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def _aligned(rows: list[list[str]], left: int = 1) -> list[str]:
    """Rows of cells as lines, the first `left` columns flush left and the others right."""
    columns = max(len(row) for row in rows)
    rows = [row + [""] * (columns - len(row)) for row in rows]
    widths = [max(len(row[k]) for row in rows) for k in range(columns)]
    cells = [
        [
            cell.ljust(width) if k < left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    return ["   ".join(row).rstrip() for row in cells]
