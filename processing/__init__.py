"""Recordings and conversations to the tensors of a Soundwave model."""

from transformers import AutoProcessor

from soundwave.modeling_soundwave import SoundwaveConfig

from .audio_soundwave import load_audio, stream_windows
from .decoding_soundwave import open_audio
from .limits_soundwave import (
    AudioError,
    AudioFetchError,
    AudioFormatError,
    AudioLimitError,
    AudioLimits,
    AudioValueError,
    EmptyAudioError,
    SamplingRateError,
    TruncatedAudioError,
)
from .messages_soundwave import ChatError, HintError, MessageError, PlaceholderError, TemplateError
from .processing_soundwave import SoundwaveProcessor
from .resampling_soundwave import SAMPLING_RATE

AutoProcessor.register(SoundwaveConfig, SoundwaveProcessor, exist_ok=True)

__all__ = [
    "AudioError",
    "AudioFetchError",
    "AudioFormatError",
    "AudioLimitError",
    "AudioLimits",
    "AudioValueError",
    "ChatError",
    "EmptyAudioError",
    "HintError",
    "MessageError",
    "PlaceholderError",
    "SAMPLING_RATE",
    "SamplingRateError",
    "SoundwaveProcessor",
    "TemplateError",
    "TruncatedAudioError",
    "load_audio",
    "open_audio",
    "stream_windows",
]
