"""The draft of `card.yaml` that a training leaves: what it trained on, without a word of a person's."""

import json

import pytest

from soundwave.model_card.facts import CardFacts
from soundwave.training.data import load_rows
from soundwave.training.described import draft_card_facts
from soundwave.training.streaming import StreamedMixture
from tests.training_rows import write_rows


@pytest.fixture
def rows_file(tmp_path):
    """Rows of three tasks; only those of the first two have a length."""
    path = write_rows(tmp_path / "data", spoken=8, written=2)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["duration_s"] = 900.0 if row["task"] == "asr" else None
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_and_hours_by_source_and_task(rows_file, tmp_path):
    draft_card_facts(tmp_path, load_rows(str(rows_file)))
    common = {"name": "noise", "licence": "not stated"}
    assert CardFacts.read(tmp_path).data == [
        common | {"task": "asr", "rows": 6, "hours": 1.5},
        common | {"task": "sound", "rows": 2, "hours": "unknown"},
        common | {"task": "text_qa", "rows": 2, "hours": 0.0},
    ]


def test_streamed_sources_are_named_and_not_counted(rows_file, tmp_path):
    for task in ("asr", "sound"):
        lines = [line for line in rows_file.read_text().splitlines() if json.loads(line)["task"] == task]
        (rows_file.parent / f"{task}.jsonl").write_text("\n".join(lines))
    files = [str(rows_file.parent / f"{task}.jsonl") for task in ("asr", "sound")]
    mixture = StreamedMixture(files, weights={"asr": 1.0, "sound": 0.0})
    draft_card_facts(tmp_path, mixture.dataset(), mixture)
    (row,) = CardFacts.read(tmp_path).data
    assert row == {
        "name": "asr.jsonl",
        "task": "asr",
        "rows": "streamed, not counted",
        "hours": "unknown",
        "licence": "not stated",
    }


def test_what_a_person_wrote_is_kept(rows_file, tmp_path):
    (tmp_path / "card.yaml").write_text("speech: read sentences\n")
    draft_card_facts(tmp_path, load_rows(str(rows_file)))
    assert (tmp_path / "card.yaml").read_text() == "speech: read sentences\n"
