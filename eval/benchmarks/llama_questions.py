"""LLaMA Questions: general knowledge asked aloud, answered in words (accuracy)."""

from pathlib import Path
from typing import Any

from soundwave.eval.benchmarks import Benchmark
from soundwave.eval.benchmarks.sources import (
    TAB_SEPARATED,
    first_existing,
    read_hub_table,
    read_parquet_table,
    read_separated,
    spoken_item,
    table_clips,
    unique,
)
from soundwave.eval.items import Clip, FileClip, Item
from soundwave.eval.text import answer_parts

TSV = "llama_questions_300.tsv"
TSV_COLUMNS = ("Questions", "Answer", "Wav Filename")
HUB_COLUMNS = ("question", "answer", "audio")


class LlamaQuestions(Benchmark):
    """The 300 questions of google-research-datasets/LLAMA1-Test-Set, in synthetic speech and without a text prompt.

    SiM scores "as Nachmani et al. 2023", whose exact rule is not published with the data. ``contained_answer`` is
    that of X-LANCE/SLAM-LLM ``examples/s2s/evaluation/close_qa.py``: normalised, every comma-separated part of the
    reference stands in the answer as whole words.
    """

    name = "llama_questions"
    title = "LLaMA Questions"
    hub_id = "fixie-ai/llama-questions"
    homepage = "https://github.com/google-research-datasets/LLAMA1-Test-Set"
    size = 300
    metric = "contained_answer"

    def load(self, source: str | Path | None = None, revision: str | None = None) -> list[Item]:
        """Rows of ``llama_questions_300.tsv`` with its wav files beside it or in ``wav``, or of the parquet file."""
        if source is None:
            table = read_hub_table(self.hub_id, HUB_COLUMNS, revision=revision)
        else:
            found = first_existing(source, [TSV, "data"])
            if found.suffix == ".tsv":
                return self._from_tsv(found)
            table = read_parquet_table(Path(source), HUB_COLUMNS)
        items = [
            self._item(str(number), clip, row["answer"], row["question"])
            for number, (row, clip) in enumerate(table_clips(table), start=1)
        ]
        return unique(items, source or self.hub_id)

    def _from_tsv(self, tsv: Path) -> list[Item]:
        clips = first_existing(tsv.parent, ["wav", "."])
        items = []
        for row in read_separated(tsv, TSV_COLUMNS, **TAB_SEPARATED):
            name = row["Wav Filename"]
            items.append(self._item(Path(name).stem, FileClip(clips / name), row["Answer"], row["Questions"]))
        return unique(items, tsv)

    def _item(self, name: str, clip: Clip, answer: Any, question: Any) -> Item:
        error = None
        try:
            if isinstance(answer, str):
                answer_parts(answer)
        except ValueError as problem:  # no answer could be right: this item's fault, not that of the others
            error = str(problem)
        return spoken_item(name, self.instruction, clip, answer, error, question=question)


BENCHMARKS = (LlamaQuestions(),)
