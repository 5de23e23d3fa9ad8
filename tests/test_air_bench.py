"""AIR-Bench on a small set in the published layout: foundation with a scripted model, chat with a scripted judge."""

import json
from pathlib import Path

import pytest

from soundwave.eval.benchmarks import get_benchmark
from soundwave.eval.benchmarks.air_bench import CATEGORIES, TASKS
from soundwave.eval.judge import Judge, judge_rows
from soundwave.eval.results import with_judgements
from soundwave.eval.scoring import score_rows
from soundwave.training.data import DataError
from tests.benchmark_sets import errors, scored, write_wav
from tests.judge_server import judge_server

FOUNDATION, CHAT = get_benchmark("air_bench_foundation"), get_benchmark("air_bench_chat")


def closed(task, source, number, answer, *choices, path=None):
    letters = {f"choice_{letter}": choice for letter, choice in zip("abcd", choices, strict=False)}
    return {
        "path": path or f"{number}.wav",
        "question": f"Question {number}?",
        **letters,
        "answer_gt": answer,
        "task_name": task,
        "dataset_name": source,
        "uniq_id": number,
    }


ITEMS = [
    closed("Speaker_Gender_Recognition", "meld", 1, "male", "male", "female"),
    closed("Speaker_Gender_Recognition", "meld", 2, "female", "male", "female"),
    closed("Speaker_Gender_Recognition", "common_voice_13_en", 1, "female", "male", "female"),
    closed("Spoken_Language_Identification", "covost2", 1, "de", "en", "fr", "de", "es"),
    closed("Spoken_Language_Identification", "covost2", 2, "de", "en", "fr", "de", "es"),
    closed("Audio_Grounding", "AudioGrounding", 1, "[1, 2]", "[0, 1]", "[1, 2]", "[2, 3]", "[3, 4]"),
    closed("Music_AQA", "music_avqa", 1, "two", "one", "two", "three", "four"),
    closed("Music_AQA", "music_avqa", 2, "two", "one", "two", "three", "four"),
]
ANSWERS = {
    "Speaker_Gender_Recognition/meld/1": "A. male",
    "Speaker_Gender_Recognition/meld/2": "A man speaks",  # by the official rule an A
    "Speaker_Gender_Recognition/common_voice_13_en/1": "The answer is B.",
    "Spoken_Language_Identification/covost2/1": "C",
    "Spoken_Language_Identification/covost2/2": "it is German",  # cannot be read
    "Audio_Grounding/AudioGrounding/1": "B",
    "Music_AQA/music_avqa/1": "A",
    "Music_AQA/music_avqa/2": "two of them",  # cannot be read
}


def write_foundation(folder: Path, items=ITEMS) -> Path:
    for item in items:
        name = item["path"]
        if item["task_name"] == "Audio_Grounding":
            name = name.replace(".wav", ".flac")
        write_wav(folder / "Foundation" / f"{item['task_name']}_{item['dataset_name']}" / name)
    (folder / "Foundation" / "Foundation_meta.json").write_text(json.dumps(items))
    return folder


