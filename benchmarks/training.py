"""Steps of the stages beside the step that they save: the LLM on all frames, none of them shrunk (Fig. 6's others).

    python benchmarks/training.py --device cuda --shape full
    python benchmarks/training.py --device cpu --shape eighth

Whisper large-v3 and Llama-3.1-8B's shapes in bf16, or an eighth of each width and of the vocabulary at full depth,
which keeps the parts' shares of the work. Random weights, random log-mel, one batch for all; CTC labels are injected
at 3.3 tokens per second, since random weights compress nothing (`contenders.py`). Our trainers run whole updates,
optimizer included, each contender in processes of its own that take turns. Utilisation is model FLOPs (recomputed ones
do not count) over the rate of a large matrix product.
"""

import argparse
import json
import tempfile
import time

import torch
from common import GIB, in_child, median, peak_memory, synchronize, write
from contenders import Shape
from datasets import Dataset
from full_size import matmul_rate
from torch.utils.flop_counter import FlopCounterMode
from training_contenders import BASELINE, CONTENDERS, SHAPES, batch, build
from transformers import TrainerCallback

from soundwave.training.arguments import training_arguments
from soundwave.training.stages import StageConfig
from soundwave.training.trainer import AlignmentTrainer, ShrinkingTrainer

BATCHES = {"full": (16, 8), "eighth": (4, 1)}  # rows of a forward pass, passes of an update


class Clock(TrainerCallback):
    """When each update was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *arguments, **kwargs):
        """Note it."""
        synchronize()
        self.times.append(time.perf_counter())


def run(
    name: str, shape: Shape, device: str, rows: int, passes: int, seconds: float, steps: int, checkpointing: bool
) -> dict:
    """Seconds of each of ``steps`` updates after a first one, the FLOPs of one, and the peak of memory in GiB."""
    contender, inputs, clock = CONTENDERS[name], batch(name, shape, rows, seconds), Clock()
    model = build(name, shape, device)
    with tempfile.TemporaryDirectory() as folder:
        config = StageConfig.for_stage(
            contender.stage,
            output_dir=folder,
            trains=list(contender.trains),
            per_device_batch=rows,
            global_batch=rows * passes,
            steps=steps + 1,
            logging_steps=steps + 1,
            gradient_checkpointing=checkpointing,
            device="cpu" if device == "cpu" else "auto",
            report_to=[],
            progress=False,
        )
        trainer = (AlignmentTrainer if contender.stage == "align" else ShrinkingTrainer)(
            model=model,
            args=training_arguments(config),
            train_dataset=Dataset.from_dict(
                {"id": [str(row) for row in range(rows * passes)], "task": ["asr"] * rows * passes}
            ),
            data_collator=lambda _: dict(inputs),
            trains=contender.trains,
            callbacks=[clock],
        )
        flops = rows * passes * row_flops(model, batch(name, shape, 1, seconds), device)
        beyond, peak = peak_memory(trainer.train, device)
    took = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    return {"seconds": took, "flops": flops, "peak_gib": peak / GIB, "beyond_model_gib": beyond / GIB}


def row_flops(model: torch.nn.Module, inputs: dict[str, torch.Tensor], device: str) -> int:
    """FLOPs of the matrix products of one row, forward and backward."""
    on_device = {name: value.to(device) for name, value in inputs.items()}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with FlopCounterMode(display=False) as counter, torch.autocast(device, dtype, enabled=device == "cuda"):
        model.train()(**on_device).loss.backward()
    model.zero_grad()
    return counter.get_total_flops()


def summary(runs: dict[str, list[dict]], audio_s: float, rate: float) -> dict[str, dict]:
    """Per contender: medians over its processes, and its step against the LLM on all frames."""
    figures = {}
    for name, parts in runs.items():
        step = median([seconds for part in parts for seconds in part["seconds"]])
        figures[name] = {
            "seconds_per_step": step,
            "audio_hours_per_hour": audio_s / step,
            "peak_gib": max(part["peak_gib"] for part in parts),
            "beyond_model_gib": max(part["beyond_model_gib"] for part in parts),
            "tflops_per_step": parts[0]["flops"] / 1e12,
            "utilisation": parts[0]["flops"] / step / rate,
        }
    for figure in figures.values():
        figure["times_faster_than_llm_on_all_frames"] = (
            figures[BASELINE]["seconds_per_step"] / figure["seconds_per_step"]
        )
    return figures


def main() -> None:
    """Measure, write `results/training.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="full", choices=list(SHAPES))
    parser.add_argument("--batch", type=int, help="rows of a forward pass")
    parser.add_argument("--passes", type=int, help="forward passes of an update")
    parser.add_argument("--seconds", type=float, nargs="+", default=[10, 30], help="length of the recordings")
    parser.add_argument("--steps", type=int, default=3, help="updates measured in each process, after a first one")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each contender")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        options = json.loads(arguments.child)
        print(json.dumps(run(shape=SHAPES[options.pop("shape_name")], **options)))
        return
    device = arguments.device
    rows, passes = (
        given or default
        for given, default in zip((arguments.batch, arguments.passes), BATCHES[arguments.shape], strict=True)
    )
    rate = matmul_rate(device, torch.bfloat16 if device == "cuda" else torch.float32)
    measured = []
    for seconds in arguments.seconds:
        for checkpointing in (False, True):
            runs: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
            for name in list(CONTENDERS) * arguments.rounds:
                options = {
                    "name": name,
                    "shape_name": arguments.shape,
                    "device": device,
                    "rows": rows,
                    "passes": passes,
                    "seconds": seconds,
                    "steps": arguments.steps,
                    "checkpointing": checkpointing,
                }
                runs[name].append(in_child(__file__, json.dumps(options)))
            figures = summary(runs, rows * passes * seconds, rate)
            measured.append({"clip_s": seconds, "gradient_checkpointing": checkpointing, "steps": figures})
            print(json.dumps(measured[-1], indent=1), flush=True)
    note = "random weights; CTC labels injected at 3.3 tokens per second"
    figures = {
        "note": note,
        "shape": arguments.shape,
        "batch": rows,
        "passes": passes,
        "matmul_flops_per_s": rate,
        "runs": measured,
    }
    if not arguments.dry_run:
        write("training", figures, device)


if __name__ == "__main__":
    main()
