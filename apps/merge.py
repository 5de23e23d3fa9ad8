"""A stage as a standalone model: `soundwave merge SOURCE OUTPUT`.

OUTPUT holds every tensor, LoRA merged, and needs neither the encoder's nor the LLM's repository;
OUTPUT/language_model holds the LLM alone, for engines that take prompt embeddings.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from soundwave import SoundwaveForConditionalGeneration, SoundwaveProcessor


def merge(source: str, output: str | Path) -> Path:
    """Write the standalone model of a stage II or III repository; return its folder.

    Args:
        source: folder or Hub id.
        output: folder to write, which must not hold anything yet.

    Raises:
        ValueError: when ``output`` is not empty, ``source`` has no LLM, or a weight file of its is damaged.
    """
    output = Path(output)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; name another folder")
    model = SoundwaveForConditionalGeneration.from_pretrained(source)
    processor = SoundwaveProcessor.from_pretrained(source)  # before anything is written
    model.config.audio_model_revision = model.config.text_model_revision = None  # nothing is read from elsewhere
    model.save_pretrained(output)
    model.language_model.save_pretrained(output / "language_model")
    processor.save_pretrained(output)
    processor.tokenizer.save_pretrained(output / "language_model")
    return output


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; `argv` without the program's name."""
    parser = argparse.ArgumentParser(prog="soundwave merge", description="Write a stage as a standalone model.")
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id of stage II or III")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write")
    a = parser.parse_args(argv)
    print(merge(a.source, a.output))
    return 0
