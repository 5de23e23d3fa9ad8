"""`device_map` with parts on disk: the ids are those of a model in memory, whichever part lies elsewhere.

Without a GPU, parts on disk are what shows whether every module is reached by a call: accelerate brings a weight only
for the forward of the module that holds it.
"""

import json

import pytest
import torch
from transformers import LlamaConfig

from soundwave import SoundwaveForConditionalGeneration, SoundwaveForCTC
from soundwave.modeling_soundwave.weights_soundwave import WeightsError
from tests.test_modeling import batch_of, mel
from tests.tiny_models import tiny_config, tiny_model

PARTS = ("audio_tower", "alignment_adapter", "ctc_head", "shrinking_adapter", "language_model")
LAYERS = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
VARIANTS = {
    "tied": {},
    "tied_llm": {
        "text_config": LlamaConfig.from_dict(tiny_config().text_config.to_dict() | {"tie_word_embeddings": True})
    },
    "separate": {"ctc_head": "separate"},
    "restricted": {"ctc_token_ids": list(range(3, 50, 2))},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folders = {name: tmp_path_factory.mktemp(name) for name in VARIANTS}
    for name, fields in VARIANTS.items():
        tiny_model(dtype=torch.float32, **fields).save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def folder(folders):
    return folders["tied"]


@pytest.fixture(scope="module")
def batch():
    return batch_of([[3, mel(90, 1), 5], [4, 6, 7], [mel(30, 2), 9, mel(4, 3)]])


def placed(folder, device_map, tmp_path, kind=SoundwaveForConditionalGeneration, **options):
    return kind.from_pretrained(
        folder, dtype=torch.float64, device_map=device_map, offload_folder=tmp_path / "offload", **options
    )


def assert_equal_to_whole(model, folder, batch):
    whole = SoundwaveForConditionalGeneration.from_pretrained(folder, dtype=torch.float64)
    assert torch.equal(model.generate(**batch, max_new_tokens=4), whole.generate(**batch, max_new_tokens=4))
    torch.testing.assert_close(model(**batch).logits, whole(**batch).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_on_disk(folder, batch, tmp_path, part):
    model = placed(folder, dict.fromkeys(PARTS, "cpu") | {part: "disk"}, tmp_path)
    away = {part for part in PARTS if any(p.is_meta for p in model.get_submodule(part).parameters())}
    assert away == {part}
    assert_equal_to_whole(model, folder, batch)


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_on_disk(folders, batch, tmp_path, variant):
    model = placed(folders[variant], dict.fromkeys(PARTS, "disk"), tmp_path)
    assert_equal_to_whole(model, folders[variant], batch)


def test_layers_of_the_llm_on_disk(folder, batch, tmp_path):
    device_map = dict.fromkeys(PARTS[:-1], "cpu") | {"language_model.lm_head": "disk"}
    device_map |= {f"language_model.model.{name}": "disk" if i % 2 == 0 else "cpu" for i, name in enumerate(LAYERS)}
    model = placed(folder, device_map, tmp_path)
    assert_equal_to_whole(model, folder, batch)


@pytest.mark.parametrize("away", ["language_model.lm_head", "language_model.model.embed_tokens"])
def test_tied_embeddings_in_two_places(folders, tmp_path, away):
    device_map = dict.fromkeys(PARTS, "cpu") | {away: "disk"}
    with pytest.raises(WeightsError, match="lm_head.weight and .*embed_tokens.weight on disk.* the same place"):
        placed(folders["tied_llm"], device_map, tmp_path)
    in_memory = placed(folders["tied_llm"], "cpu", tmp_path).language_model
    assert in_memory.lm_head.weight is in_memory.get_input_embeddings().weight


def test_whole_windows_with_everything_on_disk(tmp_path):
    tiny_model(dtype=torch.float32, audio_padding="max_length").save_pretrained(tmp_path / "model")
    features = torch.randn(1, 16, 160).double()
    audio = {"input_ids": torch.tensor([[3, 60, 5]]), "input_features": features}
    assert_equal_to_whole(
        placed(tmp_path / "model", dict.fromkeys(PARTS, "disk"), tmp_path), tmp_path / "model", audio
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_ctc_without_an_llm_from_disk(folders, batch, tmp_path, variant):
    folder = folders[variant]
    model = placed(folder, dict.fromkeys(PARTS[:3], "disk"), tmp_path, SoundwaveForCTC)
    whole = SoundwaveForCTC.from_pretrained(folder, dtype=torch.float64)
    audio = {name: batch[name] for name in batch if name.startswith(("input_features", "window"))}
    assert model.transcribe_ids(**audio) == whole.transcribe_ids(**audio)
    targets = {"ctc_labels": torch.tensor([[5, 7]] * 3), "ctc_label_lengths": torch.tensor([2, 1, -1])}
    torch.testing.assert_close(model(**audio, **targets).loss, whole(**audio, **targets).loss)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_maps_that_need_no_offload(folder, batch, tmp_path, device_map):
    model = placed(folder, device_map, tmp_path)
    assert_equal_to_whole(model, folder, batch)


def test_memory_that_does_not_suffice(folder, batch, tmp_path):
    model = placed(folder, "auto", tmp_path, max_memory={"cpu": "200KB"})
    places = set(model.hf_device_map.values())
    assert places == {"cpu", "disk"}, json.dumps(model.hf_device_map)
    assert_equal_to_whole(model, folder, batch)


def test_transcripts_and_drafts_with_the_encoder_on_disk(folder, batch, tmp_path):
    """The first parameter is nowhere then: inputs must not follow it."""
    model = placed(folder, dict.fromkeys(PARTS, "cpu") | {"audio_tower": "disk"}, tmp_path)
    whole = SoundwaveForConditionalGeneration.from_pretrained(folder, dtype=torch.float64)
    windows = batch["input_features"], batch["input_features_mask"]
    for (heard, _), (expected, _) in zip(model.hear(*windows), whole.hear(*windows), strict=True):
        assert torch.equal(heard.token_ids, expected.token_ids)
    drafted = model.generate(**batch, max_new_tokens=4, ctc_draft=True)
    assert torch.equal(drafted, whole.generate(**batch, max_new_tokens=4))