class TestFoundation:
    def test_the_tasks_are_those_of_the_paper(self):
        assert [len(tasks) for tasks in TASKS.values()] == [9, 4, 6]
        assert sum(len(sources) for tasks in TASKS.values() for sources in tasks.values()) == 25

    def test_prompt(self, tmp_path):
        items = {item.id: item for item in FOUNDATION.load(write_foundation(tmp_path))}
        assert items["Spoken_Language_Identification/covost2/1"].instruction == (
            f"{FOUNDATION.instruction}\nQuestion 1?\nA. en\nB. fr\nC. de\nD. es"
        )
        binary = items["Speaker_Gender_Recognition/meld/1"]
        assert binary.instruction.endswith("\nA. male\nB. female\nC. None\nD. None")
        published = FOUNDATION.with_instruction("Which one?").load(tmp_path)
        assert published[0].instruction == "Which one?\nQuestion 1?\nA. male\nB. female\nC. None\nD. None"

    def test_official_score(self, tmp_path):
        figures = scored(FOUNDATION, FOUNDATION.load(write_foundation(tmp_path)), ANSWERS)
        gender = figures.groups["Speaker_Gender_Recognition"]
        assert gender["value"] == pytest.approx(2 / 3)  # pooled over both sources
        assert gender["sources"]["meld"]["value"] == 0.5 and gender["sources"]["common_voice_13_en"]["value"] == 1.0
        assert figures.groups["Spoken_Language_Identification"]["value"] == 1.0  # one of one that was read
        assert figures.groups["Music_AQA"]["value"] == 0.0
        assert figures.areas["speech"]["value"] == pytest.approx((2 / 3 + 1) / 2)
        assert figures.areas["sound"]["value"] == 1.0 and figures.areas["music"]["value"] == 0.0
        assert figures.value == pytest.approx((2 / 3 + 1 + 1 + 0) / 4)
        assert figures.notes["parse_failures"] == 2

    def test_strict_score_counts_unread_answers_as_wrong(self, tmp_path):
        items = FOUNDATION.load(write_foundation(tmp_path))
        strict = scored(FOUNDATION, items, ANSWERS, "choice_strict")
        assert strict.value == pytest.approx((2 / 3 + 1 / 2 + 1 + 0) / 4)
        unread = scored(FOUNDATION, items, ANSWERS, "parse_failures")
        assert unread.groups["Music_AQA"]["value"] == 0.5 and unread.groups["Audio_Grounding"]["value"] == 0.0

    def test_a_missing_file_is_named_when_it_is_read(self, tmp_path):
        items = FOUNDATION.load(write_foundation(tmp_path))
        (tmp_path / "Foundation" / "Music_AQA_music_avqa" / "1.wav").unlink()
        assert len(items) == len(ITEMS) and items[6].clips[0].duration_s is None
        with pytest.raises(ValueError, match="1.wav is not there"):
            items[6].clips[0].read()

    def test_broken_items_are_kept_and_named(self, tmp_path):
        broken = [
            closed("Music_AQA", "music_avqa", 3, "five", "one", "two"),
            closed("Music_AQA", "music_avqa", 4, None, "one", "two"),
            closed("Music_AQA", "music_avqa", 5, "one", "one", ["two"]),
            closed("Music_AQA", "music_avqa", 6, "one", "one", "two", None, "four"),
        ]
        items = FOUNDATION.load(write_foundation(tmp_path, ITEMS + broken))
        found = errors(items)
        assert list(found) == [f"Music_AQA/music_avqa/{number}" for number in (3, 4, 5, 6)]
        assert "'five' is none of the options ['one', 'two']" in found["Music_AQA/music_avqa/3"]
        assert "gap" in found["Music_AQA/music_avqa/6"]
        assert scored(FOUNDATION, items, ANSWERS).count == len(ITEMS)

    def test_numbers_are_options_like_any_other(self, tmp_path):
        (item,) = FOUNDATION.load(write_foundation(tmp_path, [closed("Music_AQA", "music_avqa", 1, 2, 1, 2)]))
        assert item.fields["choices"] == ["1", "2"] and item.reference == "2" and "error" not in item.fields

    def test_an_id_that_stands_twice_is_told_apart(self, tmp_path):
        items = FOUNDATION.load(write_foundation(tmp_path, [ITEMS[0], ITEMS[0]]))
        name = "Speaker_Gender_Recognition/meld/1"
        assert [item.id for item in items] == [name, f"{name}#2"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda item: item.pop("choice_b"), "item 1: choice_b missing, found path, question"),
            (lambda item: item.update(task_name="Speaker_Mood"), "item 1: task_name 'Speaker_Mood' is unknown"),
            (lambda item: item.update(question=7), "item 1: question is 7, expected text"),
        ],
    )
    def test_a_changed_schema(self, tmp_path, change, message):
        items = [dict(item) for item in ITEMS]
        write_foundation(tmp_path, items)
        change(items[1])
        (tmp_path / "Foundation" / "Foundation_meta.json").write_text(json.dumps(items))
        with pytest.raises(DataError, match=message):
            FOUNDATION.load(tmp_path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{}", "json: found {}, expected a list"),
            ("null", "json: found None, expected a list"),
            ("[]", "json holds no items"),
            ("no json", "json is not JSON"),
            ("[1]", "json, item 0: found 1, expected an object with path, question"),
        ],
    )
    def test_no_list_of_items(self, tmp_path, text, message):
        (tmp_path / "Foundation").mkdir()
        (tmp_path / "Foundation" / "Foundation_meta.json").write_text(text)
        with pytest.raises(DataError, match=f"Foundation_meta.{message}"):
            FOUNDATION.load(tmp_path)

    @pytest.mark.parametrize("benchmark", [FOUNDATION, CHAT])
    def test_data_that_is_not_there(self, benchmark, tmp_path):
        with pytest.raises(DataError, match=f"{benchmark.hub_id}.*give the folder"):
            benchmark.load()
        with pytest.raises(DataError, match=rf"^{tmp_path}\S+_meta\.json does not exist; give the folder"):
            benchmark.load(tmp_path)


QUESTIONS = [
    ("speech_QA", "iemocap"),
    ("speech_dialogue_QA", "fisher"),
    ("sound_QA", "clotho"),
    ("music_generation_analysis_QA", "musiccaps"),
    ("speech_and_sound_QA", "audiocaps_cv"),
    ("speech_and_music_QA", "musiccaps_cv"),
]
#: Marks of the model's answer, when it stands second and when it stands first; the reference always gets 7.
MARKS = {
    "speech_QA": (8, 6),
    "speech_dialogue_QA": (4, 4),
    "sound_QA": (9, 10),
    "music_generation_analysis_QA": (2, 1),
    "speech_and_sound_QA": (6, 6),
    "speech_and_music_QA": (3, 4),
}


