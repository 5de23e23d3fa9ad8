"""Features -> encoder -> alignment adapter -> CTC -> shrinking adapter -> LLM."""

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForCTC, AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from .configuration_soundwave import SoundwaveConfig
from .modeling_soundwave import SoundwaveForConditionalGeneration
from .speech_soundwave import SoundwaveForCTC, SoundwaveModel, SoundwavePreTrainedModel

AutoConfig.register(SoundwaveConfig.model_type, SoundwaveConfig, exist_ok=True)
# AutoModel picks by config.architectures: a stage I repository is a SoundwaveForCTC.
MODELS = (SoundwaveForConditionalGeneration, SoundwaveForCTC, SoundwaveModel)
MODEL_MAPPING.register(SoundwaveConfig, MODELS, exist_ok=True)
AutoModelForMultimodalLM.register(SoundwaveConfig, SoundwaveForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(SoundwaveConfig, SoundwaveForConditionalGeneration, exist_ok=True)
AutoModelForCTC.register(SoundwaveConfig, SoundwaveForCTC, exist_ok=True)

__all__ = [
    "SoundwaveConfig",
    "SoundwaveForCTC",
    "SoundwaveForConditionalGeneration",
    "SoundwaveModel",
    "SoundwavePreTrainedModel",
]
