"""What cannot be evaluated: kinds of models that answer nothing, folders with damage, what is not installed here."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from soundwave.assets import TINY
from soundwave.eval.models import ModelError, load_model
from soundwave.eval.models.transformers_audio import ADAPTERS
from tests.components import save_encoder, save_llm


def test_kinds_that_answer_nothing_are_named(peers, llm_folder, tmp_path):
    with pytest.raises(ModelError, match="hears nothing.*--llm"):
        load_model(llm_folder)
    for name in ("whisper", "wav2vec2"):
        with pytest.raises(ModelError, match="writes down what is said.*--llm"):
            load_model(peers(name))
    with pytest.raises(ModelError, match="WhisperEncoder.*an encoder alone"):
        load_model(save_encoder(tmp_path / "encoder"))
    with pytest.raises(ModelError, match="no speech recogniser"):
        load_model(llm_folder, llm=llm_folder)
    with pytest.raises(ModelError, match="writes down what is said"):
        load_model(peers("wav2vec2"), llm=peers("wav2vec2"))
    with pytest.raises(ValueError, match="no model folder"):
        load_model(str(tmp_path / "nowhere"))


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen2_audio", ')


def damage_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def lose_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    save_file(dict(list(tensors.items())[1:]), folder / "model.safetensors", {"format": "pt"})


def lose_the_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


@pytest.mark.parametrize("damage", [damage_config, damage_weights, lose_weights, lose_a_tensor, lose_the_tokenizer])
@pytest.mark.parametrize("name", ["qwen2_audio", "tiny"])
def test_a_damaged_folder_is_refused(peers, tmp_path, damage, name):
    source = TINY if name == "tiny" else peers(name)
    folder = shutil.copytree(source, tmp_path / "damaged", ignore=shutil.ignore_patterns("*.py"))
    damage(folder)
    with pytest.raises(ModelError, match="damaged: "):
        load_model(str(folder))


def test_a_text_llm_without_a_template_is_refused(peers, tmp_path):
    folder = Path(save_llm(tmp_path / "base"))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template.*instruction-tuned"):
        load_model(peers("wav2vec2"), llm=str(folder))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(ADAPTERS, "voxtral", dataclasses.replace(ADAPTERS["voxtral"], needs="not_installed_here"))
    transformers.VoxtralConfig(architectures=["VoxtralForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="pip install not-installed-here"):
        load_model(str(tmp_path))


def test_a_device_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="no CUDA device"):
        load_model(str(TINY), device="cuda")
