"""VocalSound: which of six sounds a person makes (accuracy)."""

import reprlib
from pathlib import Path

from soundwave.eval.benchmarks import Benchmark
from soundwave.eval.benchmarks.sources import (
    first_existing,
    read_hub_table,
    read_json,
    read_parquet_table,
    require_list,
    require_object,
    spoken_item,
    table_clips,
    unique,
)
from soundwave.eval.items import FileClip, Item

#: Last part of a file's name -> what a model is expected to answer.
LABELS = {
    "laughter": "Laughter",
    "sniff": "Sniff",
    "throatclearing": "Throat clearing",
    "cough": "Cough",
    "sigh": "Sigh",
    "sneeze": "Sneeze",
}
HUB_COLUMNS = ("audio", "answer")


class VocalSound(Benchmark):
    """The test part of VocalSound; AIR-Bench's task of that name asks another question.

    Prompt and strict rule are those of QwenLM/Qwen2-Audio ``eval_audio/evaluate_vocal_sound.py``: the answer equals
    the label, case included. Label strings as in EvolvingLMMs-Lab/lmms-eval ``tasks/vocalsound/utils.py``.
    """

    name = "vocalsound"
    title = "VocalSound"
    licence = "CC BY-SA 4.0"
    hub_id = "lmms-lab-audio/vocalsound"
    homepage = "https://github.com/YuanGongND/vocalsound"
    metric = "label_accuracy"
    also = ("lenient_label_accuracy",)
    settings = {"labels": tuple(LABELS.values())}
    max_new_tokens = 32
    instruction = "Classify the human vocal sound to VocalSound in English:"

    def load(self, source: str | Path | None = None, revision: str | None = None) -> list[Item]:
        """Files of ``datafiles/te.json`` in ``audio_16k``, as the archive holds them, or the Hub's parquet files."""
        if source is None:
            table = read_hub_table(self.hub_id, HUB_COLUMNS, revision=revision)
        else:
            found = first_existing(source, ["datafiles/te.json", "data"])
            if found.suffix == ".json":
                return self._from_archive(found, Path(source))
            table = read_parquet_table(Path(source), HUB_COLUMNS)
        items = []
        for number, (row, clip) in enumerate(table_clips(table)):
            known = row["answer"] in LABELS.values()
            error = None if known else f"the label is {row['answer']!r}, expected {', '.join(LABELS.values())}"
            items.append(spoken_item(str(number), self.instruction, clip, row["answer"], error))
        return unique(items, source or self.hub_id)

    def _from_archive(self, file: Path, folder: Path) -> list[Item]:
        contents = require_object(read_json(file), ["data"], str(file))
        clips = first_existing(folder, ["audio_16k"])
        items = []
        for number, entry in enumerate(require_list(contents["data"], f"{file}, data")):
            wav = require_object(entry, ["wav"], f"{file}, entry {number}")["wav"]
            # The file holds paths of its authors' machine.
            name = Path(wav).name if isinstance(wav, str) else f"entry-{number}"
            label = LABELS.get(Path(name).stem.rpartition("_")[2])
            error = None if label else f"{name} ends in no class; expected one of {', '.join(LABELS)}"
            if not isinstance(wav, str):
                error = f"wav is {reprlib.repr(wav)}, expected the name of a file"
            items.append(spoken_item(Path(name).stem, self.instruction, FileClip(clips / name), label, error))
        return unique(items, file)


BENCHMARKS = (VocalSound(),)
