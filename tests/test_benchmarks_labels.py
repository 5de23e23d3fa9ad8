"""Benchmarks answered with a label or a few words: MELD, VocalSound, LLaMA Questions and our own two."""

import json
from pathlib import Path

import pytest

from soundwave.eval.benchmarks import get_benchmark
from soundwave.eval.items import Item
from soundwave.training.data import DataError
from tests.benchmark_sets import errors, scored, write_parquet, write_wav

MELD_HEADER = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime"
MELD_ROWS = [
    '1,"Why do all your coffee mugs have numbers, Mon?",Mark,surprise,positive,0,0,3,19,"00:14:38,127","00:14:40,378"',
    '2,"Oh. That\'s so ""Monica""",Rachel,anger,negative,0,1,3,19,"00:14:40,629","00:14:42,256"',
    '3,Y\'know?,Rachel,neutral,neutral,0,2,3,19,"00:14:59,440","00:15:02,442"',
    '4,Hi!,Ross,joy,positive,1,0,3,19,"00:14:59,440","00:15:02,442"',
]
MELD_ANSWERS = {"dia0_utt0": " surprise", "dia0_utt1": "Anger.", "dia0_utt2": "neutral", "dia1_utt0": "joy or fear"}


def write_meld(folder: Path, rows: list[str] = MELD_ROWS, clips: str = "output_repeated_splits_test") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test_sent_emo.csv").write_text("\n".join([MELD_HEADER, *rows]) + "\n")
    for k, name in enumerate(MELD_ANSWERS):
        suffix, kind = [("wav", "WAV"), ("flac", "FLAC"), ("mp3", "MP3")][k % 3]
        write_wav(folder / clips / f"{name}.{suffix}", format=kind)
    return folder / clips


class TestMELD:
    def check(self, items: list[Item], answers: dict[str, str]) -> None:
        benchmark = get_benchmark("meld")
        # "Anger." is wrong by the strict rule, and right by the lenient one; two labels are wrong by both.
        assert scored(benchmark, items, answers).value == 2 / 4
        lenient = scored(benchmark, items, answers, "lenient_label_accuracy")
        assert lenient.value == 3 / 4 and lenient.notes == {"parse_failures": 1}

    @pytest.mark.parametrize("clips", ["output_repeated_splits_test", "test", "."])
    def test_accuracy_of_a_script_on_the_csv(self, clips, tmp_path):
        write_meld(tmp_path, clips=clips)
        items = get_benchmark("meld").load(tmp_path)
        assert items[1].fields["transcript"] == 'Oh. That\'s so "Monica"'
        self.check(items, MELD_ANSWERS)

    def test_accuracy_of_a_script_on_parquet_files(self, tmp_path):
        emotions = ["surprise", "anger", "neutral", "joy"]
        columns = {"instruction": ["Which emotion?"] * 4, "answer": emotions}
        write_parquet(tmp_path / "data", columns, audio="context")
        items = get_benchmark("meld").load(tmp_path)
        assert {item.instruction for item in items} == {"Recognize the emotion with keywords in English:"}
        self.check(items, dict(zip("0123", MELD_ANSWERS.values(), strict=True)))

    def test_videos_say_how_to_get_the_audio(self, tmp_path):
        clips = write_meld(tmp_path)
        (clips / "dia0_utt1.flac").rename(clips / "dia0_utt1.mp4")
        items = get_benchmark("meld").load(tmp_path)
        message = "dia0_utt1.mp4 is a video; extract its audio: ffmpeg -i dia0_utt1.mp4 -vn"
        assert list(errors(items)) == ["dia0_utt1"] and errors(items)["dia0_utt1"].startswith(message)
        for path in clips.iterdir():
            path.rename(path.with_suffix(".mp4"))
        with pytest.raises(DataError, match="holds no audio dia.*ffmpeg -i dia0_utt0.mp4"):
            get_benchmark("meld").load(tmp_path)

    def test_missing_clips_and_unknown_labels_are_named(self, tmp_path):
        clips = write_meld(tmp_path, [MELD_ROWS[0], MELD_ROWS[2].replace("neutral,neutral", "bored,neutral")])
        (clips / "dia0_utt0.wav").unlink()
        items = get_benchmark("meld").load(tmp_path)
        assert (
            list(errors(items)) == ["dia0_utt2"] and "'bored', expected one of neutral" in errors(items)["dia0_utt2"]
        )
        with pytest.raises((OSError, ValueError), match="dia0_utt0.wav"):
            items[0].clips[0].read()

    def test_changed_schema_names_the_columns(self, tmp_path):
        write_meld(tmp_path)
        file = tmp_path / "test_sent_emo.csv"
        file.write_text(file.read_text().replace("Emotion", "Label"))
        with pytest.raises(DataError, match="Emotion missing, found Sr No., Utterance, Speaker, Label"):
            get_benchmark("meld").load(tmp_path)


