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

from soundwave.eval.evaluate import Row, answer_safely, ctc_answerer, length_sorted_batches, llm_answerer
from soundwave.eval.tasks import CTC, LOWER_IS_BETTER, TASKS, Task, reference_of
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
    if task.metric in LOWER_IS_BETTER:
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
        from soundwave.eval.scoring import METRICS  # needs jiwer, which only validation by generation does

        chosen = self._sample(dataset, check.rows)
        names = sorted({name for _, name, _ in chosen})
        counts = {name: [0, 0] for name in (*names, "unanswered")}  # counted, out of
        errors = []
        mine = chosen[self.args.process_index :: self.args.world_size]
        asked = {row: (name, task) for row, name, task in mine}
        rows = [{**dataset[number], "number": number} for number in asked]
        for row, answer, error in self._answers(rows, check.max_new_tokens):
            name, task = asked[row["number"]]
            if error is not None:
                errors.append(f"{row['id']!r}, {error}")
                continue
            counted, out_of = METRICS[task.metric](reference_of(row, task), answer, task.normalizer)
            counts[name][0] += counted
            counts[name][1] += out_of
        if errors:
            counts["unanswered"][0] = len(errors)
            report(f"validation: no answer to {len(errors)} of {len(asked)} rows, the first {errors[0]}")
        total = self.accelerator.reduce(torch.tensor(list(counts.values()), device=self.args.device), "sum").tolist()
        figures = {name: hits / out_of for name, (hits, out_of) in zip(counts, total, strict=True) if out_of}
        return figures | ({"unanswered": total[-1][0]} if total[-1][0] else {})

    def _determine_best_metric(self, metrics, trial):
        """The library's; a validation without the figure (no row of it was answered) cannot be the best."""
        name = self.args.metric_for_best_model
        if name is not None and name not in metrics:
            report(f"this validation has no {name}, so it cannot be the best; it has {', '.join(sorted(metrics))}.")
            return False
        return super()._determine_best_metric(metrics, trial)

    def _answers(self, rows: list[Row], max_new_tokens: int) -> Iterator[tuple[Row, str | None, str | None]]:
        """(row, answer, error) of rows, in an order of their own."""
        answerer = ctc_answerer if self.stage == "align" else llm_answerer
        cache = getattr(self.data_collator, "cache", None)  # a collator of the user's own has none
        autocast = self.accelerator.autocast  # frozen and trained parts may be of two types
        answer, _ = answerer(self.model, self.processing_class, cache, max_new_tokens, autocast)
        hidden = self.args.disable_tqdm or not self.is_world_process_zero()
        training = self.model.training
        self.model.eval()
        with tqdm(total=len(rows), desc="answering", unit="row", leave=False, disable=hidden) as bar:
            for batch in length_sorted_batches(rows, self.args.per_device_eval_batch_size):
                yield from answer_safely(answer, batch)
                bar.update(len(batch))
        self.model.train(training)

    def _sample(self, dataset: Any, count: int) -> list[tuple[int, str, Task]]:
        """(row number, figure, task) of the rows to be asked."""
        columns = dataset.select_columns(["task", "answer", "transcript", "messages"])[:]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        found = [figure_of(row, ctc=self.stage == "align") for row in rows]
        numbers = sample_rows([each and each[0] for each in found], count, self.args.seed)
        return [(number, *each) for number in numbers if (each := found[number])]
