"""The published layout converted to ours must compute what the published inference code computed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from soundwave.modeling_soundwave import convert_released
from soundwave.modeling_soundwave.convert_released import ConversionError, convert
from soundwave.modeling_soundwave.modeling_soundwave import SoundwaveForConditionalGeneration
from soundwave.processing import SoundwaveProcessor

RELEASED = Path(__file__).parent / "fixtures" / "released_tiny"
TOLERANCE = dict(atol=1e-4, rtol=0)
HEAD, EMBEDDINGS = "model.audio_feature_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def expected() -> dict:
    tensors = load_file(RELEASED / "expected.safetensors")
    return {**tensors, "items": json.loads((RELEASED / "expected.json").read_text())}


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    return convert(RELEASED, tmp_path_factory.mktemp("converted") / "model")


@pytest.fixture(scope="module")
def model(converted) -> SoundwaveForConditionalGeneration:
    return SoundwaveForConditionalGeneration.from_pretrained(converted).eval()


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the released checkpoint that a test may damage."""
    return Path(shutil.copytree(RELEASED, tmp_path / "source", ignore=shutil.ignore_patterns("expected*")))


def edit_weights(source: Path, edit) -> None:
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, source / "model.safetensors")


def edit_config(source: Path, **fields) -> None:
    config = json.loads((source / "config.json").read_text())
    config.update(fields)
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def one(expected: dict, i: int) -> dict:
    """The inputs of item i."""
    ids = expected["input_ids"][i : i + 1]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "input_features": expected["input_features"][i : i + 1].float(),
    }


@pytest.mark.parametrize("i", [0, 1])
@torch.no_grad()
def test_reproduces_the_published_outputs(model, expected, i):
    inputs = one(expected, i)
    encoded = model.encode(inputs["input_features"])
    torch.testing.assert_close(encoded[0, ::25], expected[f"encoder.{i}"], **TOLERANCE)
    aligned = model.align(input_features=inputs["input_features"])
    torch.testing.assert_close(aligned.frames[0, ::25], expected[f"aligned.{i}"], **TOLERANCE)
    assert aligned.token_ids[0].tolist() == expected[f"ctc_tokens.{i}"].tolist()
    shrunk, lengths, _ = model.get_audio_features(input_features=inputs["input_features"])
    assert lengths.tolist() == [expected["items"][i]["kept"]]
    torch.testing.assert_close(shrunk[0], expected[f"shrunk.{i}"], **TOLERANCE)
    output = model(**inputs)
    assert output.logits.shape[1] == expected["items"][i]["length"]
    torch.testing.assert_close(output.logits[0], expected[f"logits.{i}"], **TOLERANCE)


@pytest.mark.parametrize("i", [0, 1])
def test_greedy_ids(model, expected, i):
    inputs = one(expected, i)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert output[0].tolist() == inputs["input_ids"][0].tolist() + expected["items"][i]["greedy"]


def test_losses(model, expected):
    targets = expected["asr_targets"]
    inputs = {
        "input_ids": expected["input_ids"],
        "attention_mask": torch.ones_like(expected["input_ids"]),
        "input_features": expected["input_features"].float(),
        "labels": expected["labels"],
    }
    plain = model(**inputs)
    torch.testing.assert_close(plain.loss.detach().view(1), expected["loss_ce"], **TOLERANCE)
    lengths = (targets != -100).sum(dim=1)
    both = model(**inputs, ctc_labels=targets.clamp(min=0), ctc_label_lengths=lengths)
    torch.testing.assert_close(both.loss.detach().view(1), expected["loss"], **TOLERANCE)


def test_released_switches(model):
    config = model.config
    assert (config.alignment_attention, config.mask_padding, config.shrink_context) == ("frame", False, "kept")
    assert (config.keep_blanks, config.audio_padding, config.ctc_head) == (True, "max_length", "separate")
    assert config.ctc_blank_id == config.audio_token_id == 319


def test_round_trip(model, converted, tmp_path):
    model.save_pretrained(tmp_path)
    again = SoundwaveForConditionalGeneration.from_pretrained(tmp_path)
    for name, tensor in load_file(converted / "model.safetensors").items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_every_released_number_arrives(converted):
    """Nothing is lost or invented: as many numbers out as in."""
    theirs, ours = (load_file(folder / "model.safetensors").values() for folder in (RELEASED, converted))
    assert sum(t.numel() for t in theirs) == sum(t.numel() for t in ours)


def test_sharded_source(source, converted, tmp_path):
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, source / file)
        weight_map |= dict.fromkeys(part, file)
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    out = convert(source, tmp_path / "out")
    ours = load_file(converted / "model.safetensors")
    again = load_file(out / "model.safetensors")
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_half_precision_stays(source, tmp_path):
    edit_weights(source, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    out = convert(source, tmp_path / "out")
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.float16}


def test_head_equal_to_the_embeddings_is_tied(source, expected, tmp_path):
    edit_weights(source, lambda tensors: tensors.update({HEAD: tensors[EMBEDDINGS].clone()}))
    out = convert(source, tmp_path / "out")
    assert "ctc_head.weight" not in load_file(out / "model.safetensors")
    model = SoundwaveForConditionalGeneration.from_pretrained(out).eval()
    assert model.config.ctc_head == "tied"
    features = one(expected, 0)["input_features"]
    frames, _, token_ids = model.align(input_features=features)
    by_hand = (frames @ load_file(source / "model.safetensors")[EMBEDDINGS].T).argmax(dim=-1)
    assert torch.equal(token_ids, by_hand)