VOCAL_ANSWERS = {
    "f0003_0_cough": "Cough",
    "f0003_0_laughter": "laughter",
    "m0110_0_throatclearing": "It is throat clearing.",
    "m0110_0_sniff": "Sneeze",
}


def write_vocalsound(folder: Path, names=tuple(VOCAL_ANSWERS)) -> Path:
    entries = [{"wav": f"/data/sls/audioset/vs/{name}.wav", "labels": "/m/01j3sz"} for name in names]
    (folder / "datafiles").mkdir(parents=True)
    (folder / "datafiles" / "te.json").write_text(json.dumps({"data": entries}))
    for name in names:
        write_wav(folder / "audio_16k" / f"{name}.wav")
    return folder / "datafiles" / "te.json"


class TestVocalSound:
    def check(self, items: list[Item], answers: dict[str, str]) -> None:
        benchmark = get_benchmark("vocalsound")
        assert scored(benchmark, items, answers).value == 1 / 4
        assert scored(benchmark, items, answers, "lenient_label_accuracy").value == 3 / 4

    def test_accuracy_of_a_script_on_the_archive(self, tmp_path):
        write_vocalsound(tmp_path)
        items = get_benchmark("vocalsound").load(tmp_path)
        assert [item.reference for item in items] == ["Cough", "Laughter", "Throat clearing", "Sniff"]
        self.check(items, VOCAL_ANSWERS)

    def test_accuracy_of_a_script_on_parquet_files(self, tmp_path):
        write_parquet(tmp_path / "data", {"answer": ["Cough", "Laughter", "Throat clearing", "Sniff"]})
        items = get_benchmark("vocalsound").load(tmp_path)
        self.check(items, dict(zip("0123", VOCAL_ANSWERS.values(), strict=True)))

    def test_unknown_classes_and_missing_files_are_named(self, tmp_path):
        entries = write_vocalsound(tmp_path, ["f1_0_hiccup", "f1_0_sigh"])
        (tmp_path / "audio_16k" / "f1_0_sigh.wav").unlink()
        entries.write_text(json.dumps({"data": [*json.loads(entries.read_text())["data"], {"wav": None}]}))
        items = get_benchmark("vocalsound").load(tmp_path)
        found = errors(items)
        assert list(found) == ["f1_0_hiccup", "entry-2"] and "f1_0_hiccup.wav ends in no class" in found["f1_0_hiccup"]
        assert found["entry-2"] == "wav is None, expected the name of a file"
        with pytest.raises((OSError, ValueError), match="f1_0_sigh.wav"):
            items[1].clips[0].read()

    @pytest.mark.parametrize(
        ("contents", "message"),
        [
            ('{"items": []}', "te.json: data missing, found items"),
            ('{"data": [{"audio": "a.wav"}]}', "entry 0: wav missing, found audio"),
            ('{"data": []}', "holds no items"),
            ('{"data": null}', "te.json, data: found None, expected a list"),
            ('{"data": {"wav": "a.wav"}}', "te.json, data: found {'wav': 'a.wav'}, expected a list"),
            ('{"data": [3]}', "te.json, entry 0: found 3, expected an object with wav"),
            ("[]", r"te.json: found \[\], expected an object with data"),
            ("{", "is not JSON"),
        ],
    )
    def test_changed_schema_is_named(self, contents, message, tmp_path):
        write_vocalsound(tmp_path).write_text(contents)
        with pytest.raises(DataError, match=message):
            get_benchmark("vocalsound").load(tmp_path)


