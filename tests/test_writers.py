"""Every written format is parsed back, and holds its rules for any text and times."""

import html
import json
import math
import re
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soundwave.modeling_soundwave.transcripts_soundwave import Segment, TimedToken, Transcript, Word
from soundwave.modeling_soundwave.writers_soundwave import CUE_S, LINE_WIDTH, subtitle_cues

CLOCK = r"(\d{2,}):([0-5]\d):([0-5]\d)[.,](\d{3})"


def milliseconds(clock: str) -> int:
    hours, minutes, seconds, rest = map(int, re.fullmatch(CLOCK, clock).groups())
    return ((hours * 60 + minutes) * 60 + seconds) * 1000 + rest


def read_blocks(blocks: list[str]) -> list[tuple[int, int, list[str]]]:
    cues = []
    for block in blocks:
        times, *lines = block.splitlines()
        start, end = times.split(" --> ")
        assert lines and all(line.strip() for line in lines) and not any("-->" in line for line in lines)
        cues.append((milliseconds(start), milliseconds(end), lines))
    return cues


def read_srt(text: str) -> list[tuple[int, int, list[str]]]:
    blocks = [block.split("\n", 1) for block in text.rstrip("\n").split("\n\n")] if text else []
    assert [int(number) for number, _ in blocks] == list(range(1, len(blocks) + 1))
    return read_blocks([block for _, block in blocks])


def read_vtt(text: str) -> list[tuple[int, int, list[str]]]:
    header, *blocks = text.rstrip("\n").split("\n\n")
    assert header == "WEBVTT"
    assert not re.search(r"<|>", re.sub(r" --> ", "", text)) and not re.search(r"&(?!amp;|lt;|gt;)", text)
    return [(start, end, [html.unescape(line) for line in lines]) for start, end, lines in read_blocks(blocks)]


def read_textgrid(text: str) -> tuple[float, dict[str, list[tuple[float, float, str]]]]:
    lines = iter(text.splitlines())

    def value(name: str) -> str:
        found = re.fullmatch(rf"\s*{name} = (.*)", next(lines))
        assert found, name
        return found[1]

    assert [value("File type"), value("Object class"), next(lines)] == ['"ooTextFile"', '"TextGrid"', ""]
    assert float(value("xmin")) == 0
    xmax = float(value("xmax"))
    assert next(lines) == "tiers? <exists>"
    count = int(value("size"))
    assert next(lines) == "item []:"
    tiers = {}
    for number in range(1, count + 1):
        assert next(lines).strip() == f"item [{number}]:"
        assert value("class") == '"IntervalTier"'
        name = value("name").strip('"')
        assert float(value("xmin")) == 0 and float(value("xmax")) == xmax
        tiers[name] = []
        for index in range(1, int(value("intervals: size")) + 1):
            assert next(lines).strip() == f"intervals [{index}]:"
            start, end, quoted = float(value("xmin")), float(value("xmax")), value("text")
            assert re.fullmatch(r'"(?:[^"]|"")*"', quoted)
            tiers[name].append((start, end, quoted[1:-1].replace('""', '"')))
    assert next(lines, None) is None
    return xmax, tiers


def transcript_of(words: list[Word], duration: float, **fields) -> Transcript:
    text = " ".join(word.text for word in words)
    segment = Segment(text, words[0].start if words else 0.0, words[-1].end if words else duration, words=words)
    return Transcript(text, [segment], duration, **fields)


def even_words(text: str, seconds_each: float = 0.3) -> list[Word]:
    return [
        Word(word, index * seconds_each, (index + 1) * seconds_each, 1.0) for index, word in enumerate(text.split())
    ]


