"""What the benchmarks share: paired timing, the clips, the result file, and plots of one style."""

import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"
SAMPLING_RATE = 16_000
GIB = 2**30
COLOURS = ("#1764ab", "#d9742b", "#8a8a8a", "#4c9a52")


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(function: Callable, *arguments) -> float:
    """Seconds of one call."""
    synchronize()
    start = time.perf_counter()
    function(*arguments)
    synchronize()
    return time.perf_counter() - start


def paired(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, called in turn ``repeats`` times after a first round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(repeats + 1):
        for name, function in functions.items():
            took = timed(function)
            if round_number:
                seconds[name].append(took)
    return seconds


def median(values: Sequence[float]) -> float:
    """As a plain float, for JSON."""
    return float(np.median(values))


def peak_memory(function: Callable[[], object], device: str = "cpu") -> tuple[int, int]:
    """Bytes at the peak of one call: beyond what is held before it, and in all (of the process; on a GPU, of tensors).

    On a CPU (Linux) the kernel's mark of the process, set back before the call. Not `ru_maxrss`: a new process begins
    with that of the one that started it.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
        before = process_peak()
        function()
        peak = process_peak()
    return peak - before, peak


def process_peak() -> int:
    """Bytes of this process at its peak so far (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def in_child(script: str, *arguments: object) -> dict:
    """What ``script --child ARGUMENTS``, a process of its own, prints as its last line of JSON."""
    command = [sys.executable, script, "--child", *map(str, arguments)]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(finished.stdout.splitlines()[-1])


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """(n,) samples: what is heard does not change the speed of random weights."""
    samples = np.random.default_rng(seed).standard_normal(round(seconds * SAMPLING_RATE))
    return (0.1 * samples).astype(np.float32)


def command() -> str:
    """What was typed to run this script."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def write(name: str, figures: dict, device: str = "cpu") -> Path:
    """``results/NAME.json``: the figures, the command that made them, the machine and the versions."""
    cuda = device.startswith("cuda")
    made = {
        "command": command(),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("torch", "transformers")},
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**made, **figures}, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")
    return path


def figure(title: str, xlabel: str, ylabel: str, log: str = ""):
    """A small plot (figure, axes); ``log`` names the logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(figsize=(6, 3.6), dpi=100, layout="constrained")
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_prop_cycle(color=COLOURS)
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
    return canvas, axes


def save(canvas, name: str) -> None:
    """``results/NAME.png``."""
    from matplotlib import pyplot

    canvas.savefig(RESULTS / f"{name}.png")
    pyplot.close(canvas)
