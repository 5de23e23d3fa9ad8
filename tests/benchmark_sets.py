"""Small test sets on disk, and the score of a model that answers from a script."""

import json
from pathlib import Path

import soundfile
from datasets import Audio, Dataset, Features, Value

from soundwave.eval.benchmarks import Benchmark
from soundwave.eval.items import Item
from soundwave.eval.scoring import Figures, score_rows
from tests.sounds import encoded, tone


def write_wav(path: Path, seconds: float = 0.2, rate: int = 16_000, hertz: float = 440.0, **kwargs) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds, rate, hertz), rate, **kwargs)


def write_parquet(path: Path, columns: dict[str, list], audio: str = "audio", parts: int = 1) -> None:
    """Write a table as `datasets` uploads it, with a recording in each row: `test-00000-of-00001.parquet`, ..."""
    count = len(next(iter(columns.values())))
    cells = [{"bytes": encoded(tone(0.1 + 0.1 * k)), "path": f"clip{k}.wav"} for k in range(count)]
    recording = {"bytes": Value("binary"), "path": Value("string")}
    features = Features({audio: recording} | {name: Value("string") for name in columns})
    table = Dataset.from_dict({audio: cells, **columns}, features=features).cast_column(audio, Audio(decode=False))
    path.mkdir(parents=True, exist_ok=True)
    for part in range(parts):
        shard = table.shard(parts, part, contiguous=True)
        shard.to_parquet(str(path / f"test-{part:05}-of-{parts:05}.parquet"))


def scored(benchmark: Benchmark, items: list[Item], answers: dict[str, str], metric: str = "") -> Figures:
    """Figures of a model that answers from a script; it has to read every recording that is not broken."""
    rows = []
    for item in items:
        error = item.fields.get("error")
        if error is None:
            assert all(len(clip.read()) for clip in item.clips)
        rows.append(
            {"id": item.id, "reference": item.reference, "answer": answers.get(item.id), "error": error}
            | {"group": item.group, "source": item.fields.get("source"), "fields": item.fields}
        )
    json.dumps(rows)
    return score_rows(rows, metric or benchmark.metric, benchmark.settings, benchmark.average, benchmark.areas)


def errors(items: list[Item]) -> dict[str, str]:
    return {item.id: item.fields["error"] for item in items if "error" in item.fields}
