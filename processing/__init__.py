"""Recordings and conversations to the tensors of a Soundwave model."""

from transformers import AutoProcessor

from soundwave.modeling_soundwave import SoundwaveConfig

from .audio_soundwave import SAMPLING_RATE, AudioError, load_audio
from .chat_soundwave import ChatError
from .processing_soundwave import SoundwaveProcessor

AutoProcessor.register(SoundwaveConfig, SoundwaveProcessor, exist_ok=True)

__all__ = ["SAMPLING_RATE", "AudioError", "ChatError", "SoundwaveProcessor", "load_audio"]
