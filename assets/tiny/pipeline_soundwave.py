"""`pipeline("automatic-speech-recognition")` over a Soundwave repository: the CTC head transcribes, with times."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Pipeline

# `config.custom_pipelines` of every repository: the library's own pipeline wants logits over characters.
CUSTOM_PIPELINES = {
    "automatic-speech-recognition": {
        "impl": "pipeline_soundwave.SoundwaveRecognitionPipeline",
        "pt": ["AutoModelForCTC"],
    }
}


@dataclass
class Recording:
    """A recording on its way through the pipeline, which would move, pad or unpack anything that it knows."""

    source: Any


class SoundwaveRecognitionPipeline(Pipeline):
    """Speech to text for recordings of any length, by `SoundwaveForCTC.transcribe_ctc`.

    A recording is a path, URL, bytes, a waveform (n,) or (n, channels), or a dictionary with ``"array"`` or ``"raw"``
    and ``"sampling_rate"``; a bare waveform has 16 kHz unless ``sampling_rate=`` says otherwise. Lists, generators and
    datasets of them work as in every pipeline, with ``batch_size=``.

    Returns:
        ``{"text": ...}`` per recording; with ``return_timestamps="word"`` (words) or ``True`` (segments) also
        ``"chunks"``: ``[{"text": ..., "timestamp": (start, end)}]`` in seconds.
    """

    _load_processor = True
    _load_tokenizer = True  # batches are made by the pipeline, which asks for one
    _load_feature_extractor = False
    _load_image_processor = False
    _load_video_processor = False

    def _sanitize_parameters(self, **given):
        refused = sorted(given.keys() - {"return_timestamps", "sampling_rate", "windows_per_batch"})
        if refused:
            raise ValueError(
                f"The Soundwave pipeline does not take {', '.join(refused)}; leave them out. Recordings of any length "
                "are read as a stream, without chunks to set."
            )
        if given.get("return_timestamps") not in (None, False, True, "word"):
            raise ValueError(
                f"return_timestamps is {given['return_timestamps']!r}; expected 'word', True (segments) or False."
            )
        stages: tuple[tuple[str, ...], ...] = (("sampling_rate",), ("windows_per_batch",), ("return_timestamps",))
        return tuple({name: given[name] for name in names if name in given} for names in stages)

    def preprocess(self, audio: Any, sampling_rate: int | None = None) -> dict[str, Recording]:
        """Say of what rate a waveform is; the recording is decoded when its turn comes, block by block."""
        if isinstance(audio, Mapping):
            audio = {"array" if key == "raw" else key: value for key, value in audio.items()}
            audio.setdefault("sampling_rate", sampling_rate)
        elif isinstance(audio, np.ndarray | torch.Tensor):
            expected = self.processor.feature_extractor.sampling_rate
            audio = {"array": audio, "sampling_rate": sampling_rate or expected}
        return {"recording": Recording(audio)}

    def _forward(self, inputs: dict[str, Any], windows_per_batch: int = 8) -> dict[str, Any]:
        batch = inputs["recording"]
        if isinstance(batch, Recording):
            transcript = self.model.transcribe_ctc(batch.source, self.processor, windows_per_batch=windows_per_batch)
            return {"transcript": transcript}
        sources = [recording.source for recording in batch]
        transcripts = self.model.transcribe_ctc(sources, self.processor, windows_per_batch=windows_per_batch)
        return {"transcript": transcripts}

    def postprocess(self, outputs: dict[str, Any], return_timestamps: bool | str | None = None) -> dict[str, Any]:
        """Text, and on request what is said when."""
        transcript = outputs["transcript"]
        result = {"text": transcript.text}
        if return_timestamps:
            parts = transcript.words if return_timestamps == "word" else transcript.segments
            result["chunks"] = [
                {"text": part.text, "timestamp": (part.start, part.end)} for part in parts if part.text
            ]
        return result
