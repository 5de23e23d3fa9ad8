"""Any encoder with any LLM (issue: any pair): three LLM families and two encoders, made from folders.

Chat templates of the families are tested in `test_chat`, drafting in `test_drafting`; here is what the LLM's own code
could break: losses, gradients, generation from embeddings, files. And that stage I's adapter keeps its LLM.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.testing_utils import CaptureLogger

from soundwave import SoundwaveForConditionalGeneration, SoundwaveForCTC, SoundwaveProcessor
from soundwave.modeling_soundwave import same_llm_soundwave
from soundwave.modeling_soundwave.weights_soundwave import WeightsError
from soundwave.processing import SAMPLING_RATE
from soundwave.training.building import build_model
from soundwave.training.collator import SoundwaveCollator
from soundwave.training.stages import StageConfig
from tests.components import WINDOW_S, save_llm, save_w2v_bert
from tests.conftest import tone
from tests.local_hub import LocalHub
from tests.test_batch_invariance import recording

FAMILIES = {"llama3": "llama", "qwen3": "qwen3", "gemma": "gemma3_text"}
PROMPT = {"task": "asr", "instruction": "Transcribe the speech."}
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory, encoder_folder) -> dict[str, tuple[str, dict]]:
    """Folders, and the fields that they want."""
    folder = save_w2v_bert(tmp_path_factory.mktemp("w2v_bert"))
    return {"whisper": (encoder_folder, {}), "w2v-bert": (folder, {"window_seconds": WINDOW_S})}


@pytest.fixture(scope="module")
def llms(tmp_path_factory) -> dict[str, str]:
    return {family: save_llm(tmp_path_factory.mktemp(family), family=family) for family in FAMILIES}


@pytest.fixture(scope="module", params=[(e, f) for f in FAMILIES for e in ("whisper", "w2v-bert")], ids="-".join)
def pair(request, encoders, llms):
    """Model (float32, so that it is saved as it is) and processor of an encoder and an LLM."""
    encoder, family = request.param
    folder, fields = encoders[encoder]
    parts = (folder, llms[family])
    processor = SoundwaveProcessor.from_components(*parts, audio_padding="longest", **fields)
    torch.manual_seed(4)
    model = SoundwaveForConditionalGeneration.from_components(
        *parts, processor.audio_token_id, audio_padding="longest", **fields
    )
    assert model.language_model.config.model_type == FAMILIES[family]
    return model, processor


def conversations() -> list[list[dict]]:
    """Recordings of one and of several windows, two in a turn, and a turn without one."""
    audio = [
        {"type": "audio", "audio": recording(s, 0.3, k), "sampling_rate": 16_000} for k, s in enumerate((0.6, 4.3))
    ]
    said = {"type": "text", "text": "what is said"}
    return [
        [{"role": "user", "content": [audio[0], said]}],
        [{"role": "user", "content": [audio[1], said, audio[0]]}],
        [{"role": "user", "content": [said]}],
    ]


def test_loss_and_gradients(pair):
    """Stage II's losses are finite and reach both adapters, the head and the LLM, but no frozen encoder."""
    model, processor = pair
    model.zero_grad()
    rows = [
        {"id": str(k), "audio": {"path": None, "bytes": wav(seconds)}, "transcript": text, **PROMPT, "answer": text}
        for k, (seconds, text) in enumerate(((0.8, "red boxes"), (3.1, "three"), (1.2, "the kitchen")))
    ]
    out = model(**SoundwaveCollator(processor)(rows))
    assert out.ce_loss > 0 and out.ctc_loss > 0
    torch.testing.assert_close(out.loss, out.ce_loss + 0.3 * out.ctc_loss)
    out.loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    parts = ("alignment_adapter.proj", "shrinking_adapter.norm", "ctc_head.log_scale", "language_model.model.layers.0")
    for part in parts:
        assert any(name.startswith(part) for name in trained), part
    assert not any(name.startswith("audio_tower.") for name in trained)
    model.zero_grad()


def wav(seconds: float) -> bytes:
    """A recording as the bytes of a WAV file."""
    file = io.BytesIO()
    soundfile.write(file, recording(seconds, 0.3, round(10 * seconds)), SAMPLING_RATE, format="WAV")
    return file.getvalue()


