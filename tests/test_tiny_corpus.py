"""Speech, sounds, and the corpus folder of the tiny preset."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("espeakng_loader", reason='needs the embedded synthesizer: pip install "soundwave[tiny]"')
soundfile = pytest.importorskip("soundfile")

from soundwave.training.tiny import corpus as corpus_module  # noqa: E402
from soundwave.training.tiny import synthesizer as voices  # noqa: E402
from soundwave.training.tiny.corpus import CorpusSettings, build_corpus  # noqa: E402
from soundwave.training.tiny.grammar import sentence_split  # noqa: E402
from soundwave.training.tiny.sounds import SOUNDS, make_sound  # noqa: E402
from soundwave.training.tiny.synthesizer import synthesizer, word_times  # noqa: E402
from soundwave.training.tiny.utterances import Job, frame_count, frame_names, speak  # noqa: E402


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    build_corpus(folder, seed=1, settings=CorpusSettings.smoke(), progress=False)
    return folder


def rows_of(corpus, name):
    return [json.loads(line) for line in (corpus / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", sorted(SOUNDS))
def test_sounds_are_finite_and_differ(name):
    for seed in range(20):
        wave = make_sound(name, np.random.default_rng(seed))
        assert wave.dtype == np.float32
        assert np.isfinite(wave).all()
        assert 0.05 < np.abs(wave).max() <= 1
        assert 0.15 < len(wave) / 16_000 < 1
    assert not np.array_equal(make_sound(name, np.random.default_rng(1))[:99], wave[:99])


def test_unknown_sound_is_named():
    with pytest.raises(ValueError, match="bark"):
        make_sound("bark", np.random.default_rng(0))


def test_no_test_voice_is_a_training_voice():
    held_out = [*voices.UNSEEN_VOICES, *voices.ACCENT_VOICES, *voices.DEV_UNSEEN_VOICES, *voices.DEV_ACCENT_VOICES]
    assert len(set(held_out)) == 12
    assert not set(held_out) & set(voices.SEEN_VOICES)
    variants = {voice.split("+")[1] for voice in voices.SEEN_VOICES}
    assert not {voice.split("+")[1] for voice in held_out} & variants
    bases = {voice.split("+")[0] for voice in voices.SEEN_VOICES}
    accents = {voice.split("+")[0] for voice in (*voices.ACCENT_VOICES, *voices.DEV_ACCENT_VOICES)}
    assert not accents & bases


def test_word_times_split_what_espeak_joins():
    phonemes = [(0.0, "ɪ"), (0.1, "n"), (0.15, "ð"), (0.2, "ə"), (0.3, "h"), (0.6, "")]
    times = word_times("in the hall", [(1, 0.0), (8, 0.3)], phonemes)
    assert times == [(0.0, "in"), (0.15, "the"), (0.3, "hall")]


def test_every_voice_speaks():
    for voice in (*voices.UNSEEN_VOICES, *voices.ACCENT_VOICES, *voices.DEV_UNSEEN_VOICES, *voices.DEV_ACCENT_VOICES):
        spoken = synthesizer().speak("seven", voice)
        assert 0.2 < len(spoken.samples) / voices.SYNTHESIZER_RATE < 1.5
        assert spoken.words == [(pytest.approx(0, abs=0.1), "seven")]
    with pytest.raises(ValueError, match="no voice 'xx'"):
        synthesizer().speak("seven", "xx")


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ImportError, match=r'pip install "soundwave\[tiny\]"'):
        voices.Synthesizer()


def test_the_library_never_imports_the_synthesizer_by_itself():
    import subprocess

    code = "import sys, soundwave, soundwave.training.tiny.corpus; sys.exit('espeakng_loader' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_utterance_is_labelled_to_the_end():
    one = speak(Job("x", ("<cough>", "open the red door in the hall"), "en-us+f2", seed=5))
    frames = frame_count(len(one.samples))
    words = frame_names(one.words, frames)
    assert len(words) == frames == 2 * -(-len(one.samples) // 640)
    heard = [word for word, before in zip(words, ["", *words], strict=False) if word != before and word != "sil"]
    assert heard == ["<cough>", "open", "the", "red", "door", "in", "the", "hall"]
    assert words[-1] == "sil"


def test_corpus_rows_point_at_audio(corpus):
    files = sorted(str(path.relative_to(corpus))[:-6] for path in corpus.glob("t*/*.jsonl"))
    tests = "asr_accent asr_seen asr_unseen intent sound sound_class spoken_qa st_seen st_unseen text_qa".split()
    assert [file for file in files if file.startswith("test/")] == [f"test/{name}" for name in tests]
    for file in (file for file in files if not file.startswith("text/")):
        rows = rows_of(corpus, file)
        assert len({row["id"] for row in rows}) == len(rows) > 0
        for row in rows:
            assert row["instruction"] and row["answer"]
            if row["task"] == "text_qa":
                assert row["audio"] is None
                continue
            samples, rate = soundfile.read((corpus / file).parent / row["audio"])
            assert rate == 16_000
            assert len(samples) / rate == pytest.approx(row["duration_s"], abs=1e-3)
            assert np.isfinite(samples).all() and np.abs(samples).max() > 0.01


def test_no_test_sentence_is_in_training(corpus):
    held_out = {
        row["transcript"]
        for name in ("asr_seen", "asr_unseen", "asr_accent")
        for row in rows_of(corpus, f"test/{name}")
    }
    assert {sentence_split(text) for text in held_out} == {"test"}
    spoken = {row["transcript"] for row in rows_of(corpus, "train/asr")}
    read = {row["content"] for row in rows_of(corpus, "text/train")}
    assert not held_out & spoken and not held_out & read
    questions = {row["transcript"] for row in rows_of(corpus, "test/spoken_qa")}
    assert not questions & spoken


def test_frame_labels_cover_train_and_dev(corpus):
    frames = np.load(corpus / "frames.npz")
    classes = json.loads((corpus / "frames.json").read_text(encoding="utf-8"))
    assert frames["lengths"].sum() == len(frames["phonemes"]) == len(frames["words"])
    assert classes["phonemes"][0] == classes["words"][0] == "sil"
    assert frames["words"].max() == len(classes["words"]) - 1
    assert {"<cough>", "<sigh>"} <= set(classes["phonemes"]) | set(classes["words"])
    ids = frames["ids"].tolist()
    assert not [name for name in ids if name.startswith("test_")]
    for name, length in zip(ids, frames["lengths"], strict=True):
        assert length == frame_count(soundfile.info(corpus / "wav" / f"{name}.wav").frames)


def test_the_seed_decides_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "JOBS_PER_PROCESS", 20)
    settings = CorpusSettings(4, 1, 2, 2, 2, 2, 2, 2, 2, 2, 12.0, 20, 10, 1)
    for name, seed, processes in (("a", 0, 1), ("b", 0, 2), ("c", 1, 1)):
        build_corpus(tmp_path / name, seed, replace(settings, processes=processes), progress=False)
    contents = [
        {
            str(f.relative_to(tmp_path / name)): f.read_bytes()
            for f in (tmp_path / name).rglob("*")
            if f.suffix in (".wav", ".jsonl")
        }
        for name in "abc"
    ]
    assert contents[0] == contents[1]
    assert contents[0]["train/asr.jsonl"] != contents[2]["train/asr.jsonl"]
