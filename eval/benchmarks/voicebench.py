"""VoiceBench: spoken questions to an assistant, one benchmark per subset that can be scored by a stated rule.

Left out: ``ifeval`` (its checkers are no maintained library; a rewrite would be another benchmark), ``mtbench``
(several turns) and ``bbh`` (a rule per kind of item, which the data does not name).
"""

import re
from pathlib import Path
from typing import Any

from soundwave.eval.benchmarks import Benchmark
from soundwave.eval.benchmarks.sources import DataError, read_hub_table, read_parquet_table, table_clips, unique
from soundwave.eval.items import Item
from soundwave.eval.judge import Prompt, mark, no_mark

HUB_ID = "hlt-lab/voicebench"
LETTERS = "ABCD"
#: Published sampling: three replies per question (MatthewCYM/VoiceBench ``api_judge.py``).
SAMPLES = 3
SAMPLING = {"temperature": 0.5, "top_p": 0.95}
SYSTEM = {"role": "system", "content": "You judge the answers of a voice assistant, fairly and exactly."}


class VoiceBench(Benchmark):
    """One subset: the recording alone is the question. Several splits (regions, subjects) are groups, pooled by item.

    Attributes:
        columns: That the data must have, beside the recording.
        right: What is right where the data has no reference.
    """

    licence = "Apache-2.0"
    hub_id = HUB_ID
    homepage = "https://github.com/MatthewCYM/VoiceBench"
    max_new_tokens = 1024
    columns: tuple[str, ...] = ("prompt", "reference")
    right: str | None = None

    def __init__(self, subset: str, size: int) -> None:
        self.subset, self.size = subset, size
        self.name = f"voicebench_{subset.replace('-', '_')}"
        self.title = f"VoiceBench {subset}"

    def load(self, source: str | Path | None = None, revision: str | None = None) -> list[Item]:
        """All splits of the subset: on the Hub, or ``<subset>/<split>-*.parquet`` in a copy of its repository."""
        columns = ("audio", *self.columns)
        items = []
        for split in self._splits(source, revision):
            if source is None:
                table = read_hub_table(self.hub_id, columns, config=self.subset, split=split, revision=revision)
            else:
                table = read_parquet_table(Path(source), columns, config=self.subset, split=split)
            for number, (row, clip) in enumerate(table_clips(table)):
                fields = {"prompt": row["prompt"], "source": split}
                if error := self.fault(row):
                    fields["error"] = error
                items.append(
                    Item(
                        f"{split}/{number}", self.instruction, [clip], row.get("reference", self.right), split, fields
                    )
                )
        return unique(items, source or self.hub_id)

    def fault(self, row: dict[str, Any]) -> str | None:
        """Why a row cannot be scored, if so."""
        wrong = next((name for name in self.columns if not isinstance(row[name], str) or not row[name].strip()), None)
        return f"{wrong} is {row[wrong]!r}, expected text" if wrong else None

    def _splits(self, source: str | Path | None, revision: str | None) -> list[str]:
        if source is None:
            from datasets import get_dataset_split_names

            try:
                return sorted(get_dataset_split_names(self.hub_id, self.subset, revision=revision))
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{self.hub_id}, {self.subset}: cannot be listed ({error}); give the folder of its files."
                ) from error
        files = (Path(source) / self.subset).glob("*.parquet")
        splits = {part[1] for file in files if (part := re.fullmatch(r"(.+)-\d+-of-\d+", file.stem))}
        if not splits:
            raise DataError(
                f"{Path(source) / self.subset} holds no <split>-00000-of-00001.parquet; give the folder of a copy of "
                f"{self.hub_id} as the source."
            )
        return sorted(splits)


class OpenQuestions(VoiceBench):
    """Open questions without a reference, marked from 1 to 5; the published judge is gpt-4o-mini."""

    metric = "judge_score"
    settings = {"scale": (1, 5)}
    judged = True
    columns = ("prompt",)

    def prompts(self, row: dict[str, Any], official: bool = False) -> list[Prompt]:
        """One question, three times with ``official``."""
        text = (
            f"[Spoken request, written down]\n{row['fields']['prompt']}\n\n"
            f"[Answer]\n{row['answer']}\n\n"
            "Mark the answer from 1 to 5:\n"
            "1: beside the point, wrong, or not understandable\n"
            "2: touches the request, but does not help\n"
            "3: helps in part, with errors, gaps or needless matter\n"
            "4: helpful and right, as it would be spoken, with small flaws\n"
            "5: exactly what was asked for, right, clear and brief enough to be listened to\n"
            "Print the number and nothing else."
        )
        return _asked(text, "voicebench-open-1", official)

    def verdict(self, reply: str, order: str) -> dict[str, Any]:
        """A number from 1 to 5 and nothing else."""
        said = reply.strip().rstrip(".")
        return mark(int(said)) if said in {"1", "2", "3", "4", "5"} else no_mark("expected a number from 1 to 5")


class SpokenFacts(VoiceBench):
    """Short facts asked in eleven regions' English; a judge says yes or no, of several replies the majority counts.

    VoiceBench gives the mean of this and of a string matcher (PEDANT), which is left out here.
    """

    metric = "judge_majority"
    judged = True

    def prompts(self, row: dict[str, Any], official: bool = False) -> list[Prompt]:
        """One question, three times with ``official``."""
        text = (
            f"[Question]\n{row['fields']['prompt']}\n\n"
            f"[Right answer]\n{row['reference']}\n\n"
            f"[Answer]\n{row['answer']}\n\n"
            "Does the answer say the same as the right answer, as far as the question goes? Print Yes or No and "
            "nothing else."
        )
        return _asked(text, "voicebench-facts-1", official)

    def verdict(self, reply: str, order: str) -> dict[str, Any]:
        """Yes or No and nothing else."""
        said = reply.strip().rstrip(".").lower()
        return mark(float(said == "yes")) if said in {"yes", "no"} else no_mark("expected Yes or No")


class SpokenChoices(VoiceBench):
    """Spoken multiple choice; the reference is a letter, read from the answer by ``verdicts.spoken_letter``."""

    metric = "spoken_choice"

    def fault(self, row: dict[str, Any]) -> str | None:
        """Why a row cannot be scored: besides what is missing, a reference that is no letter."""
        fault = super().fault(row)
        if fault is None and row["reference"] not in tuple(LETTERS):
            fault = f"reference is {row['reference']!r}, expected one of {', '.join(LETTERS)}"
        return fault


class HarmfulRequests(VoiceBench):
    """Requests that a safe assistant declines; the figure is the share of refusals, found by set phrases.

    The phrases (``verdicts.REFUSALS``) are our own list: figures differ from those by VoiceBench's.
    """

    metric = "refusal_rate"
    columns = ("prompt",)
    right = "a refusal"


def _asked(text: str, version: str, official: bool) -> list[Prompt]:
    messages = [SYSTEM, {"role": "user", "content": text}]
    sampling = {"max_tokens": 16} | (SAMPLING if official else {})
    return [Prompt(f"sample_{n}", messages, sampling, version) for n in range(1, (SAMPLES if official else 1) + 1)]


BENCHMARKS = (
    OpenQuestions("alpacaeval", 199),
    OpenQuestions("alpacaeval_full", 636),
    OpenQuestions("commoneval", 200),
    OpenQuestions("wildvoice", 1000),
    SpokenFacts("sd-qa", 6083),
    SpokenChoices("openbookqa", 455),
    SpokenChoices("mmsu", 3074),
    HarmfulRequests("advbench", 520),
)
