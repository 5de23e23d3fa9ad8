"""The judge over HTTP: what it is sent, what is kept, and that whatever goes wrong is counted and named."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from soundwave.eval.benchmarks import get_benchmark
from soundwave.eval.judge import Judge, JudgeError, Prompt, Reply, ReplyCache, judge_rows, unjudged
from soundwave.eval.runner import Runner
from tests.judge_server import completion, judge_server
from tests.test_air_bench import write_chat

KEY = "sk-never-to-be-seen"
CHAT = get_benchmark("air_bench_chat")


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    with judge_server() as running:
        yield running


def make(server, folder, **options):
    return Judge("judge", folder / "judge", server.url, **{"timeout_s": 5.0, "attempts": 2, "workers": 2} | options)


def answer_rows(count=1):
    return [
        {
            "name": "air_bench_chat",
            "id": f"speech_QA/iemocap/{number}",
            "instruction": "Who speaks?",
            "reference": "A woman.",
            "answer": f"A man, number {number}.",
            "error": None,
            "fields": {"meta_info": "A woman says hello."},
        }
        for number in range(count)
    ]


def test_what_is_sent_and_what_is_stored(server, tmp_path):
    judge = make(server, tmp_path)
    first, second = judge_rows(CHAT, answer_rows(), judge, progress=False)
    assert [request["temperature"] for request in server.requests] == [0.0, 0.0]
    assert {request["model"] for request in server.requests} == {"judge"}
    assert {request["max_tokens"] for request in server.requests} == {1024}
    assert server.keys == [f"Bearer {KEY}"] * 2
    assert (first["order"], first["score"], first["reference_score"]) == ("reference_first", 8, 7)
    assert (second["order"], second["score"], second["reference_score"]) == ("answer_first", 7, 8)
    assert first["name"] == "air_bench_chat" and first["id"] == "speech_QA/iemocap/0" and first["error"] is None
    assert first["reply"] == "7 8" and first["model"] == "judge" and first["served_model"] == "judge-2024-01-01"
    assert first["prompt_version"] == second["prompt_version"] and first["prompt_sha"] != second["prompt_sha"]
    assert judge.describe() == {"model": "judge", "endpoint": server.url, "sampling": {"temperature": 0.0}}


def test_official_settings(server, tmp_path):
    rows = answer_rows(20)
    judgements = judge_rows(CHAT, rows, make(server, tmp_path, official=True), progress=False)
    temperatures = [judgement["sampling"]["temperature"] for judgement in judgements]
    assert set(temperatures) == {1.0, 2.0}
    assert sorted(request["temperature"] for request in server.requests) == sorted(temperatures)


def test_no_temperature_for_models_that_take_none(server, tmp_path):
    judge_rows(CHAT, answer_rows(), make(server, tmp_path, temperature=None), progress=False)
    assert all("temperature" not in request for request in server.requests)


def test_prose_refusals_and_empty_replies_are_named_and_no_zero(server, tmp_path):
    replies = iter(
        [
            completion("I would say that both are about equal."),
            completion(None, refusal="I will not."),
            completion(""),
            completion("8 9 7"),
            completion("11 4"),
            completion("8", finish_reason="length"),
        ]
    )
    server.answer = lambda request: (200, next(replies), 0.0)
    judgements = judge_rows(CHAT, answer_rows(3), make(server, tmp_path, workers=1), progress=False)
    assert [judgement["score"] for judgement in judgements] == [None] * 6
    errors = [judgement["error"] for judgement in judgements]
    assert errors[0] == (
        "expected two whole numbers separated by one space; the judge said 'I would say that both are about equal.'"
    )
    assert errors[1] == "the judge refused" and judgements[1]["reply"] == "I will not."
    assert "empty" in errors[2] and "'8 9 7'" in errors[3] and "1 to 10" in errors[4] and "cut" in errors[5]
    assert list(unjudged(judgements)) == [f"{row['id']} {row['order']}" for row in judgements]


@pytest.mark.parametrize("body", [b"no json", b"{}", b'{"choices": []}', b"[1]", b'"text"', b'{"choices": [{}]}'])
def test_a_body_that_is_no_chat_completion(server, tmp_path, body):
    server.answer = lambda request: (200, body, 0.0)
    judgements = judge_rows(CHAT, answer_rows(), make(server, tmp_path), progress=False)
    assert all(row["score"] is None and row["error"].startswith("request failed") for row in judgements)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_recovers_is_asked_again(server, tmp_path, status):
    statuses = iter([status, status])
    server.answer = lambda request: (next(statuses, 200), completion("3 4"), 0.0)
    judgements = judge_rows(CHAT, answer_rows(), make(server, tmp_path, attempts=3, workers=1), progress=False)
    assert [row["score"] for row in judgements] == [4, 3] and len(server.requests) == 4


def test_a_server_that_does_not_recover_is_named_and_asked_again_by_the_next_run(server, tmp_path):
    server.answer = lambda request: (500, f"broken for {KEY}".encode(), 0.0)
    judgements = judge_rows(CHAT, answer_rows(), make(server, tmp_path), progress=False)
    assert len(server.requests) == 4  # two orders, two attempts
    assert all(row["score"] is None and "InternalServerError" in row["error"] for row in judgements)
    assert KEY not in json.dumps(judgements)
    server.say("7 8")
    assert [row["score"] for row in judge_rows(CHAT, answer_rows(), make(server, tmp_path), progress=False)] == [8, 7]


def test_a_server_that_hangs_costs_its_timeout_and_no_more(server, tmp_path):
    server.answer = lambda request: (200, completion("7 8"), 60.0)
    started = time.monotonic()
    judgements = judge_rows(CHAT, answer_rows(), make(server, tmp_path, timeout_s=0.2, attempts=1), progress=False)
    assert time.monotonic() - started < 10
    assert all(row["score"] is None and "APITimeoutError" in row["error"] for row in judgements)


def test_a_server_that_is_down_ends_the_run_and_keeps_what_was_judged(server, tmp_path):
    judge_rows(CHAT, answer_rows(2), make(server, tmp_path), progress=False)
    server.answer = lambda request: (503, b"", 0.0)
    with pytest.raises(JudgeError, match=r"failed 2\d times in a row.*run the same command again"):
        judge_rows(CHAT, answer_rows(40), make(server, tmp_path, attempts=1), progress=False)
    asked = len(server.requests)
    assert asked < 40
    server.say("7 8")
    assert len(judge_rows(CHAT, answer_rows(40), make(server, tmp_path), progress=False)) == 80
    assert len(server.requests) == asked + 76  # four were kept


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_judge_that_cannot_be_asked(server, tmp_path, status):
    server.answer = lambda request: (status, json.dumps({"error": {"message": f"not {KEY}"}}).encode(), 0.0)
    with pytest.raises(JudgeError, match="check the model's name") as raised:
        judge_rows(CHAT, answer_rows(3), make(server, tmp_path), progress=False)
    assert KEY not in str(raised.value)


def test_a_key_is_asked_for_before_anything_else(monkeypatch, tmp_path):
    monkeypatch.delenv("JUDGE_API_KEY")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(JudgeError, match="set JUDGE_API_KEY or OPENAI_API_KEY"):
        Judge("gpt-4o", tmp_path)
    assert Judge("own", tmp_path, "http://name:secret@localhost:8000/v1?token=secret").describe()["endpoint"] == (
        "http://localhost:8000/v1"
    )


def test_a_key_in_the_address_that_a_server_repeats(server, tmp_path):
    server.answer = lambda request: (400, json.dumps({"error": {"message": "no key=hidden"}}).encode(), 0.0)
    address = server.url.replace("//", "//me:word@") + "?key=hidden"
    judge = Judge("judge", tmp_path / "judge", address, attempts=1)
    judgements = judge_rows(CHAT, answer_rows(), judge, progress=False)
    assert all("BadRequestError" in judgement["error"] for judgement in judgements)
    assert "hidden" not in json.dumps([judgements, judge.describe()])


def test_the_key_is_in_no_file(server, tmp_path):
    judge_rows(CHAT, answer_rows(3), make(server, tmp_path), progress=False)
    files = [file for file in (tmp_path / "judge").rglob("*") if file.is_file()]
    assert len(files) == 6 and not any(KEY in file.read_text() for file in files)


def test_a_reply_is_kept_for_exactly_its_request(server, tmp_path):
    rows = answer_rows(2)
    logged = []
    done = judge_rows(CHAT, rows, make(server, tmp_path), logged.extend, progress=False)
    assert logged == done and [row["id"] for row in done] == [rows[0]["id"]] * 2 + [rows[1]["id"]] * 2
    assert judge_rows(CHAT, rows, make(server, tmp_path), progress=False) == done and len(server.requests) == 4
    judge_rows(CHAT, rows, make(server, tmp_path, temperature=0.5), progress=False)
    assert len(server.requests) == 8
    rows[0]["answer"] = "Somebody else."
    judge_rows(CHAT, rows, make(server, tmp_path), progress=False)
    assert len(server.requests) == 10


def test_a_damaged_file_of_the_cache_is_no_reply(tmp_path):
    cache = ReplyCache(tmp_path)
    request = {"model": "judge", "messages": [{"role": "user", "content": "\udc80 lone surrogate"}]}
    assert cache.get(request) is None
    cache.put(request, Reply("5", served_model="judge"))
    assert cache.get(request) == Reply("5", served_model="judge")
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    for text in (file.read_text()[:-9], "[]", '{"request": 1}', ""):
        file.write_text(text)
        assert cache.get(request) is None


def test_two_runs_share_a_cache(server, tmp_path):
    rows, done = answer_rows(15), []
    judges = [make(server, tmp_path, workers=4) for _ in range(2)]
    threads = [
        threading.Thread(target=lambda judge=judge: done.append(judge_rows(CHAT, rows, judge, progress=False)))
        for judge in judges
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done[0] == done[1] and all(row["error"] is None for row in done[0]) and len(done[0]) == 30
    assert len([file for file in (tmp_path / "judge").rglob("*") if file.is_file()]) == 30
    asked = len(server.requests)
    judge_rows(CHAT, rows, make(server, tmp_path), progress=False)
    assert len(server.requests) == asked


def test_samples_of_one_question_are_several_replies(server, tmp_path):
    judge = make(server, tmp_path)
    prompts = [Prompt(f"sample_{n}", [{"role": "user", "content": "?"}], {"max_tokens": 4}, "v") for n in (1, 2, 1)]
    for prompt in prompts:
        assert judge.ask(prompt).text == "7 8"
    assert len(server.requests) == 2


def test_rows_without_an_answer_are_not_judged(server, tmp_path):
    rows = answer_rows(2)
    rows[0] |= {"answer": None, "error": "FileNotFoundError: 0.wav"}
    judgements = judge_rows(CHAT, rows, make(server, tmp_path), progress=False)
    assert {row["id"] for row in judgements} == {rows[1]["id"]} and len(server.requests) == 2


def test_a_benchmark_without_a_judge(server, tmp_path):
    with pytest.raises(ValueError, match="without a judge"):
        judge_rows(get_benchmark("air_bench_foundation"), answer_rows(), make(server, tmp_path), progress=False)


class Scripted:
    """A model that says one thing."""

    decoding = {"strategy": "scripted"}

    def __init__(self):
        self.asked = 0

    def answer(self, items, max_new_tokens):
        self.asked += len(items)
        return ["the model's answer"] * len(items)

    def describe(self):
        return {"name": "scripted", "revision": "1", "class": "Scripted", "parameters": 0, "dtype": "none"}


def test_a_run_asks_again_only_for_judgements_that_failed_on_the_way(server, tmp_path):
    folder, model = write_chat(tmp_path / "data"), Scripted()
    server.answer = lambda request: (500, b"", 0.0) if "speech_QA" in str(request) else (200, completion("7 8"), 0.0)

    def run():
        judge = make(server, tmp_path, attempts=1)
        return Runner(model, tmp_path / "run", judge=judge, progress=False).run(CHAT, CHAT.load(folder))

    first = run()
    assert first.notes["judge_failures"] == 1 and first.areas["Speech"]["value"] == 7.5
    asked = len(server.requests)
    server.say("9 9")
    second = run()
    assert second.notes["judge_failures"] == 0 and second.areas["Speech"]["value"] == pytest.approx((7.5 + 9) / 2)
    assert len(server.requests) == asked + 2 and model.asked == 6
    assert run().value == second.value and len(server.requests) == asked + 2
    lines = (tmp_path / "run" / "judgements.jsonl").read_text().splitlines()
    assert len(lines) == 12 and not any(json.loads(line)["error"] for line in lines)


KILLED = """
import json, sys
from soundwave.eval.benchmarks import get_benchmark
from soundwave.eval.judge import Judge, judge_rows
judge = Judge("judge", sys.argv[2], sys.argv[1], workers=2)
judge_rows(get_benchmark("air_bench_chat"), json.loads(sys.argv[3]), judge, progress=False)
"""


def test_a_killed_run_goes_on_where_it_was(server, tmp_path):
    rows = answer_rows(20)
    server.answer = lambda request: (200, completion("7 8"), 0.05)
    command = [sys.executable, "-c", KILLED, server.url, str(tmp_path / "judge"), json.dumps(rows)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], env=os.environ)
    deadline = time.monotonic() + 30
    while len(server.requests) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(server.requests)
    assert 8 <= before < 40
    server.say("7 8")
    judgements = judge_rows(CHAT, rows, make(server, tmp_path), progress=False)
    assert [row["score"] for row in judgements] == [8, 7] * 20
    assert len(server.requests) - before <= 40 - before + 2  # at most the two that were in flight are asked twice
