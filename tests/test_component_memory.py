"""Stage I reads of the LLM its embedding rows only (design: training, stage I): how much a process grows by that."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from soundwave.modeling_soundwave import weights_soundwave

FACTOR = 1.3  # of the rows' bytes as the process holds them, and no more
VOCABULARY, WIDTH = 128_000, 1024  # 250 MiB of embeddings in bf16

LOAD = """
import gc, json, sys
import torch
from soundwave import SoundwaveForCTC

torch.set_num_threads(1)
arguments = json.loads(sys.stdin.read())
folders = arguments.pop("folders")
# The same at a small size first: what is imported and allocated once is not the rows'.
SoundwaveForCTC.from_components(folders["encoder"], folders["small"])
gc.collect()


def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


before = resident()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
model = SoundwaveForCTC.from_components(folders["encoder"], folders["llm"], **arguments)
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
rows = model.ctc_head.weight
ours = sum(p.numel() * p.element_size() for p in model.alignment_adapter.parameters())
print(json.dumps({
    "growth": peak - before - ours, "rows": rows.numel() * rows.element_size(), "type": str(rows.dtype),
    "shape": list(rows.shape), "first": float(rows[0, 0]), "last": float(rows[-1, -1]),
}))
"""


def save_sparse_llm(folder: Path, vocabulary: int, width: int, other_bytes: int, dtype: torch.dtype) -> str:
    """A sharded checkpoint of zeros, but for the corners of its embeddings; zeros take no room on the disk."""
    shard = 2**29 // dtype.itemsize
    shards = {"model-00001.safetensors": {"model.embed_tokens.weight": [vocabulary, width]}}
    for number in range(-(-other_bytes // 2**29)):
        shards[f"model-{number + 2:05}.safetensors"] = {
            f"model.layers.{number}.mlp.up_proj.weight": [width, shard // width]
        }
    folder.mkdir()
    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    for file_name, tensors in shards.items():
        header, end = {}, 0
        for name, shape in tensors.items():
            size = shape[0] * shape[1] * dtype.itemsize
            header[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file_name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            start = file.tell()
            file.truncate(start + end)
            if "model.embed_tokens.weight" in tensors:
                for position, value in ((0, 3.0), (end - dtype.itemsize, 5.0)):
                    file.seek(start + position)
                    file.write(torch.tensor([value], dtype=dtype).view(torch.uint8).numpy().tobytes())
    index = {"weight_map": {name: file_name for file_name, tensors in shards.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=2, num_attention_heads=8, dtype=dtype
    ).save_pretrained(folder)
    return str(folder)


def measure(folders: dict[str, str], **fields) -> dict:
    """What `LOAD` finds in a fresh process."""
    arguments = json.dumps({"folders": folders, "alignment_ffn_dim": 16, **fields})
    result = subprocess.run(
        [sys.executable, "-c", LOAD], input=arguments, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    print(f"{found['growth'] / found['rows']:.3f} times the rows' {found['rows'] / 2**20:.0f} MiB")
    return found


def check(folders: dict[str, str], rows: int, dtype: torch.dtype, **fields) -> dict:
    """Load in a fresh process, and compare its growth with ``rows`` rows of 1,024 numbers in ``dtype``."""
    found = measure(folders, **fields)
    assert (found["shape"], found["type"]) == ([rows, WIDTH], str(dtype))
    assert found["rows"] == rows * WIDTH * dtype.itemsize
    assert found["growth"] <= FACTOR * found["rows"]
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory, encoder_folder, llm_folder) -> dict[str, str]:
    """An encoder, a small LLM, and one of over 2 GB in shards, in bf16."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process is read from Linux's /proc")
    llm = save_sparse_llm(tmp_path_factory.mktemp("sparse") / "llm", VOCABULARY, WIDTH, 2**31, torch.bfloat16)
    assert sum(path.stat().st_size for path in Path(llm).glob("*.safetensors")) > 2**31
    return {"encoder": encoder_folder, "small": llm_folder, "llm": llm}


def test_stage_one_grows_by_the_embedding_rows_of_a_checkpoint_of_two_gigabytes(folders):
    """Rows of a tied head are held in the checkpoint's own type: the factor is one of the checkpoint's bytes too."""
    found = check(folders, VOCABULARY, torch.bfloat16)
    assert (found["first"], found["last"]) == (3.0, 5.0)  # what the first and the last number of the file are


@pytest.mark.slow
@pytest.mark.parametrize("head", ["tied", "separate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_stage_one_grows_by_the_rows_that_its_head_holds(folders, tmp_path, head, dtype):
    """A separate head trains, so its rows are held in fp32."""
    llm = save_sparse_llm(tmp_path / "llm", VOCABULARY, WIDTH, 2**31, dtype)
    held = torch.float32 if head == "separate" else dtype
    check(folders | {"llm": llm}, VOCABULARY, held, ctc_head=head)
    check(folders | {"llm": llm}, VOCABULARY // 2, held, ctc_head=head, ctc_token_ids=list(range(0, VOCABULARY, 2)))


@pytest.mark.parametrize("token_ids", [None, [0, 2, 5, 59]])
@pytest.mark.parametrize("at_once", [1, 100, 2**20])
def test_rows_are_read_block_by_block_as_in_one(tmp_path, monkeypatch, token_ids, at_once):
    monkeypatch.setattr(weights_soundwave, "VALUES_AT_ONCE", at_once)
    embeddings = torch.randn(60, 16)
    save_file(
        {"model.embed_tokens.weight": embeddings, "lm_head.weight": 0 * embeddings}, tmp_path / "model.safetensors"
    )
    config = LlamaConfig(vocab_size=60, hidden_size=16, num_attention_heads=4)
    rows = weights_soundwave.embedding_rows(str(tmp_path), config, token_ids)
    assert torch.equal(rows, embeddings if token_ids is None else embeddings[token_ids])
    halves = weights_soundwave.embedding_rows(str(tmp_path), config, token_ids, torch.bfloat16)
    assert torch.equal(halves, rows.bfloat16())