@st.composite
def transcripts(draw) -> Transcript:
    """Words of any characters, some without length, in segments some of which have no words."""
    texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    now, segments = 0.0, []
    for _ in range(draw(st.integers(0, 4))):
        start, words = now, []
        for text in draw(st.lists(texts, max_size=8)):
            now += draw(st.sampled_from([0.0, 0.00004, 0.1234, 0.9, 3.0]))
            end = now + draw(st.sampled_from([0.0, 0.0004, 0.25, 8.0]))
            words.append(Word(text, now, end, 0.5))
            now = end
        now += draw(st.sampled_from([0.0, 2.0]))
        text = draw(texts) if not words else draw(st.sampled_from([" ", "", "\n"])).join(w.text for w in words)
        segments.append(Segment(text, start, now, words=words))
    return Transcript(" ".join(segment.text for segment in segments), segments, now)


def squeezed(text: str) -> str:
    return "".join(text.split())


@given(transcripts())
def test_subtitles_of_any_transcript(transcript):
    cues = read_srt(transcript.to_srt())
    said = "".join(squeezed("".join(w.text for w in s.words) or s.text) for s in transcript.segments)
    assert "".join(squeezed("".join(lines)) for _, _, lines in cues).replace("->", "-->") == said.replace("->", "-->")
    times = [time for start, end, _ in cues for time in (start, end)]
    assert times == sorted(times) and all(start < end for start, end, _ in cues)
    assert all(len(lines) <= 2 for _, _, lines in cues)
    vtt = read_vtt(transcript.to_vtt())
    assert [(start, end) for start, end, _ in vtt] == [(start, end) for start, end, _ in cues]
    assert "".join(squeezed("".join(lines)) for _, _, lines in vtt) == said


@given(transcripts())
def test_textgrid_of_any_transcript(transcript):
    xmax, tiers = read_textgrid(transcript.to_textgrid())
    assert list(tiers) == ["words", "segments"]
    assert xmax == pytest.approx(transcript.duration, abs=1e-4)
    for intervals in tiers.values():
        assert intervals[0][0] == 0 and intervals[-1][1] == xmax
        assert all(start < end for start, end, _ in intervals)
        assert all(first[1] == second[0] for first, second in zip(intervals, intervals[1:], strict=False))
    assert [text for *_, text in tiers["words"] if text] == [
        " ".join(word.text.split()) for word in transcript.words if word.text.strip()
    ]


@given(transcripts())
def test_verbose_json_of_any_transcript(transcript):
    values = json.loads(json.dumps(transcript.to_verbose_json(), allow_nan=False))
    assert [segment["id"] for segment in values["segments"]] == list(range(len(values["segments"])))
    assert len(values["words"]) == len(transcript.words)


def test_srt():
    words = [Word("Hello", 0.5, 0.9, 1.0), Word("<b>&", 3661.0, 3661.2, 1.0), Word("-->", 3661.3, 3661.5, 1.0)]
    transcript = transcript_of(words, 3700.0)
    assert transcript.to_srt() == (
        "1\n00:00:00,500 --> 00:00:01,500\nHello\n\n2\n01:01:01,000 --> 01:01:02,000\n<b>& ->\n"
    )
    assert transcript.to_vtt() == (
        "WEBVTT\n\n00:00:00.500 --> 00:00:01.500\nHello\n\n01:01:01.000 --> 01:01:02.000\n&lt;b&gt;&amp; --&gt;\n"
    )


def test_nothing_said():
    silent = Transcript("", [Segment("", 0.0, 2.0)], 2.0)
    assert silent.to_srt() == "" and silent.to_vtt() == "WEBVTT\n"
    assert read_textgrid(silent.to_textgrid())[1] == {"words": [(0.0, 2.0, "")], "segments": [(0.0, 2.0, "")]}
    assert silent.to_verbose_json()["segments"] == []


def test_subtitles_fit_and_break_at_sentences():
    sentences = ["The red boxes are in the garage, I think.", "Please bring three of them to the kitchen."] * 4
    cues = subtitle_cues(transcript_of(even_words(" ".join(sentences), 0.2), 20.0))
    assert [text.replace("\n", " ") for *_, text in cues] == [" ".join(sentences[:2])] * 4
    long = even_words("word " * 300, 0.5)
    cues = subtitle_cues(transcript_of(long, 150.0))
    assert all(end - start <= CUE_S * 1000 for start, end, _ in cues)
    assert all(len(line) <= LINE_WIDTH for *_, text in cues for line in text.split("\n"))
    assert len(cues) <= 25  # not more than need be: 14 words in 7 s


