"""What no file of a run knows: whose speech the data are, their licences, what a meter read; kept in ``card.yaml``."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from soundwave.model_card.figures import CardError

CARD_FACTS = "card.yaml"
UNSTATED = "not stated"
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
        self._expect(
            "data",
            f"a list whose entries have {', '.join(DATA_FIELDS)}",
            isinstance(self.data, list) and all(isinstance(x, dict) and set(DATA_FIELDS) <= set(x) for x in self.data),
        )
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
        text = yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)
        (Path(run_dir) / CARD_FACTS).write_text(text, encoding="utf-8")


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def data_summary(rows: Iterable[Mapping[str, Any]], licences: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Rows and hours per source and task, with licences by source, for ``CardFacts.data``."""
    sums: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        entry = sums.setdefault((row.get("source") or "unnamed", row["task"]), [0, 0.0])
        entry[0] += 1
        entry[1] += row.get("duration_s") or 0.0
    licences = licences or {}
    return [
        {
            "name": name,
            "task": task,
            "rows": int(n),
            "hours": round(s / 3600, 2),
            "licence": licences.get(name, UNSTATED),
        }
        for (name, task), (n, s) in sorted(sums.items())
    ]
