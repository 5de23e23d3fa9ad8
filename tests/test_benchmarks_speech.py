"""The registry, and benchmarks answered with a text: LibriSpeech, CoVoST 2, MuST-C.

Each is read from a small set in its published layout and answered by a script whose score is known.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import sacrebleu
from hypothesis import given

from soundwave.eval.benchmarks import BENCHMARKS, Benchmark, get_benchmark
from soundwave.eval.benchmarks.sources import TAB_SEPARATED, read_separated
from soundwave.eval.items import Item
from soundwave.eval.scoring import METRICS
from soundwave.training.data import DataError
from tests.benchmark_sets import errors, scored, write_parquet, write_wav
from tests.sounds import peak_hertz

OWN = (
    "librispeech_clean librispeech_other covost2_en_de mustc_en_nl mustc_en_it mustc_en_ro mustc_en_es meld "
    "vocalsound llama_questions spoken_digits esc_sounds"
).split()


class TestRegistry:
    def test_unknown_name_lists_the_known(self):
        with pytest.raises(ValueError, match="'libri' is unknown.*librispeech_clean.*vocalsound"):
            get_benchmark("libri")

    @pytest.mark.parametrize("name", OWN)
    def test_names_what_tables_and_scoring_need(self, name):
        benchmark = get_benchmark(name)
        assert benchmark.name == name and benchmark.title
        assert {benchmark.metric, *benchmark.also} <= set(METRICS)
        assert benchmark.hub_id or benchmark.homepage
        json.dumps(benchmark.settings)

    def test_every_name_leads_to_its_benchmark(self):
        assert set(OWN) <= set(BENCHMARKS)
        assert [BENCHMARKS[name].name for name in BENCHMARKS] == list(BENCHMARKS)

    def test_one_benchmark_does_not_import_the_others(self):
        script = (
            "import sys; from soundwave.eval.benchmarks import get_benchmark; get_benchmark('vocalsound');"
            "print([m for m in sys.modules if m.startswith('soundwave.eval.benchmarks.')])"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert "vocalsound" in done.stdout and "mustc" not in done.stdout

    def test_another_prompt_leaves_the_benchmark_as_it_was(self, tmp_path):
        benchmark = get_benchmark("librispeech_clean")
        asked = benchmark.with_instruction("What is said?")
        write_librispeech(tmp_path)
        assert {item.instruction for item in asked.load(tmp_path)} == {"What is said?"}
        assert {item.instruction for item in benchmark.load(tmp_path)} == {benchmark.instruction}

    def test_questions_of_the_items_cannot_be_replaced(self):
        class Asking(Benchmark):
            name, own_questions = "asking", True

        with pytest.raises(ValueError, match="asking: every item has its own question"):
            Asking().with_instruction("What?")

    @pytest.mark.parametrize("name", [name for name in OWN if not name.startswith(("mustc", "spoken", "esc"))])
    def test_without_network_the_error_names_the_hub_id(self, name):
        with pytest.raises(DataError, match=f"{get_benchmark(name).hub_id}.*give the folder"):
            get_benchmark(name).load()

    @pytest.mark.parametrize("name", OWN)
    def test_a_folder_without_the_data_is_an_error(self, name, tmp_path):
        with pytest.raises(DataError, match=str(tmp_path)):
            get_benchmark(name).load(tmp_path)
        with pytest.raises(DataError, match="does not exist"):
            get_benchmark(name).load(tmp_path / "missing")


LIBRISPEECH = {"1089-134686-0000": "HE HOPED THERE WOULD BE STEW", "1089-134686-0001": "STUFF IT INTO YOU MISTER"}
LIBRISPEECH_ANSWERS = {"1089-134686-0000": "He hoped there'd be stew.", "1089-134686-0001": "Stuff it in to you, Mr."}


def write_librispeech(folder: Path, part: str = "clean", transcripts: dict[str, str] = LIBRISPEECH) -> Path:
    chapter = folder / "LibriSpeech" / f"test-{part}" / "1089" / "134686"
    for name in transcripts:
        write_wav(chapter / f"{name}.flac")
    lines = "".join(f"{name} {text}\n" for name, text in transcripts.items())
    (chapter / "1089-134686.trans.txt").write_text(lines)
    return chapter


class TestLibriSpeech:
    def test_word_error_rate_of_a_script(self, tmp_path):
        write_librispeech(tmp_path)
        benchmark = get_benchmark("librispeech_clean")
        items = benchmark.load(tmp_path)
        assert [item.id for item in items] == list(LIBRISPEECH)
        assert items[0].clips[0].name == "1089-134686-0000.flac" and items[0].fields["speaker"] == "1089"
        # Case, stop, "there'd" and "Mr." are the normaliser's; "in to" for "into" is 2 errors in 11 words.
        assert scored(benchmark, items, LIBRISPEECH_ANSWERS).value == pytest.approx(2 / 11)

    @pytest.mark.parametrize("source", [".", "LibriSpeech", "LibriSpeech/test-other"])
    def test_any_folder_of_the_archive_will_do(self, source, tmp_path):
        write_librispeech(tmp_path, "other")
        assert len(get_benchmark("librispeech_other").load(tmp_path / source)) == 2

    def test_the_other_part_is_refused(self, tmp_path):
        write_librispeech(tmp_path, "other")
        write_librispeech(tmp_path, "clean")
        with pytest.raises(DataError, match="test-other holds none of LibriSpeech/test-clean"):
            get_benchmark("librispeech_clean").load(tmp_path / "LibriSpeech" / "test-other")

    @pytest.mark.parametrize("hub", [False, True])
    def test_parquet_files_of_the_hub(self, hub, tmp_path):
        columns = {"id": list(LIBRISPEECH), "text": list(LIBRISPEECH.values()), "speaker_id": ["1089", "1089"]}
        write_parquet(tmp_path / "clean", columns, parts=2)
        (tmp_path / "README.md").write_text(
            "---\nconfigs:\n- config_name: clean\n  data_files:\n  - split: test\n    path: clean/test-*\n---\n"
        )
        benchmark = get_benchmark("librispeech_clean").with_instruction("Transcribe.")
        benchmark.hub_id = str(tmp_path)  # `datasets` reads a repository on disk as it reads one on the Hub
        items = benchmark.load(None if hub else tmp_path)
        assert items[1].clips[0].name == "clip1.wav" and items[1].clips[0].duration_s == pytest.approx(0.2)
        assert scored(benchmark, items, LIBRISPEECH_ANSWERS).value == pytest.approx(2 / 11)

    def test_of_the_hub_only_the_files_of_the_split_are_read(self, tmp_path):
        columns = {"id": list(LIBRISPEECH), "text": list(LIBRISPEECH.values()), "speaker_id": ["1089", "1089"]}
        write_parquet(tmp_path / "other", columns)
        (tmp_path / "other" / "train-00000-of-00001.parquet").write_bytes(b"gigabytes")
        splits = [f"  - split: {split}\n    path: other/{split}-*\n" for split in ("train", "test")]
        readme = "---\nconfigs:\n- config_name: other\n  data_files:\n" + "".join(splits) + "---\n"
        (tmp_path / "README.md").write_text(readme)
        benchmark = get_benchmark("librispeech_other").with_instruction("Transcribe.")
        benchmark.hub_id = str(tmp_path)
        assert len(benchmark.load()) == 2
        (tmp_path / "README.md").write_text(readme.replace("split: test", "split: dev"))
        with pytest.raises(DataError, match="split 'test'.*its splits are train, dev"):
            benchmark.load()

    def test_changed_schema_names_the_columns(self, tmp_path):
        columns = {"id": list(LIBRISPEECH), "transcription": list(LIBRISPEECH.values())}
        write_parquet(tmp_path / "clean", columns)
        with pytest.raises(DataError, match="text, speaker_id missing, found audio, id, transcription"):
            get_benchmark("librispeech_clean").load(tmp_path)

    def test_missing_and_broken_parts_are_named(self, tmp_path):
        columns = {"id": list(LIBRISPEECH), "text": list(LIBRISPEECH.values()), "speaker_id": ["1", "1"]}
        write_parquet(tmp_path / "clean", columns, parts=2)
        last = tmp_path / "clean" / "test-00001-of-00002.parquet"
        last.write_bytes(last.read_bytes()[:100])
        with pytest.raises(DataError, match="test-00000-of-00002.parquet and its other parts cannot be read"):
            get_benchmark("librispeech_clean").load(tmp_path)
        last.unlink()
        with pytest.raises(DataError, match="holds 1 parts of the 2"):
            get_benchmark("librispeech_clean").load(tmp_path)

    def test_broken_utterances_are_kept_and_named(self, tmp_path):
        chapter = write_librispeech(tmp_path, transcripts=LIBRISPEECH | {"1089-134686-0002": ""})
        (chapter / "1089-134686-0001.flac").unlink()
        write_wav(chapter / "1089-134686-0003.flac")
        items = get_benchmark("librispeech_clean").load(tmp_path)
        assert len(items) == 4
        with pytest.raises(ValueError, match="1089-134686-0001.flac is not there"):
            items[1].clips[0].read()
        assert errors(items) == {
            "1089-134686-0002": "the reference is '', expected text",
            "1089-134686-0003": "the reference is None, expected text",
        }

    def test_no_transcripts_and_double_ids_are_errors(self, tmp_path):
        chapter = write_librispeech(tmp_path)
        twice = tmp_path / "LibriSpeech" / "test-clean" / "1089" / "999"
        twice.mkdir()
        (twice / "a.trans.txt").write_text("1089-134686-0001 AGAIN\n")
        with pytest.raises(DataError, match="two items have the id '1089-134686-0001'"):
            get_benchmark("librispeech_clean").load(tmp_path)
        for file in (chapter / "1089-134686.trans.txt", twice / "a.trans.txt"):
            file.unlink()
        with pytest.raises(DataError, match="trans.txt"):
            get_benchmark("librispeech_clean").load(tmp_path)


GERMAN = ["Er hofft auf Eintopf.", 'Das "Haus" ist sehr groß und schön.', "Es regnet heute den ganzen Tag."]
GERMAN_ANSWERS = ["Er hofft auf Eintopf.", 'Das "Haus" ist groß und sehr schön.', ""]
ENGLISH = ["He hopes for stew.", 'The "house" is very large and nice.', "It rains all day."]


def write_covost(folder: Path, header: str = "path\tsentence\ttranslation\tclient_id", texts: list[str] = GERMAN):
    lines = [f"common_voice_en_{k}.mp3\t{ENGLISH[k]}\t{text}\tspeaker{k}" for k, text in enumerate(texts)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "covost_v2.en_de.test.tsv").write_text("\n".join([header, *lines]) + "\n")
    for k in range(len(texts)):
        write_wav(folder / "clips" / f"common_voice_en_{k}.mp3", format="MP3")


class TestCoVoST2:
    def check(self, items: list[Item]) -> None:
        answers = dict(zip([item.id for item in items], GERMAN_ANSWERS, strict=True))
        expected = sacrebleu.corpus_bleu(GERMAN_ANSWERS, [GERMAN])
        figures = scored(get_benchmark("covost2_en_de"), items, answers)
        assert figures.value == pytest.approx(expected.score) and 30 < expected.score < 90
        assert "tok:13a" in figures.signature
        assert [item.fields["transcript"] for item in items] == ENGLISH

    @pytest.mark.parametrize("place", [".", "en"])
    def test_bleu_of_a_script_on_the_tsv(self, place, tmp_path):
        write_covost(tmp_path / place)
        items = get_benchmark("covost2_en_de").load(tmp_path)
        assert items[0].id == "common_voice_en_0" and "into German" in items[0].instruction
        self.check(items)

    def test_bleu_of_a_script_on_parquet_files(self, tmp_path):
        columns = {"client_id": ["a", "b", "c"], "id": ["0", "1", "2"], "sentence": ENGLISH, "translation": GERMAN}
        write_parquet(tmp_path / "en_de", columns)
        self.check(get_benchmark("covost2_en_de").load(tmp_path))

    def test_changed_schema_names_the_columns(self, tmp_path):
        write_covost(tmp_path, "path\tsentence\ttarget\tclient_id")
        with pytest.raises(DataError, match="translation missing, found path, sentence, target, client_id"):
            get_benchmark("covost2_en_de").load(tmp_path)

    def test_rows_that_do_not_match_the_header(self, tmp_path):
        write_covost(tmp_path, texts=["Eins.", "Zwei.\tDrei."])
        with pytest.raises(DataError, match="row 2: its cells do not match the columns"):
            get_benchmark("covost2_en_de").load(tmp_path)

    def test_empty_references_and_missing_clips_are_named(self, tmp_path):
        write_covost(tmp_path, texts=["Eins.", " "])
        (tmp_path / "clips" / "common_voice_en_0.mp3").unlink()
        items = get_benchmark("covost2_en_de").load(tmp_path)
        assert errors(items) == {"common_voice_en_1": "the reference is ' ', expected text"}
        with pytest.raises((OSError, ValueError), match="common_voice_en_0.mp3"):
            items[0].clips[0].read()

    @given(st.lists(st.text("ab ,äß'\"\\\t\n\u2028", min_size=1), min_size=1, max_size=4))
    def test_cells_come_back_as_pandas_wrote_them(self, tmp_path_factory, texts):
        # `get_covost_splits.py` writes through pandas, which hands these very options to the csv module.
        path = tmp_path_factory.mktemp("covost") / "texts.tsv"
        with open(path, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n", **TAB_SEPARATED).writerows([("id", "text"), *enumerate(texts)])
        assert [row["text"] for row in read_separated(path, ["id", "text"], **TAB_SEPARATED)] == texts

    def test_clips_elsewhere_are_an_error(self, tmp_path):
        write_covost(tmp_path)
        (tmp_path / "clips").rename(tmp_path / "audio")
        with pytest.raises(DataError, match="holds none of clips"):
            get_benchmark("covost2_en_de").load(tmp_path)


SEGMENTS = [("ted_1.wav", 0.5, 1.0), ("ted_1.wav", 1.5, 0.5), ("ted_2.wav", 0.25, 0.5)]


def write_mustc(folder: Path, language: str = "nl", translations: list[str] = GERMAN, segments=SEGMENTS) -> Path:
    data = folder / f"en-{language}" / "data" / "tst-COMMON"
    (data / "txt").mkdir(parents=True)
    entries = [
        f"- {{duration: {duration}, offset: {offset}, rW: 1, speaker_id: spk.1, wav: {wav}}}"
        for wav, offset, duration in segments
    ]
    (data / "txt" / "tst-COMMON.yaml").write_text("\n".join(entries) + "\n")
    (data / "txt" / "tst-COMMON.en").write_text("\n".join(ENGLISH) + "\n")
    (data / "txt" / f"tst-COMMON.{language}").write_text("\n".join(translations) + "\n")
    write_wav(data / "wav" / "ted_1.wav", 2.0, hertz=300.0)
    write_wav(data / "wav" / "ted_2.wav", 1.0, rate=22_050, hertz=600.0)
    return data


class TestMustC:
    def test_a_segment_without_a_recording_is_named(self, tmp_path):
        write_mustc(tmp_path, segments=[("null", *SEGMENTS[0][1:]), *SEGMENTS[1:]])
        items = get_benchmark("mustc_en_nl").load(tmp_path)
        assert list(errors(items).values()) == ["wav is None, expected the name of a file"]

    @pytest.mark.parametrize("language", ["nl", "it", "ro", "es"])
    def test_bleu_of_a_script_and_segments_by_offset(self, language, tmp_path):
        write_mustc(tmp_path, language)
        benchmark = get_benchmark(f"mustc_en_{language}")
        items = benchmark.load(tmp_path)
        answers = dict(zip([item.id for item in items], GERMAN_ANSWERS, strict=True))
        expected = sacrebleu.corpus_bleu(GERMAN_ANSWERS, [GERMAN])
        assert scored(benchmark, items, answers).value == pytest.approx(expected.score)
        waveforms = [item.clips[0].read() for item in items]
        assert [len(waveform) for waveform in waveforms] == [16_000, 8_000, 8_001]  # resampled: a sample more
        assert [item.duration_s for item in items] == [1.0, 0.5, 0.5]
        assert peak_hertz(waveforms[0]) == pytest.approx(300, abs=5)
        assert peak_hertz(waveforms[2]) == pytest.approx(600, abs=5)

    @pytest.mark.parametrize("source", ["en-nl", "en-nl/data", "en-nl/data/tst-COMMON"])
    def test_any_folder_of_the_archive_will_do(self, source, tmp_path):
        write_mustc(tmp_path)
        assert len(get_benchmark("mustc_en_nl").load(tmp_path / source)) == 3

    def test_it_is_not_on_the_hub(self):
        with pytest.raises(DataError, match="MuST-C En-Ro is not on the Hub"):
            get_benchmark("mustc_en_ro").load()

    def test_lines_that_are_not_parallel(self, tmp_path):
        write_mustc(tmp_path, translations=GERMAN[:2])
        with pytest.raises(DataError, match="3 segments, 3 lines of English and 2 of Dutch"):
            get_benchmark("mustc_en_nl").load(tmp_path)

    def test_line_separators_inside_a_sentence_do_not_shift_the_lines(self, tmp_path):
        write_mustc(tmp_path, translations=["Een\u2028twee.", "Drie\x85vier.", ""])
        items = get_benchmark("mustc_en_nl").load(tmp_path)
        assert [item.reference for item in items] == ["Een\u2028twee.", "Drie\x85vier.", None]
        assert errors(items) == {"ted_2_2": "the reference is '', expected text"}

    def test_the_text_of_another_language_is_missed(self, tmp_path):
        write_mustc(tmp_path, "it")
        with pytest.raises(DataError, match="tst-COMMON.nl does not exist"):
            get_benchmark("mustc_en_nl").load(tmp_path / "en-it")

    def test_times_that_are_none_and_segments_beyond_the_end(self, tmp_path):
        segments = [("ted_1.wav", "soon", 1.0), ("ted_1.wav", 1.5, 0.5), ("ted_2.wav", 5.0, 0.5)]
        write_mustc(tmp_path, segments=segments)
        items = get_benchmark("mustc_en_nl").load(tmp_path)
        assert errors(items) == {"ted_1_0": "offset 'soon', duration 1.0, expected seconds"}
        with pytest.raises(ValueError, match="ted_2.wav lasts 1.00 s"):
            items[2].clips[0].read()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("- {duration: 1, wav: a.wav}\n", "entry 0: offset missing, found duration, wav"),
            ("- just text\n", "entry 0: found 'just text', expected an object with wav, offset, duration"),
            ("wav: a.wav\n", "yaml: found {'wav': 'a.wav'}, expected a list"),
            ("", "yaml: found None, expected a list"),
            ("- {duration: 1", "is not YAML"),
        ],
    )
    def test_changed_schema_is_named(self, text, message, tmp_path):
        data = write_mustc(tmp_path)
        (data / "txt" / "tst-COMMON.yaml").write_text(text)
        for language in ("en", "nl"):
            (data / "txt" / f"tst-COMMON.{language}").write_text("One.\n")
        with pytest.raises(DataError, match=message):
            get_benchmark("mustc_en_nl").load(tmp_path)
