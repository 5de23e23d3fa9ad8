"""Recorded clips made into a corpus folder: what is held out, what is written, and that labels sit where sound is."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from soundwave.training.tiny import clips as audio
from soundwave.training.tiny.corpus import CorpusSettings
from soundwave.training.tiny.manifest import Clip, HoldOut, ManifestError, read_manifest, split_clips
from soundwave.training.tiny.recording_texts import NUMBERS, draw_text, question, text_examples
from soundwave.training.tiny.recordings import RecordingSettings, build_recordings, main
from soundwave.training.tiny.utterances import SILENCE, frame_count, frame_names

WORDS = NUMBERS[:4]
SPEAKERS = ("anna", "boris", "carla", "zoe")
SOUNDS = ("dog barking", "rain")
RATE = 8000
DATA = Path(__file__).parents[1].parent / "shared" / "data" / "manifest.jsonl"


def tone(hertz: float, seconds: float, rate: int = RATE) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """Four speakers say four words eighteen times each, as tones between silences; two sounds in three folds."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    quiet = np.zeros(RATE // 10)
    for s, speaker in enumerate(SPEAKERS):
        for w, word in enumerate(WORDS):
            for take in range(18):
                path = f"{word}_{speaker}_{take}.wav"
                wave = np.concatenate([quiet, tone(300 + 200 * w + 20 * s + take, 0.3), quiet])
                soundfile.write(folder / path, wave, RATE)
                rows.append({"path": path, "kind": "digit", "transcript": word, "labels": {}, "speaker": speaker})
    for n, sound in enumerate(SOUNDS):
        for fold in (1, 2, 3):
            for take in range(6):
                path = f"sound_{n}_{fold}_{take}.flac"
                wave = np.random.default_rng(take).normal(0, 0.1, (RATE * 3, 2))  # stereo
                soundfile.write(folder / path, wave, RATE)
                labels = {"sound": sound, "fold": fold, "freesound_id": 100 * n + 10 * fold + take // 2}
                rows.append({"path": path, "kind": "sound", "transcript": None, "labels": labels, "licence": "CC0"})
    rows.append({"path": "absent.wav", "kind": "speech", "transcript": "more than one word", "labels": {}})
    rows.append({"path": "absent.wav", "kind": "speech", "transcript": None, "labels": None})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def corpus(manifest, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    build_recordings(manifest, folder, settings=RecordingSettings.smoke(), progress=False)
    return folder


def rows_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_hold_out_is_computed_from_the_manifest(manifest):
    clips = read_manifest(manifest)
    assert len(clips) == 4 * 4 * 18 + 36
    held = HoldOut.from_clips(clips)
    assert (held.takes, held.dev_takes) == ({16, 17}, {14, 15})
    assert (held.speaker, held.fold) == ("zoe", 3)
    given = HoldOut.from_clips(clips, takes=[3], dev_takes=[4], speaker="anna", fold=1)
    assert (given.takes, given.dev_takes, given.speaker, given.fold) == ({3}, {4}, "anna", 1)


def test_no_recording_is_in_two_splits(manifest):
    clips = read_manifest(manifest)
    held = HoldOut.from_clips(clips)
    pools, dropped = split_clips(clips, held)
    assert not dropped
    found: dict[str, set] = {}
    for split, pool in pools.items():
        said = [c for words in pool.words.values() for takes in words.values() for c in takes]
        found[split] = {c.path for c in said} | {c.group for sounds in pool.sounds.values() for c in sounds}
    names = list(found)
    assert all(not found[a] & found[b] for i, a in enumerate(names) for b in names[i + 1 :])
    assert set(pools["test_unseen"].words) == {"zoe"}
    assert all(set(pools[split].words) == {"anna", "boris", "carla"} for split in ("train", "dev", "test_seen"))
    assert {c.fold for said in pools["test_seen"].sounds.values() for c in said} == {3}
    assert all(set(pools[split].sounds) == set(SOUNDS) for split in ("train", "dev", "test_seen"))


def test_rare_words_are_left_out(manifest):
    clips = read_manifest(manifest)
    rare = Clip(Path("rare.wav"), "word", "maybe", "anna", take=0, group="rare")
    pools, dropped = split_clips([*clips, rare], HoldOut.from_clips(clips))
    assert dropped == {"maybe": 1}
    assert all("maybe" not in words for words in pools["train"].words.values())


def test_paths_without_numbers_are_split_by_their_hash():
    clips = [Clip(Path(f"{s}{i}x.wav"), "word", "yes", s, None, f"{s}{i}x") for s in "ab" for i in range(60)]
    pools, _ = split_clips(clips, HoldOut.from_clips(clips))
    sizes = {
        split: sum(len(c) for words in pool.words.values() for c in words.values()) for split, pool in pools.items()
    }
    assert sizes["test_unseen"] == 0 and sizes["test_seen"] > 3 and sizes["dev"] > 3 and sizes["train"] > 80


def test_corpus_folder(corpus):
    facts = json.loads((corpus / "corpus.json").read_text())
    small = RecordingSettings.smoke()
    assert facts["rows"]["test/asr_seen"] == facts["rows"]["test/asr_unseen"] == small.test_rows
    assert facts["held_out"]["speaker"] == "zoe" and facts["licences"].keys() == {"", "CC0"}
    assert facts["vocabulary"] == sorted(WORDS)
    for file, count in facts["rows"].items():
        rows = rows_of(corpus, file)
        assert len(rows) == count and len({row["id"] for row in rows}) == count
        for row in rows:
            assert row["task"] in INSTRUCTED and row["instruction"] and row["answer"]
            if row["audio"] is None:
                assert row["task"] == "text_qa"
                continue
            info = soundfile.info((corpus / file).parent / row["audio"])
            assert (info.samplerate, info.channels, info.subtype) == (16000, 1, "PCM_16")
            assert row["duration_s"] == pytest.approx(info.frames / 16000, abs=1e-3)
            assert row["transcript"]


INSTRUCTED = ("asr", "sound", "sound_class", "spoken_qa", "text_qa")


def test_answers_fit_their_tasks(corpus):
    for split in ("train", "dev", "test"):
        for row in rows_of(corpus, f"{split}/sound"):
            labels = [word for word in row["answer"].split() if word.startswith("<")]
            assert len(labels) == 1 and labels[0] in ("<dog_barking>", "<rain>")
            assert row["answer"] == row["transcript"]
        assert {row["answer"] for row in rows_of(corpus, f"{split}/sound_class")} <= set(SOUNDS)
        for row in rows_of(corpus, f"{split}/spoken_qa"):
            said, answer = row["answer"].split(" : ")
            assert said == row["transcript"] and answer in {*NUMBERS, "yes", "no"}


def test_tests_hear_held_out_recordings_only(corpus):
    for name, speakers in (("asr_seen", {"anna", "boris", "carla"}), ("asr_unseen", {"zoe"})):
        for row in rows_of(corpus, f"test/{name}"):
            takes = [source.split("_") for source in row["source"].split(", ")]
            assert {speaker for _, speaker, _ in takes} <= speakers
            if name == "asr_seen":
                assert {int(take) for *_, take in takes} <= {16, 17}
    for row in rows_of(corpus, "train/asr"):
        for source in row["source"].split(", "):
            assert source.startswith("espeak-ng") or int(source.rsplit("_", 1)[1]) < 14 and "zoe" not in source


def test_texts_of_three_words_are_in_one_split(corpus):
    long = {
        split: {row["transcript"] for row in rows_of(corpus, f"{split}/{file}") if len(row["transcript"].split()) > 2}
        for split, file in (("train", "asr"), ("dev", "asr_seen"), ("test", "asr_seen"))
    }
    read = {example["content"] for example in rows_of(corpus, "text/train") if example["task"] == "asr"}
    assert not long["train"] & long["test"] and not long["dev"] & long["test"] and not read & long["test"]


def test_frames_cover_train_and_dev(corpus):
    frames = np.load(corpus / "frames.npz")
    names = set(frames["ids"].tolist())
    assert all(not name.startswith("test_") for name in names)
    assert {name.rsplit("_", 1)[0] for name in names} == {"train", "synthesized", "sound", "dev_seen", "dev_sound"}
    for name, length in zip(frames["ids"].tolist(), frames["lengths"], strict=True):
        assert length == frame_count(soundfile.info(corpus / "wav" / f"{name}.wav").frames)
    classes = json.loads((corpus / "frames.json").read_text())
    assert set(classes["words"]) == {SILENCE, *WORDS, "<dog_barking>", "<rain>"}
    assert frames["words"].min() >= -1 and frames["words"].max() == len(classes["words"]) - 1


def test_same_seed_same_corpus(manifest, corpus, tmp_path):
    # Without synthesized strings: the synthesizer's own noise depends on what it said before.
    recorded = replace(RecordingSettings.smoke(), synthesized=0)
    for name, seed, processes in (("first", 0, 1), ("again", 0, 2), ("other", 1, 1)):
        build_recordings(
            manifest, tmp_path / name, seed, settings=replace(recorded, processes=processes), progress=False
        )
    paths = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.*"))
    for path in paths:
        if path.suffix in (".wav", ".jsonl"):
            assert (tmp_path / "first" / path).read_bytes() == (tmp_path / "again" / path).read_bytes(), path
    assert rows_of(tmp_path / "first", "train/asr") != rows_of(tmp_path / "other", "train/asr")


def test_every_answer_word_is_an_answer_of_stage_0(corpus):
    """Head and embeddings are frozen later: the model can only say what it once answered."""
    vocabulary, names = list(WORDS), {name: audio.label_of(name) for name in SOUNDS}
    examples = text_examples(vocabulary, names, 3000, "train", np.random.default_rng(0))
    answered = {word for example in examples for word in example["answer"].split()}
    for split in ("train", "test"):
        for path in sorted((corpus / split).glob("*.jsonl")):
            for row in rows_of(corpus, f"{split}/{path.stem}"):
                assert set(row["answer"].split()) <= answered, row["answer"]


@given(st.lists(st.sampled_from(NUMBERS[:10]), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_questions_are_answered_right(words, seed):
    asked, answer = question(words, NUMBERS[:10], np.random.default_rng(seed))
    values = [NUMBERS.index(word) for word in words]
    right = {
        "How many words are said?": NUMBERS[len(words)],
        "What is the first word?": words[0],
        "What is the last word?": words[-1],
        "What is the largest number?": NUMBERS[max(values)],
        "What is the smallest number?": NUMBERS[min(values)],
    }
    contains = asked.removeprefix("Is the word ").removesuffix(" said?")
    assert answer == (right[asked] if asked in right else ("yes" if contains in words else "no"))


@given(st.integers(0, 2**32 - 1), st.sampled_from(["train", "dev", "test"]))
@settings(deadline=None, max_examples=30)
def test_drawn_texts_have_test_lengths(seed, split):
    words = draw_text(WORDS, np.random.default_rng(seed), split)
    assert 1 <= len(words) <= 25 if split == "train" else 2 <= len(words) <= 6


def make_clip(text: str, kind: str = "word") -> Clip:
    return Clip(Path(f"{text}.wav"), kind, text)


@given(st.lists(st.sampled_from([*WORDS, "dog barking"]), min_size=1, max_size=6), st.integers(0, 999), st.booleans())
@settings(deadline=None, max_examples=25)
def test_labels_stand_where_sound_is(texts, seed, augmented):
    rng = np.random.default_rng(seed)
    pieces = [
        (
            make_clip(text, "word" if text in WORDS else "sound"),
            tone(500, rng.uniform(0.2, 0.6), 16000).astype(np.float32),
        )
        for text in texts
    ]
    spoken = audio.string_together(pieces, rng, audio.Augmentation(echo_probability=0.0) if augmented else None)
    assert np.isfinite(spoken.samples).all() and np.abs(spoken.samples).max() <= 0.98 + 1e-6
    frames = frame_count(len(spoken.samples))
    names = frame_names(spoken.words, frames)
    runs = [name for i, name in enumerate(names) if name != SILENCE and (i == 0 or names[i - 1] != name)]
    assert runs == ["<dog_barking>" if text == "dog barking" else text for text in texts]
    padded = np.pad(spoken.samples, (0, frames * 320 - len(spoken.samples))).reshape(frames, 320)
    energy = (padded**2).mean(axis=1)
    said = np.array([name != SILENCE for name in names])
    # Frames at an edge are half one, half the other.
    inner = said[1:-1] & said[:-2] & said[2:]
    assert np.median(energy[1:-1][inner]) > 3 * np.median(energy[~said])
    starts = [start for start, _ in spoken.phonemes]
    assert starts == sorted(starts)


def test_phonemes_of_known_and_unknown_words():
    assert audio.symbols("seven") == ["s", "ɛ", "v", "ə", "n"]
    assert audio.symbols("Mañana") == list("mañana")
    events = audio.spread("one", 1.0, 1.4)
    assert [name for _, name in events] == ["w", "ʌ", "n"]
    assert [start for start, _ in events] == pytest.approx([1.0, 1.1, 1.3])


def test_quiet_parts_of_a_sound_are_unknown():
    bark = tone(400, 0.3, 16000)
    wave = np.concatenate([bark, np.zeros(16000), bark, np.zeros(8000)]).astype(np.float32)
    names = frame_names([(0.0, SILENCE), *audio.heard_parts(wave, "<dog>", 0.0)], len(wave) // 320)
    assert names[5] == "<dog>" and names[40] == "" and names[70] == "<dog>" and names[-1] == ""


def test_trim_and_crop():
    wave = np.concatenate([np.zeros(4000), tone(440, 0.25, 16000), np.zeros(8000)]).astype(np.float32)
    assert 4000 <= len(audio.trim(wave)) <= 4000 + 5 * 160
    assert len(audio.trim(np.zeros(0, np.float32))) == 0
    for seed in range(20):
        crop = audio.crop_sound(wave, 0.4, np.random.default_rng(seed))
        assert len(crop) == 6400 and np.abs(crop).max() > 0.2  # never silence alone
    assert len(audio.trim(np.zeros(1600, np.float32))) == 1600


def test_reading_mixes_and_resamples(tmp_path):
    left, right = tone(440, 1.0, 44100), np.zeros(44100)
    soundfile.write(tmp_path / "stereo.flac", np.stack([left, right], axis=1), 44100)
    wave = audio.read_clip(tmp_path / "stereo.flac")
    assert wave.dtype == np.float32 and abs(len(wave) - 16000) <= 1
    assert np.abs(wave).max() == pytest.approx(0.15, abs=0.01)


def test_bad_manifests(tmp_path, manifest):
    with pytest.raises(ManifestError, match="not a file"):
        read_manifest(tmp_path)
    path = tmp_path / "manifest.jsonl"
    for text, message in (
        ("{oops", "line 1"),
        ('{"kind": "digit"}', "line 1: KeyError"),
        ('{"path": "a.wav", "kind": "digit", "transcript": "two words"}', "single word"),
        ('{"path": "a.wav", "kind": "digit", "transcript": "one", "speaker": "x"}', "1 of its files do not exist"),
    ):
        path.write_text(text)
        with pytest.raises(ManifestError, match=message):
            read_manifest(path)
    clips = read_manifest(manifest)
    with pytest.raises(ManifestError, match="choose one of anna, boris"):
        HoldOut.from_clips(clips, speaker="nobody")
    with pytest.raises(ManifestError, match="fold 9"):
        HoldOut.from_clips(clips, fold=9)
    with pytest.raises(ManifestError, match="no word is left for train"):
        split_clips(clips, HoldOut.from_clips(clips, takes=range(18)))


def test_without_sounds_there_are_no_sound_rows(manifest, tmp_path):
    words = [line for line in manifest.read_text().splitlines() if '"digit"' in line]
    path = manifest.parent / "words.jsonl"
    path.write_text("\n".join(words))
    small = RecordingSettings(12, 0, 12, 8, 12, 12, 8, 6, 60, 20, 1)
    facts = build_recordings(path, tmp_path, settings=small, progress=False)
    assert not any("sound" in file for file in facts["rows"])
    assert {example["task"] for example in rows_of(tmp_path, "text/train")} == {"asr", "words", "spoken_qa", "text_qa"}


def test_command_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0 and "--unheard-speaker" in capsys.readouterr().out


def test_the_same_stage_0_reads_both_corpora(corpus, tmp_path):
    from soundwave.training.tiny.pretrain_encoder import EncoderSettings, pretrain_encoder
    from soundwave.training.tiny.pretrain_llm import LanguageModelSettings, pretrain_llm

    encoder = pretrain_encoder(corpus, tmp_path / "encoder", EncoderSettings.smoke(), progress=False)
    assert set(encoder["frame_accuracy"]) == {"dev_seen", "dev_sound"}
    language = pretrain_llm(corpus, tmp_path / "llm", LanguageModelSettings.smoke(), progress=False)
    assert language["dev_exact"].keys() == {"asr", "words", "sound", "sound_class", "spoken_qa", "text_qa"}
    assert [gate["name"] for gate in language["gates"]] == ["text repeat"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llm")
    for word in (*WORDS, "<dog_barking>", "<rain>"):  # what the CTC head must emit is one token
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word
    assert CorpusSettings().test_rows == RecordingSettings().test_rows == 400


@pytest.mark.skipif(not DATA.is_file(), reason="the shared recordings are not here")
def test_shared_recordings():
    clips = read_manifest(DATA)
    held = HoldOut.from_clips(clips)
    assert (held.takes, held.speaker, held.fold) == ({45, 46, 47, 48, 49}, "fsdd-yweweler", 4)
    assert held.dev_takes == {40, 41, 42, 43, 44}
    pools, _ = split_clips(clips, held)
    assert {len(said) for said in pools["test_seen"].words.values()} == {10}
    assert len(pools["test_seen"].sounds) == 10
