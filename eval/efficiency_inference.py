"""What an answer costs before its first word: time to the first token, positions per recording, and how close these
positions are to text.

Each measurement takes a model and the items of any benchmark with recordings, and yields one ``Measurement`` per item;
``efficiency`` writes and sums them up. An item that cannot be measured is counted and named, as everywhere.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from soundwave.eval.batches import describe_error
from soundwave.eval.items import Item
from soundwave.eval.models.base import AudioModel, ModelUnavailableError

SAMPLES_PER_ENCODER_FRAME = 320  # 20 ms at 16 kHz
MEL_PER_ENCODER_FRAME = 2


@dataclass(frozen=True)
class Measurement:
    """What was measured on one item, or on one training step.

    Attributes:
        id: Of the item; unique within the measurement.
        numbers: Name -> number; ``None`` where it failed.
        item: What was measured on; ``None`` for a training step.
        group: Measured apart, such as a training stage.
        error: Why it failed.
    """

    id: str
    numbers: dict[str, Any] | None
    item: Item | None = None
    group: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class HeardClip:
    """A recording that was read already: reading and decoding a file are no part of a measurement."""

    name: str
    samples: np.ndarray

    @property
    def duration_s(self) -> float:
        """In seconds."""
        return len(self.samples) / (50 * SAMPLES_PER_ENCODER_FRAME)

    def read(self) -> np.ndarray:
        """The samples, (samples,) float32, mono, 16 kHz."""
        return self.samples


def measure_ttft(model: AudioModel, items: Sequence[Item], warm_up: int = 1) -> Iterator[Measurement]:
    """Wall time of a call that generates one token, batch 1, greedy, after an untimed warm-up.

    As VoiceBench measures it (MatthewCYM/VoiceBench, ``src/models/base.py``), with the device synchronised before
    both readings of the clock. The recording is in memory when the clock starts. ``ttft_ms`` is the ``generate`` call
    alone; ``features_ms`` is what comes before and after it: log-mel, prompt, transfer, text. For an endpoint and a
    cascade, which make no single such call, ``ttft_ms`` is the whole.

    Args:
        model: Any that generates.
        items: Of any benchmark.
        warm_up: How often the first readable item is answered before.

    Yields:
        Per item ``{"ttft_ms", "features_ms", "total_ms"}``.

    Raises:
        ValueError: For a CTC head without an LLM, which generates no tokens.
    """
    inner: Any = getattr(model, "model", None)
    local = isinstance(inner, torch.nn.Module)
    if local and not hasattr(inner, "generate"):
        raise ValueError(f"ttft needs a model that generates; a {type(inner).__name__} has no LLM")
    device = inner.device if local else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    warm_ups = warm_up

    def once(item: Item) -> dict[str, float]:
        nonlocal warm_ups
        heard = replace(item, clips=[HeardClip(clip.name, clip.read()) for clip in item.clips])
        while warm_ups:
            model.answer([heard], 1)
            warm_ups -= 1
        with _timed_generate(inner if local else None, device) as inside:
            synchronize(device)
            start = time.perf_counter()
            model.answer([heard], 1)
            synchronize(device)
            total_ms = 1e3 * (time.perf_counter() - start)
        ttft_ms = 1e3 * sum(inside) if local else total_ms
        return {"ttft_ms": ttft_ms, "features_ms": total_ms - ttft_ms, "total_ms": total_ms}

    return _each(items, once)


def measure_compression(model: AudioModel, items: Sequence[Item]) -> Iterator[Measurement]:
    """Positions that a recording takes in the LLM, beside the encoder's, in both readings of Table 8.

    The paper names neither its denominator nor how it averages. Its 2.5 % are 37.5 of the 1,500 encoder positions of a
    padded 30 s window, the likely reading (``ratio_padded``); ``ratio_speech`` counts the positions of the recording
    itself, 50 per second. Longer recordings have several windows, and as many times the padded positions.

    Yields:
        Per item ``{"positions", "padded_positions", "speech_positions"}``, several recordings added up.
    """
    soundwave, processor = speech_llm(model, "compression")
    window = soundwave.config.window_mel_frames // MEL_PER_ENCODER_FRAME

    @torch.inference_mode()
    def once(item: Item) -> dict[str, int]:
        waveforms = _waveforms(item)
        inputs = processor.audio_features(waveforms)
        lengths = soundwave.get_audio_features(**_on_device(inputs, soundwave)).lengths
        return {
            "positions": int(lengths.sum()),
            "padded_positions": window * len(inputs["input_features"]),
            "speech_positions": sum(-(-len(waveform) // SAMPLES_PER_ENCODER_FRAME) for waveform in waveforms),
        }

    return _each(items, once)


def measure_similarity(model: AudioModel, items: Sequence[Item], sample: int, seed: int) -> Iterator[Measurement]:
    """How close recordings come to their transcripts in the LLM's input space (Fig. 6).

    Both sides are averaged over positions: a recording's LLM positions, padding left out, and the input embeddings of
    its transcript's tokens. Their cosine is one number per recording (§5.2 names no measure). Averages of embeddings
    resemble each other in any case: ``shuffled`` is the cosine with the transcript of another recording.

    Args:
        model: A whole Soundwave model.
        items: With recordings, and what is said in them (``transcript_of``).
        sample: So many of them, drawn at random; all if there are fewer.
        seed: Of the drawing, and of who is paired with whom.

    Yields:
        Per drawn item ``{"cosine", "shuffled", "shuffled_with"}``.

    Raises:
        ValueError: If fewer than two items can be measured.
    """
    soundwave, processor = speech_llm(model, "similarity")
    rng = random.Random(seed)
    drawn = rng.sample(list(items), min(sample, len(items)))

    @torch.inference_mode()
    def pooled(item: Item) -> dict[str, torch.Tensor]:
        ids = processor.tokenizer(transcript_of(item), add_special_tokens=False)["input_ids"]
        text = soundwave.get_input_embeddings()(torch.tensor(ids, device=soundwave.device))  # (tokens, D)
        inputs = processor.audio_features(_waveforms(item))
        embeds, lengths, _ = soundwave.get_audio_features(**_on_device(inputs, soundwave))  # (recordings, K, D)
        inside = torch.arange(embeds.shape[1], device=embeds.device) < lengths[:, None]
        return {"speech": embeds[inside].float().mean(dim=0), "text": text.float().mean(dim=0)}

    done = list(_each(drawn, pooled))
    yield from (one for one in done if one.numbers is None)
    whole = [(one, one.numbers) for one in done if one.numbers is not None]
    if len(whole) < 2:
        raise ValueError(f"similarity needs two recordings with transcripts; {len(whole)} of {len(drawn)} can be used")
    # In drawn order, which is random: the next one's transcript is that of no one in particular.
    for (this, means), (other, others) in zip(whole, [*whole[1:], whole[0]], strict=True):
        numbers = {
            "cosine": float(F.cosine_similarity(means["speech"], means["text"], dim=0)),
            "shuffled": float(F.cosine_similarity(means["speech"], others["text"], dim=0)),
            "shuffled_with": other.id,
        }
        yield replace(this, numbers=numbers)


def transcript_of(item: Item) -> str:
    """What is said in an item: ``fields["transcript"]``, or without that its reference.

    All capitals, as LibriSpeech has them, become lower case: they stand for no case at all, and an LLM would read them
    letter by letter.

    Raises:
        ValueError: If it has none.
    """
    said = item.fields.get("transcript", item.reference)
    if not isinstance(said, str) or not said.strip():
        raise ValueError(f"item {item.id!r} has no transcript")
    return said.lower() if said.isupper() else said


def speech_llm(model: Any, measurement: str) -> tuple[Any, Any]:
    """The whole Soundwave model and the processor behind an ``AudioModel``.

    Raises:
        ValueError: If it is of another kind: the measurement looks inside.
    """
    from soundwave.modeling_soundwave import SoundwaveForConditionalGeneration

    inner = getattr(model, "model", None)
    if not isinstance(inner, SoundwaveForConditionalGeneration):
        kind = type(model if inner is None or isinstance(inner, str) else inner).__name__
        raise ValueError(f"{measurement} looks inside a whole Soundwave model (stage II or III); this is a {kind}")
    return inner, model.processor


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _timed_generate(model: torch.nn.Module | None, device: torch.device) -> Iterator[list[float]]:
    """Seconds of every ``model.generate`` call inside: whoever prepares the inputs, the call itself is timed."""
    seconds: list[float] = []
    if model is None:
        yield seconds
        return
    generate = model.generate

    def timed(*arguments: Any, **options: Any) -> Any:
        synchronize(device)
        start = time.perf_counter()
        out = generate(*arguments, **options)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        return out

    model.generate = timed  # on this instance, over the method of its class
    try:
        yield seconds
    finally:
        del model.generate


def _each(items: Sequence[Item], once: Callable[[Item], dict[str, Any]]) -> Iterator[Measurement]:
    for item in items:
        if item.fields.get("error"):
            yield Measurement(item.id, None, item, error=str(item.fields["error"]))
            continue
        try:
            numbers = once(item)
        except ModelUnavailableError:
            raise
        except Exception as error:  # decoders and models raise whatever they like; the item is named in the files
            yield Measurement(item.id, None, item, error=describe_error(error))
        else:
            yield Measurement(item.id, numbers, item)


def _waveforms(item: Item) -> list[np.ndarray]:
    if not item.clips:
        raise ValueError(f"item {item.id!r} has no recording")
    return [clip.read() for clip in item.clips]


def _on_device(inputs: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }
