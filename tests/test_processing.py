"""SoundwaveProcessor: the tensors of its calls, and saving."""

import json
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, WhisperConfig, WhisperFeatureExtractor

from soundwave.processing import AudioError, ChatError, MessageError, PlaceholderError, SoundwaveProcessor
from tests.processors import ASSISTANT, PROCESSORS, SAMPLING_RATE, USER, audio_item, make_processor, noise, user
from tests.tokenizers import FAMILIES, SETTINGS, make_tokenizer


@pytest.fixture(params=FAMILIES)
def processor(request) -> SoundwaveProcessor:
    return PROCESSORS[request.param]


# Calls


def test_batch_is_padded_on_the_left_and_equals_singles(processor):
    chats = [
        [user(audio_item(8000, 1), "What is said?")],
        [user("No audio here, but a much longer question, is it not?")],
        [user(audio_item(50_000, 2), "and", audio_item(700, 3)), ASSISTANT, user("Why?")],
    ]
    batch = processor.apply_chat_template(chats)
    assert batch["windows_per_audio"].tolist() == [1, 2, 1]
    windows = 0
    for index, one in enumerate(chats):
        single = processor.apply_chat_template(one)
        length = single["input_ids"].shape[1]
        mask = batch["attention_mask"][index].tolist()
        assert mask == [0] * (len(mask) - length) + [1] * length
        assert torch.equal(batch["input_ids"][index, -length:], single["input_ids"][0])
        if "input_features" in single:
            count = len(single["input_features"])
            assert torch.equal(batch["input_features"][windows : windows + count], single["input_features"])
            windows += count
        else:
            assert index == 1 and set(single) == {"input_ids", "attention_mask"}
    assert windows == len(batch["input_features"])
    assert set(batch) == set(processor.model_input_names)


def test_contract_of_the_tensors():
    batch = PROCESSORS["llama3"](audio=[noise(8000), noise(50_000)], sampling_rate=SAMPLING_RATE)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items() if "i" not in name[:1]} == {
        "attention_mask": (torch.int64, tuple(batch["input_ids"].shape)),
        "window_offsets": (torch.int64, (3,)),
        "windows_per_audio": (torch.int64, (2,)),
    }
    assert batch["input_features"].shape == (3, 80, 200) and batch["input_features"].dtype == torch.float32
    assert batch["input_features_mask"].dtype == torch.bool
    assert batch["input_features_mask"].sum(1).tolist() == [52, 200, 152]
    half = batch.to(dtype=torch.bfloat16)
    assert half["input_features"].dtype == torch.bfloat16 and half["input_ids"].dtype == torch.int64


def test_audio_alone_asks_for_the_transcript(processor):
    expected = processor.apply_chat_template([user(audio_item(), processor.transcription_prompt)])
    for call in (
        processor(noise(8000), sampling_rate=SAMPLING_RATE),
        processor(audio=[noise(8000)], audio_kwargs={"sampling_rate": SAMPLING_RATE}),
        processor(torch.from_numpy(noise(8000)), sampling_rate=SAMPLING_RATE, return_tensors="pt"),
        processor({"array": noise(8000), "sampling_rate": SAMPLING_RATE}),
    ):
        assert set(call) == set(expected)
        assert all(torch.equal(call[name], expected[name]) for name in expected)


def test_trusted_text_writes_placeholders_and_control_tokens(processor):
    rendered = processor.apply_chat_template([user(audio_item(), "What is said?")], tokenize=False)
    expected = processor.apply_chat_template([user(audio_item(), "What is said?")])
    batch = processor(text=rendered, audio=noise(8000), sampling_rate=SAMPLING_RATE, return_tensors="pt")
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    two = processor(
        text=[rendered, rendered + "more"],
        audio=[[noise(8000)], [noise(8000)]],
        sampling_rate=SAMPLING_RATE,
        padding=True,
    )
    assert two["input_ids"].shape[0] == 2 and two["attention_mask"][0, 0] == 0


def test_counts_of_placeholders_and_recordings():
    processor = PROCESSORS["llama3"]
    with pytest.raises(PlaceholderError, match="2 audio placeholders .* 1 recordings"):
        processor(text="<|audio|> and <|audio|>", audio=noise(100), sampling_rate=SAMPLING_RATE)
    with pytest.raises(PlaceholderError, match="0 audio placeholders .* 1 recordings"):
        processor(text="What is said?", audio=noise(100), sampling_rate=SAMPLING_RATE)
    with pytest.raises(PlaceholderError, match="1 audio placeholders .* 0 recordings"):
        processor(text="<|audio|>")
    assert issubclass(PlaceholderError, ChatError) and issubclass(ChatError, ValueError)


