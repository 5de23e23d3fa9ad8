"""Front ends: the mel frames that each audio encoder takes, by the feature extractors of transformers.

Whisper's is a log-mel spectrogram. w2v-BERT's are log filter banks, normalised over the window; its extractor stacks
two frames of 10 ms, which the encoder does here (`encoders_soundwave`), so that all windows are (M, T).

Letters: `M` mel bins, `T` mel frames (10 ms), `W` mel frames of a full window (3,000 for Whisper), `n` samples.
"""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, SeamlessM4TFeatureExtractor, WhisperFeatureExtractor

from .resampling_soundwave import SAMPLING_RATE

HOP = 160  # samples per mel frame, of every front end: 10 ms
FILTER_BANK_SAMPLES = 400  # that a frame of filter banks looks at, from its start on
WINDOW_SECONDS = 30  # of an encoder that has no bound of its own
POSITIONS_PER_SECOND = 50  # of Whisper's encoder: two mel frames each


def make_extractor(config: PreTrainedConfig, name: str, window_seconds: int | None = None) -> Any:
    """The feature extractor of an audio encoder.

    Args:
        config: The encoder's configuration.
        name: What messages call it.
        window_seconds: Length of a window; `None`: the encoder's own (Whisper), or 30 s.

    Raises:
        ValueError: An encoder of another type, or a window that is not its own.
    """
    if config.model_type == "wav2vec2-bert":
        bins = config.feature_projection_input_dim // 2
        seconds = WINDOW_SECONDS if window_seconds is None else window_seconds
        return SeamlessM4TFeatureExtractor(feature_size=bins, num_mel_bins=bins, chunk_length=seconds)
    missing = [field for field in ("num_mel_bins", "max_source_positions") if not hasattr(config, field)]
    if missing:
        raise ValueError(
            f"{name!r} is a {config.model_type} checkpoint without {' and '.join(missing)}; expected a Whisper or "
            "w2v-BERT 2.0 encoder."
        )
    seconds, rest = divmod(config.max_source_positions, POSITIONS_PER_SECOND)
    if rest or not seconds:
        raise ValueError(
            f"{name!r} has max_source_positions={config.max_source_positions}; expected a multiple of "
            f"{POSITIONS_PER_SECOND}: windows are whole seconds."
        )
    if window_seconds not in (None, seconds):
        raise ValueError(f"{name!r} has windows of {seconds} s; leave window_seconds={window_seconds} out.")
    # Everything else of Whisper's front end is the same for all of its sizes.
    return WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=seconds, return_attention_mask=True)


def window_frames(extractor: Any) -> int:
    """Mel frames `W` of a full window.

    Raises:
        ValueError: A feature extractor of another type.
    """
    if isinstance(extractor, WhisperFeatureExtractor):
        return extractor.nb_max_frames
    if isinstance(extractor, SeamlessM4TFeatureExtractor):  # its chunk_length is ours: it knows no windows
        return getattr(extractor, "chunk_length", WINDOW_SECONDS) * SAMPLING_RATE // HOP
    raise ValueError(
        f"The feature extractor is a {type(extractor).__name__}; expected a WhisperFeatureExtractor or a "
        "SeamlessM4TFeatureExtractor (w2v-BERT 2.0)."
    )


def window_features(samples: np.ndarray, length: int, extractor: Any, padding: str) -> torch.Tensor:
    """Features of one window.

    Args:
        samples: Mono at 16 kHz, (n,), with n at most `length` frames.
        length: Mel frames that are wanted, a multiple of 4.
        extractor: The encoder's feature extractor.
        padding: `"longest"` or `"max_length"`.

    Returns:
        (M, length) for "longest" and (M, W) for "max_length".
    """
    make = _log_mel if isinstance(extractor, WhisperFeatureExtractor) else _filter_banks
    return make(samples, length, extractor, padding)


def _log_mel(samples: np.ndarray, length: int, extractor: WhisperFeatureExtractor, padding: str) -> torch.Tensor:
    window, n_fft = extractor.nb_max_frames, extractor.n_fft
    # Zeros after the clip: the transform of its last frames looks half an FFT window ahead and would otherwise reflect
    # the clip. Two FFT windows, so that the last frame is one of pure silence.
    padded = np.zeros(length * HOP + 2 * n_fft, dtype=np.float32)
    if padding == "max_length" and len(padded) > extractor.n_samples:
        padded = np.zeros(extractor.n_samples, dtype=np.float32)
    padded[: len(samples)] = samples
    output = extractor(
        padded, padding="do_not_pad", truncation=False, sampling_rate=SAMPLING_RATE, return_tensors="pt"
    )
    mel = output["input_features"][0]  # (M, frames)
    if padding == "longest":
        return mel[:, :length]
    # All frames of padding are equal: repeating one gives what 30 s of zeros would, at the price of the clip alone.
    silence = mel[:, -1:].expand(-1, max(0, window - mel.shape[1]))
    return torch.cat([mel[:, :window], silence], dim=1)


def _filter_banks(
    samples: np.ndarray, length: int, extractor: SeamlessM4TFeatureExtractor, padding: str
) -> torch.Tensor:
    padded = np.zeros((length - 1) * HOP + FILTER_BANK_SAMPLES, dtype=np.float32)
    padded[: len(samples)] = samples
    output = extractor(
        padded,
        padding="do_not_pad",
        pad_to_multiple_of=None,
        do_normalize_per_mel_bins=False,
        sampling_rate=SAMPLING_RATE,
        return_tensors="np",
    )
    banks = output["input_features"].reshape(length, -1)  # (frames, M)
    # The zeros behind the clip must not count: over the frames that lie in it whole, as for the clip alone.
    whole = banks[: max(2, 1 + (len(samples) - FILTER_BANK_SAMPLES) // HOP)]
    banks = (banks - whole.mean(0)) / np.sqrt(whole.var(0, ddof=1) + 1e-7)
    banks[-(-len(samples) // HOP) :] = 0.0  # a frame without any sample says nothing: the mean
    features = torch.zeros(banks.shape[1], length if padding == "longest" else window_frames(extractor))
    features[:, :length] = torch.from_numpy(banks.T)
    return features
