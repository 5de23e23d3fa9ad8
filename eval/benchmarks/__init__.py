"""The benchmarks of the papers, one small class each: where its data is, how it is asked, how it is scored.

    items = get_benchmark("librispeech_clean").load("LibriSpeech/test-clean")

A benchmark reads its public Hub id, or a local folder in the layout in which the data was published. It never runs a
model: ``load`` gives the items, ``runner`` asks them, and ``scoring`` scores the answers by ``metric``.
"""

from collections.abc import Iterator, Mapping
from copy import copy
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from soundwave.eval.items import Item

if TYPE_CHECKING:
    from soundwave.eval.judge import Prompt


class Benchmark:
    """One test set and its protocol. Subclasses set the attributes and write ``load``.

    Attributes:
        name: As on the command line and in the files.
        title: For tables.
        licence: Of the data, as its publisher states it; ``None``: not confirmed.
        hub_id: ``owner/name`` of the data set; ``None``: it is not on the Hub, and ``source`` must be given.
        homepage: Where the data is described and obtained.
        size: Number of items that paper or card states; ``None``: not confirmed.
        metric: Headline metric, a name of ``scoring.METRICS``.
        also: Further metrics that are reported beside it.
        settings: Of the metrics, such as ``{"normalizer": "english"}``.
        max_new_tokens: Bound of an answer's length.
        average: Headline over all ``"items"`` together, or the unweighted mean over the ``"groups"``.
        areas: Name -> groups whose unweighted mean is reported under that name.
        judged: Whether a judge model reads the answers (``prompts`` and ``verdict``).
        instruction: Text beside every recording; ``None``: the recording alone, or a question of each item's own.
        own_questions: Whether every item brings its own text, so that there is no common instruction to replace.
        transcribed: Whether every item tells what is said: ``fields["transcript"]``, or without that its reference.
    """

    name: str
    title: str
    licence: str | None = None
    hub_id: str | None = None
    homepage: str | None = None
    size: int | None = None
    metric: str
    also: tuple[str, ...] = ()
    settings: Mapping[str, Any] = {}
    max_new_tokens: int = 256
    average: Literal["items", "groups"] = "items"
    areas: Mapping[str, tuple[str, ...]] = {}
    judged: bool = False
    instruction: str | None = None
    own_questions: bool = False
    transcribed: bool = False

    def load(self, source: str | Path | None = None, revision: str | None = None) -> list[Item]:
        """The items, in the order of the data.

        Args:
            source: A local folder in the published layout; ``None``: the Hub id.
            revision: Of the Hub id: a commit, tag or branch.

        Raises:
            DataError: If the data is not where it should be, or its schema has changed: names the column or file that
                is missing and those found. A single broken item is kept, and fails when it is asked.
        """
        raise NotImplementedError(f"{type(self).__name__} has no load")

    def prompts(self, row: dict[str, Any], official: bool = False) -> list["Prompt"]:
        """What a judge is asked about an answer row; with ``official``, as often and sampled as it was published."""
        raise ValueError(f"{self.name} is scored by {self.metric}, without a judge")

    def verdict(self, reply: str, order: str) -> dict[str, Any]:
        """``judge.mark`` or ``judge.no_mark``: what the judge's reply to the prompt of that order says."""
        raise ValueError(f"{self.name} is scored by {self.metric}, without a judge")

    def with_instruction(self, instruction: str) -> Self:
        """The same benchmark, asked in other words.

        Raises:
            ValueError: If every item has a question of its own.
        """
        if self.own_questions:
            raise ValueError(f"{self.name}: every item has its own question; another prompt cannot replace them")
        asked = copy(self)
        asked.instruction = instruction
        return asked


#: Module of this package -> names of the benchmarks in its ``BENCHMARKS``, a tuple of instances.
_MODULES: dict[str, tuple[str, ...]] = {
    "librispeech": ("librispeech_clean", "librispeech_other"),
    "covost2": ("covost2_en_de",),
    "mustc": ("mustc_en_nl", "mustc_en_it", "mustc_en_ro", "mustc_en_es"),
    "meld": ("meld",),
    "vocalsound": ("vocalsound",),
    "llama_questions": ("llama_questions",),
    "air_bench": ("air_bench_foundation", "air_bench_chat"),
    "mmau": ("mmau_mini_2025_01", "mmau_mini_2025_08"),
    "audiobench": ("alpaca_audio", "openhermes_audio"),
    "voicebench": (
        "voicebench_alpacaeval",
        "voicebench_alpacaeval_full",
        "voicebench_commoneval",
        "voicebench_wildvoice",
        "voicebench_sd_qa",
        "voicebench_openbookqa",
        "voicebench_mmsu",
        "voicebench_advbench",
    ),
    "own": ("spoken_digits", "esc_sounds"),
}


class _Registry(Mapping[str, Benchmark]):
    """Name -> benchmark; imports the module of a benchmark when it is first asked for."""

    def __init__(self, modules: Mapping[str, tuple[str, ...]]):
        self._module_of = {name: module for module, names in modules.items() for name in names}

    def __getitem__(self, name: str) -> Benchmark:
        module = import_module(f"{__name__}.{self._module_of[name]}")
        return next(benchmark for benchmark in module.BENCHMARKS if benchmark.name == name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._module_of)

    def __len__(self) -> int:
        return len(self._module_of)


BENCHMARKS: Mapping[str, Benchmark] = _Registry(_MODULES)


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        ValueError: If there is none.
    """
    if name not in BENCHMARKS:
        near = get_close_matches(name, BENCHMARKS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(BENCHMARKS)}"
        raise ValueError(f"benchmark {name!r} is unknown; {hint}")
    return BENCHMARKS[name]


def require_transcripts(benchmark: Benchmark) -> None:
    """Refuse a benchmark that does not tell what is said in its recordings.

    Raises:
        ValueError: Naming those that do.
    """
    if not benchmark.transcribed:
        have = ", ".join(name for name, each in BENCHMARKS.items() if each.transcribed)
        raise ValueError(f"{benchmark.name} has no transcripts of what is said; choose one of {have}")


__all__ = ["BENCHMARKS", "Benchmark", "get_benchmark", "require_transcripts"]
