"""CTC over an LLM's vocabulary: `linear_ctc_loss` beside `log_softmax` and `F.ctc_loss`, forward and backward.

    python benchmarks/ctc_loss.py

A = 750 frames (30 s), V = 128,257 (Llama 3.1's rows and a blank), targets of 100 tokens, fp32, a frozen head:
gradients to the frames and the scale, in ours to the blank row too. The naive way is spared the blank's: its matrix
holds a constant blank, so that it copies neither matrix nor scores. Memory is the peak beyond what both ways are
given (frames, matrix, targets), each in a process of its own ("process_gib" counts everything). Times are medians of
rounds in which the contenders take turns.
"""

import argparse
import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import GIB, in_child, median, paired, peak_memory, write

from soundwave.modeling_soundwave.ctc_soundwave import linear_ctc_loss

FRAMES, TOKENS = 750, 100
ROWS, RESTRICTED = 128_256, 40_000  # of Llama 3.1; as many as the authors' newer code keeps
WIDTHS = (256, 4096)
NAIVE, OURS, OURS_RESTRICTED = "log_softmax + F.ctc_loss", "linear_ctc_loss", "linear_ctc_loss, 40k rows"
ROWS_OF = {NAIVE: ROWS, OURS: ROWS, OURS_RESTRICTED: RESTRICTED}


class Step:
    """Forward and backward of one contender's loss on random frames (B, A, D) and rows (V, D)."""

    def __init__(self, name: str, batch: int, width: int, rows: int, device: str = "cpu", frames: int = FRAMES):
        torch.manual_seed(0)
        self.naive = name == NAIVE
        # One row more than the vocabulary: the naive way's blank. Ours has its blank beside the matrix.
        self.matrix = torch.randn(rows + 1, width, device=device).mul_(width**-0.5)
        self.blank = self.matrix[-1].clone().requires_grad_()
        self.hidden = torch.randn(batch, frames, width, device=device).requires_grad_()
        self.log_scale = torch.zeros((), device=device).requires_grad_()
        tokens = min(TOKENS, frames // 2)
        self.targets = torch.randint(0, min(rows, RESTRICTED), (batch, tokens), device=device)
        self.lengths = torch.full((batch,), frames, device=device)
        self.target_lengths = torch.full((batch,), tokens, device=device)

    def loss(self) -> torch.Tensor:
        """The mean over target lengths and batch."""
        scaled, rows = self.hidden * self.log_scale.exp(), len(self.matrix) - 1
        if self.naive:
            # (A, B, V + 1) from the start, as F.ctc_loss wants it: transposing scores would copy their gradient.
            # Flat frames: PyTorch would make a product of each one, which reads the matrix A times.
            scores = scaled.transpose(0, 1).reshape(-1, self.hidden.shape[-1]) @ self.matrix.T
            log_p = F.log_softmax(scores.view(*scaled.shape[1::-1], -1), dim=-1)
            return F.ctc_loss(log_p, self.targets, self.lengths, self.target_lengths, blank=rows)
        return linear_ctc_loss(
            scaled,
            self.matrix[:rows],
            self.targets,
            self.lengths,
            self.target_lengths,
            blank=rows,
            blank_weight=self.blank,
        )

    def __call__(self) -> torch.Tensor:
        """One step, gradients left in `hidden`, `log_scale` and, in ours, `blank`."""
        self.hidden.grad = self.log_scale.grad = self.blank.grad = None
        loss = self.loss()
        loss.backward()
        return loss.detach()


def child(name: str, batch: int, width: int, rows: int, device: str) -> dict[str, float]:
    """Peak memory in GiB of one contender, run in a process of its own."""
    step: Callable[[], object] = Step(name, batch, width, rows, device)
    Step(name, 1, 8, 512, device, frames=16)()  # what libraries load and keep is not the loss's
    beyond, process = peak_memory(step, device)
    return {"peak_gib": beyond / GIB, "process_gib": process / GIB}


def measure(batch: int, width: int, repeats: int, device: str) -> dict:
    """Both ways at one width: seconds, memory, and the ratios that the bars are about."""
    memory = {name: in_child(__file__, name, batch, width, rows, device) for name, rows in ROWS_OF.items()}
    steps = {name: Step(name, batch, width, rows, device) for name, rows in ROWS_OF.items()}
    steps[NAIVE].matrix = steps[OURS].matrix  # one copy: the machine has to hold the naive way's scores too
    difference = abs(steps[NAIVE]() - steps[OURS]()).item()
    seconds = {name: median(took) for name, took in paired(steps, repeats).items()}
    return {
        "batch": batch,
        "width": width,
        "seconds": seconds,
        "memory": memory,
        "loss_difference": difference,
        "time_ratio": seconds[OURS] / seconds[NAIVE],
        "time_ratio_restricted": seconds[OURS_RESTRICTED] / seconds[OURS],
        "memory_ratio": memory[OURS]["peak_gib"] / memory[NAIVE]["peak_gib"],
    }


def main() -> None:
    """Measure, write `results/ctc_loss.json`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=4, help="the naive way takes 3 x 0.36 GiB for each")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        name, batch, width, rows, device = arguments.child
        print(json.dumps(child(name, int(batch), int(width), int(rows), device)))
        return
    runs = []
    for width in arguments.widths:
        runs.append(measure(arguments.batch, width, arguments.repeats, arguments.device))
        print(json.dumps(runs[-1], indent=1), flush=True)
    figures = {"frames": FRAMES, "vocabulary": ROWS + 1, "target_tokens": TOKENS, "widths": runs}
    if not arguments.dry_run:
        write("ctc_loss", figures, arguments.device)


if __name__ == "__main__":
    main()