def test_generated_ids_equal_those_of_each_row_decoded_step_by_step(pair):
    """In float64, against greedy decoding of one row without a cache: position ids, padding, sliding windows."""
    model, processor = pair
    model.double()
    inputs = processor.apply_chat_template(conversations(), add_generation_prompt=True)
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, inputs["input_ids"].shape[1] :].tolist()
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    for row, together in zip(conversations(), ids, strict=True):
        one = processor.apply_chat_template([row], add_generation_prompt=True)
        said: list[int] = []
        while len(said) < 6 and not ends & set(said):
            said.append(int(model(**one, use_cache=False).logits[0, -1].argmax()))
            one["input_ids"] = torch.cat([one["input_ids"], torch.tensor([[said[-1]]])], dim=1)
            one["attention_mask"] = torch.ones_like(one["input_ids"])
        assert together[: len(said)] == said
        assert set(together[len(said) :]) <= {model.generation_config.pad_token_id}
    model.float()


def test_a_saved_model_gives_the_same_logits(pair, tmp_path):
    model, processor = pair
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, loaded = (
        kind.from_pretrained(tmp_path) for kind in (SoundwaveForConditionalGeneration, SoundwaveProcessor)
    )
    inputs = loaded.apply_chat_template(conversations(), add_generation_prompt=True)
    expected = processor.apply_chat_template(conversations(), add_generation_prompt=True)
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    assert torch.equal(again(**inputs).logits, model(**expected).logits)
    heard = [m.transcribe_ctc(tone(2.9), p, SAMPLING_RATE) for m, p in ((again, loaded), (model, processor))]
    assert heard[0].token_ids == heard[1].token_ids and heard[0].text == heard[1].text


def test_a_model_around_an_llm_is_no_llm(encoder_folder, tmp_path):
    """A multimodal model has no vocabulary of its own in its configuration."""
    AutoConfig.for_model("gemma3").save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="is a gemma3, which nests its LLM"):
        SoundwaveForCTC.from_components(encoder_folder, str(tmp_path))


# The LLM under stage I's adapter


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory, encoder_folder, llms) -> dict[str, str]:
    """Stage I folders by the kind of CTC head, as a run leaves them: over the Llama, with the processor."""
    folders = {}
    for head in ("tied", "separate"):
        folders[head] = str(tmp_path_factory.mktemp(head))
        processor = SoundwaveProcessor.from_components(encoder_folder, llms["llama3"], audio_padding="longest")
        torch.manual_seed(5)
        model = SoundwaveForCTC.from_components(
            encoder_folder, llms["llama3"], processor.audio_token_id, audio_padding="longest", ctc_head=head
        )
        model.save_pretrained(folders[head])
        processor.save_pretrained(folders[head])
    return folders


def variant(source: str, folder: Path, change) -> str:
    """A copy of an LLM's folder whose embeddings went through ``change``."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = change(tensors["model.embed_tokens.weight"]).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def from_ctc(folder: str, llm: str) -> tuple[SoundwaveForConditionalGeneration, str]:
    """Stage II's start, and what was logged."""
    with CaptureLogger(same_llm_soundwave.logger) as log:
        model = SoundwaveForConditionalGeneration.from_ctc(folder, llm)
    return model, log.out


@pytest.mark.parametrize("head", ["tied", "separate"])
def test_stage_two_starts_from_a_stage_one_folder_over_the_same_llm(stage_one, llms, head):
    model, logged = from_ctc(stage_one[head], llms["llama3"])
    ctc = SoundwaveForCTC.from_pretrained(stage_one[head])
    processor = SoundwaveProcessor.from_pretrained(stage_one[head])
    features = processor.audio_features([tone(0.9)])
    assert model.transcribe_ids(**features) == ctc.transcribe_ids(**features)
    assert not logged
    with pytest.raises(WeightsError, match="names no LLM on the Hub; give text_model"):
        SoundwaveForConditionalGeneration.from_ctc(stage_one[head])


@pytest.mark.parametrize("head", ["tied", "separate"])
@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [("vocab_size", 600, "a vocabulary of 600, but .* a vocabulary of"), ("hidden_size", 32, "a width of 32, but")],
)
def test_an_llm_of_another_size_is_refused(stage_one, llms, tmp_path, head, field, value, reason):
    config = AutoConfig.from_pretrained(llms["llama3"])
    setattr(config, field, value)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=reason):
        from_ctc(stage_one[head], str(tmp_path))
    run = StageConfig.for_stage("shrink", start=stage_one[head], text_model=str(tmp_path))
    with pytest.raises(WeightsError, match=reason):
        build_model(run)


