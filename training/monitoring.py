"""What a run tells while it trains: counts and rates beside the losses, TensorBoard, and others on request.

Counts are sums since the last log over all devices; rates leave validation and saving out. They are added up on the
device and read when a line is logged, so that no step waits for a number.
"""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.integrations import TensorBoardCallback, is_tensorboard_available
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from soundwave.training.collator import IGNORED
from soundwave.training.encoder_cache import MEL_PER_ALIGNED_FRAME
from soundwave.training.incidents import report
from soundwave.training.stages import ConfigError, check_field

LOGS = "logs"  # folder of TensorBoard's files within the output folder
SECONDS_PER_MEL_FRAME = 0.01


class Monitor:
    """Counts what was trained on since the last log, and for how long.

    Args:
        device: of the batches.
        mask_padding: the model's; without it, padding counts as frames of the recording.
    """

    def __init__(self, device: torch.device, mask_padding: bool = True):
        self.mask_padding = mask_padding
        # rows, target tokens, mel frames, aligned frames and the LLM positions made of them
        self._counts = torch.zeros(5, dtype=torch.long, device=device)
        self._seconds = 0.0  # of training, since the last line
        self._since: float | None = None  # when the clock was started

    def add(self, inputs: Mapping[str, torch.Tensor], outputs: Any) -> None:
        """Count a batch and what the model made of it."""
        positions = getattr(outputs, "audio_positions", None)
        self._counts += torch.stack(
            [
                *batch_counts(inputs),
                *speech_frames(inputs, self.mask_padding, self._counts.device),
                self._counts.new_zeros(()) if positions is None else positions.sum(),
            ]
        ).to(self._counts)

    def start(self) -> None:
        """Let the clock run; without effect while it does."""
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        """Stop the clock, once the device has done what it was given."""
        if self._since is not None:
            if self._counts.is_cuda:
                torch.cuda.synchronize(self._counts.device)
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def line(self, steps: int, reduce: Any) -> dict[str, float]:
        """Counts and rates since the last line, which begin anew.

        Args:
            steps: updates since the last line.
            reduce: sums a tensor over the devices.
        """
        rows, tokens, mel_frames, aligned, positions = reduce(self._counts).tolist()
        audio_s, seconds = mel_frames * SECONDS_PER_MEL_FRAME, max(self._seconds, 1e-9)
        line = {"rows": rows, "target_tokens": tokens, "audio_seconds": round(audio_s, 2)}
        if positions:
            line["compression_ratio"] = aligned / positions
        line["steps_per_second"] = steps / seconds
        line["tokens_per_second"] = tokens / seconds
        line["audio_seconds_per_second"] = audio_s / seconds
        self._counts.zero_()
        self._seconds = 0.0
        return line


def batch_counts(inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a batch (recordings in stage I), and the tokens that it teaches: the answers', in stage I the CTC's."""
    if "labels" in inputs:
        labels = inputs["labels"]
        return torch.tensor(len(labels), device=labels.device), (labels != IGNORED).sum()
    lengths = inputs["ctc_label_lengths"]
    return torch.tensor(len(lengths), device=lengths.device), lengths.clamp(min=0).sum()


def speech_frames(
    inputs: Mapping[str, torch.Tensor], mask_padding: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mel frames (10 ms) of a batch's recordings and their aligned frames (40 ms), overlaps of windows once."""
    mask = inputs.get("input_features_mask")
    if mask is None:
        zero = torch.zeros((), dtype=torch.long, device=device)
        return zero, zero
    valid = mask.sum(dim=1)  # (n_windows,)
    offsets = inputs.get("window_offsets", torch.zeros_like(valid))
    windows = inputs.get("windows_per_audio", torch.ones_like(valid))
    last = windows.cumsum(0) - 1  # (n_audios,) the window that a recording ends in
    heard = (offsets + valid)[last]
    counted = heard if mask_padding else (offsets + mask.shape[1])[last]
    return heard.sum(), counted.add(MEL_PER_ALIGNED_FRAME - 1).div(MEL_PER_ALIGNED_FRAME, rounding_mode="floor").sum()


class MonitoringMixin(Trainer):
    """Stops the trainers' clock while they log, validate and save."""

    monitor: Monitor

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        control = self.control
        if not (control.should_log or control.should_evaluate or control.should_save):
            return super()._maybe_log_save_evaluate(*args, **kwargs)
        self.monitor.stop()
        result = super()._maybe_log_save_evaluate(*args, **kwargs)
        self.monitor.start()
        return result


class TensorBoard(TensorBoardCallback):
    """Writes to `logs` in the output folder; a resumed run hides what was logged after its checkpoint."""

    tb_writer: Any

    def on_train_begin(self, args, state, control, **kwargs):
        """Open the files."""
        if state.is_world_process_zero and self.tb_writer is None:
            self.tb_writer = self._SummaryWriter(
                log_dir=self.logging_dir or str(Path(args.output_dir) / LOGS),
                purge_step=state.global_step + 1 if state.global_step else None,
            )
        super().on_train_begin(args, state, control, **kwargs)


def reporters(names: Sequence[str] | None) -> list[str]:
    """Names of the library's reporters that a run logs to, from the setting `report_to`.

    Args:
        names: `None` = TensorBoard where it is installed; `[]` = none.

    Raises:
        ConfigError: for a reporter that does not exist, or whose package is missing.
    """
    if names is None:
        if is_tensorboard_available():
            return ["tensorboard"]
        if os.environ.get("RANK", "0") == "0":
            report(
                'TensorBoard is not installed, so no live curves: pip install "soundwave[train]" brings it, '
                "report_to=[] leaves it out without this remark. The report at the end of the run has its curves."
            )
        return []
    if list(names) == ["none"]:
        return []
    available = get_available_reporting_integrations()
    for name in names:
        check_field(name, list(INTEGRATION_TO_CALLBACK), prefix="report_to: ")
        if name not in available:
            package = '"soundwave[train]"' if name == "tensorboard" else name
            raise ConfigError(f"report_to names {name!r}, which is not installed: pip install {package}.")
    return list(names)