def test_audio_of_earlier_turns_is_neither_opened_nor_computed(processor):
    second, third = audio_item(50_000, 2), audio_item(700, 3)
    whole = [[user(audio_item(), "What?", second), ASSISTANT, user("And", third)], [user("this", audio_item(900, 4))]]
    known = [[user({"type": "audio", "path": "gone.wav"}, "What?", {"type": "audio"}), *whole[0][1:]], whole[1]]
    expected = processor.apply_chat_template(whole)
    batch = processor.apply_chat_template(known, reuse_audio=2)
    assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    assert batch["windows_per_audio"].tolist() == [1, 1]
    features = processor.audio_features([third["audio"], whole[1][0]["content"][1]["audio"]])
    assert all(torch.equal(batch[name], features[name]) for name in features)
    everything = processor.apply_chat_template(whole, reuse_audio=4)
    assert set(everything) == {"input_ids", "attention_mask"}
    assert set(processor.apply_chat_template([USER], reuse_audio=0)) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("count", [2, -1, None, "1", 1.0])
def test_more_reused_audio_than_recordings(count):
    with pytest.raises(
        PlaceholderError, match=f"reuse_audio is {count!r} for 1 recordings; expected a number from 0 to 1"
    ):
        PROCESSORS["llama3"].apply_chat_template([user(audio_item(), "What?")], reuse_audio=count)
    with pytest.raises(MessageError, match="names no recording"):
        PROCESSORS["llama3"].apply_chat_template([user({"type": "audio"}, {"type": "audio"})], reuse_audio=1)


def test_call_errors():
    processor = PROCESSORS["llama3"]
    for nothing in ({}, {"audio": []}, {"text": []}):
        with pytest.raises(ValueError, match="Neither audio nor text"):
            processor(**nothing)
    for text in (3, [3], ["x", None], b"x"):
        with pytest.raises(MessageError, match="expected a string or a list"):
            processor(text=text)
    with pytest.raises(MessageError, match="lone surrogate"):
        processor(text="a\udc00")
    with pytest.raises(ValueError, match="given twice, as 8000 and 16000"):
        processor(noise(100), sampling_rate=8000, audio_kwargs={"sampling_rate": 16_000})
    with pytest.raises(AudioError) as lone:
        processor(audio="\ud800.wav")
    assert str(lone.value).encode()  # can be printed and sent
    circle: list = []
    circle.append(circle)
    for audio in ([noise(100), None], [[[None]]], circle):  # none is left out, and nothing recurses for ever
        with pytest.raises(AudioError, match="None|unequal lengths|list"):
            processor(audio=audio, sampling_rate=SAMPLING_RATE)
    with pytest.raises(ValueError, match="images"):
        processor(text="x", images=[1])
    with pytest.raises(ValueError, match="truncation"):
        processor(text="x", truncation=True)
    with pytest.raises(ValueError, match="'np'"):
        processor(text="x", return_tensors="np")
    with pytest.raises(AudioError, match="sampling_rate="):
        processor(noise(100))
    with pytest.raises(ValueError, match="audio_padding"):
        make_processor("llama3", audio_padding="left")


def test_calls_of_pipeline_and_server():
    """The argument names with which the library's any-to-any pipeline and server call a processor."""
    processor = PROCESSORS["qwen3"]
    messages = [user(audio_item(), "What is said?")]
    expected = processor.apply_chat_template(messages)["input_ids"]
    pipeline = processor.apply_chat_template(
        messages,
        continue_final_message=False,
        return_tensors="pt",
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        processor_kwargs={"audio_kwargs": {"sampling_rate": SAMPLING_RATE}},
    )
    server = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tools=None,
        return_tensors="pt",
        return_dict=True,
        tokenize=True,
        load_audio_from_video=False,
    )
    assert torch.equal(pipeline.to(dtype=torch.float32)["input_ids"], expected)
    assert torch.equal(server["input_ids"], expected)
    decoded = processor.post_process_multimodal_output(expected, skip_special_tokens=True)
    assert decoded == processor.batch_decode(expected, skip_special_tokens=True)
    assert "What is said?" in decoded[0] and "<|audio|>" not in decoded[0]
    assert "<|audio|>" in processor.decode(expected[0])


