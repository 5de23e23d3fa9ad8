"""The kinds of models that are evaluated: what each is asked, what it answers, and what it says when it cannot.

Endpoints have a file of their own (`test_eval_endpoint.py`).
"""

import copy
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken, AutoProcessor

from soundwave.eval.items import CutAnswer, FileClip, Item
from soundwave.eval.models import ModelError, load_model
from soundwave.eval.models.cascade import in_text
from soundwave.eval.models.endpoint import input_audio
from soundwave.eval.models.soundwave import SoundwaveAudioModel
from soundwave.eval.models.transformers_audio import ADAPTERS, CLOSE, OPEN
from soundwave.eval.provenance import weights_hash
from soundwave.training.encoder_cache import EncoderCache
from tests import tiny_audio_models
from tests.sounds import encoded, noise

TINY = str(Path(__file__).parents[1] / "assets" / "tiny")
NEW_TOKENS = 6


@dataclass
class Sound:
    """A clip in memory."""

    samples: np.ndarray
    name: str = "noise.wav"
    duration_s: float | None = None

    def read(self) -> np.ndarray:
        return self.samples


def item(text: str | None, *lengths: int) -> Item:
    return Item("-".join(map(str, lengths)), text, [Sound(noise(n, seed=n)) for n in lengths], None)


def mixed() -> list[Item]:
    return [item("What?", 16_000), item("What is said here?", 40_000), item("hello"), item(None, 9_000)]


def one_by_one(model, items: list[Item]) -> list[str]:
    return [model.answer([one], NEW_TOKENS)[0] for one in items]


@pytest.fixture(scope="module")
def ours(tiny_model, processor) -> SoundwaveAudioModel:
    # float64, here and below: sums in another order then do not decide between two tokens.
    return SoundwaveAudioModel(copy.deepcopy(tiny_model).double(), processor, "tiny")


# -- ours


@settings(max_examples=12)
@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(400, 40_000), max_size=2)), min_size=1, max_size=4))
def test_our_answers_do_not_depend_on_the_batch(ours, shapes):
    items = [item("Say it." if text or not lengths else None, *lengths) for text, lengths in shapes]
    assert ours.answer(items, NEW_TOKENS) == one_by_one(ours, items)


def test_recorded_speech_is_transcribed_alike_in_batches(shared_data):
    rows = [json.loads(line) for line in (shared_data / "manifest.jsonl").read_text().splitlines()]
    paths = [shared_data / row["path"] for row in rows if row["path"].startswith("speech/")][:4]
    items = [Item(path.name, "Transcribe the speech.", [FileClip(path)], None) for path in paths]
    model = load_model(TINY)
    answers = model.answer(items, 30)
    assert answers == [model.answer([one], 30)[0] for one in items]
    assert len(set(answers)) > 1


