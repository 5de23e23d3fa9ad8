"""A quickstart's last stage as the small model that comes with the package: `python -m soundwave.training.tiny.pack`.

    python -m soundwave.training.tiny.pack runs/quickstart assets/tiny

Weights in bf16, scored again as they are then (computed in fp32), with a card of these figures.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from soundwave import SoundwaveConfig, SoundwaveForConditionalGeneration, SoundwaveProcessor
from soundwave.eval.rows import evaluate_files
from soundwave.model_card.build_card import write_card

LIMIT_BYTES = 5_000_000


def pack(run: str | Path, output: str | Path, name: str = "soundwave/soundwave-tiny-instruct") -> Path:
    """Write the model folder; return it.

    Args:
        run: folder of a quickstart.
        output: folder to write; an earlier one is replaced.
        name: what the card calls it.

    Raises:
        ValueError: when the result is larger than the package takes.
    """
    run, output = Path(run), Path(output)
    stage = run / "instruct"
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "tiny"
        shutil.copytree(stage, made, ignore=shutil.ignore_patterns("answers.jsonl", "results.json", "checkpoint-*"))
        tensors = {key: value.to(torch.bfloat16) for key, value in load_file(stage / "model.safetensors").items()}
        save_file(tensors, made / "model.safetensors", {"format": "pt"})
        config = SoundwaveConfig.from_pretrained(made)
        config.dtype = torch.bfloat16
        config.save_pretrained(made)
        GenerationConfig.from_pretrained(stage).save_pretrained(made)
        model = SoundwaveForConditionalGeneration.from_pretrained(made, dtype=torch.float32).eval()
        processor = SoundwaveProcessor.from_pretrained(made)
        names = sorted(str(path) for path in (run / "corpus" / "test").glob("*.jsonl"))
        command = "python -m soundwave.training.tiny.pack"
        evaluate_files(model, processor, names, output_dir=made, source=str(made), command=command)
        write_card(made, name, answers_stay=False)
        (made / "answers.settings.json").unlink()
        (made / "answers.jsonl").unlink()  # as large as the weights; `results.json` keeps what was counted
        size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        if size > LIMIT_BYTES:
            raise ValueError(f"the packed model has {size} bytes, more than the {LIMIT_BYTES} that the package takes.")
        if output.exists():
            shutil.rmtree(output)
        shutil.copytree(made, output)
    return output


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m soundwave.training.tiny.pack", description=pack.__doc__)
    parser.add_argument("run", help="folder of a quickstart")
    parser.add_argument("output", help="folder to write")
    a = parser.parse_args(argv)
    folder = pack(a.run, a.output)
    sys.stdout.write(f"{folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
