"""Tokenizer and stage 0 of the tiny preset, at toy size."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, WhisperFeatureExtractor, WhisperModel

from soundwave.training.tiny.corpus import write_frames, write_jsonl
from soundwave.training.tiny.examples import text_examples
from soundwave.training.tiny.pretrain import pretrain
from soundwave.training.tiny.pretrain_encoder import EncoderSettings, encode, log_mel, new_encoder, pretrain_encoder
from soundwave.training.tiny.pretrain_llm import LanguageModelSettings, pretrain_llm, prompt_text
from soundwave.training.tiny.tokenizer import SYSTEM_PROMPT, train_tokenizer

soundfile = pytest.importorskip("soundfile")
TEXTS = [
    "please bring <cough> die Tür schließe",
    "what is two plus three : five",
    "Transcribe the speech.",
    SYSTEM_PROMPT,
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twelve clips of tones with two "words", and a little text: no synthesizer needed."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "wav").mkdir()
    rng = np.random.default_rng(0)
    labels = {}
    for index in range(12):
        name = f"{'dev_seen' if index > 9 else 'train'}_{index:02d}"
        frames = 2 * int(rng.integers(10, 40))
        high = rng.random(frames // 2).repeat(2) > 0.5
        time = np.arange(frames * 320) / 16_000
        wave = 0.3 * np.sin(2 * np.pi * np.where(high.repeat(320), 1500, 400) * time)
        soundfile.write(folder / "wav" / f"{name}.wav", wave, 16_000, subtype="PCM_16")
        words = ["high" if h else "low" for h in high]
        labels[name] = (words, words)
    write_frames(folder, labels)
    for split, count in (("train", 120), ("dev", 12)):
        write_jsonl(folder / f"text/{split}.jsonl", text_examples(count, 0, split))
    return folder


def test_corpus_words_are_single_tokens(tokenizer):
    for text in TEXTS:
        pieces = text.replace(".", " .").split()
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == len(pieces)


@pytest.mark.parametrize("text", [*TEXTS, "Zürich 北 4.2!\n x", "<sneeze>", "a  b", "\U0001f600"])
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("text", ["please bring", "<cough> please", "die Tür <cough>"])
def test_answer_ids_are_label_ids(tokenizer, text):
    """The ids of a text alone are those of the same text as an answer, up to the closing token."""
    user = {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "Transcribe the speech."}]}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([user, {"role": "assistant", "content": text}], return_dict=False)
    assert whole[: len(prompt)] == prompt
    alone = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert whole[len(prompt) :] == [*alone, tokenizer.eos_token_id]
    assert not set(alone) & set(tokenizer.all_special_ids)
    assert prompt.count(tokenizer.convert_tokens_to_ids("<|audio|>")) == 1


def test_text_content_stands_where_audio_stands(tokenizer):
    """Stage 0 prompts differ from the later ones by the content alone."""
    example = {"content": "please bring", "instruction": "Transcribe the speech."}
    messages = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "Transcribe the speech."}]},
    ]
    spoken = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    spot = spoken.index(tokenizer.convert_tokens_to_ids("<|audio|>"))
    content = tokenizer("please bring", add_special_tokens=False)["input_ids"]
    read = tokenizer(prompt_text(example, tokenizer), add_special_tokens=False)["input_ids"]
    assert read == spoken[:spot] + content + spoken[spot + 1 :]


def test_log_mel_is_whispers():
    """At full length the features are those of the library's extractor."""
    extractor = WhisperFeatureExtractor(feature_size=80)
    wave = np.random.default_rng(0).standard_normal(10_000).astype(np.float32) * 0.1
    theirs = extractor(wave, sampling_rate=16_000, return_tensors="pt")["input_features"][0]
    ours = log_mel(wave, extractor)
    assert ours.shape == (80, 64)
    assert torch.allclose(ours, theirs[:, :64], atol=1e-4)


def test_encoding_ignores_the_neighbours():
    torch.manual_seed(0)
    encoder = new_encoder(EncoderSettings()).encoder.double().eval()
    mel = torch.randn(3, 80, 60, dtype=torch.float64)
    lengths = torch.tensor([60, 32, 8])
    with torch.no_grad():
        together = encode(encoder, mel, lengths)
        for row, length in enumerate(lengths.tolist()):
            alone = encode(encoder, mel[row : row + 1, :, :length], lengths[row : row + 1])
            assert torch.allclose(together[row, : length // 2], alone[0], atol=1e-10)


def test_encoder_equals_the_librarys_at_full_length():
    torch.manual_seed(0)
    encoder = new_encoder(EncoderSettings(positions=50)).encoder.eval()
    mel = torch.randn(2, 80, 100)
    with torch.no_grad():
        assert torch.allclose(
            encode(encoder, mel, torch.tensor([100, 100])), encoder(mel).last_hidden_state, atol=1e-5
        )


def test_encoder_pretraining_learns_and_saves(corpus, tmp_path):
    settings = EncoderSettings(steps=40, frames_per_batch=200, warmup=4, log_every=10, layers=1)
    figures = pretrain_encoder(corpus, tmp_path, settings, progress=False)
    losses = [loss for _, loss in figures["loss_curve"]]
    assert len(losses) == 4 and losses[-1] < 0.7 * losses[0]
    assert set(figures["frame_accuracy"]) == {"dev_seen"}
    assert figures["gate"]["passed"] == (figures["dev_frame_accuracy"] >= 0.88)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.max_source_positions) == ("whisper", 1500)
    model, report = WhisperModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert WhisperFeatureExtractor.from_pretrained(tmp_path).feature_size == 80
    assert json.loads((tmp_path / "pretraining.json").read_text())["steps"] == 40


def test_language_model_pretraining_learns_and_saves(corpus, tmp_path):
    figures = pretrain_llm(corpus, tmp_path, LanguageModelSettings.smoke(), progress=False)
    losses = [loss for _, loss in figures["loss_curve"]]
    assert losses[-1] < losses[0]
    assert [gate["passed"] for gate in figures["gates"]] == [False, False]  # nothing is learnt in twelve steps
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.vocab_size == len(tokenizer) == figures["vocabulary"]
    assert model.get_input_embeddings().weight.data_ptr() != model.get_output_embeddings().weight.data_ptr()


def test_stand_ins_are_small():
    """Encoder and language model take 2 bytes each in the shipped model, which is under 5 MB with its adapters."""
    encoder = sum(p.numel() for p in new_encoder(EncoderSettings()).encoder.parameters())
    from transformers import LlamaConfig, LlamaForCausalLM

    s = LanguageModelSettings()
    config = LlamaConfig(
        vocab_size=1150, hidden_size=s.hidden, intermediate_size=s.intermediate, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, tie_word_embeddings=False,
    )  # fmt: skip
    language_model = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    assert encoder + language_model <= 1_950_000


def test_both_side_by_side(corpus, tmp_path):
    figures = pretrain(
        corpus,
        tmp_path / "encoder",
        tmp_path / "llm",
        EncoderSettings.smoke(),
        LanguageModelSettings.smoke(),
        progress=False,
    )
    assert set(figures) == {"encoder", "language_model"}
    assert (tmp_path / "encoder/model.safetensors").is_file() and (tmp_path / "llm/tokenizer.json").is_file()