def test_subtitles_break_at_pauses():
    words = even_words("one two three four", 0.4)
    for word in words[2:]:
        word.start, word.end = word.start + 0.5, word.end + 0.5
    words += [Word(f"{number}", 10 + number / 2, 10.4 + number / 2, 1.0) for number in range(4)]
    texts = [text for *_, text in subtitle_cues(transcript_of(words, 20.0))]
    assert texts == ["one two three four", "0 1 2 3"]


def test_lines_are_even_and_wide_characters_take_two_columns():
    words = even_words("a transcript of two lines that are about even", 0.1)
    ((_, _, text),) = subtitle_cues(transcript_of(words, 1.0))
    assert text == "a transcript of two\nlines that are about even"
    segment = Segment("你好世界" * 30, 0.0, 30.0)
    cues = subtitle_cues(Transcript(segment.text, [segment], 30.0))
    assert "".join(text.replace("\n", "") for *_, text in cues) == segment.text
    assert all(len(line) <= LINE_WIDTH // 2 for *_, text in cues for line in text.split("\n"))
    assert (cues[0][0], cues[-1][1]) == (0, 30_000)  # a segment without words lends them its time


def test_textgrid_fills_gaps_and_doubles_quotes():
    transcript = transcript_of([Word('"a"', 0.5, 1.0, 1.0), Word("b\nc", 1.0, 1.25, 1.0)], 2.0)
    tiers = read_textgrid(transcript.to_textgrid())[1]
    assert tiers["words"] == [(0.0, 0.5, ""), (0.5, 1.0, '"a"'), (1.0, 1.25, "b c"), (1.25, 2.0, "")]
    assert tiers["segments"] == [(0.0, 0.5, ""), (0.5, 1.25, '"a" b c'), (1.25, 2.0, "")]


def test_verbose_json():
    tokens = [TimedToken(7, "the ", 1.5, 1.6, 0.5), TimedToken(9, "box", 1.7, 2.0, 0.25)]
    words = [Word("the", 1.5, 1.6, 0.5), Word("box", 1.7, 2.0, 0.25)]
    heard = Segment("the box", 1.25, 2.5, tokens, words, no_speech_prob=0.125)
    transcript = Transcript("the box yes", [Segment("", 0.0, 1.25), heard, Segment("yes", 2.5, 3.0)], 3.0)
    values = transcript.to_verbose_json()
    assert {key: values[key] for key in ("task", "language", "duration", "text")} == {
        "task": "transcribe",
        "language": "unknown",
        "duration": 3.0,
        "text": "the box yes",
    }
    assert values["segments"][0] == {
        "id": 0,
        "seek": 125,
        "start": 1.25,
        "end": 2.5,
        "text": "the box",
        "tokens": [7, 9],
        "temperature": 0.0,
        "avg_logprob": pytest.approx((math.log(0.5) + math.log(0.25)) / 2),
        "compression_ratio": len("the box") / len(zlib.compress(b"the box")),
        "no_speech_prob": 0.125,
    }
    assert (values["segments"][1]["avg_logprob"], values["segments"][1]["no_speech_prob"]) == (None, None)
    assert values["words"][1] == {"word": "box", "start": 1.7, "end": 2.0}


def test_openai_reads_verbose_json():
    audio = pytest.importorskip("openai.types.audio")
    tokens = [TimedToken(7, "box", 0.0, 1.0, 0.5)]
    segment = Segment("box", 0.0, 1.0, tokens, [Word("box", 0.0, 1.0, 0.5)], no_speech_prob=0.1)
    values = Transcript("box", [segment], 1.0, language="en").to_verbose_json()
    read = audio.TranscriptionVerbose.model_validate(values)
    assert (read.language, read.segments[0].tokens, read.words[0].word) == ("en", [7], "box")
