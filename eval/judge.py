"""A judge: a language model behind an OpenAI-compatible endpoint that marks answers.

    judge = Judge("gpt-4o", cache="results/judge")
    judgements = judge_rows(get_benchmark("air_bench_chat"), answers, judge)

A benchmark says what is asked (``Benchmark.prompts``) and how a reply is read (``Benchmark.verdict``); this file asks.
Every reply is on disk before the next question is put by the same thread, so that a run that was killed goes on where
it was. What gives no mark (a failed request, a refusal, prose) is a judgement without a score and with the reason.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from tqdm.auto import tqdm

if TYPE_CHECKING:
    from soundwave.eval.benchmarks import Benchmark

Row = dict[str, Any]
#: Environment variables of the key, the first that is set. A server of one's own needs none.
API_KEYS = ("JUDGE_API_KEY", "OPENAI_API_KEY")
#: After so many requests in a row without a reply the endpoint is taken to be down.
MAX_FAILURES_IN_A_ROW = 20
#: Of a reply, in the reason why it gave no mark; the whole reply stands beside it.
QUOTED_CHARACTERS = 80


class JudgeError(ValueError):
    """The judge cannot be asked at all: says why, and what to do."""


@dataclass(frozen=True)
class Prompt:
    """One question to a judge.

    Attributes:
        order: Name of this question among those about one answer, such as ``"reference_first"``.
        messages: As the chat completions API takes them.
        sampling: ``max_tokens``, and with the published settings ``temperature`` and the like.
        version: Of the wording; marks under different wordings are not comparable.
    """

    order: str
    messages: list[dict[str, str]]
    sampling: dict[str, Any]
    version: str

    @property
    def sha(self) -> str:
        """Hash of the messages."""
        return _sha(self.messages)[:16]


@dataclass(frozen=True)
class Reply:
    """What came back: ``text``, or ``error`` where that is no reply to read a mark from (a refusal keeps its text).

    ``served_model`` is the name that the server gives, often with a date; ``finish_reason`` is ``"length"`` for a
    reply cut at ``max_tokens``.
    """

    text: str | None
    error: str | None = None
    served_model: str | None = None
    finish_reason: str | None = None


class Judge:
    """A model behind an OpenAI-compatible endpoint, with its replies kept on disk.

    Args:
        model: As the endpoint calls it.
        cache: Folder of the replies, one file per request, found by the hash of the whole request. Several runs may
            share it at the same time.
        endpoint: Such as ``http://localhost:8000/v1``; ``None``: OpenAI's own, or ``OPENAI_BASE_URL``.
        temperature: Of every request. ``None`` sends none, for models that accept no temperature.
        official: Take the sampling settings that the benchmark was published with in place of ``temperature``; they
            sample, so that another run gives other marks.
        timeout_s: How long a server may be silent, per attempt.
        attempts: Per request, on no connection, 408, 409, 429 and 5xx, with growing pauses or the server's own.
        workers: Requests at a time.

    Raises:
        JudgeError: If there is no key for OpenAI's endpoint, or the ``openai`` client is not installed.
    """

    def __init__(
        self,
        model: str,
        cache: str | os.PathLike[str],
        endpoint: str | None = None,
        *,
        temperature: float | None = 0.0,
        official: bool = False,
        timeout_s: float = 120.0,
        attempts: int = 5,
        workers: int = 8,
    ) -> None:
        try:
            from openai import OpenAI  # late: an extra, and only judged benchmarks need it
        except ImportError as error:
            raise JudgeError("a judge is asked through the openai client; pip install 'soundwave[eval]'") from error
        key = next((os.environ[name] for name in API_KEYS if os.environ.get(name)), None)
        if key is None and endpoint is None and not os.environ.get("OPENAI_BASE_URL"):
            raise JudgeError(
                f"judge {model!r} at OpenAI's endpoint needs a key; set {' or '.join(API_KEYS)} in the environment, "
                "or give the endpoint of a server of your own"
            )
        self._client = OpenAI(base_url=endpoint, api_key=key or "none", timeout=timeout_s, max_retries=attempts - 1)
        address = urlsplit(str(self._client.base_url))
        self._secrets = list(filter(None, (key, address.query, address.password)))
        self.model, self.temperature, self.official, self.workers = model, temperature, official, workers
        self.endpoint = _without_secrets(str(self._client.base_url))
        self._cache = ReplyCache(cache)
        self._lock, self._failures_in_a_row = threading.Lock(), 0

    def describe(self) -> dict[str, Any]:
        """What ``results.json`` says about the judge. Never the key."""
        sampling = "as published" if self.official else {"temperature": self.temperature}
        return {"model": self.model, "endpoint": self.endpoint, "sampling": sampling}

    def sampling(self, prompt: Prompt) -> dict[str, Any]:
        """The settings a prompt is sent with."""
        if self.official:
            return prompt.sampling
        own = {} if self.temperature is None else {"temperature": self.temperature}
        return {"max_tokens": prompt.sampling["max_tokens"], **own}

    def ask(self, prompt: Prompt) -> Reply:
        """The reply, from the cache if there is one. Failed requests are not kept: the next run asks again.

        Nor are replies that `forget` was told of.

        Raises:
            JudgeError: If the endpoint refuses the key or does not know the model, or is down.
        """
        request = self._request(prompt)
        kept = self._cache.get(request)
        if kept is None:
            kept, answered = self._post(self._sent(prompt))
            self._count(kept, answered)
            if answered:
                self._cache.put(request, kept)
        return kept

    def forget(self, prompt: Prompt) -> None:
        """Take the reply to a prompt out of the cache: it held no mark, and the next run asks again."""
        self._cache.remove(self._request(prompt))

    def _sent(self, prompt: Prompt) -> dict[str, Any]:
        return {"model": self.model, "messages": prompt.messages, **self.sampling(prompt)}

    def _request(self, prompt: Prompt) -> dict[str, Any]:
        # The order is part of the key: samples of one question are the same request, asked several times.
        return {"endpoint": self.endpoint, "order": prompt.order, **self._sent(prompt)}

    def _post(self, sent: dict[str, Any]) -> tuple[Reply, bool]:
        """(reply, whether the model replied at all)."""
        import openai

        try:
            completion = self._client.chat.completions.create(**sent)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise JudgeError(
                f"{self.endpoint} does not let {self.model!r} judge: {self._say(error)}; check the model's name, the "
                f"endpoint and {' or '.join(API_KEYS)}"
            ) from None
        except (openai.OpenAIError, ValueError) as error:  # ValueError: a body that is no JSON
            return Reply(None, f"request failed: {self._say(error)}"), False
        choices = getattr(completion, "choices", None) or [None]
        message = getattr(choices[0], "message", None)
        if message is None:
            return Reply(None, "request failed: what came back is not a chat completion"), False
        about = {"served_model": completion.model, "finish_reason": choices[0].finish_reason}
        if refusal := getattr(message, "refusal", None):
            return Reply(refusal, "the judge refused", **about), True
        if not isinstance(message.content, str) or not message.content.strip():
            return Reply(None, f"the reply is empty (finish_reason {about['finish_reason']!r})", **about), True
        return Reply(message.content, **about), True

    def _count(self, reply: Reply, answered: bool) -> None:
        with self._lock:
            self._failures_in_a_row = 0 if answered else self._failures_in_a_row + 1
            if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
                raise JudgeError(
                    f"{self.endpoint} failed {self._failures_in_a_row} times in a row, the last time: {reply.error}; "
                    "what was judged is kept: run the same command again when the endpoint answers"
                )

    def _say(self, error: Exception) -> str:
        text = f"{type(error).__name__}: {error}"
        for secret in self._secrets:  # some servers repeat what they were sent
            text = text.replace(secret, "***")
        return text


class ReplyCache:
    """Replies by request, a small file each: written beside and moved, so that a kill leaves no half reply."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def get(self, request: dict[str, Any]) -> Reply | None:
        """The reply to exactly this request; ``None`` if there is none, or its file is damaged."""
        try:
            entry = json.loads(self._path(request).read_text(encoding="utf-8"))
            return Reply(**entry["reply"]) if entry["request"] == request else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def put(self, request: dict[str, Any], reply: Reply) -> None:
        """Keep a reply; of two at the same time the last one stays."""
        path = self._path(request)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"request": request, "reply": asdict(reply)}, indent=1)
        with NamedTemporaryFile("w", dir=path.parent, suffix=".new", encoding="utf-8", delete=False) as file:
            file.write(text)
        os.replace(file.name, path)

    def remove(self, request: dict[str, Any]) -> None:
        """Keep no reply to this request."""
        self._path(request).unlink(missing_ok=True)

    def _path(self, request: dict[str, Any]) -> Path:
        sha = _sha(request)
        return self.folder / sha[:2] / f"{sha}.json"


def judge_rows(
    benchmark: "Benchmark",
    rows: Sequence[Row],
    judge: Judge,
    log: Callable[[list[Row]], None] | None = None,
    progress: bool = True,
) -> list[Row]:
    """Judgements of answers, in the order of the rows and of a benchmark's prompts.

    Args:
        benchmark: A judged one.
        rows: Answer rows. Those with an ``error`` have no answer to judge and are left out.
        judge: Who is asked.
        log: Gets every judgement as it comes, as a list of one: ``AnswerLog.append``.
        progress: Show a bar.

    Returns:
        Rows ``{name, id, model, prompt_version, order, prompt_sha, sampling, served_model, reply, score, error}``, and
        what else the benchmark reads from a reply. ``score`` is ``None`` exactly where ``error`` says why.

    Raises:
        JudgeError: If the judge cannot be asked.
    """
    questions = [
        (row, prompt)
        for row in rows
        if row["error"] is None
        for prompt in benchmark.prompts(row, official=judge.official)
    ]
    judgements = []
    pool = ThreadPoolExecutor(judge.workers)
    try:
        results = pool.map(lambda question: _judgement(benchmark, judge, *question), questions)
        for judgement in tqdm(results, f"{benchmark.name}: judge", len(questions), disable=not progress, leave=False):
            judgements.append(judgement)
            if log is not None:
                log([judgement])
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C nothing that waits is asked any more
    return judgements


def _judgement(benchmark: "Benchmark", judge: Judge, row: Row, prompt: Prompt) -> Row:
    reply = judge.ask(prompt)
    if reply.error is not None or reply.text is None:
        verdict = no_mark(reply.error or "no reply")
    else:
        verdict = benchmark.verdict(reply.text, prompt.order)
        if verdict["error"] is not None:
            cut = ", cut at max_tokens" if reply.finish_reason == "length" else ""
            verdict["error"] += f"; the judge said {_quote(reply.text)}{cut}"
    if verdict["error"] is not None:
        judge.forget(prompt)
    return {
        "name": row["name"],
        "id": row["id"],
        "model": judge.model,
        "prompt_version": prompt.version,
        "order": prompt.order,
        "prompt_sha": prompt.sha,
        "sampling": judge.sampling(prompt),
        "served_model": reply.served_model,
        "reply": reply.text,
        **verdict,
    }


def mark(score: float, **more: float) -> Row:
    """A verdict: the score, and what else was read from the reply."""
    return {"score": score, "error": None, **more}


def no_mark(reason: str, **more: float | None) -> Row:
    """The verdict on a reply that holds no score."""
    return {"score": None, "error": reason, **more}


def unjudged(judgements: Sequence[Row]) -> dict[str, str]:
    """``"<id> <order>"`` -> why it has no score: what a run counts and names."""
    return {f"{row['id']} {row['order']}": row["error"] for row in judgements if row["error"] is not None}


def _quote(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= QUOTED_CHARACTERS else line[:QUOTED_CHARACTERS] + "...")


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rsplit("@", 1)[-1], parts.path, "", "")).rstrip("/")


__all__ = ["Judge", "JudgeError", "Prompt", "Reply", "ReplyCache", "judge_rows", "mark", "no_mark", "unjudged"]
