"""The library's pipelines over a saved model: what they say is what `generate` answers and `transcribe_ctc` hears."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import pipeline

QUESTION = "What is said?"
NEW_TOKENS = 4


@pytest.fixture(scope="module")
def folder(tiny_model, processor, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pipe(folder):
    return pipeline("any-to-any", model=folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def waveform() -> np.ndarray:
    return (0.1 * np.random.default_rng(0).standard_normal(20_000)).astype(np.float32)


def messages(waveform: np.ndarray) -> list[dict]:
    audio = {"type": "audio", "audio": waveform, "sampling_rate": 16_000}
    return [{"role": "user", "content": [audio, {"type": "text", "text": QUESTION}]}]


@pytest.fixture(scope="module")
def expected(tiny_model, processor, waveform) -> str:
    inputs = processor.apply_chat_template(messages(waveform))
    ids = tiny_model.generate(**inputs, max_new_tokens=NEW_TOKENS)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_chat(pipe, waveform, expected):
    answer = pipe(text=messages(waveform), max_new_tokens=NEW_TOKENS)
    assert answer[0]["generated_text"][-1] == {"role": "assistant", "content": expected}


def test_text_and_audio(pipe, processor, waveform, expected):
    text = processor.apply_chat_template(messages(waveform), tokenize=False)
    answer = pipe(text=text, audio=waveform, sampling_rate=16_000, max_new_tokens=NEW_TOKENS, return_full_text=False)
    assert answer[0]["generated_text"] == expected


# Speech recognition


@pytest.fixture(scope="module")
def recognizer(folder):
    """Nothing is trained: what is heard is as good as noise, but it is heard on purpose."""
    recognizer = pipeline(model=folder, trust_remote_code=True, device="cpu", dtype=torch.float32)
    assert recognizer.task == "automatic-speech-recognition"
    with torch.no_grad():
        recognizer.model.ctc_head.blank.mul_(0.5)
    return recognizer


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    """0.5 s to 9 s: up to five windows."""
    rng = np.random.default_rng(1)
    return [(0.1 * rng.standard_normal(round(seconds * 16_000))).astype(np.float32) for seconds in (0.5, 9.0, 3.1)]


@pytest.fixture(scope="module")
def transcripts(recognizer, processor, clips):
    transcripts = recognizer.model.transcribe_ctc(
        [{"array": clip, "sampling_rate": 16_000} for clip in clips], processor
    )
    assert all(len(transcript.words) > 1 for transcript in transcripts)
    return transcripts


def test_words_with_times(recognizer, clips, transcripts):
    for clip, transcript in zip(clips, transcripts, strict=True):
        chunks = [{"text": word.text, "timestamp": (word.start, word.end)} for word in transcript.words]
        assert recognizer(clip, return_timestamps="word") == {"text": transcript.text, "chunks": chunks}
        assert recognizer(clip) == {"text": transcript.text}
    segments = [segment.text for segment in transcripts[1].segments if segment.text]
    assert [chunk["text"] for chunk in recognizer(clips[1], return_timestamps=True)["chunks"]] == segments
    assert len(segments) > 1


def test_lists_batches_generators_and_datasets(recognizer, clips, transcripts):
    expected = [{"text": transcript.text} for transcript in transcripts]
    assert recognizer(clips) == recognizer(clips, batch_size=2) == expected
    assert list(recognizer((clip for clip in clips), batch_size=2)) == expected

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(clips)

        def __getitem__(self, index):
            return {"array": clips[index], "sampling_rate": 16_000}

    assert list(recognizer(Rows(), batch_size=3)) == expected


def test_forms_of_a_recording(recognizer, clips, transcripts, tmp_path):
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / "clip.wav"
    soundfile.write(path, clips[2], 16_000, subtype="FLOAT")
    expected = {"text": transcripts[2].text}
    array = {"array": clips[2], "sampling_rate": 16_000}
    for audio in (str(path), path.read_bytes(), array, {"raw": clips[2], "sampling_rate": 16_000}):
        assert recognizer(audio) == expected
    for audio in (torch.from_numpy(clips[2]), {"raw": torch.from_numpy(clips[2]), "sampling_rate": 16_000}):
        assert recognizer(audio) == expected
    with pytest.raises(ValueError, match="without its sampling rate"):
        recognizer({"raw": clips[2]})
    halved = recognizer(clips[2], sampling_rate=8000, return_timestamps="word")
    assert halved["chunks"][-1]["timestamp"][1] > 3.1  # twice as long as at 16 kHz


def test_unknown_arguments_are_refused(recognizer, clips):
    with pytest.raises(ValueError, match="does not take chunk_length_s"):
        recognizer(clips[0], chunk_length_s=30)
    with pytest.raises(ValueError, match="return_timestamps is 'char'"):
        recognizer(clips[0], return_timestamps="char")


def test_code_is_asked_for(folder):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline("automatic-speech-recognition", model=folder)


def test_a_loaded_pipeline_can_be_saved_and_loaded_again(recognizer, processor, clips, transcripts, tmp_path):
    recognizer.model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = pipeline("automatic-speech-recognition", model=str(tmp_path), trust_remote_code=True, device="cpu")
    assert again([clips[2]]) == [{"text": transcripts[2].text}]


WITHOUT_PACKAGE = """
    import sys
    sys.modules |= dict.fromkeys(("soundwave", "torchaudio"))
    import json, numpy as np, torch
    from transformers import pipeline
    recognizer = pipeline(model=sys.argv[1], trust_remote_code=True, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        recognizer.model.ctc_head.blank.mul_(0.5)
    print(json.dumps(recognizer(np.load(sys.argv[2]), return_timestamps="word")))
"""


def test_without_the_package(folder, clips, transcripts, tmp_path):
    np.save(tmp_path / "clip.npy", clips[1])
    result = subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(WITHOUT_PACKAGE), folder, str(tmp_path / "clip.npy")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    seen = json.loads(result.stdout.splitlines()[-1])
    assert seen["text"] == transcripts[1].text
    assert [chunk["text"] for chunk in seen["chunks"]] == [word.text for word in transcripts[1].words]
