"""Runs that can be killed at any moment, without the seconds that a process takes to import everything.

    with ForkedRuns(tmp_path) as runs:
        pid = runs.start(settings)      # of `StageConfig.for_stage`
        os.kill(pid, signal.SIGKILL)
        assert runs.wait() == -signal.SIGKILL

A process of its own imports everything and keeps to one thread, so that forking it is safe; each run is a fork.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[1]


class ForkedRuns:
    """The process that forks; a context manager.

    Args:
        folder: for what the runs write on stdout and stderr, `output.txt`.
        environment: variables on top of this process's.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None):
        self.output = folder / "output.txt"
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | dict(environment or {})

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked_runs", str(self.output)],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()

    def start(self, settings: Mapping[str, Any]) -> int:
        """Begin a run; returns its process id."""
        self.process.stdin.write(json.dumps(settings) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """Wait for the run to end; returns its exit code, negative for a signal."""
        return int(self.process.stdout.readline())

    def run(self, settings: Mapping[str, Any]) -> None:
        """A run to its end."""
        self.start(settings)
        code = self.wait()
        assert code == 0, self.output.read_text()[-3000:]


def serve(output: str) -> None:
    """Fork a run for each line of settings on stdin; say its process id, then its exit code."""
    import torch
    import torchaudio  # noqa: F401 (else each run would import it)

    from soundwave.training.stages import StageConfig
    from soundwave.training.train import run_stage

    torch.set_num_threads(1)
    sys.modules["matplotlib"] = None  # not installed: the report's curves would take longer than the run
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            settings = json.loads(line)
            run_stage(StageConfig.for_stage(settings.pop("stage"), **settings))
            sys.exit(0)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
