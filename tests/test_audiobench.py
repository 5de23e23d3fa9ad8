"""Alpaca-Audio and OpenHermes-Audio on a small table in the Hub's layout, marked by a scripted judge."""

import pytest

from soundwave.eval.benchmarks import get_benchmark
from soundwave.eval.benchmarks.audiobench import REQUESTS
from soundwave.eval.judge import Judge, judge_rows
from soundwave.eval.results import with_judgements
from soundwave.eval.scoring import score_rows
from soundwave.training.data import DataError
from tests.benchmark_sets import errors, write_parquet
from tests.judge_server import judge_server

ALPACA, OPENHERMES = get_benchmark("alpaca_audio"), get_benchmark("openhermes_audio")


def write(folder, count=4, **changes):
    columns = {
        "instruction": ["Follow the audio."] * count,
        "speech_instruction": [f"spoken request {number}" for number in range(count)],
        "answer": [f"reference {number}" for number in range(count)],
    }
    columns = {name: values for name, values in (columns | changes).items() if values is not None}
    write_parquet(folder / "data", columns, audio="context")
    return folder


def answered(items):
    return [
        {"name": "alpaca_audio", "id": item.id, "reference": item.reference, "answer": f"answer {item.id}"}
        | {"error": item.fields.get("error"), "fields": item.fields}
        for item in items
    ]


REPLIES = {
    "answer 0": "Explanation: it agrees.\nRating: 5",
    "answer 1": "Explanation: it is off.\nRating: (2)",  # the parentheses are no number
    "answer 2": "Explanation: nearly.\nRating: 4\nI hope that helps.",  # goes on after the mark
    "answer 3": "I cannot judge this.",
}


def test_known_score(tmp_path):
    rows = answered(ALPACA.load(write(tmp_path)))
    with judge_server(lambda text: next(reply for said, reply in REPLIES.items() if said in text)) as server:
        judgements = judge_rows(ALPACA, rows, Judge("judge", tmp_path / "judge", server.url), progress=False)
    joined = with_judgements(rows, judgements)
    headline = score_rows(joined, "judge_score", ALPACA.settings)
    assert headline.value == 5.0 and headline.notes["judge_failures"] == 3
    official = score_rows(joined, "judge_score_official", ALPACA.settings)
    assert official.value == (5 + 0 + 0 + 0) / 4 and official.notes["judge_failures"] == 3
    unanswered = {"score": None, "error": "request failed", "reply": None}
    lost = joined[1] | {"id": "lost", "judgements": [joined[1]["judgements"][0] | unanswered]}
    assert score_rows([*joined, lost], "judge_score_official", ALPACA.settings).value == official.value
    lenient = score_rows(joined, "judge_score_lenient", ALPACA.settings)
    assert lenient.value == pytest.approx((5 + 2 + 4) / 3) and lenient.notes["judge_failures"] == 1
    assert [row["error"] is None for row in judgements] == [True, False, False, False]
    assert "the judge said 'I cannot judge this.'" in judgements[3]["error"]


@pytest.mark.parametrize(
    ("reply", "score", "lenient"),
    [
        ("Rating: 3", 3, 3),
        ("3", 3, 3),
        ("Rating: 4.5", 4.5, 4.5),
        ("Rating: 3.", 3, 3),  # Python reads "3." as a number
        ("**Rating: 2**", None, 2),
        ("Rating: 4/5", None, 4),
        ("A rating of 1? No.\nRating: 3", 3, 3),
        ("Rating: 7", None, None),
        ("Rating: -1", None, None),
        ("Rating: nan", None, None),
        ("good", None, None),
    ],
)
def test_readings_of_a_reply(reply, score, lenient):
    verdict = ALPACA.verdict(reply, "once")
    assert (verdict["score"], verdict["lenient_score"]) == (score, lenient)
    assert (verdict["error"] is None) == (score is not None)


def test_requests_are_drawn_with_a_seed(tmp_path):
    items = ALPACA.load(write(tmp_path, count=30))
    drawn = [item.instruction for item in items]
    assert set(drawn) <= set(REQUESTS) and len(set(drawn)) > 5 and len(set(REQUESTS)) == 10
    assert drawn == [item.instruction for item in ALPACA.load(tmp_path)]
    assert drawn != [item.instruction for item in OPENHERMES.load(tmp_path)]
    assert {item.instruction for item in ALPACA.with_instruction("Listen.").load(tmp_path)} == {"Listen."}


def test_what_the_judge_reads(tmp_path):
    (row, *_) = answered(ALPACA.load(write(tmp_path)))
    (prompt,) = ALPACA.prompts(row, official=True)
    (message,) = prompt.messages
    text = message["content"]
    assert text.index("reference 0") < text.index("answer 0") < text.index("spoken request 0") < text.index("Rating:")
    assert prompt.sampling == {"max_tokens": 512}  # the published settings leave the rest to the server


def test_broken_items_and_a_changed_schema(tmp_path):
    items = ALPACA.load(write(tmp_path / "broken", 2, answer=["right", None], speech_instruction=[" ", "what?"]))
    assert "speech_instruction is ' '" in errors(items)["0"] and "the reference is None" in errors(items)["1"]
    with pytest.raises(DataError, match="speech_instruction missing, found context, instruction, answer"):
        ALPACA.load(write(tmp_path / "changed", speech_instruction=None))
    with pytest.raises(DataError, match="AudioLLMs/openhermes_instruction_test.*give the folder"):
        OPENHERMES.load()
