"""Stage 0: encoder (0a) and language model (0b) side by side, each in a process of its own with one thread.

One process with two threads would take longer: at this size threads wait for each other more than they compute.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from soundwave.training.tiny.pretrain_encoder import EncoderSettings, pretrain_encoder
from soundwave.training.tiny.pretrain_llm import LanguageModelSettings, pretrain_llm


def pretrain(
    corpus: str | Path,
    encoder: str | Path,
    language_model: str | Path,
    encoder_settings: EncoderSettings | None = None,
    language_model_settings: LanguageModelSettings | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, dict]:
    """Pretrain both stand-ins on a corpus folder; return {"encoder": figures, "language_model": figures}.

    Args:
        corpus: folder that `build_corpus` wrote.
        encoder: folder to write, for `WhisperModel` and `WhisperFeatureExtractor`.
        language_model: folder to write, for `AutoModelForCausalLM` and `AutoTokenizer`.
        encoder_settings: size and schedule of stage 0a.
        language_model_settings: size and schedule of stage 0b.
        seed: of both.
        progress: show a progress bar each.
    """
    # "spawn": the caller may have started the threads of torch, which a fork would copy half alive.
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        one = pool.submit(pretrain_encoder, corpus, encoder, encoder_settings, seed, 1, progress)
        other = pool.submit(pretrain_llm, corpus, language_model, language_model_settings, seed, 1, progress)
        return {"encoder": one.result(), "language_model": other.result()}
