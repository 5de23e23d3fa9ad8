"""The models that are evaluated: ours, audio-text models of transformers, cascades, and models behind endpoints.

    model = load_model("Qwen/Qwen2-Audio-7B-Instruct")
    answers = model.answer(items, max_new_tokens=256)

All get the same items with the same prompts, and answer greedily.
"""

from collections.abc import Callable
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_CTC_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from soundwave.eval.models.base import AudioModel, ModelError, ModelUnavailableError, read_config

#: Classes that write down what is said, and can be asked nothing.
RECOGNISERS = {*MODEL_FOR_CTC_MAPPING_NAMES.values(), *MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values()} - {
    *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values()
}


def load_model(
    model: str,
    *,
    llm: str | None = None,
    endpoint: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> AudioModel:
    """A model to evaluate, of the kind that its configuration says.

    Args:
        model: Folder or Hub id of a Soundwave model, of an audio-text model of transformers or, with ``llm``, of a
            speech recogniser; with ``endpoint`` alone, the model's id at the server.
        llm: Text LLM that is given the transcripts of ``model``: folder or Hub id, or with ``endpoint`` its id there.
        endpoint: Base URL of an OpenAI-compatible API, such as ``http://127.0.0.1:8000/v1``.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:N"``; ``"auto"``: a GPU where there is one.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``; ``"auto"``: bfloat16 on a GPU, float32 on the CPU.
        revision: Commit, tag or branch of ``model`` on the Hub.
        trust_remote_code: Run code that the repositories of ``model`` and ``llm`` bring.

    Raises:
        ModelError: For what cannot be evaluated: a text LLM or an encoder alone, a damaged folder, a missing package.
        ModelUnavailableError: If the endpoint does not answer.
    """
    from soundwave.apps.loading import resolve_device, resolve_model
    from soundwave.eval.models.cascade import Cascade, Transcriber
    from soundwave.eval.models.endpoint import Endpoint

    if endpoint is not None and llm is None:
        return Endpoint(model, endpoint)
    place, precision = resolve_device(*(None if given == "auto" else given for given in (device, dtype)))
    where = {"device": place, "dtype": precision, "trust_remote_code": trust_remote_code}
    if llm is None:
        return _load(_that_hears, resolve_model(model), revision, **where)
    ears = _load(Transcriber.load, resolve_model(model), revision, **where)
    if endpoint is not None:
        return Cascade(ears, Endpoint(llm, endpoint))
    return Cascade(ears, _load(_that_answers, resolve_model(llm), None, **where))


def _load(load: Callable[..., Any], source: str, revision: str | None, trust_remote_code: bool, **where: Any) -> Any:
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = read_config(source, AutoConfig.from_pretrained, **hub)
    return load(source, config, commit=getattr(config, "_commit_hash", None), **where, **hub)


def _that_hears(source: str, config: Any, **arguments: Any) -> AudioModel:
    from soundwave.eval.models.soundwave import SoundwaveAudioModel
    from soundwave.eval.models.transformers_audio import TransformersAudioModel

    if config.model_type == "soundwave":
        return SoundwaveAudioModel.load(source, config, **arguments)
    if RECOGNISERS.intersection(config.architectures or []):
        raise ModelError(
            f"{source} ({config.model_type}) writes down what is said and can be asked nothing; add a text LLM that "
            f"is given its transcripts: --model {source} --llm LLM"
        )
    return TransformersAudioModel.load(source, config, **arguments)


def _that_answers(source: str, config: Any, **arguments: Any) -> AudioModel:
    from soundwave.eval.models.text import TextModel

    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return TextModel.load(source, **arguments)
    return _that_hears(source, config, **arguments)


__all__ = ["AudioModel", "ModelError", "ModelUnavailableError", "load_model"]
