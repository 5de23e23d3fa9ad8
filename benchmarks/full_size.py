"""The full size on a GPU, beside Qwen2-Audio-7B's shape and beside what the hardware allows.

    python benchmarks/full_size.py --device cuda --shape full

Whisper large-v3's encoder and Llama-3.1-8B's shape, random weights, bf16. CTC labels are injected at 3.3 tokens per
second, since random weights compress nothing (`contenders.py`). The floor of a part is its FLOPs over the measured
rate of a large matrix product plus its weights' bytes over the measured bandwidth. ``--shape small --device cpu`` is a
trial of the script, not a measurement.
"""

import argparse
import json

import torch
from common import COLOURS, figure, median, noise, paired, save, timed, write
from contenders import FULL, QWEN2_AUDIO_7B, SMALL, TOKENS_PER_SECOND, Qwen2Audio, Soundwave
from torch.utils.flop_counter import FlopCounterMode

SECONDS = (3, 10, 30)
BATCHES = (1, 16, 64)
SHAPES = {"full": (FULL, QWEN2_AUDIO_7B), "small": (SMALL, SMALL)}


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOPs per second of a large matrix product."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / min(timed(torch.mm, a, b) for _ in range(20))


def bandwidth(device: str) -> float:
    """Bytes per second that memory gives: one read and one write of each."""
    values = torch.empty(2**30 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(values)
    target.copy_(values)
    return 2 * len(values) / min(timed(target.copy_, values) for _ in range(20))


@torch.no_grad()
def floor(soundwave: Soundwave, seconds: float, rate: float, speed: float) -> dict[str, float]:
    """Least seconds of each part for the first token about one clip."""
    model, inputs = soundwave.model, soundwave.inputs([noise(seconds)])
    audio = {name: inputs[name] for name in model.AUDIO_FEATURES if name in inputs}
    features, mask = audio["input_features"], audio["input_features_mask"]
    encoded = model.encode(features, mask)
    aligned = model.align(**{**audio, "input_features": None, "encoder_features": encoded})
    spliced = model.splice(inputs["input_ids"], inputs["attention_mask"], {}, aligned=aligned)
    mask = mask[:, ::4].bool()
    head = [p for name, p in model.ctc_head.named_parameters()] + [model.get_input_embeddings().weight]
    embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
    llm = [p for p in model.language_model.parameters() if id(p) not in embeddings]
    parts = {
        "encoder": (lambda: model.encode(features, audio["input_features_mask"]), model.audio_tower.parameters()),
        "alignment": (lambda: model.alignment_adapter(encoded, mask), model.alignment_adapter.parameters()),
        "CTC scores": (lambda: soundwave.inject.labels(aligned.frames, model.ctc_rows()), head),
        "shrinking": (lambda: model.shrink(aligned), model.shrinking_adapter.parameters()),
        "LLM": (lambda: model.language_model(inputs_embeds=spliced.inputs_embeds, logits_to_keep=1), llm),
    }
    least = {}
    for name, (call, parameters) in parts.items():
        with FlopCounterMode(display=False) as counter:
            call()
        size = sum(p.numel() * p.element_size() for p in parameters)
        took = min(timed(call) for _ in range(5))
        least[name] = {"floor_s": counter.get_total_flops() / rate + size / speed, "measured_s": took}
    return least


def first_token(contenders: list, repeats: int) -> list[dict]:
    """Median seconds to the first token of one clip, features included."""
    rows = []
    for seconds in SECONDS:
        clip = [noise(seconds)]
        took = paired({c.name: lambda c=c, clip=clip: c.answer(clip, 1) for c in contenders}, repeats)
        medians = {name: median(values) for name, values in took.items()}
        ours, peer = (medians[c.name] for c in contenders)
        rows.append({"seconds": seconds, **medians, "ratio": ours / peer})
    return rows


def throughput(contenders: list, device: str, batches: tuple[int, ...]) -> list[dict]:
    """Seconds of audio answered per second, tokens per second, peak memory, for 10 s clips by batch."""
    rows = []
    for size in batches:
        row: dict = {"batch": size}
        tokens = round(10 * TOKENS_PER_SECOND)
        for contender in contenders:
            group = [noise(10, seed) for seed in range(size)]
            contender.answer(group, 2)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            first = min(timed(contender.answer, group, 1) for _ in range(3))
            whole = min(timed(contender.answer, group, tokens) for _ in range(3))
            row[contender.name] = {
                "audio_seconds_per_second": 10 * size / whole,
                "tokens_per_second": size * (tokens - 1) / max(whole - first, 1e-9),
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
            }
        rows.append(row)
    return rows


def plots(figures: dict) -> None:
    """`results/full_size_floor.png`, `results/full_size_throughput.png`."""
    canvas, axes = figure("First token, 10 s clip: floor and measured", "", "milliseconds")
    parts = figures["floor"]["10"]
    for index, kind in enumerate(("floor_s", "measured_s")):
        where = [position + 0.4 * index for position in range(len(parts))]
        axes.bar(where, [1e3 * part[kind] for part in parts.values()], 0.4, label=kind[:-2], color=COLOURS[index])
    axes.set_xticks([position + 0.2 for position in range(len(parts))], list(parts))
    axes.legend()
    save(canvas, "full_size_floor")
    canvas, axes = figure("10 s clips", "batch", "seconds of audio per second", log="xy")
    rows = figures["throughput"]
    for name in (Soundwave.name, Qwen2Audio.name):
        rates = [row[name]["audio_seconds_per_second"] for row in rows]
        axes.plot([row["batch"] for row in rows], rates, "o-", label=name)
    axes.legend()
    save(canvas, "full_size_throughput")


def main() -> None:
    """Measure, write `results/full_size.json` and the plots."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="full", choices=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    arguments = parser.parse_args()
    device, (ours, peers) = arguments.device, SHAPES[arguments.shape]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rate, speed = matmul_rate(device, dtype), bandwidth(device)
    soundwave = Soundwave(ours, device, dtype)
    contenders = [soundwave, Qwen2Audio(peers, device, dtype)]
    rows = first_token(contenders, arguments.repeats)
    floors = {str(seconds): floor(soundwave, seconds, rate, speed) for seconds in SECONDS}
    for row in rows:
        row["floor"] = sum(part["floor_s"] for part in floors[str(row["seconds"])].values())
        row["times_the_floor"] = row[soundwave.name] / row["floor"]
    figures = {
        "note": "random weights; CTC labels injected at 3.3 tokens per second",
        "matmul_flops_per_s": rate,
        "bandwidth_bytes_per_s": speed,
        "time_to_first_token_s": rows,
        "floor": floors,
        "throughput": throughput(contenders, device, BATCHES if device == "cuda" else BATCHES[:1]),
    }
    print(json.dumps(figures, indent=1))
    if not arguments.dry_run:
        write("full_size", figures, device)
        plots(figures)


if __name__ == "__main__":
    main()