def test_the_audio_token():
    for family, processor in PROCESSORS.items():
        tokenizer = make_tokenizer(family)
        already = "<|audio|>" in tokenizer.get_vocab()
        assert already == (family == "words")
        assert processor.audio_token_id == (
            tokenizer.convert_tokens_to_ids("<|audio|>") if already else len(tokenizer)
        )
        assert processor.tokenizer.padding_side == "left" and processor.tokenizer.pad_token_id is not None
    named = make_processor("llama3", audio_token="<speech>")
    assert named.prompt_ids([user({"type": "audio"}, "say <|audio|>")]).count(named.audio_token_id) == 1


def test_tokenizer_without_template():
    tokenizer = make_tokenizer("llama3")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        SoundwaveProcessor(WhisperFeatureExtractor(), tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        SoundwaveProcessor(WhisperFeatureExtractor(), tokenizer)


# Saving


@pytest.mark.parametrize("padding", ["max_length", "longest"])
def test_from_components(tmp_path, padding):
    WhisperConfig(num_mel_bins=128, max_source_positions=100, d_model=16).save_pretrained(tmp_path / "encoder")
    make_tokenizer("gemma").save_pretrained(tmp_path / "llm")
    processor = SoundwaveProcessor.from_components(tmp_path / "encoder", tmp_path / "llm", audio_padding=padding)
    features = processor.audio_features([noise(40_000)])["input_features"]
    assert features.shape == (2, 128, 200)
    assert processor.chat_template == SETTINGS["gemma"][0]
    WhisperConfig(max_source_positions=75).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="multiple of 50"):
        SoundwaveProcessor.from_components(tmp_path / "encoder", tmp_path / "llm")
    (tmp_path / "encoder" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="Whisper"):
        SoundwaveProcessor.from_components(tmp_path / "encoder", tmp_path / "llm")


def test_saved_processor_is_the_same(processor, tmp_path):
    changed = SoundwaveProcessor(
        processor.feature_extractor,
        processor.tokenizer,
        system_prompt="Be brief.",
        transcription_prompt="Write it down.",
        audio_padding="longest",
        chat_template_kwargs={"date_string": "1 Jan 2020"},
    )
    changed.save_pretrained(tmp_path)
    again = SoundwaveProcessor.from_pretrained(tmp_path)
    assert again.chat_template == changed.chat_template
    for name in ("audio_token", "system_prompt", "transcription_prompt", "audio_padding", "chat_template_kwargs"):
        assert getattr(again, name) == getattr(changed, name)
    first, second = (one([noise(5000), noise(50_000)], sampling_rate=SAMPLING_RATE) for one in (changed, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    copied = pickle.loads(pickle.dumps(changed))
    assert copied.prompt_ids([USER]) == changed.prompt_ids([USER])


def test_remote_code_without_the_package(tmp_path):
    processor = make_processor("llama3", audio_padding="longest", transcription_prompt="Write it down.")
    processor.save_pretrained(tmp_path / "saved")
    code = {"audio", "chat", "messages", "processing", "prompts"}
    assert {f"{name}_soundwave.py" for name in code} <= {path.name for path in (tmp_path / "saved").iterdir()}
    script = """
        import sys

        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "soundwave":
                    raise ImportError(f"{name} is not installed here")

        sys.meta_path.insert(0, Refuse())
        import numpy as np
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained("saved", trust_remote_code=True)
        batch = processor(np.linspace(-0.5, 0.5, 9000, dtype=np.float32), sampling_rate=16_000)
        processor.save_pretrained("again")
        np.savez("batch.npz", **{name: tensor.numpy() for name, tensor in batch.items()})
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        env={"PATH": "", "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    waveform = np.linspace(-0.5, 0.5, 9000, dtype=np.float32)
    expected = processor(waveform, sampling_rate=SAMPLING_RATE)
    with np.load(tmp_path / "batch.npz") as remote:
        assert set(remote) == set(expected)
        for name in expected:
            np.testing.assert_array_equal(remote[name], expected[name].numpy())
    assert (tmp_path / "again" / "chat_soundwave.py").is_file()
    reloaded = AutoProcessor.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert reloaded.prompt_ids([USER]) == processor.prompt_ids([USER])
