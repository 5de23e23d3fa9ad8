"""``answers.jsonl`` and ``judgements.jsonl``, whatever moment a run was killed at."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soundwave.eval.logs import AnswerLog, JudgementLog, read_answers, read_judgements

ROWS = [
    {"name": "a", "id": str(i), "answer": text} for i, text in enumerate(["grün", "two\u2028lines", 'a "quote"\n'])
]


def test_rows_come_back_as_they_were(tmp_path):
    log = AnswerLog(tmp_path / "new", "a")
    assert log.rows == []
    log.append(ROWS[:2])
    log.append(ROWS[2:])
    assert read_answers(tmp_path / "new") == ROWS
    assert read_answers(tmp_path) == read_judgements(tmp_path) == []


def test_judgements_have_a_file_of_their_own(tmp_path):
    JudgementLog(tmp_path, "a").append(ROWS[:1])
    assert read_judgements(tmp_path) == ROWS[:1]
    assert read_answers(tmp_path) == []


def test_a_kill_at_any_byte_loses_nothing_but_the_line_it_tore(tmp_path):
    AnswerLog(tmp_path, "a").append(ROWS)
    path = tmp_path / "answers.jsonl"
    whole = path.read_bytes()
    ends = [end for end in range(len(whole) + 1) if whole[:end].endswith(b"\n") or end == 0]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        complete = sum(0 < end <= cut + 1 for end in ends)  # a line that lacks nothing but its end is complete
        assert read_answers(tmp_path) == ROWS[:complete]
        log = AnswerLog(tmp_path, "a", keep=lambda row: True)
        assert log.rows == ROWS[:complete]
        log.append(ROWS[complete:])
        assert path.read_bytes() == whole


def test_half_a_character_as_a_server_may_send_it_is_kept(tmp_path):
    rows = [ROWS[0] | {"answer": "cut \ud83d"}]
    AnswerLog(tmp_path, "a").append(rows)
    assert AnswerLog(tmp_path, "a", keep=lambda row: True).rows == read_answers(tmp_path) == rows


def test_an_earlier_run_goes_unless_it_is_kept_and_other_sets_stay(tmp_path):
    other = {"name": "b", "id": "0", "answer": "x"}
    AnswerLog(tmp_path, "b").append([other])
    AnswerLog(tmp_path, "a").append(ROWS)
    kept = AnswerLog(tmp_path, "a", keep=lambda row: row["id"] == "1")
    assert kept.rows == [ROWS[1]]
    assert read_answers(tmp_path) == [other, ROWS[1]]
    AnswerLog(tmp_path, "a")
    assert read_answers(tmp_path) == [other]


def test_a_damaged_line_elsewhere_is_named(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + '{"name": "a"' + "\n" + json.dumps(ROWS[1]) + "\n")
    with pytest.raises(ValueError, match="answers.jsonl, line 2 is no JSON"):
        read_answers(tmp_path)
    path.write_text('["a"]\n')
    with pytest.raises(ValueError, match="line 1 is no row of a test set"):
        AnswerLog(tmp_path, "a")
    assert path.read_text() == '["a"]\n'


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=4))
def test_any_text_survives(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("log")
    rows = [{"name": "a", "id": str(i), "answer": text} for i, text in enumerate(texts)]
    AnswerLog(folder, "a").append(rows)
    assert read_answers(folder) == rows
