"""Cross-entropy on labelled positions only, beside the library's own way: logits of all positions, then the loss.

    python benchmarks/cross_entropy.py

Our model around an LLM of 4 layers and width 512 with 128,257 tokens, fp32, random weights, both adapters
and LoRA trained as in stage II. Both ways run the same prompts, of 40 tokens, recordings of 3.3 positions per second
(given as embeddings: the speech side is left out) and answers, forward and backward; only the answers are labelled.
Memory is the peak beyond model and batch, each way in a process of its own. Times are medians of rounds in which the
ways take turns.
"""

import argparse
import json

import torch
from common import GIB, in_child, median, paired, peak_memory, write
from contenders import Shape, prompt, random_model, soundwave_config

from soundwave import SoundwaveForConditionalGeneration
from soundwave.training.freezing import freeze
from soundwave.training.lora import add_lora
from soundwave.training.stages import StageConfig

SHAPE = Shape(2, 64, 2, 4, 512, 8, 2, 1792, 128_257)
LABELLED, ALL = "labelled positions", "all positions"
# Audio positions and answer tokens.
CASES = {"transcript of 10 s": (33, 33), "transcript of 30 s": (99, 99), "question about 30 s": (99, 8)}


class Step:
    """Forward and backward of stage II's answer loss."""

    def __init__(self, way: str, case: str, batch: int, device: str = "cpu", shape: Shape = SHAPE):
        self.way = way
        self.model = stage_two(shape, device)
        positions, tokens = CASES[case]
        torch.manual_seed(0)
        prompts = torch.tensor([prompt([shape.vocabulary], shape.vocabulary)] * batch)
        answers = torch.randint(3, shape.vocabulary, (batch, tokens))
        input_ids = torch.cat([prompts, answers], dim=1)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "labels": torch.cat([torch.full_like(prompts, -100), answers], dim=1),
            "audio_embeds": torch.randn(batch, positions, shape.width),
            "audio_lengths": torch.full((batch,), positions),
        }
        self.inputs = {name: value.to(device) for name, value in inputs.items()}
        self.inputs["audio_embeds"].requires_grad_()  # gradients go on to the adapters

    def loss(self) -> torch.Tensor:
        """The mean over labelled tokens."""
        if self.way == LABELLED:
            return self.model(**self.inputs, use_cache=False).loss
        inputs = dict(self.inputs)
        ids, mask, labels = (inputs.pop(name) for name in ("input_ids", "attention_mask", "labels"))
        spliced = self.model.splice(ids, mask, inputs, labels)
        return self.model.language_model(
            inputs_embeds=spliced.inputs_embeds,
            attention_mask=spliced.attention_mask,
            position_ids=spliced.position_ids,
            labels=spliced.labels,
            use_cache=False,
        ).loss

    def __call__(self) -> torch.Tensor:
        """One step, gradients left in LoRA and the recordings' embeddings."""
        self.model.zero_grad()
        self.inputs["audio_embeds"].grad = None
        loss = self.loss()
        loss.backward()
        return loss.detach()


def stage_two(shape: Shape, device: str) -> SoundwaveForConditionalGeneration:
    """The model as stage II trains it."""
    config = StageConfig.for_stage("shrink")
    model = random_model(SoundwaveForConditionalGeneration, soundwave_config(shape), device, torch.float32)
    add_lora(model, config.lora_r, config.lora_alpha, config.lora_targets)
    freeze(model, config.trains)
    return model.train()


def child(way: str, case: str, batch: int, device: str) -> dict[str, float]:
    """Peak memory in GiB of one way, run in a process of its own."""
    step = Step(way, case, batch, device)
    Step(way, case, 1, device, shape=Shape(1, 32, 1, 1, 32, 1, 1, 32, 64))()  # what libraries load and keep
    beyond, process = peak_memory(step, device)
    return {"peak_gib": beyond / GIB, "process_gib": process / GIB}


def measure(case: str, batch: int, repeats: int, device: str) -> dict:
    """Both ways: seconds, memory, and the ratios."""
    memory = {way: in_child(__file__, way, case, batch, device) for way in (ALL, LABELLED)}
    steps = {way: Step(way, case, batch, device) for way in (ALL, LABELLED)}
    steps[ALL].model = steps[LABELLED].model
    difference = abs(steps[ALL]() - steps[LABELLED]()).item()
    seconds = {way: median(took) for way, took in paired(steps, repeats).items()}
    positions, tokens = CASES[case]
    return {
        "case": case,
        "batch": batch,
        "positions": steps[ALL].inputs["input_ids"].shape[1] - 1 + positions,
        "labelled": tokens,
        "seconds": seconds,
        "memory": memory,
        "loss_difference": difference,
        "time_ratio": seconds[LABELLED] / seconds[ALL],
        "memory_ratio": memory[LABELLED]["peak_gib"] / memory[ALL]["peak_gib"],
    }


def main() -> None:
    """Measure, write `results/cross_entropy.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        way, case, batch, device = arguments.child
        print(json.dumps(child(way, case, int(batch), device)))
        return
    runs = []
    for case in arguments.cases:
        runs.append(measure(case, arguments.batch, arguments.repeats, arguments.device))
        print(json.dumps(runs[-1], indent=1), flush=True)
    if not arguments.dry_run:
        write("cross_entropy", {"vocabulary": SHAPE.vocabulary, "cases": runs}, arguments.device)


if __name__ == "__main__":
    main()
