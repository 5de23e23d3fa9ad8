"""What no file of a run knows: whose speech the data are, their licences, what a meter read; kept in ``card.yaml``.

A training drafts it with its data, so that only the licences are left to state; from the first word that a person
changes on, it is that person's.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from soundwave.model_card.figures import CardError
from soundwave.training.checkpoints import write_whole

CARD_FACTS = "card.yaml"
UNSTATED = "not stated"
UNKNOWN = "unknown"
#: First line of a draft, before the hash of the rest.
DRAFT = "# Drafted by `soundwave train`, and made anew by it until somebody changes a line: "
#: What each row of `CardFacts.data` says.
DATA_FIELDS = ("name", "task", "rows", "hours", "licence")


@dataclass
class CardFacts:
    """The facts that people state; saved as ``card.yaml`` beside the weights.

    Attributes:
        speech: What kind of speech the model was trained and tested on.
        data: One row per source: ``name``, ``task``, ``rows``, ``hours``, ``licence`` (``data_summary`` makes them).
        attributions: Whom the data's licences ask to name, one line each.
        datasets: Ids of Hub datasets among them.
        languages: ISO 639-1 codes.
        limits: Sentences on what it cannot do.
        encoder: What the audio encoder is, where it has no Hub id.
        llm: What the LLM is, where it has no Hub id.
        base_licences: Part (``encoder``, ``llm``) -> its licence, where this package does not know it.
        energy_kwh: Energy of this stage's training as a meter read it; an estimate does not belong here.
        energy_meter: What it was read from.
        license: Of the repository's weights; by default that of the base models' rules, else Apache-2.0.
    """

    speech: str | None = None
    data: list[dict[str, Any]] = field(default_factory=list)
    attributions: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    encoder: str | None = None
    llm: str | None = None
    base_licences: dict[str, str] = field(default_factory=dict)
    energy_kwh: float | None = None
    energy_meter: str | None = None
    license: str | None = None

    def __post_init__(self) -> None:
        for name in ("speech", "encoder", "llm", "energy_meter", "license"):
            self._expect(name, "a text", isinstance(getattr(self, name), str | None))
        for name in ("attributions", "datasets", "languages", "limits"):
            value = getattr(self, name)
            self._expect(name, "a list of texts", isinstance(value, list) and all(isinstance(x, str) for x in value))
        self._expect("data", "a list of rows", isinstance(self.data, list))
        for number, row in enumerate(self.data, 1):
            _check_data(number, row)
        known = isinstance(self.base_licences, dict) and set(self.base_licences) <= {"encoder", "llm"}
        self._expect("base_licences", "encoder: LICENCE and llm: LICENCE", known)
        self._expect("energy_kwh", "a number above 0", self.energy_kwh is None or _positive(self.energy_kwh))
        if (self.energy_kwh is None) != (self.energy_meter is None):
            raise CardError(
                f"{CARD_FACTS} has energy_kwh {self.energy_kwh} and energy_meter {self.energy_meter}; a measurement "
                "is both, a figure and what it was read from: give both or neither"
            )

    def _expect(self, name: str, expected: str, holds: bool) -> None:
        if not holds:
            raise CardError(f"{CARD_FACTS} has {name}: {getattr(self, name)!r}, expected {expected}")

    @classmethod
    def read(cls, run_dir: str | Path) -> "CardFacts":
        """Facts of a folder's ``card.yaml``; none if there is no such file, or nothing in it.

        Raises:
            CardError: If it cannot be read, or holds a field that does not exist or a value of another kind.
        """
        path = Path(run_dir) / CARD_FACTS
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise CardError(f"{CARD_FACTS} is not YAML: {' '.join(str(error).split())}") from error
        if values is None:
            return cls()
        if not isinstance(values, dict):
            raise CardError(f"{CARD_FACTS} holds {values!r}, expected lines such as 'speech: read sentences'")
        unknown = sorted(set(map(str, values)) - set(cls.__dataclass_fields__))
        if unknown:
            raise CardError(
                f"{CARD_FACTS} holds {', '.join(unknown)}; the fields are {', '.join(cls.__dataclass_fields__)}"
            )
        defaults = asdict(cls())  # a field left empty ("limits:") is one that nobody stated
        return cls(**{name: defaults[name] if value is None else value for name, value in values.items()})

    def save(self, run_dir: str | Path) -> None:
        """Write ``card.yaml``."""
        write_whole(Path(run_dir) / CARD_FACTS, self._yaml())

    def save_draft(self, run_dir: str | Path) -> None:
        """Write ``card.yaml`` unless there is one that a person wrote or changed."""
        path, text = Path(run_dir) / CARD_FACTS, self._yaml()
        if not path.exists() or _is_draft(path.read_bytes()):
            write_whole(path, f"{DRAFT}{_digest(text.encode())}\n{text}")

    def _yaml(self) -> str:
        return yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)


def _is_draft(content: bytes) -> bool:
    head, _, rest = content.partition(b"\n")
    return head == f"{DRAFT}{_digest(rest)}".encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _check_data(number: int, row: Any) -> None:
    fields = f"each has {', '.join(DATA_FIELDS)}"
    if not isinstance(row, dict):
        raise CardError(f"{CARD_FACTS}, data row {number} is {row!r}, expected fields: {fields}")
    if missing := [name for name in DATA_FIELDS if name not in row]:
        named = f" ({row['name']})" if "name" in row else ""
        raise CardError(f"{CARD_FACTS}, data row {number}{named} has no {', '.join(missing)}; {fields}")
    if not isinstance(row["licence"], str | None):
        raise CardError(
            f"{CARD_FACTS}, data row {number} ({row['name']}) has licence: {row['licence']!r}, expected a text"
        )


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def data_summary(rows: Iterable[Mapping[str, Any]], licences: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Rows and hours per source and task, with licences by source, for ``CardFacts.data``.

    Args:
        rows: Of ``training.data.load_rows``. Hours are unknown where a row has a recording and no ``duration_s``.
        licences: Source -> its licence.
    """
    counts: dict[tuple[str, str], int] = {}
    seconds: dict[tuple[str, str], float | None] = {}
    for row in rows:
        key = row.get("source") or "unnamed", row["task"]
        counts[key] = counts.get(key, 0) + 1
        known, length = seconds.setdefault(key, 0.0), row.get("duration_s")
        if length is None and not row.get("audio"):
            length = 0.0
        seconds[key] = None if known is None or length is None else known + length
    licences = licences or {}
    return [
        {
            "name": name,
            "task": task,
            "rows": counts[name, task],
            "hours": UNKNOWN if total is None else round(total / 3600, 2),
            "licence": licences.get(name, UNSTATED),
        }
        for (name, task), total in sorted(seconds.items())
    ]
