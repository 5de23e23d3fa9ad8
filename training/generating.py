"""Validation by generation: what the model answers to a fixed sample of rows, scored as `soundwave.eval` does.

Stage I has no LLM: there the CTC head's greedy transcripts are scored.
"""

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import Trainer

from soundwave.eval.batches import Answered, answer_in_batches, describe_error, longest_first
from soundwave.eval.models.soundwave import Row, ctc_answerer, llm_answerer
from soundwave.eval.scoring import METRICS
from soundwave.eval.tasks import CTC, TASKS, Task, reference_of
from soundwave.training.incidents import report
from soundwave.training.stages import ConfigError, StageConfig

#: Of a task without an entry in `eval.tasks`: longer answers have no exact match worth counting; they have their loss.
SHORT_ANSWER_WORDS = 8


@dataclass(frozen=True)
class AnswerCheck:
    """How much a validation generates.

    Args:
        rows: at most so many, spread over the figures; the same ones at every validation.
        max_new_tokens: bound of an answer's length.

    Raises:
        ConfigError: without jiwer, which counts the word errors.
    """

    rows: int = 64
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if importlib.util.find_spec("jiwer") is None:
            raise ConfigError(
                f"eval_generate_rows is {self.rows}: answers are scored with jiwer, which is not installed: "
                'pip install "soundwave[train]", or set eval_generate_rows=0.'
            )

    @classmethod
    def from_config(cls, config: StageConfig) -> "AnswerCheck | None":
        """That of a run's settings; `None` where nothing is generated."""
        if not config.eval_data or not config.eval_generate_rows:
            return None
        return cls(config.eval_generate_rows, config.eval_max_new_tokens)


def figure_of(row: Row, ctc: bool) -> tuple[str, Task] | None:
    """The figure that a row's answer counts in, and the task that scores it; `None` for a row that is not asked.

    `wer` pools the rows whose answer is the transcript, `ctc_wer` all transcripts (stage I); other tasks have their
    own: `wer_<task>`, `accuracy_<task>`. Conversations of several turns are not asked.
    """
    task = TASKS[CTC] if ctc else TASKS.get(row["task"]) or Task(row["task"], row["task"], "accuracy")
    if row["messages"]:
        return None
    try:
        answer = reference_of(row, task)
    except ValueError:  # nothing to compare with
        return None
    if ctc:
        return "ctc_wer", task
    transcript = row["transcript"]
    spoken = [text or "" for text in transcript] if isinstance(transcript, list) else [transcript or ""]
    if row["task"] == "asr" or answer == " ".join(spoken):
        return "wer", TASKS["asr"]
    if METRICS[task.metric].lower_is_better:
        return f"{task.metric}_{task.name}", task
    if task.name not in TASKS and len(answer.split()) > SHORT_ANSWER_WORDS:
        return None
    return f"accuracy_{task.name}", task


def sample_rows(figures: Sequence[str | None], count: int, seed: int) -> list[int]:
    """At most `count` row numbers, the figures in turn and each one's rows shuffled; `None` is never drawn."""
    by_figure: dict[str, list[int]] = {}
    for row, figure in enumerate(figures):
        if figure is not None:
            by_figure.setdefault(figure, []).append(row)
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(by_figure[figure]).tolist() for figure in sorted(by_figure)]
    return [row for turn in zip_longest(*shuffled) for row in turn if row is not None][:count]


@functools.cache  # once is enough
def _say_left_out() -> None:
    # Generation runs parts of the model on their own, which sharded weights are not gathered for.
    report("the weights are sharded: validation has its losses, but no generated answers (eval_generate_rows).")


class AnsweringMixin(Trainer):
    """Adds figures of generated answers to the trainers' validation losses, under names that can pick the best."""

    answer_check: AnswerCheck | None

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """The library's, and the figures of `figures_of_answers`."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.answer_check is not None:
            figures = self.figures_of_answers(dataloader.dataset, self.answer_check)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def figures_of_answers(self, dataset: Any, check: AnswerCheck) -> dict[str, float]:
        """Error rates and accuracies of greedy answers to the sample; every process answers its share."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            if self.is_world_process_zero():
                _say_left_out()
            return {}
        chosen = self._sample(dataset, check.rows)
        metrics = {name: METRICS[task.metric] for _, name, task in sorted(chosen, key=lambda each: each[1])}
        sums = {name: np.zeros(1 + metric.size) for name, metric in metrics.items()}  # rows, the metric's numbers
        errors = []
        mine = chosen[self.args.process_index :: self.args.world_size]
        asked = {row: (name, task) for row, name, task in mine}
        rows = [{**dataset[number], "number": number} for number in asked]
        for row, answer, error in self._answers(rows, check.max_new_tokens):
            name, task = asked[row["number"]]
            if error is not None:
                errors.append(f"{row['id']!r}, {describe_error(error)}")
                continue
            scored = {"id": row["id"], "reference": reference_of(row, task), "answer": answer}
            sums[name] += (1, *metrics[name].statistics(scored, {"normalizer": task.normalizer}))
        if errors:
            report(f"validation: no answer to {len(errors)} of {len(asked)} rows, the first {errors[0]}")
        # Not every device has 64 bit; these are counts, exact in 32.
        counted = torch.tensor(np.concatenate([*sums.values(), [len(errors)]]), dtype=torch.float32)
        total = self.accelerator.reduce(counted.to(self.args.device), "sum").cpu().double().numpy()
        *parts, unanswered = np.split(total, np.cumsum([len(part) for part in sums.values()]))
        values = {name: metrics[name].combine(part[1:]) for name, part in zip(sums, parts, strict=True) if part[0]}
        figures = {name: value for name, value in values.items() if not np.isnan(value)}
        return figures | ({"unanswered": int(unanswered[0])} if unanswered[0] else {})

    def _determine_best_metric(self, metrics, trial):
        """The library's; a validation without the figure (no row of it was answered) cannot be the best."""
        name = self.args.metric_for_best_model
        if name is not None and name not in metrics:
            report(f"this validation has no {name}, so it cannot be the best; it has {', '.join(sorted(metrics))}.")
            return False
        return super()._determine_best_metric(metrics, trial)

    def _answers(self, rows: list[Row], max_new_tokens: int) -> Iterator[Answered[Row]]:
        """Rows with their answers or errors, the longest first."""
        answerer = ctc_answerer if self.stage == "align" else llm_answerer
        cache = getattr(self.data_collator, "cache", None)  # a collator of the user's own has none
        autocast = self.accelerator.autocast  # frozen and trained parts may be of two types
        answer = answerer(self.model, self.processing_class, cache, max_new_tokens, autocast)
        rows = longest_first(rows, lambda row: (row["duration_s"] or 0.0, len(row["instruction"] or "")))
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        training = self.model.training
        self.model.eval()
        with tqdm(total=len(rows), desc="answering", unit="row", leave=False, disable=hidden) as bar:
            for batch in answer_in_batches(answer, rows, self.args.per_device_eval_batch_size, report):
                yield from batch
                bar.update(len(batch))
        self.model.train(training)

    def _sample(self, dataset: Any, count: int) -> list[tuple[int, str, Task]]:
        """(row number, figure, task) of the rows to be asked."""
        columns = dataset.select_columns(["task", "answer", "transcript", "messages"])[:]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        found = [figure_of(row, ctc=self.stage == "align") for row in rows]
        numbers = sample_rows([each and each[0] for each in found], count, self.args.seed)
        return [(number, *each) for number in numbers if (each := found[number])]
