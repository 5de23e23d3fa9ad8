"""The model that comes with the package: small, whole, in step with the code, and it hears the grammar's sentences."""

from pathlib import Path

import pytest
import torch

from soundwave import SoundwaveForConditionalGeneration, SoundwaveForCTC, SoundwaveProcessor
from soundwave.assets import TINY
from soundwave.eval.scoring import score_texts

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tiny():
    model = SoundwaveForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    return model, SoundwaveProcessor.from_pretrained(TINY)


@pytest.fixture(scope="module")
def spoken():
    """Held-out sentences in a voice that the model never heard: (texts, waveforms of 16 kHz)."""
    import random

    from soundwave.training.tiny.grammar import draw_split
    from soundwave.training.tiny.synthesizer import UNSEEN_VOICES
    from soundwave.training.tiny.utterances import Job, speak

    texts = [sentence.text for sentence in draw_split(random.Random(5), "test", 40, distinct=True)]
    jobs = [Job(f"u{i}", (text,), UNSEEN_VOICES[i % len(UNSEEN_VOICES)], i, False) for i, text in enumerate(texts)]
    return texts, [speak(job).samples for job in jobs]


def answers(tiny, waveforms, **options):
    model, processor = tiny
    inputs = processor(audio=waveforms, sampling_rate=16_000)
    ids = model.generate(**inputs, max_new_tokens=64, do_sample=False, **options)
    texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def test_it_is_small_and_whole():
    files = [path for path in TINY.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5_000_000
    assert {"README.md", "results.json", "config.json", "processor_config.json"} <= {path.name for path in files}
    assert "/" + "tmp/" not in (TINY / "config.json").read_text()


def test_its_code_is_the_packages_code():
    """A change of the remote-code files needs `cp` of them into assets/tiny, or a new `training.tiny.pack`."""
    copies = list(TINY.glob("*.py"))
    assert len(copies) >= 9
    for copy in copies:
        folder = "processing" if (ROOT / "processing" / copy.name).is_file() else "modeling_soundwave"
        assert copy.read_text() == (ROOT / folder / copy.name).read_text(), f"{copy.name} is out of date"


def test_it_transcribes_unheard_sentences_in_unheard_voices(tiny, spoken):
    texts, waveforms = spoken
    assert score_texts("wer", texts, answers(tiny, waveforms)).value < 0.08


def test_its_ctc_head_alone_does_too(tiny, spoken):
    texts, waveforms = spoken
    model, processor = SoundwaveForCTC.from_pretrained(TINY, dtype=torch.float32).eval(), tiny[1]
    ids = model.transcribe_ids(**processor.audio_features(waveforms))
    heard = [text.strip() for text in processor.batch_decode(ids)]
    assert score_texts("wer", texts, heard).value < 0.10


def test_a_batch_answers_as_its_items_alone(tiny, spoken):
    """fp32: a token may flip only where the two best scores are nearly equal; on these clips none does."""
    waveforms = spoken[1][:12]
    assert answers(tiny, waveforms) == [answers(tiny, [waveform])[0] for waveform in waveforms]


def test_recordings_of_any_rate_length_and_kind_give_an_answer(tiny, shared_data):
    """What it says of real speech is wrong (it has heard none), but every recording gets its positions."""
    model, processor = tiny
    kinds = ("speech/misc", "sounds", "digits")
    files = [path for kind in kinds for path in sorted((shared_data / kind).rglob("*.*"))[:3]]
    assert {path.suffix for path in files} >= {".flac", ".ogg", ".wav"}
    for file in files:
        features = processor.audio_features([processor.load_audio(file)])
        lengths = model.get_audio_features(**features).lengths
        assert lengths.shape == (1,) and lengths[0] >= 1
    longest = max((shared_data / "speech" / "misc").glob("*.*"), key=lambda path: len(processor.load_audio(path)))
    samples = processor.load_audio(longest)
    assert len(samples) > 30 * 16_000
    assert len(processor.audio_features([samples])["input_features"]) > 1  # windows, joined at their seams
    assert isinstance(answers(tiny, [samples])[0], str)
