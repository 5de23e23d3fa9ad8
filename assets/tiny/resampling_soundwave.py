"""Mono samples at any rate to 16 kHz, block by block, exactly as the whole at once."""

from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from numbers import Real
from reprlib import repr  # of any value, however deep
from typing import Any

import numpy as np
import torch

from .limits_soundwave import SamplingRateError

SAMPLING_RATE = 16_000  # Hz
MIN_RATE, MAX_RATE = 100, 1_000_000  # Hz; beyond them a header is wrong, not a recording
MAX_FACTOR = 1000  # of the larger side of the ratio


def check_rate(rate: Any, name: str) -> float:
    """The sampling rate as a number of Hz, or `SamplingRateError`."""
    if rate is None:
        raise SamplingRateError(
            f"Given {name} without its sampling rate; expected sampling_rate= in Hz "
            f"({SAMPLING_RATE} if it was already resampled for this model)."
        )
    if not isinstance(rate, Real) or not MIN_RATE <= rate <= MAX_RATE:  # type: ignore[operator]
        raise SamplingRateError(
            f"{name} has a sampling rate of {repr(rate)[:40]}; expected a positive number of samples per second, "
            f"{MIN_RATE} to {MAX_RATE}. Pass the rate it was recorded at."
        )
    return float(rate)


def resample_blocks(blocks: Iterable[np.ndarray], rate: float, name: str) -> Iterator[np.ndarray]:
    """Blocks (n,) float32 at `rate` -> blocks (n',) float32 at 16 kHz; n samples become ceil(n * 16,000 / rate).

    Args:
        blocks: Mono samples in blocks of any lengths, with at least one sample in all.
        rate: Their sampling rate in Hz, within `MIN_RATE` and `MAX_RATE`.
        name: Of the recording, for messages.

    Raises:
        SamplingRateError: Neither torchaudio nor soxr can be imported, and one is needed.
    """
    # The filter bank has a row per phase: 44,101 Hz taken literally would need gigabytes. A rate that is off by less
    # than a thousandth is not heard.
    larger = max(rate, SAMPLING_RATE)
    ratio = Fraction(min(rate, SAMPLING_RATE) / larger).limit_denominator(MAX_FACTOR)
    inputs, outputs = ratio.denominator, ratio.numerator
    if rate < SAMPLING_RATE:
        inputs, outputs = outputs, inputs
    if inputs == outputs:
        return (np.ascontiguousarray(block, dtype=np.float32) for block in blocks)
    try:
        from torchaudio.transforms import Resample
    except Exception:  # torchaudio that does not fit torch raises more than ImportError
        return _resample_with_soxr(blocks, rate, name)
    return _filter_blocks(blocks, Resample(inputs, outputs), inputs, outputs)


def _filter_blocks(
    blocks: Iterable[np.ndarray], resample: Callable[[torch.Tensor], torch.Tensor], inputs: int, outputs: int
) -> Iterator[np.ndarray]:
    """Apply a filter of finite length that makes `outputs` samples of every `inputs` ones.

    Every block brings the samples before and after it that its filter reaches, and begins at a multiple of `inputs`,
    where the phases of the filter start anew.
    """
    reach = 6 * max(1, inputs / outputs) / 0.99  # samples: torchaudio's width in zero crossings and its roll-off
    context = (int(reach) // inputs + 2) * inputs
    held = np.zeros(context, np.float32)  # silence before the recording, as for the whole
    taken = made = 0
    for block in blocks:
        taken += len(block)
        held = np.concatenate([held, block])
        ready = (len(held) - 2 * context) // inputs * inputs
        if ready > 0:
            made += ready // inputs * outputs
            yield _filtered(resample, held[: ready + 2 * context], context, inputs, outputs)
            held = held[ready:]
    left = -(-taken * outputs // inputs) - made
    if left:
        held = np.concatenate([held, np.zeros(context + -len(held) % inputs, np.float32)])
        yield _filtered(resample, held, context, inputs, outputs)[:left]


def _filtered(
    resample: Callable[[torch.Tensor], torch.Tensor], held: np.ndarray, context: int, inputs: int, outputs: int
) -> np.ndarray:
    """Filter `held` (a multiple of `inputs`) and drop what belongs to the context on both sides."""
    edge = context // inputs * outputs
    return resample(torch.from_numpy(held)).numpy()[edge : (len(held) - context) // inputs * outputs]


def _resample_with_soxr(blocks: Iterable[np.ndarray], rate: float, name: str) -> Iterator[np.ndarray]:
    try:
        import soxr
    except Exception as error:
        raise SamplingRateError(
            f"{name} has {rate:g} Hz; expected {SAMPLING_RATE} Hz, since resampling needs torchaudio or soxr, and "
            "neither can be imported. Run `pip install soxr`, or pass audio that already has that rate."
        ) from error
    stream = soxr.ResampleStream(rate, SAMPLING_RATE, num_channels=1, dtype="float32")
    made, first = 0, np.zeros(0, np.float32)
    for block in blocks:
        first = first if first.size else block[:1]
        resampled = stream.resample_chunk(np.ascontiguousarray(block, dtype=np.float32))
        made += len(resampled)
        yield resampled
    resampled = stream.resample_chunk(np.zeros(0, np.float32), last=True)
    # A handful of samples at a high rate can come out as none: keep one, so that the recording keeps its place.
    yield resampled if made + len(resampled) else first