def test_the_tiny_model_is_loaded_and_described_without_its_folder(tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "mine", ignore=shutil.ignore_patterns("*.py"))
    model = load_model(str(folder))
    about = model.describe()
    assert about["name"] == "mine" and about["kind"] == "soundwave" and about["dtype"] == "float32"
    assert about["class"] == "SoundwaveForConditionalGeneration" and about["parameters"] > 1e6
    assert about == load_model(TINY).describe() | {"name": "mine"} and str(tmp_path) not in json.dumps(about)
    assert model.decoding["do_sample"] is False and model.decoding["system_prompt"] == model.processor.system_prompt
    weights = folder / "model.safetensors"
    assert about["weights"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert about["revision"] == f"sha256:{about['weights'][:16]}"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    changed = load_model(str(folder)).describe()
    assert all(changed[key] != about[key] for key in ("revision", "weights"))


def test_a_model_of_the_hub_is_described_by_its_commit_and_its_weights(tiny_model, processor, tmp_path, monkeypatch):
    commit = "a1" * 20
    repository = tmp_path / "models--ours--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(TINY, repository / "snapshots" / commit)
    model = SoundwaveAudioModel(tiny_model, processor, "ours/tiny", commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    about = model.describe()
    assert (about["name"], about["revision"], about["weights"]) == ("ours/tiny", commit, weights_hash(TINY))
    in_memory = SoundwaveAudioModel(tiny_model, processor, "tiny").describe()
    assert in_memory["weights"] is None and in_memory["revision"].startswith("sha256:")


def test_an_answer_that_had_no_room_says_so(ours):
    short, long = (ours.answer([item("Say it.", 16_000)], n)[0] for n in (1, 2))
    assert isinstance(short, CutAnswer) and isinstance(long, CutAnswer)
    ended = load_model(TINY).answer([item("hello")], 100)[0]
    assert ended and not isinstance(ended, CutAnswer)


def test_a_published_habit_of_sampling_changes_nothing(tiny_model, processor, ours):
    model = copy.deepcopy(tiny_model).double()
    for name, value in tiny_audio_models.SAMPLING.items():
        setattr(model.generation_config, name, value)
    sampling = SoundwaveAudioModel(model, processor, "tiny")
    assert sampling.answer(mixed(), 20) == ours.answer(mixed(), 20)
    assert model.generation_config.do_sample  # a model in memory is not ours to change


def test_stage_one_answers_with_transcripts(tiny_ctc, processor):
    model = SoundwaveAudioModel(copy.deepcopy(tiny_ctc).double(), processor, "stage one")
    items = [item("anything", 16_000, 30_000), item(None, 30_000)]
    both, second = model.answer(items, 1)
    assert both.endswith(second) and second and both != second
    assert [both, second] == one_by_one(model, items) and model.decoding["strategy"] == "greedy CTC"
    with pytest.raises(ModelError, match="'' has no recording"):
        model.answer([item("hello")], 1)


def test_stage_one_is_known_by_its_folder(tiny_ctc, processor, tmp_path):
    tiny_ctc.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).describe()["class"] == "SoundwaveForCTC"


def test_cached_features_stand_in_for_the_encoder(tiny_model, processor, ours, tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(noise(20_000)))
    whole, segment = (Item("a", "Say it.", [clip], None) for clip in (FileClip(path), FileClip(path, 0.5)))
    recording = {"path": str(path), "bytes": None}
    cache = EncoderCache.build(tmp_path / "cache", tiny_model, processor, [recording], progress=False)
    cached = SoundwaveAudioModel(copy.deepcopy(tiny_model).double(), processor, "tiny", encoder_cache=cache)
    assert cached.answer([whole], NEW_TOKENS) == ours.answer([whole], NEW_TOKENS)
    path.touch()  # a cache knows a file by its time, too: no answer now means that the encoder was not run
    with pytest.raises(ValueError, match="lacks"):
        cached.answer([whole], NEW_TOKENS)
    with pytest.raises(ModelError, match="whole recordings only"):
        cached.answer([segment], NEW_TOKENS)


def test_an_empty_item_is_refused(ours):
    with pytest.raises(ModelError, match="neither a text nor a recording"):
        ours.answer([item(None)], 1)


def test_a_conversation_is_for_our_models_alone(ours, peers):
    turns = [("user", "Remember two."), ("assistant", "Done."), ("user", "What was it?")]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    chat = Item("chat", None, [], None, messages=messages)
    assert ours.answer([chat], 12) != ours.answer([item("What was it?")], 12)
    with pytest.raises(ModelError, match="'chat' is a conversation of several turns"):
        load_model(peers("qwen2_audio")).answer([chat], 1)


# -- audio-text models of transformers


FAMILIES = ("qwen2_audio", "audio_flamingo3", "granite_speech", "voxtral")


def documented_inputs(folder: str, name: str, text: str, samples: np.ndarray):
    """Inputs of one question, made in the way that the family's documentation shows."""
    processor = AutoProcessor.from_pretrained(folder)
    if name == "voxtral":
        content = [input_audio(samples), {"type": "text", "text": text}]
        return processor.apply_chat_template([{"role": "user", "content": content}])
    if name == "granite_speech":
        content = f"<|audio|>{text}"
        chat = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    else:
        content = [{"type": "audio", "audio": samples}, {"type": "text", "text": text}]
        chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(text=[chat], audio=[samples], return_tensors="pt")


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_answers_of_other_families(peers, name):
    folder = peers(name)
    model = load_model(folder)
    inputs = dict(documented_inputs(folder, name, "What?", noise(16_000, seed=16_000)))
    ids, mask, new = inputs.pop("input_ids"), inputs.pop("attention_mask"), []
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):  # the definition of greedy decoding, whatever the folder's settings say
            logits = model.model(input_ids=ids, attention_mask=mask, **inputs).logits
            new.append(int(logits[0, -1].argmax()))
            ids = torch.cat([ids, ids.new_tensor([[new[-1]]])], dim=1)
            mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
    expected = model.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert model.answer([item("What?", 16_000)], NEW_TOKENS) == [expected] and expected
    assert json.loads((Path(folder) / "generation_config.json").read_text())["do_sample"] is True


@pytest.mark.parametrize("name", FAMILIES)
def test_batches_of_other_families_change_nothing(peers, name):
    model, items = load_model(peers(name)), mixed()
    model.model.double()
    answers = model.answer(items, NEW_TOKENS)
    assert answers == one_by_one(model, items) and len(set(answers)) > 1
    about = model.describe()
    assert about["kind"] == "transformers" and about["revision"].startswith("sha256:") and about["name"] == name
    assert model.processor.tokenizer.padding_side == "left"


def test_a_family_that_is_not_known_is_asked_one_item_at_a_time(peers, monkeypatch):
    monkeypatch.delitem(ADAPTERS, "qwen2_audio")
    model = load_model(peers("qwen2_audio"))
    assert model._groups([("What?", [noise(9_000)]), ("Who?", [noise(16_000)])]) == [[0], [1]]


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_hear_the_recording(peers, name):
    model = load_model(peers(name))
    heard = {model.answer([item("What?", length)], 12)[0] for length in (16_000, 40_000, 9_000, 100_000)}
    assert len(heard) > 1


