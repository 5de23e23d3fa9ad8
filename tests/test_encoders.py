"""Encoders beside Whisper: w2v-BERT 2.0 through every path, and that its windows depend on no neighbour.

What any Soundwave model must do is tested with Whisper elsewhere; here is what its features and its masks could break.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    HubertConfig,
    LlamaConfig,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertForCTC,
    Wav2Vec2BertModel,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
)

from soundwave import SoundwaveForConditionalGeneration, SoundwaveForCTC, SoundwaveProcessor
from soundwave.modeling_soundwave import SoundwaveConfig, speech_soundwave
from soundwave.modeling_soundwave.weights_soundwave import WeightsError, read_encoder
from soundwave.processing import SAMPLING_RATE
from soundwave.training.augment import SpecAugment
from soundwave.training.building import build_model
from soundwave.training.encoder_cache import EncoderCache
from soundwave.training.stages import StageConfig
from soundwave.training.train import run_stage
from tests.components import MEL_BINS, WINDOW_S, save_w2v_bert, w2v_bert_config
from tests.conftest import tone
from tests.test_batch_invariance import recording
from tests.tiny_models import tiny_model
from tests.tokenizers import make_tokenizer
from tests.training_rows import write_rows

POSITIONS = ["relative_key", "relative", "rotary"]


@pytest.fixture(scope="module")
def w2v_bert_folder(tmp_path_factory) -> str:
    return save_w2v_bert(tmp_path_factory.mktemp("w2v_bert"))


@pytest.fixture(scope="module")
def w2v_bert(w2v_bert_folder, llm_folder):
    """Model in float64 and processor, with windows of 2 s."""
    processor = SoundwaveProcessor.from_components(
        w2v_bert_folder, llm_folder, audio_padding="longest", window_seconds=WINDOW_S
    )
    torch.manual_seed(3)
    model = SoundwaveForConditionalGeneration.from_components(
        w2v_bert_folder, llm_folder, processor.audio_token_id, audio_padding="longest", window_seconds=WINDOW_S
    ).double()
    with torch.no_grad():  # a blank that wins some of the frames
        rows = model.ctc_head.rows(model.ctc_rows())
        model.ctc_head.blank.copy_(2 * rows.std() * torch.randn(rows.shape[1]))
    return model, processor


# Features


def test_features_are_those_of_the_encoders_own_extractor():
    extractor = SeamlessM4TFeatureExtractor()
    processor = SoundwaveProcessor(extractor, make_tokenizer("llama3"), audio_padding="longest")
    waveform = recording(3.217, 0.3, seed=1)
    theirs = extractor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt")["input_features"][0]  # (E', 160)
    ours = processor.audio_features([waveform])["input_features"][0]  # (80, T)
    stacked = ours.T.reshape(-1, 160)
    assert len(theirs) < len(stacked) == 2 * -(-len(waveform) // 640)
    torch.testing.assert_close(stacked[: len(theirs)], theirs, rtol=1e-4, atol=1e-4)  # means in another order
    assert stacked[len(theirs) :].abs().max() < 20  # what the zeros behind the clip make of the last frames


def test_features_of_the_whole_encoder_are_those_of_the_library(w2v_bert_folder, w2v_bert):
    model, processor = w2v_bert
    library = Wav2Vec2BertModel.from_pretrained(w2v_bert_folder).double().eval()
    waveform = recording(1.9, 0.3, seed=2)
    given_ = processor.feature_extractor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt")
    inputs = processor.audio_features([waveform])
    theirs = library(given_["input_features"].double()).last_hidden_state[0]
    mask = inputs["input_features_mask"] & (torch.arange(inputs["input_features"].shape[2]) < 2 * len(theirs))
    ours = model.encode(inputs["input_features"], mask)[0]
    torch.testing.assert_close(ours[: len(theirs)], theirs, rtol=1e-3, atol=1e-4)  # of features in fp32


@given(st.lists(st.integers(1, 5 * SAMPLING_RATE), min_size=1, max_size=4), st.sampled_from(["longest", "max_length"]))
@settings(max_examples=25)
def test_features_are_finite_and_those_of_each_recording_alone(lengths, padding):
    extractor = SeamlessM4TFeatureExtractor(feature_size=8, num_mel_bins=8, chunk_length=WINDOW_S)
    processor = SoundwaveProcessor(extractor, make_tokenizer("llama3"), audio_padding=padding)
    waveforms = [recording(n / SAMPLING_RATE, 0.3 * (n % 3), seed=n) for n in lengths]
    together = processor.audio_features(waveforms)
    features, mask = together["input_features"], together["input_features_mask"]
    assert torch.isfinite(features).all() and not features.masked_select(~mask[:, None]).any()
    assert features.shape[1:] == (8, 100 * WINDOW_S) if padding == "max_length" else features.shape[1] == 8
    first = 0
    for waveform, count in zip(waveforms, together["windows_per_audio"].tolist(), strict=True):
        alone = processor.audio_features([waveform])
        T = alone["input_features"].shape[2]
        assert torch.equal(features[first : first + count, :, :T], alone["input_features"])
        streamed = list(processor.stream_windows(iter(np.array_split(waveform, 3))))
        for window, row, valid in zip(streamed, alone["input_features"], alone["input_features_mask"], strict=True):
            assert torch.equal(window.features[:, : window.frames], row[:, : window.frames])
            assert window.frames == valid.sum()
        first += count


def test_silence_has_features_too():
    extractor = SeamlessM4TFeatureExtractor(chunk_length=WINDOW_S)
    processor = SoundwaveProcessor(extractor, make_tokenizer("llama3"), audio_padding="longest")
    for n in (1, 559, 560, 3 * SAMPLING_RATE):
        features = processor.audio_features([np.zeros(n, np.float32)])["input_features"]
        assert torch.isfinite(features).all() and features.abs().max() < 0.1


# The encoder


@pytest.mark.parametrize("positions", POSITIONS)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=5), st.integers(0, 10**6))
@settings(max_examples=10)
def test_a_window_does_not_depend_on_its_neighbours(positions, lengths, seed):
    """Values in the padding, and how much of it there is, change no valid frame."""
    torch.manual_seed(seed)
    audio = w2v_bert_config(position_embeddings_type=positions)
    model = tiny_model(audio_config=audio, window_seconds=WINDOW_S)
    T = 4 * max(lengths)
    features = torch.randn(len(lengths), MEL_BINS, T, dtype=torch.float64)
    mask = torch.arange(T) < 4 * torch.tensor(lengths)[:, None]
    together = model.encode(features, mask)
    assert together.shape == (len(lengths), T // 2, 32)
    for row, length, ours in zip(features, lengths, together, strict=True):
        alone = model.encode(row[None, :, : 4 * length], None)[0]
        torch.testing.assert_close(ours[: 2 * length], alone, rtol=1e-9, atol=1e-9)


def test_passes_of_a_frozen_encoder_give_what_one_pass_gives(w2v_bert, monkeypatch):
    model, processor = w2v_bert
    inputs = processor.audio_features([tone(seconds) for seconds in (0.5, 1.8, 4.9, 0.1)])
    whole = model.encode(inputs["input_features"], inputs["input_features_mask"])
    monkeypatch.setitem(speech_soundwave.MEL_FRAMES_PER_PASS, "cpu", 100 * WINDOW_S)
    parts = model.encode(inputs["input_features"], inputs["input_features_mask"])
    valid = inputs["input_features_mask"][:, ::2]
    torch.testing.assert_close(parts[valid], whole[valid])


@given(st.lists(st.floats(0.05, 7.0), min_size=2, max_size=4), st.integers(0, 10**6))
@settings(max_examples=15)
def test_ids_of_a_batch_equal_those_of_each_recording(w2v_bert, seconds, seed):
    """Recordings of up to four windows, with seams; greedy CTC ids and generated ids."""
    model, processor = w2v_bert
    waveforms = [recording(s, 0.3, seed + k) for k, s in enumerate(seconds)]
    inputs = processor(audio=waveforms, sampling_rate=SAMPLING_RATE)
    together = model.transcribe_ids(**processor.audio_features(waveforms))
    N = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, N:].tolist()
    for waveform, heard, said in zip(waveforms, together, ids, strict=True):
        assert model.transcribe_ids(**processor.audio_features([waveform])) == [heard]
        one = processor(audio=waveform, sampling_rate=SAMPLING_RATE)
        alone = model.generate(**one, max_new_tokens=4, do_sample=False)[0, one["input_ids"].shape[1] :].tolist()
        assert said[: len(alone)] == alone
        assert set(said[len(alone) :]) <= {model.generation_config.pad_token_id}


def test_full_windows_give_the_frames_of_short_ones(w2v_bert_folder, llm_folder, w2v_bert):
    """The encoder masks its padding, so `audio_padding` is a matter of time alone."""
    model, short = w2v_bert
    full = SoundwaveProcessor.from_components(w2v_bert_folder, llm_folder, window_seconds=WINDOW_S)
    waveforms = [tone(0.7), tone(1.3, 300.0)]
    one, other = (model.align(**processor.audio_features(waveforms)) for processor in (short, full))
    torch.testing.assert_close(one.frames[one.mask], other.frames[other.mask])


def test_streamed_and_long_recordings_are_transcribed(w2v_bert):
    model, processor = w2v_bert
    waveform = recording(7.3, 0.3, seed=5)
    heard = model.transcribe_ids(**processor.audio_features([waveform]))[0]
    assert model.transcribe_ctc(waveform, processor, SAMPLING_RATE).token_ids == heard
    last = list(model.stream_ctc(np.array_split(waveform, 9), processor, SAMPLING_RATE))[-1]
    assert last.transcript.duration == pytest.approx(7.3)


# Files


def test_it_comes_back_from_a_folder_and_as_remote_code(w2v_bert, tmp_path):
    model, processor = w2v_bert
    model, folder = model.float(), tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    again = SoundwaveForConditionalGeneration.from_pretrained(folder)
    loaded = SoundwaveProcessor.from_pretrained(folder)
    waveforms = [tone(0.6), tone(5.1, 300.0)]
    inputs = loaded(audio=waveforms, sampling_rate=SAMPLING_RATE)
    assert torch.equal(inputs["input_features"], processor.audio_features(waveforms)["input_features"])
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    script = f"""
import sys
sys.modules["soundwave"] = None  # as if it were not installed
import numpy as np, torch
from transformers import AutoModel, AutoModelForCTC, AutoProcessor
torch.set_num_threads(1)
processor = AutoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)
inputs = torch.load({str(tmp_path / "inputs.pt")!r}, weights_only=False)
features = processor.audio_features(inputs.pop("waveforms"))
assert torch.equal(features["input_features"], inputs["input_features"])
model = AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)
ctc = AutoModelForCTC.from_pretrained({str(folder)!r}, trust_remote_code=True)
print([model.generate(**inputs, max_new_tokens=4, do_sample=False).tolist(), ctc.transcribe_ids(**features)])
"""
    torch.save({**inputs, "waveforms": waveforms}, tmp_path / "inputs.pt")
    result = subprocess.run(
        [sys.executable, "-I", "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False).tolist()
    heard = model.transcribe_ids(**processor.audio_features(waveforms))
    model.double()
    assert result.stdout.splitlines()[-1] == str([ids, heard])


def test_a_fine_tuned_checkpoint_lends_its_encoder(tmp_path):
    """Of `Wav2Vec2BertForCTC`, without the head; of the bare model, without what its own SpecAugment puts in."""
    torch.manual_seed(0)
    whole = Wav2Vec2BertForCTC(w2v_bert_config(vocab_size=11, mask_time_prob=0.05))
    whole.save_pretrained(tmp_path / "ctc")
    whole.wav2vec2_bert.save_pretrained(tmp_path / "bare")
    found = [read_encoder(str(tmp_path / name), "wav2vec2-bert") for name in ("ctc", "bare")]
    model = tiny_model(audio_config=w2v_bert_config(), dtype=torch.float32)
    for tensors in found:
        assert {name.removeprefix("audio_tower.") for name in tensors} == set(model.audio_tower.state_dict())
        assert torch.equal(
            tensors["audio_tower.feature_projection.projection.weight"],
            whole.wav2vec2_bert.feature_projection.projection.weight,
        )


def test_a_checkpoint_of_another_kind_is_refused(encoder_folder, w2v_bert_folder, llm_folder, tmp_path):
    with pytest.raises(WeightsError, match="holds no tensors of a whisper encoder"):
        read_encoder(llm_folder, "whisper")
    HubertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a hubert checkpoint without num_mel_bins .*expected a Whisper or"):
        SoundwaveProcessor.from_components(str(tmp_path), llm_folder)
    with pytest.raises(ValueError, match="'hubert'; the encoders that Soundwave runs are whisper and wav2vec2-bert"):
        SoundwaveForCTC(SoundwaveConfig(audio_config=HubertConfig(), text_config=LlamaConfig()))
    with pytest.raises(ValueError, match="add_adapter is True"):
        tiny_model(audio_config=w2v_bert_config(add_adapter=True))
    with pytest.raises(ValueError, match="is a Wav2Vec2FeatureExtractor; expected a WhisperFeatureExtractor or"):
        SoundwaveProcessor(Wav2Vec2FeatureExtractor(), make_tokenizer("llama3"))


def test_windows_are_whole_seconds_of_the_encoders_choice(encoder_folder, w2v_bert_folder, llm_folder):
    audio = w2v_bert_config()
    assert SoundwaveConfig(audio_config=audio).window_mel_frames == 3000
    assert SoundwaveConfig(audio_config=audio, window_seconds=10).window_mel_frames == 1000
    assert SoundwaveConfig(audio_config=WhisperConfig(), window_seconds=30).window_mel_frames == 3000
    with pytest.raises(ValueError, match="window_seconds is 10, but this Whisper encoder has windows of 30 s"):
        SoundwaveConfig(audio_config=WhisperConfig(), window_seconds=10)
    with pytest.raises(ValueError, match="window_seconds is 0, expected at least 1"):
        SoundwaveConfig(audio_config=audio, window_seconds=0)
    with pytest.raises(ValueError, match="has windows of 2 s; leave window_seconds=10 out"):
        SoundwaveProcessor.from_components(encoder_folder, llm_folder, window_seconds=10)
    extractor = SoundwaveProcessor.from_components(w2v_bert_folder, llm_folder).feature_extractor
    assert extractor.chunk_length == 30 and extractor.num_mel_bins == MEL_BINS


# Training


@given(st.lists(st.integers(4, 45), min_size=2, max_size=3), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=6)
def test_a_batch_trains_as_its_items_alone(lengths, trained_encoder, seed):
    """Losses and gradients, those of an encoder that trains included; its own random masks are off."""
    model = tiny_model(
        audio_config=w2v_bert_config(mask_time_prob=0.5, layerdrop=0.5, conformer_conv_dropout=0.0),
        window_seconds=WINDOW_S,
        alignment_dropout=0.0,
    )
    ctc = SoundwaveForCTC(model.config).double()
    ctc.load_state_dict(model.state_dict() | {"ctc_head.weight": model.ctc_rows()}, strict=False)
    ctc.audio_tower.requires_grad_(trained_encoder)
    ctc.train()
    torch.manual_seed(seed)
    features = [torch.randn(MEL_BINS, 4 * length, dtype=torch.float64) for length in lengths]
    features = [SpecAugment(time_mask_width=20)(mel[None], None, seed)[0] for mel in features]
    targets = [[5 + k, 9] for k in range(len(features))]

    def run(rows: list[int]) -> dict[str, torch.Tensor]:
        ctc.zero_grad()
        T = max(features[k].shape[1] for k in rows)
        padded = torch.stack([torch.nn.functional.pad(features[k], (0, T - features[k].shape[1])) for k in rows])
        mask = torch.arange(T) < torch.tensor([features[k].shape[1] for k in rows])[:, None]
        labels, counts = torch.tensor([targets[k] for k in rows]), torch.tensor([2] * len(rows))
        out = ctc(padded, mask, ctc_labels=labels, ctc_label_lengths=counts, num_ctc_tokens=1)
        out.loss.backward()
        found = {name: p.grad.clone() for name, p in ctc.named_parameters() if p.grad is not None}
        return {"loss": out.loss.detach()} | found

    together, alone = run(list(range(len(features)))), [run([k]) for k in range(len(features))]
    encoder = {name for name, _ in ctc.named_parameters() if name.startswith("audio_tower.")}
    assert encoder & together.keys() == (encoder if trained_encoder else set())  # every layer, every time
    for name, value in together.items():
        expected = sum(item[name] for item in alone)
        torch.testing.assert_close(
            value, expected, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_spec_augment_masks_a_bin_of_both_stacked_frames():
    """Windows are (M, T) for every encoder: a masked band is one of the spectrum, not of every second frame."""
    features = torch.randn(1, MEL_BINS, 80)
    out = SpecAugment(freq_masks=4, time_masks=0)(features, None, seed=3)
    changed = (out != features)[0].T.reshape(40, 2, MEL_BINS)
    assert changed.any() and torch.equal(changed[:, 0], changed[:, 1])


def test_the_cache_gives_what_the_encoder_gives(w2v_bert, tmp_path):
    model, processor = w2v_bert
    write_rows(tmp_path / "rows", spoken=4, written=0, longest_s=4.0)
    clips = [{"path": str(tmp_path / "rows" / f"clip{k}.wav"), "bytes": None} for k in range(4)]
    cache = EncoderCache.build(tmp_path / "cache", model, processor, clips, progress=False)
    batch = cache.batch(clips)
    inputs = processor.audio_features([processor.load_audio(clip) for clip in clips])
    assert torch.equal(batch["window_offsets"], inputs["window_offsets"])
    encoded = model.encode(inputs["input_features"], inputs["input_features_mask"])
    valid = inputs["input_features_mask"][:, ::2]
    assert torch.equal(batch["input_features_mask"][:, ::2], valid)
    torch.testing.assert_close(batch["encoder_features"][valid].double(), encoded[valid], rtol=2e-3, atol=2e-3)


def test_a_run_goes_from_stage_one_to_two(w2v_bert_folder, llm_folder, tmp_path):
    rows = write_rows(tmp_path / "rows", spoken=4, written=0, longest_s=3.0)
    settings_ = {
        "data": [str(rows)],
        "device": "cpu",
        "steps": 2,
        "warmup_steps": 0,
        "global_batch": 2,
        "per_device_batch": 2,
        "progress": False,
        "report_to": [],
    }
    model = {"audio_padding": "longest", "window_seconds": WINDOW_S}
    one = run_stage(
        StageConfig.for_stage(
            "align",
            audio_model=w2v_bert_folder,
            text_model=llm_folder,
            model=model,
            output_dir=str(tmp_path / "one"),
            **settings_,
        )
    )
    two = run_stage(
        StageConfig.for_stage(
            "shrink",
            start=str(one),
            text_model=llm_folder,
            output_dir=str(tmp_path / "two"),
            lora_r=2,
            **settings_,
        )
    )
    trained, processor = build_model(StageConfig.for_stage("instruct", start=str(two)))
    assert trained.config.window_mel_frames == 100 * WINDOW_S
    inputs = processor(audio=tone(3.3), sampling_rate=SAMPLING_RATE)
    assert inputs["input_features"].shape[0] == 2 and torch.isfinite(trained(**inputs).logits).all()
