"""What only a GPU shows: bf16 ids against the CPU's, flash attention, compiled decoding, maps over GPU, CPU and disk.

Run with `pytest -m gpu`.
"""

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from soundwave import SoundwaveForConditionalGeneration, SoundwaveProcessor
from soundwave.assets import TINY
from tests.test_compatibility import spoken
from tests.test_compile import AUDIO_LENGTHS, batches, graphs
from tests.test_device_map import PARTS
from tests.test_modeling import batch_of, mel
from tests.tiny_models import tiny_model

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