def write_chat(folder: Path, **changes) -> Path:
    entries = []
    for task, source in QUESTIONS:
        write_wav(folder / "Chat" / f"{task}_{source}" / "a.wav")
        entries.append(
            {
                "path": "a.wav",
                "question": f"What of {task}?",
                "answer_gt": "the reference",
                "meta_info": f"heard in {task}",
                "task_name": task,
                "dataset_name": source,
                "uniq_id": 1,
                **changes,
            }
        )
    (folder / "Chat" / "Chat_meta.json").write_text(json.dumps(entries))
    return folder


def answered(items):
    return [
        {"name": CHAT.name, "id": item.id, "instruction": item.instruction, "reference": item.reference}
        | {"answer": "the model's answer", "error": item.fields.get("error"), "group": item.group}
        | {"source": item.fields["source"], "fields": item.fields}
        for item in items
    ]


def marks(text: str) -> str:
    task = next(task for task in MARKS if f"heard in {task}\n" in text)
    if text.index("the reference") < text.index("the model's answer"):
        return f"7 {MARKS[task][0]}"
    return f"{MARKS[task][1]} 7"


def judged(rows, say, folder):
    with judge_server(say) as server:
        judgements = judge_rows(CHAT, rows, Judge("judge", folder / "judge", server.url), progress=False)
    joined = with_judgements(rows, judgements)
    return judgements, lambda metric=CHAT.metric: score_rows(joined, metric, CHAT.settings, CHAT.average, CHAT.areas)


class TestChat:
    def test_the_question_alone_is_asked(self, tmp_path):
        items = CHAT.load(write_chat(tmp_path))
        assert [item.instruction for item in items] == [f"What of {task}?" for task, _ in QUESTIONS]
        assert {item.group for item in items} == set(CATEGORIES.values())
        assert all(len(item.clips[0].read()) for item in items)

    def test_columns_of_the_table(self, tmp_path):
        judgements, figures = judged(answered(CHAT.load(write_chat(tmp_path))), marks, tmp_path)
        assert len(judgements) == 12 and all(row["error"] is None for row in judgements)
        scores = figures()
        columns = {area: figure["value"] for area, figure in scores.areas.items()}
        assert columns == {"Speech": 5.5, "Sound": 9.5, "Music": 1.5, "Mixed": (6 + 3.5) / 2}
        assert scores.value == pytest.approx((5.5 + 9.5 + 1.5 + 4.75) / 4)
        assert figures("judge_win_rate").areas["Sound"]["value"] == 1.0
        assert figures("judge_win_rate").areas["Speech"]["value"] == 0.0

    def test_what_the_judge_reads(self, tmp_path):
        (row, *_) = answered(CHAT.load(write_chat(tmp_path)))
        first, second = (prompt.messages[0]["content"] for prompt in CHAT.prompts(row))
        for text in (first, second):
            assert text.index("heard in speech_QA") < text.index("What of speech_QA?") < text.index("the reference")
        assert first.index("the reference") < first.index("the model's answer")
        assert second.index("the reference") > second.index("the model's answer")

    def test_an_item_with_one_prose_reply_is_left_out_and_counted(self, tmp_path):
        def say(text):
            prose = "heard in speech_QA\n" in text and text.index("the reference") < text.index("the model's answer")
            return "Both answers are fine." if prose else marks(text)

        judgements, figures = judged(answered(CHAT.load(write_chat(tmp_path))), say, tmp_path)
        assert [row["error"] for row in judgements if row["error"]] == [
            "expected two whole numbers separated by one space; the judge said 'Both answers are fine.'"
        ]
        scores = figures()
        assert scores.areas["Speech"]["value"] == 4.0 and scores.notes["judge_failures"] == 1

    @pytest.mark.parametrize(
        ("reply", "score"),
        [("8 6", 6), (" 8 6\n", 6), ("8\n6", None), ("8  6", None), ("8, 6", None), ("8.5 6", None), ("8 11", None)]
        + [("8 6 5", None), ("0 6", None), ("eight six", None), ("Scores: 8 6", None)],
    )
    def test_official_parse(self, reply, score):
        verdict = CHAT.verdict(reply, "reference_first")
        assert verdict["score"] == score and (verdict["error"] is None) == (score is not None)

    def test_broken_items_and_a_changed_schema(self, tmp_path):
        assert set(errors(CHAT.load(write_chat(tmp_path, answer_gt=None)))) == {f"{t}/{s}/1" for t, s in QUESTIONS}
        with pytest.raises(DataError, match="item 0: meta_info is None, expected text"):
            CHAT.load(write_chat(tmp_path, meta_info=None))
