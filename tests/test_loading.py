"""Stage repositories: what is written, what comes back, and that nothing is missing in silence."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForCTC, WhisperModel

from soundwave.modeling_soundwave import SoundwaveForConditionalGeneration, SoundwaveForCTC
from soundwave.modeling_soundwave.weights_soundwave import WeightsError, lora_state_dict
from tests.test_modeling import batch_of, mel
from tests.tiny_models import AUDIO_ID, tiny_config, tiny_model

LORA = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def inject_lora(model) -> None:
    """LoRA on the LLM as a trainer does it, with values that change the answer."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=LORA["target_modules"])
    inject_adapter_in_model(config, model.language_model)
    model.config.lora = LORA
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)


def names(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.fixture
def batch():
    return batch_of([[3, mel(50, 1).float(), 5], [4, 6]])


@pytest.fixture
def components(tmp_path):
    """A Whisper checkpoint and a Llama checkpoint in folders."""
    config = tiny_config()
    torch.manual_seed(5)
    WhisperModel(config.audio_config).save_pretrained(tmp_path / "whisper")
    AutoModelForCausalLM.from_config(config.text_config).save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    assert (tmp_path / "llama" / "model.safetensors.index.json").exists()
    return str(tmp_path / "whisper"), str(tmp_path / "llama")


@pytest.mark.parametrize("head", ["tied", "separate"])
def test_round_trip_gives_the_same_logits(tmp_path, batch, head):
    model = tiny_model(dtype=torch.float32, ctc_head=head)
    model.save_pretrained(tmp_path)
    again = SoundwaveForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert type(AutoModel.from_pretrained(tmp_path)) is SoundwaveForConditionalGeneration


def test_lora_is_saved_apart_and_merged_at_load(tmp_path, batch):
    model = tiny_model(dtype=torch.float32)
    plain = model(**batch).logits
    inject_lora(model)
    expected = model(**batch).logits
    assert not torch.allclose(plain, expected)
    model.save_pretrained(tmp_path)
    q_proj = "language_model.model.layers.0.self_attn.q_proj"
    assert {f"{q_proj}.{part}" for part in ("weight", "lora_A.weight", "lora_B.weight")} <= names(tmp_path)
    assert not any("base_layer" in name for name in names(tmp_path))

    merged = SoundwaveForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    assert merged.config.lora is None
    unmerged = SoundwaveForConditionalGeneration.from_pretrained(tmp_path, merge_lora=False)
    assert torch.equal(unmerged(**batch).logits, plain)
    assert set(lora_state_dict(str(tmp_path))) == {name for name in names(tmp_path) if "lora_" in name}


def test_pinned_components_are_read_from_their_own_repositories(tmp_path, components, batch):
    audio, text = components
    model = SoundwaveForConditionalGeneration.from_components(audio, text, AUDIO_ID, audio_padding="longest")
    assert model.config.text_model_id is None  # a folder of this machine is never written down
    inject_lora(model)
    expected = model(**batch).logits
    for kind, source in (("audio", audio), ("text", text)):  # as after from_components with Hub ids
        setattr(model.config, f"{kind}_model_id", source)
        setattr(model.config, f"{kind}_model_revision", "0123abc")
    model.save_pretrained(tmp_path / "stage")
    saved = names(tmp_path / "stage")
    assert all("lora_" in name for name in saved if name.startswith("language_model."))
    assert not any(name.startswith("audio_tower.") for name in saved)

    again = SoundwaveForConditionalGeneration.from_pretrained(tmp_path / "stage")
    torch.testing.assert_close(again(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    again.save_pretrained(tmp_path / "merged")  # its LLM is no longer the pinned one: saved whole
    assert "language_model.lm_head.weight" in names(tmp_path / "merged")
    ctc = SoundwaveForCTC.from_pretrained(tmp_path / "stage")
    audio_inputs = {key: batch[key] for key in ("input_features", "input_features_mask", "windows_per_audio")}
    audio_inputs["window_offsets"] = batch["window_offsets"]
    assert ctc.transcribe_ids(**audio_inputs) == again.transcribe_ids(**audio_inputs)


@pytest.mark.parametrize("head", ["tied", "separate"])
def test_stage_two_starts_where_stage_one_ended(tmp_path, components, batch, head):
    audio, text = components
    stage_one = SoundwaveForCTC.from_components(audio, text, AUDIO_ID, audio_padding="longest", ctc_head=head)
    with torch.no_grad():
        stage_one.ctc_head.blank.normal_()
        stage_one.alignment_adapter.proj.bias.normal_()
    stage_one.save_pretrained(tmp_path / "one")
    assert type(AutoModelForCTC.from_pretrained(tmp_path / "one")) is SoundwaveForCTC
    assert type(AutoModel.from_pretrained(tmp_path / "one")) is SoundwaveForCTC
    stage_two = SoundwaveForConditionalGeneration.from_ctc(tmp_path / "one", text, ctc_weight=0.5)
    assert stage_two.config.ctc_weight == 0.5
    audio_inputs = {key: batch[key] for key in stage_two.AUDIO_FEATURES if key in batch}
    assert stage_two.transcribe_ids(**audio_inputs) == stage_one.transcribe_ids(**audio_inputs)
    assert torch.isfinite(stage_two(**batch).logits).all()
    with pytest.raises(WeightsError, match="no field ctc_wieght"):
        SoundwaveForConditionalGeneration.from_ctc(tmp_path / "one", text, ctc_wieght=0.5)
    with pytest.raises(ValueError, match="shrink_context is 'dropt', expected one of"):
        SoundwaveForConditionalGeneration.from_ctc(tmp_path / "one", text, shrink_context="dropt")
    with pytest.raises(WeightsError, match="names no LLM on the Hub; give text_model"):
        SoundwaveForConditionalGeneration.from_ctc(tmp_path / "one")
    with pytest.raises(WeightsError, match="stage I repository: it has no LLM"):
        SoundwaveForConditionalGeneration.from_pretrained(tmp_path / "one")


@pytest.mark.parametrize("change", ["missing", "surplus"])
def test_a_missing_or_surplus_tensor_is_named(tmp_path, change):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if change == "missing":
        del tensors["shrinking_adapter.norm.weight"]
    else:
        tensors["shrinking_adapter.norm.weight2"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WeightsError, match="shrinking_adapter.norm.weight"):
        SoundwaveForConditionalGeneration.from_pretrained(tmp_path)


def test_a_folder_without_weights_says_so(tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="neither model.safetensors nor"):
        SoundwaveForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", [lambda whole: whole[:-100], lambda whole: b"", lambda whole: whole[:6]])
def test_a_file_cut_short_is_named(tmp_path, components, damage):
    tiny_model().save_pretrained(tmp_path / "stage", max_shard_size="50KB")
    SoundwaveForCTC.from_components(*components, audio_token_id=AUDIO_ID).save_pretrained(tmp_path / "aligned")
    encoder, llm = components
    shard = sorted((tmp_path / "stage").glob("model-*.safetensors"))[-1]
    first = min((tmp_path / "llama").glob("model-*.safetensors"))
    for path, load, name in (
        (shard, lambda: SoundwaveForConditionalGeneration.from_pretrained(tmp_path / "stage"), shard),
        (first, lambda: SoundwaveForCTC.from_components(encoder, llm, audio_token_id=AUDIO_ID), first),
        (first, lambda: SoundwaveForConditionalGeneration.from_components(encoder, llm, AUDIO_ID), llm),
        (first, lambda: SoundwaveForConditionalGeneration.from_ctc(tmp_path / "aligned", llm), llm),
    ):
        whole = path.read_bytes()
        path.write_bytes(damage(whole))
        with pytest.raises(WeightsError, match=f"{name} cannot be read .*; fetch or write it again"):
            load()
        path.write_bytes(whole)
        load()


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', "{}"])
def test_a_damaged_index_is_named(tmp_path, text):
    tiny_model().save_pretrained(tmp_path, max_shard_size="50KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match="model.safetensors.index.json cannot be read .* weight_map"):
        SoundwaveForConditionalGeneration.from_pretrained(tmp_path)


def test_the_librarys_loader_arguments_work(tmp_path, batch):
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    again = SoundwaveForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.bfloat16, device_map="cpu", attn_implementation="eager", ctc_weight=0.7
    )
    assert again.dtype == torch.bfloat16 and again.config.ctc_weight == 0.7
    assert again.language_model.config._attn_implementation == "eager"
    _, info = SoundwaveForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]


FRESH_PROCESS = """
import sys
sys.modules["soundwave"] = None  # as if the package were not installed: importing it fails
import json, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForCTC, AutoModelForMultimodalLM
folder, batch = sys.argv[1], torch.load(sys.argv[2])
ids = {}
for auto in (AutoModel, AutoModelForMultimodalLM, AutoModelForCausalLM):
    model = auto.from_pretrained(folder, trust_remote_code=True)
    ids[auto.__name__] = model.generate(**batch, max_new_tokens=5, do_sample=False).tolist()
AutoConfig.from_pretrained(folder, trust_remote_code=True)
ctc = AutoModelForCTC.from_pretrained(folder, trust_remote_code=True)
audio = {key: batch[key] for key in batch if key.startswith(("input_features", "window"))}
ids["ctc"] = ctc.transcribe_ids(**audio)
print(json.dumps(ids))
"""


def test_loads_as_remote_code_without_the_package(tmp_path, batch):
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "repository")
    torch.save(batch, tmp_path / "batch.pt")
    result = subprocess.run(
        [sys.executable, "-I", "-c", FRESH_PROCESS, tmp_path / "repository", tmp_path / "batch.pt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    ids = json.loads(result.stdout.splitlines()[-1])
    expected = model.generate(**batch, max_new_tokens=5, do_sample=False).tolist()
    assert ids["AutoModel"] == ids["AutoModelForMultimodalLM"] == ids["AutoModelForCausalLM"] == expected
    audio_inputs = {key: batch[key] for key in model.AUDIO_FEATURES if key in batch}
    assert ids["ctc"] == model.transcribe_ids(**audio_inputs)


def test_configuration_survives_saving(tmp_path):
    config = tiny_config(ctc_token_ids=[3, 5], lora=LORA, shrink_context="all")
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert (again.ctc_token_ids, again.lora, again.shrink_context) == ([3, 5], LORA, "all")
    assert again.text_config.hidden_size == 32 and again.audio_config.d_model == 24
