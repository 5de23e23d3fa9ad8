"""Recordings to text: `soundwave transcribe FILE...` and `soundwave ask FILE "question"`."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from soundwave import SoundwaveForConditionalGeneration, SoundwaveProcessor
from soundwave.assets import TINY
from soundwave.processing import SAMPLING_RATE

# Bound on a transcript: fast speech has about 5 words a second, and a small vocabulary several tokens a word.
TOKENS_PER_SECOND = 20


def load(model: str | None) -> tuple[SoundwaveForConditionalGeneration, SoundwaveProcessor]:
    """Return a model in fp32 on the CPU, and its processor.

    Args:
        model: folder or Hub id; `None` = the tiny model that comes with the package.
    """
    source = model or str(TINY)
    if not Path(source).is_dir() and (Path(source).is_absolute() or source.startswith(".") or source.count("/") > 1):
        raise ValueError(f"there is no model folder {source}; give a folder, or a Hub id of the form owner/name")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    processor = SoundwaveProcessor.from_pretrained(source)
    return SoundwaveForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval(), processor


def transcribe_files(files: Sequence[str], model: str | None, batch_size: int, max_new_tokens: int | None) -> int:
    """Print what is said in each file, in order; after the file's name and a tab if there are several.

    A file that cannot be read costs one line on stderr, and the others are transcribed all the same.

    Returns:
        The exit code: 1 if a file could not be read, else 0.
    """
    loaded, processor = load(model)
    failed = False
    for names, waveforms, errors in _batches(files, processor, batch_size):
        for error in errors:
            failed = True
            print(f"soundwave transcribe: {error}", file=sys.stderr)
        if not waveforms:
            continue
        longest_s = max(map(len, waveforms)) / SAMPLING_RATE
        inputs = processor(audio=waveforms, sampling_rate=SAMPLING_RATE)
        limit = max_new_tokens or 64 + int(TOKENS_PER_SECOND * longest_s)
        for name, text in zip(names, _answers(loaded, processor, inputs, limit, names), strict=True):
            line = " ".join(text.split())
            print(f"{name}\t{line}" if len(files) > 1 else line, flush=True)
    return int(failed)


def ask_file(file: str, question: str, model: str | None, max_new_tokens: int) -> int:
    """Print the answer to a question about a file; a file that cannot be read is an error that names it."""
    loaded, processor = load(model)
    waveform = _read(file, processor)
    content = [{"type": "audio", "audio": waveform}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], sampling_rate=SAMPLING_RATE, add_generation_prompt=True
    )
    print(_answers(loaded, processor, inputs, max_new_tokens, [file])[0])
    return 0


def _read(file: str, processor: SoundwaveProcessor) -> np.ndarray:
    """Return (n,) samples of a file; every way of failing becomes a ValueError that names the file."""
    try:
        waveform = processor.load_audio(file)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(reason if file in reason else f"{file}: {reason}") from error
    if not len(waveform):
        raise ValueError(f"{file}: the recording is empty (0 samples)")
    return waveform


def _batches(
    files: Sequence[str], processor: SoundwaveProcessor, batch_size: int
) -> Iterator[tuple[list[str], list[np.ndarray], list[ValueError]]]:
    """Yield (names, waveforms, errors) of `batch_size` files at a time: memory does not grow with their number."""
    for start in range(0, len(files), batch_size):
        names: list[str] = []
        waveforms: list[np.ndarray] = []
        errors: list[ValueError] = []
        for file in files[start : start + batch_size]:
            try:
                waveforms.append(_read(file, processor))
                names.append(file)
            except ValueError as error:
                errors.append(error)
        yield names, waveforms, errors


@torch.inference_mode()
def _answers(
    model: SoundwaveForConditionalGeneration,
    processor: SoundwaveProcessor,
    inputs: Any,
    limit: int,
    names: Sequence[str],
) -> list[str]:
    """Return one answer per row; an answer that the limit cut short is returned, and said on stderr."""
    prompt_length = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=limit)[:, prompt_length:]
    ends = model.generation_config.eos_token_id
    ended = torch.isin(ids, torch.tensor(ends if isinstance(ends, list) else [ends])).any(dim=1)
    for name, complete in zip(names, ended.tolist(), strict=True):
        if not complete:
            print(f"soundwave: {name}: cut after {limit} tokens; --max-new-tokens sets the limit", file=sys.stderr)
    return [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
