"""A model and its processor for a command: where it runs, in what precision, and what it must be able to do."""

import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging
from transformers.utils.hub import cached_file, extract_commit_hash

from soundwave import SoundwaveConfig, SoundwaveForConditionalGeneration, SoundwaveForCTC, SoundwaveProcessor
from soundwave.apps.inputs import URL
from soundwave.assets import TINY


def resolve_model(model: str | None) -> str:
    """The folder or Hub id of a model; `None` = the tiny model that comes with the package.

    Raises:
        ValueError: it looks like a folder, and is none.
    """
    source = model or str(TINY)
    if not Path(source).is_dir() and (Path(source).is_absolute() or source.startswith(".") or source.count("/") > 1):
        raise ValueError(f"there is no model folder {source}; give a folder, or a Hub id of the form owner/name")
    return source


def resolve_device(device: str | None, dtype: str | None) -> tuple[str, torch.dtype]:
    """Device and precision: a GPU and bf16 where there is one, else the CPU and fp32 (bf16 is slow there).

    Raises:
        ValueError: a GPU is asked for, and PyTorch sees none.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: PyTorch sees no CUDA device here; use --device cpu")
    return device, getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))


def load_processor(source: str, recordings: Iterable[str] = ()) -> SoundwaveProcessor:
    """The processor of a model; shows progress bars only to people.

    Args:
        source: folder or Hub id.
        recordings: what the user named: an address among them may be a private one.
    """
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    processor = SoundwaveProcessor.from_pretrained(source)
    if any(URL.match(recording) for recording in recordings):
        processor.audio_limits = replace(processor.audio_limits, allow_private_addresses=True, allow_file_urls=True)
    return processor


def load_model(source: str, device: str, dtype: torch.dtype, llm: bool = True) -> Any:
    """A model ready to run: the whole one, or only what hears (`SoundwaveForCTC`).

    Raises:
        ValueError: the LLM is asked for, and the model is of stage I, which has none; or its weights are damaged.
    """
    if llm and SoundwaveConfig.from_pretrained(source).architectures == ["SoundwaveForCTC"]:
        raise ValueError(
            f"{source} is a model of stage I, without an LLM; give one of stage II or III (only "
            "`soundwave transcribe --ctc-only` needs none)"
        )
    kind = SoundwaveForConditionalGeneration if llm else SoundwaveForCTC
    return kind.from_pretrained(source, dtype=dtype).to(device).eval()


def revision_of(source: str) -> str | None:
    """What tells one state of a model from another: the commit on the Hub, or when the folder was last written."""
    if not Path(source).is_dir():
        return extract_commit_hash(cached_file(source, "config.json"), None)
    return f"written at {max((int(path.stat().st_mtime) for path in Path(source).glob('*.*')), default=0)}"