def renumber(folder: str) -> None:
    """Give some pieces of a tokenizer the numbers of others: the same sizes, but ids that mean something else."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_encoder
    first, second = [piece for piece in sorted(vocabulary) if piece not in added and piece.isalpha()][:2]
    path = Path(folder) / "tokenizer.json"
    pieces = {first: vocabulary[second], second: vocabulary[first]}
    text = path.read_text(encoding="utf-8")
    data = json.loads(text)
    data["model"]["vocab"] |= pieces
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.mark.parametrize("head", ["tied", "separate"])
def test_an_llm_with_another_tokenizer_of_the_same_size_is_refused(stage_one, llms, tmp_path, head):
    other = variant(llms["llama3"], tmp_path / "llm", lambda rows: rows)
    renumber(other)
    with pytest.raises(WeightsError, match="has another tokenizer .*: 2 token ids differ, .* is .* and was"):
        from_ctc(stage_one[head], other)


def test_an_llm_with_other_embeddings_is_refused(stage_one, llms, tmp_path):
    """The same tokenizer, but trained from other weights: a tied head would score against the wrong rows."""
    other = variant(llms["llama3"], tmp_path / "llm", torch.randn_like)
    with pytest.raises(WeightsError, match=r"other embeddings .*mean cosine -?0\.0"):
        from_ctc(stage_one["tied"], other)


@pytest.mark.parametrize("tokenizer", [True, False])
def test_a_fine_tuned_variant_is_taken_with_a_warning(stage_one, llms, tmp_path, tokenizer):
    """Its embeddings are slightly different, a special token has another name, and it may come without tokenizer."""
    tuned = variant(llms["llama3"], tmp_path / "llm", lambda rows: rows + 0.1 * rows.std() * torch.randn_like(rows))
    path = Path(tuned) / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    assert "<|end_of_text|>" in text
    path.write_text(text.replace("<|end_of_text|>", "<|fim_pad|>"), encoding="utf-8")
    if not tokenizer:
        path.unlink()
        (Path(tuned) / "tokenizer_config.json").unlink()
    model, logged = from_ctc(stage_one["tied"], tuned)
    assert "is a variant of the LLM that" in logged and "cosine of their embeddings is 0.99" in logged
    assert torch.equal(model.ctc_rows(), load_file(Path(tuned) / "model.safetensors")["model.embed_tokens.weight"])
    rounded = variant(llms["llama3"], tmp_path / "rounded", lambda rows: rows.bfloat16().float())
    assert not from_ctc(stage_one["tied"], rounded)[1]  # another type is no other model


HUB = """
    from pathlib import Path
    import torch
    from huggingface_hub import HfApi
    from soundwave import SoundwaveForConditionalGeneration, SoundwaveForCTC, SoundwaveProcessor
    from soundwave.modeling_soundwave.weights_soundwave import WeightsError
    from soundwave.training.building import build_model
    from soundwave.training.stages import StageConfig
    from tests.components import save_encoder, save_llm

    torch.set_num_threads(1)
    hub = HfApi()
    for name in ("encoder", "llm", "other"):
        hub.create_repo(f"ours/{name}")
    commits = {
        name: hub.upload_folder(repo_id=f"ours/{name}", folder_path=folder).oid
        for name, folder in {
            "encoder": save_encoder(Path("encoder")),
            "llm": save_llm(Path("llm")),
            "other": save_llm(Path("other"), seed=9),
        }.items()
    }
    processor = SoundwaveProcessor.from_components("ours/encoder", "ours/llm", audio_padding="longest")
    aligned = SoundwaveForCTC.from_components(
        "ours/encoder", "ours/llm", processor.audio_token_id, audio_padding="longest"
    )
    with torch.no_grad():
        aligned.alignment_adapter.proj.bias.normal_()
    hub.create_repo("ours/one")
    for part in (aligned, processor):
        part.save_pretrained("one")
        part.push_to_hub("ours/one")
    hub.upload_folder(repo_id="ours/llm", folder_path="other")  # the LLM's repository moves on
    for start in ("one", "ours/one"):  # a run's folder, and what it pushed
        model, _ = build_model(StageConfig.for_stage("shrink", start=start, lora_r=2))
        assert model.config.text_model_id == "ours/llm" and model.config.text_model_revision == commits["llm"]
        assert torch.equal(model.alignment_adapter.proj.bias, aligned.alignment_adapter.proj.bias)
        assert torch.equal(model.ctc_rows(), aligned.ctc_head.weight)
    for llm in ("ours/other", "ours/llm"):
        try:
            SoundwaveForConditionalGeneration.from_ctc("ours/one", llm)
        except WeightsError as error:
            assert "has other embeddings" in str(error)
        else:
            raise AssertionError(llm)
    print("done")
"""


def test_stage_two_starts_from_a_hub_id_and_its_llm_at_the_commit_of_stage_one(tmp_path):
    with LocalHub(tmp_path / "hub") as hub:
        environment = {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
        inherited = {name: value for name, value in os.environ.items() if name not in offline}
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(HUB)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=inherited | hub.environment() | environment,
        )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1] == "done"