QUESTIONS = ["What is the capital of France?", "What are the first two colours?", "Who wrote 'Hamlet\"?"]
REFERENCES = ["Paris", "red, orange", "Shakespeare"]
ANSWERS = ["It is Paris, the capital.", "The first two are orange and red.", "Marlowe did."]


class TestLlamaQuestions:
    def write(self, folder: Path, header: str = "Questions\tAnswer\tWav Filename") -> None:
        rows = [f"{q}\t{a}\t{k}.wav" for k, (q, a) in enumerate(zip(QUESTIONS, REFERENCES, strict=True), start=1)]
        (folder / "llama_questions_300.tsv").write_text("\n".join([header, *rows]))

    @pytest.mark.parametrize("place", [".", "wav"])
    def test_accuracy_of_a_script_on_the_tsv(self, place, tmp_path):
        self.write(tmp_path)
        for k in range(1, 4):
            write_wav(tmp_path / place / f"{k}.wav", rate=24_000)
        items = get_benchmark("llama_questions").load(tmp_path)
        assert [item.instruction for item in items] == [None] * 3
        assert [item.fields["question"] for item in items] == QUESTIONS
        answers = dict(zip("123", ANSWERS, strict=True))
        assert scored(get_benchmark("llama_questions"), items, answers).value == pytest.approx(2 / 3)

    def test_accuracy_of_a_script_on_parquet_files(self, tmp_path):
        write_parquet(tmp_path / "data", {"question": QUESTIONS, "answer": REFERENCES})
        items = get_benchmark("llama_questions").load(tmp_path)
        answers = dict(zip("123", ANSWERS, strict=True))
        assert scored(get_benchmark("llama_questions"), items, answers).value == pytest.approx(2 / 3)

    def test_a_reference_without_a_word_to_look_for_is_a_broken_item(self, tmp_path):
        write_parquet(tmp_path / "data", {"question": QUESTIONS, "answer": ["Paris", "The", "Shakespeare"]})
        errors = [item.fields.get("error") for item in get_benchmark("llama_questions").load(tmp_path)]
        assert errors[::2] == [None, None] and "nothing is left of the answer 'The'" in errors[1]

    def test_changed_schema_names_the_columns(self, tmp_path):
        self.write(tmp_path, "Question\tAnswer\tWav Filename")
        with pytest.raises(DataError, match="Questions missing, found Question, Answer, Wav Filename"):
            get_benchmark("llama_questions").load(tmp_path)