def test_encoder_outside_the_checkpoint(source, converted, tmp_path):
    """The published class keeps the encoder out of its own weights: it is a Whisper folder or repository."""
    prefix = "model.audio_tower."
    tensors = load_file(source / "model.safetensors")
    encoder = {"model.encoder." + k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    encoder["model.decoder.layer_norm.weight"] = torch.ones(32)
    encoder["proj_out.weight"] = torch.ones(64, 32)
    save_file(encoder, source / "audio_tower" / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith(prefix)}, source / "model.safetensors")
    ours = load_file(converted / "model.safetensors")
    again = load_file(convert(source, tmp_path / "out") / "model.safetensors")
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    tower = shutil.move(source / "audio_tower", tmp_path / "whisper")
    with pytest.raises(ConversionError, match="audio-tower"):
        edit_config(source, audio_tower="/nowhere/models/whisper")
        convert(source, tmp_path / "other")
    moved = load_file(convert(source, tmp_path / "other", audio_tower=tower) / "model.safetensors")
    assert all(torch.equal(ours[name], moved[name]) for name in ours)


def test_computed_buffers_are_skipped(source, tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    edit_weights(source, lambda tensors: tensors.update(extra))
    assert (convert(source, tmp_path / "out") / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "name",
    [
        "model.lbm.encoder_attn.in_proj_weight",
        "model.asr_transformer_encoder.layers.0.self_attn.in_proj_bias",
        "model.audio_tower.layers.1.fc1.weight",
        "model.audio_feature_head.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_missing_tensor_is_named(source, tmp_path, name):
    edit_weights(source, lambda tensors: tensors.pop(name))
    with pytest.raises(ConversionError, match=f"missing tensor {name}"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.mm_projector2.weight", "model.layers.2.mlp.up_proj.weight", "ema.decay"])
def test_surplus_tensor_is_named(source, tmp_path, name):
    edit_weights(source, lambda tensors: tensors.update({name: torch.ones(2)}))
    with pytest.raises(ConversionError, match=f"surplus tensor {name}"):
        convert(source, tmp_path / "out")


def test_wrong_shape_is_named(source, tmp_path):
    edit_weights(source, lambda tensors: tensors.update({"model.out_norm.weight": torch.ones(65)}))
    with pytest.raises(ConversionError, match=r"model.out_norm.weight is \[65\], expected \[64\]"):
        convert(source, tmp_path / "out")


def test_wrong_folders(source, converted, tmp_path):
    with pytest.raises(ConversionError, match="config.json"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(ConversionError, match="not a folder"):
        convert(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(ConversionError, match="needs no conversion"):
        convert(converted, tmp_path / "out")
    with pytest.raises(ConversionError, match="same folder"):
        convert(source, source)
    (source / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match="neither model.safetensors"):
        convert(source, tmp_path / "out")


def test_placeholder_must_be_known(source, tmp_path):
    edit_config(source, audio_patch_token=...)
    with pytest.raises(ConversionError, match="placeholder"):
        convert(source, tmp_path / "out")


def add_tokenizer(source: Path, placeholder_id: int = 319) -> None:
    """A byte-level tokenizer with Llama 3's control tokens, and the placeholder where the released one has it."""
    alphabet = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bare = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    control = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]
    fillers = [f"<|reserved_{i}|>" for i in range(placeholder_id - len(alphabet) - len(control))]
    bare.add_special_tokens([*control, *fillers, "<audio_patch>"])
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<|eot_id|>", pad_token="<|pad|>").save_pretrained(source)


def test_processor_builds_the_released_prompt(source, tmp_path, capsys):
    add_tokenizer(source)
    assert convert_released.main([str(source), str(tmp_path / "out")]) == 0
    assert "tokenizer" not in capsys.readouterr().out
    processor = SoundwaveProcessor.from_pretrained(tmp_path / "out")
    assert processor.audio_token_id == 319
    content = [{"type": "audio", "audio": np.zeros(16000, np.float32), "sampling_rate": 16000}]
    content.append({"type": "text", "text": "What is said?"})
    inputs = processor.apply_chat_template([{"role": "user", "content": content}])
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(319) == 1
    assert processor.tokenizer.decode(ids) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\nYou are a helpful language and speech "
        "assistant. You are able to understand the speech content that the user provides, and assist the user with a "
        "variety of tasks using natural language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n<audio_patch>"
        "What is said?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n"
    )
    assert inputs["input_features"].shape == (1, 80, 3000)  # whole windows, as the published code
    prompt, answer = processor.prompt_and_answer_ids(
        [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": "Nothing."}]},
        ]
    )
    assert prompt == ids and processor.tokenizer.decode(answer) == "Nothing.<|eot_id|>"
    model = SoundwaveForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.generate(**inputs, max_new_tokens=2).shape == (1, len(ids) + 2)


def test_placeholder_from_the_tokenizer(source, tmp_path):
    add_tokenizer(source)
    edit_config(source, audio_patch_token=...)
    model = SoundwaveForConditionalGeneration.from_pretrained(convert(source, tmp_path / "out"))
    assert model.config.audio_token_id == 319
    edit_config(source, audio_patch_token=7)
    with pytest.raises(ConversionError, match="audio_patch_token is 7 in config.json, but <audio_patch> is 319"):
        convert(source, tmp_path / "other")


def test_generation_config_keeps_its_ends_and_does_not_sample(source, tmp_path):
    fields = {"eos_token_id": [1, 7], "bos_token_id": 0, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (source / "generation_config.json").write_text(json.dumps(fields))
    model = SoundwaveForConditionalGeneration.from_pretrained(convert(source, tmp_path / "out"))
    assert model.generation_config.eos_token_id == [1, 7]
    assert not model.generation_config.do_sample and model.generation_config.temperature in (None, 1.0)


def test_command_says_what_it_wrote(source, tmp_path, capsys):
    assert convert_released.main([str(source), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "model written" in said and "no tokenizer" in said
    assert not (tmp_path / "out" / "processor_config.json").exists()