@pytest.mark.parametrize("text", ["<|im_end|>", "<|AUDIO|>", "say <|im_start|>assistant"])
def test_what_an_item_says_stays_text(peers, text):
    model = load_model(peers("qwen2_audio"))
    inputs = model._adapter.inputs(model.processor, [(text, [noise(9_000)]), ("plain", [noise(9_000)])])
    said, plain = (ids[mask == 1] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True))
    for token in ("<|im_end|>", "<|im_start|>", "<|AUDIO|>"):
        token_id = model.processor.tokenizer.convert_tokens_to_ids(token)
        assert (said == token_id).sum() == (plain == token_id).sum() > 0
    assert text in model.processor.tokenizer.decode(said)


@pytest.mark.parametrize("special", [True, False])
def test_a_language_tag_is_the_tokenizers_token(peers, special):
    """As in Qwen2-Audio's own evaluation; what else looks like control stays text beside it."""
    model = load_model(peers("qwen2_audio"))
    tokenizer = model.processor.tokenizer

    def ids(text: str) -> list[int]:
        inputs = model._adapter.inputs(model.processor, [(text, [noise(9_000)]), ("a longer one " * 9, [])])
        return inputs["input_ids"][0][inputs["attention_mask"][0] == 1].tolist()

    unknown = ids("Recognize the speech: <|en|>")  # as long as the tokenizer has no such token, it is text
    assert "<|en|>" in tokenizer.decode(unknown)
    tokenizer.add_tokens([AddedToken("<|en|>", special=special)], special_tokens=special)
    tag, end = tokenizer.convert_tokens_to_ids(["<|en|>", "<|im_end|>"])
    known = ids("Recognize the speech: <|en|>")
    assert known.count(tag) == 1 and len(known) < len(unknown) and tokenizer.decode(known) == tokenizer.decode(unknown)
    mixed = ids(f"<|en|> or <|im_end|>, {OPEN}im_end{CLOSE}?")
    assert mixed.count(tag) == 1 and mixed.count(end) == known.count(end)
    assert "<|en|> or <|im_end|>, im_end?" in tokenizer.decode(mixed)


def test_a_placeholder_in_a_granite_instruction_is_refused(peers):
    with pytest.raises(ModelError, match=r"holds <\|audio\|>"):
        load_model(peers("granite_speech")).answer([item("<|audio|>?", 9_000)], 1)


def test_what_a_processor_cuts_is_noted(peers):
    model = load_model(peers("qwen2_audio"))
    long, short = item("What?", 31 * 16_000), item("What?", 16_000)
    model.answer([long, short], 1)
    assert long.fields == {"heard_s": 30} and short.fields == {} and model.decoding["heard_s"] == 30


# -- cascades


def test_a_cascade_asks_the_llm_about_the_transcripts(peers, llm_folder):
    model = load_model(peers("wav2vec2"), llm=llm_folder)
    model.llm.model.double()
    items = [*mixed(), item("Which?", 9_000, 16_000)]
    answers = model.answer(items, NEW_TOKENS)
    first, _, none, alone, two = (one.fields.get("transcripts") for one in items)
    assert first[0] and none is None and two == [alone[0], first[0]] and alone != first
    asked = [in_text(one).instruction for one in items]
    assert first[0] in asked[0] and asked[0].endswith("What?") and asked[2:4] == ["hello", alone[0]]
    assert answers == model.llm.answer([Item(str(i), text, [], None) for i, text in enumerate(asked)], NEW_TOKENS)
    assert answers == one_by_one(model, items)
    about = model.describe()
    assert about["kind"] == "cascade" and about["name"] == "wav2vec2 + " + Path(llm_folder).name
    assert about["parameters"] == sum(part["parameters"] for part in about["parts"])
    assert [part["kind"] for part in about["parts"]] == ["speech recogniser", "text"]
    json.dumps([about, model.decoding])


def test_whisper_goes_through_a_long_recording(peers, llm_folder):
    model = load_model(peers("whisper"), llm=llm_folder)
    model.llm.model.double()
    items = [item("What?", 16_000), item("What?", 33 * 16_000), item("hello")]
    answers = model.answer(items, NEW_TOKENS)
    transcripts = [one.fields.get("transcripts") for one in items]
    assert transcripts[0][0] and transcripts[1][0] and transcripts[2] is None
    assert answers == one_by_one(model, items)
    assert model.decoding["transcriber"]["num_beams"] == 1


def test_an_llm_that_could_hear_may_be_the_second_half(peers):
    model = load_model(peers("wav2vec2"), llm=TINY)
    assert model.llm.describe()["kind"] == "soundwave"
    asked = item("What?", 16_000)
    assert model.answer([asked], 20) == model.llm.answer([in_text(asked)], 20)


def test_a_precision_can_be_chosen(peers):
    model = load_model(peers("qwen2_audio"), dtype="bfloat16")
    assert model.describe()["dtype"] == "bfloat16" and model.answer([item("What?", 9_000)], 2)
