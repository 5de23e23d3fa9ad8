"""What only a GPU shows: bf16 ids against the CPU's, flash attention, compiled decoding, maps over GPU, CPU and disk.

And training through the FSDP2 launch file, which accelerate refuses on a CPU.

Run with `pytest -m gpu`.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils import is_flash_attn_2_available

from soundwave import SoundwaveForConditionalGeneration, SoundwaveForCTC, SoundwaveProcessor
from soundwave.assets import TINY
from tests.test_compatibility import spoken
from tests.test_compile import AUDIO_LENGTHS, batches, graphs
from tests.test_device_map import PARTS
from tests.test_modeling import batch_of, mel
from tests.tiny_models import tiny_model
from tests.training_rows import write_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
MARGIN = 5e-2  # of the two best scores in bf16, below which an id may flip
load = SoundwaveForConditionalGeneration.from_pretrained


def on_gpu(batch: dict) -> dict:
    return {name: value.cuda() for name, value in batch.items()}


@pytest.fixture(scope="module")
def inputs():
    processor = SoundwaveProcessor.from_pretrained(TINY)
    return processor(audio=spoken(24)[1], sampling_rate=16_000)


@pytest.fixture(scope="module")
def on_cpu(inputs):
    return load(TINY, dtype=torch.float32).generate(
        **inputs, max_new_tokens=32, return_dict_in_generate=True, output_scores=True
    )


def assert_same_but_for_close_scores(ids: torch.Tensor, expected, margin: float, prompt: int) -> None:
    ids, reference = ids.cpu()[:, prompt:], expected.sequences[:, prompt:]
    length = min(ids.shape[1], reference.shape[1])
    differ = ids[:, :length] != reference[:, :length]
    for row in torch.nonzero(differ.any(dim=1)).flatten().tolist():
        first = int(differ[row].int().argmax())
        best, second = expected.scores[first][row].log_softmax(dim=-1).topk(2).values
        assert best - second < margin
    print(f"{int(differ.any(dim=1).sum())} of {len(ids)} transcripts differ")


ATTENTION = ["eager", "sdpa", "flex_attention"]
ATTENTION += ["flash_attention_2"] if is_flash_attn_2_available() else []


@pytest.mark.parametrize("attention", ATTENTION)
def test_bf16_says_what_the_cpu_says(inputs, on_cpu, attention):
    model = load(TINY, dtype=torch.bfloat16, device_map="cuda", attn_implementation=attention)
    ids = model.generate(**inputs.to("cuda"), max_new_tokens=32)
    assert_same_but_for_close_scores(ids, on_cpu, MARGIN, inputs["input_ids"].shape[1])


def test_fp32_says_what_the_cpu_says(inputs, on_cpu):
    model = load(TINY, dtype=torch.float32, device_map="cuda")
    ids = model.generate(**inputs.to("cuda"), max_new_tokens=32)
    assert_same_but_for_close_scores(ids, on_cpu, 1e-4, inputs["input_ids"].shape[1])


def test_float64_ids_are_the_cpus():
    model, batch = tiny_model(), batch_of([[3, mel(100, 1), 5], [4, 6, 7], [mel(30, 2), 9, mel(4, 3)]])
    expected = model.generate(**batch, max_new_tokens=8)
    assert torch.equal(model.cuda().generate(**on_gpu(batch), max_new_tokens=8).cpu(), expected)


def test_a_static_cache_compiles_by_itself_and_gives_the_ids_of_eager():
    model = tiny_model().cuda()
    start = graphs()
    seen = []
    for batch in map(on_gpu, batches()):
        expected = model.generate(**batch, max_new_tokens=8)
        assert torch.equal(model.generate(**batch, max_new_tokens=8, cache_implementation="static"), expected)
        seen.append(graphs() - start)
    assert len(seen) == len(AUDIO_LENGTHS) and 0 < seen[-1] == seen[1]


SECOND = ["second"] if torch.cuda.device_count() > 1 else []


@pytest.mark.parametrize("elsewhere", [None, "audio_tower", "language_model", *SECOND])
def test_maps_over_devices(tmp_path, elsewhere):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "model")
    batch = batch_of([[3, mel(90, 1), 5], [4, 6, 7]])
    expected = load(tmp_path / "model", dtype=torch.float64).generate(**batch, max_new_tokens=8)
    device_map = "auto"
    if elsewhere == "second":  # the parts on two GPUs in turn
        device_map = {part: i % 2 for i, part in enumerate(PARTS)}
    elif elsewhere is not None:
        device_map = dict.fromkeys(PARTS, 0) | {elsewhere: "cpu"}
    model = load(tmp_path / "model", dtype=torch.float64, device_map=device_map)
    assert torch.equal(model.generate(**on_gpu(batch), max_new_tokens=8).cpu(), expected)


ROOT = Path(__file__).parents[1]
LAUNCH = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "training" / "launch" / "fsdp2.yaml")]


def train(stage: str, folder: Path, launcher: list[str], **settings) -> list[dict]:
    """Run the command on one GPU; returns the log lines of its updates."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    values = {
        "output_dir": str(folder),
        "global_batch": 4,
        "per_device_batch": 2,
        "steps": 3,
        "save_steps": 1,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "progress": False,
    }
    arguments = [f"{name}={json.dumps(value)}" for name, value in (values | settings).items()]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "soundwave.training.train", stage, *arguments],
        cwd=folder.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "0", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    log = [json.loads(line) for line in open(folder / "train_log.jsonl")]
    return [entry for entry in log if "loss" in entry]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_stages_through_the_fsdp2_launch_file(tmp_path, encoder_folder, llm_folder, dtype):
    """One GPU, which holds all the parts: the updates of a plain run, results that load, and a run that goes on."""
    path = write_rows(tmp_path / "data")
    spoken = [line for line in path.read_text().splitlines() if json.loads(line)["audio"]]
    (tmp_path / "data" / "spoken.jsonl").write_text("\n".join(spoken))
    begin = {"audio_model": encoder_folder, "text_model": llm_folder, "model": {"audio_padding": "longest"}}
    later = {"lora_r": 4, "data": [str(path)], "dtype": dtype}
    tolerance = 1e-4 if dtype == "float32" else 3e-2
    launcher = [*LAUNCH, "--num_processes", "1"]
    start: dict = {}
    for stage, settings in (
        ("align", {**begin, "data": [str(tmp_path / "data" / "spoken.jsonl")], "dtype": dtype}),
        ("shrink", {**later, "text_model": llm_folder}),
        ("instruct", later),
    ):
        plain = train(stage, tmp_path / "plain" / stage, [], **settings, **start)
        folder = tmp_path / "cut" / stage
        cut = train(stage, folder, launcher, **settings, **start)
        assert [entry["loss"] for entry in cut] == pytest.approx([entry["loss"] for entry in plain], rel=tolerance)
        kind = SoundwaveForCTC if stage == "align" else SoundwaveForConditionalGeneration
        assert kind.from_pretrained(folder, dtype=torch.float32).config.architectures == [kind.__name__]
        saved = load_file(folder / "model.safetensors")
        assert saved.keys() == load_file(tmp_path / "plain" / stage / "model.safetensors").keys()
        # As if killed after its second update.
        shutil.copytree(folder / "checkpoint-2", tmp_path / "again" / stage / "checkpoint-2")
        train(stage, tmp_path / "again" / stage, launcher, **settings, **start, resume=True)
        again = load_file(tmp_path / "again" / stage / "model.safetensors")
        for name, tensor in saved.items():
            torch.testing.assert_close(again[name], tensor, rtol=1e-3, atol=1e-5)
        start = {"start": str(folder)}