class TestOwn:
    ROWS = (
        {"path": "digits/7_a.wav", "kind": "digit", "labels": {"digit": 7}, "speaker": "a", "source": "fsdd"},
        {"path": "digits/0_b.wav", "kind": "digit", "labels": {"digit": 0}, "speaker": "b", "source": "fsdd"},
        {"path": "digits/1_b.wav", "kind": "digit", "labels": {"digit": 1}, "speaker": "b", "source": "fsdd"},
        {"path": "sounds/dog.ogg", "kind": "sound", "labels": {"sound": "dog barking"}, "source": "esc"},
        {"path": "sounds/sea.ogg", "kind": "sound", "labels": {"sound": "sea waves"}, "source": "esc"},
    )

    def write(self, folder: Path, rows=ROWS) -> None:
        (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            write_wav(folder / row["path"], rate=8_000, format="OGG" if row["path"].endswith("ogg") else "WAV")

    def test_open_answers_of_a_script(self, tmp_path):
        self.write(tmp_path)
        digits, sounds = get_benchmark("spoken_digits"), get_benchmark("esc_sounds")
        heard = {"digits/7_a.wav": "The number is 7.", "digits/0_b.wav": "Zero", "digits/1_b.wav": "one or nine"}
        figures = scored(digits, digits.load(tmp_path), heard)
        assert figures.value == pytest.approx(2 / 3) and figures.notes == {"parse_failures": 1}
        heard = {"sounds/dog.ogg": "A dog is barking.", "sounds/sea.ogg": "Heavy rain"}
        assert scored(sounds, sounds.load(tmp_path), heard).value == 1 / 2

    def test_the_prompt_names_no_choice(self):
        for name in ("spoken_digits", "esc_sounds"):
            benchmark = get_benchmark(name)
            words = set(benchmark.instruction.lower().strip("?").split())
            assert not words & {*benchmark.settings["labels"], *benchmark.settings["synonyms"]}

    def test_unknown_labels_and_missing_files_are_named(self, tmp_path):
        rows = ({**self.ROWS[0], "labels": {"digit": 11}}, self.ROWS[1], {**self.ROWS[2], "labels": {"digit": [1]}})
        self.write(tmp_path, rows)
        (tmp_path / rows[1]["path"]).unlink()
        items = get_benchmark("spoken_digits").load(tmp_path)
        assert list(errors(items)) == ["digits/7_a.wav", "digits/1_b.wav"]
        with pytest.raises((OSError, ValueError), match="0_b.wav"):
            items[1].clips[0].read()

    def test_changed_schema_is_named(self, tmp_path):
        (tmp_path / "manifest.jsonl").write_text('{"path": "a.wav", "type": "digit", "labels": {}}\n')
        with pytest.raises(DataError, match="line 1: kind missing, found path, type, labels"):
            get_benchmark("spoken_digits").load(tmp_path)
        (tmp_path / "manifest.jsonl").write_text('{"path": "a.wav", "kind": "digit", "labels": {"value": 1}}\n')
        with pytest.raises(DataError, match="line 1, labels: digit missing, found value"):
            get_benchmark("spoken_digits").load(tmp_path)
        (tmp_path / "manifest.jsonl").write_text('{"path": "a.wav", "kind": "digit", "labels": null}\n')
        with pytest.raises(DataError, match="line 1, labels: found None, expected an object with digit"):
            get_benchmark("spoken_digits").load(tmp_path)

    @pytest.mark.parametrize("label", ["0", 11, -1, None, True, 3.0])
    def test_what_is_no_digit_is_named(self, label, tmp_path):
        self.write(tmp_path, ({**self.ROWS[0], "labels": {"digit": label}}, self.ROWS[1]))
        found = errors(get_benchmark("spoken_digits").load(tmp_path))
        assert found == {"digits/7_a.wav": f"the label is {label!r}, expected a whole number 0 to 9"}

    def test_an_unknown_sound_is_named_beside_the_known(self, tmp_path):
        self.write(tmp_path, ({**self.ROWS[3], "labels": {"sound": "wolf"}},))
        (error,) = errors(get_benchmark("esc_sounds").load(tmp_path)).values()
        assert error.startswith("the label is 'wolf', expected one of baby crying, chainsaw")

    def test_rows_without_a_path_are_broken_each_by_its_line(self, tmp_path):
        self.write(tmp_path)
        lines = [json.dumps({**row, "path": None}) for row in self.ROWS[:2]]
        with (tmp_path / "manifest.jsonl").open("a") as file:
            file.write("\n".join(lines) + "\n")
        found = errors(get_benchmark("spoken_digits").load(tmp_path))
        assert found == dict.fromkeys(["line-6", "line-7"], "path is None, expected the name of a file")

    def test_a_manifest_with_a_byte_order_mark(self, tmp_path):
        self.write(tmp_path)
        manifest = tmp_path / "manifest.jsonl"
        manifest.write_text(manifest.read_text(), encoding="utf-8-sig")
        assert len(get_benchmark("spoken_digits").load(tmp_path)) == 3

    @pytest.mark.parametrize("text", ["", "\n \n"])
    def test_an_empty_manifest_holds_no_items(self, text, tmp_path):
        (tmp_path / "manifest.jsonl").write_text(text)
        with pytest.raises(DataError, match="manifest.jsonl holds no items"):
            get_benchmark("spoken_digits").load(tmp_path)

    @pytest.mark.parametrize(("name", "count"), [("spoken_digits", 2250), ("esc_sounds", 318)])
    def test_the_recordings_beside_the_checkout(self, name, count, shared_data):
        items = get_benchmark(name).load(shared_data)
        assert len(items) == count and not errors(items)
        assert len({item.reference for item in items}) == 10
        assert len(items[0].clips[0].read())
