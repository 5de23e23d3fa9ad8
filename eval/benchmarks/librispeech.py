"""LibriSpeech test-clean and test-other: read English, transcribed (word error rate)."""

from pathlib import Path

from soundwave.eval.benchmarks import Benchmark
from soundwave.eval.benchmarks.sources import (
    DataError,
    existing,
    first_existing,
    read_hub_table,
    read_lines,
    read_parquet_table,
    spoken_item,
    table_clips,
    unique,
)
from soundwave.eval.items import FileClip, Item

COLUMNS = ("id", "text", "speaker_id", "audio")


class LibriSpeech(Benchmark):
    """One test part of LibriSpeech.

    The prompt is Qwen2-Audio's (its evaluation file as quoted in MoonshotAI/Kimi-Audio-Evalkit,
    ``models/qwen_audio.py``): Soundwave published none. SiM normalises both sides as Whisper does; Soundwave says
    nothing, so that Whisper's English normaliser is the rule here.

    Args:
        part: ``"clean"`` or ``"other"``.
        size: Items of its test part.
    """

    licence = "CC BY 4.0"
    hub_id = "openslr/librispeech_asr"
    homepage = "https://www.openslr.org/12"
    metric = "wer"
    also = ("cer",)
    settings = {"normalizer": "english"}
    instruction = "Detect the language and recognize the speech: <|en|>"
    transcribed = True

    def __init__(self, part: str, size: int):
        self.part = part
        self.size = size
        self.name = f"librispeech_{part}"
        self.title = f"LibriSpeech test-{part}"

    def load(self, source: str | Path | None = None, revision: str | None = None) -> list[Item]:
        """Utterances of ``LibriSpeech/test-*`` as OpenSLR packs it, or of the Hub's parquet files."""
        if source is None:
            table = read_hub_table(self.hub_id, COLUMNS, config=self.part, revision=revision)
        else:
            test = f"test-{self.part}"
            folder = Path(source).resolve()
            if folder.name != test:
                folder = first_existing(folder, [f"LibriSpeech/{test}", test, self.part])
            if folder.name == test:
                return self._from_openslr(existing(folder))
            table = read_parquet_table(folder.parent, COLUMNS, config=self.part)
        items = [
            spoken_item(row["id"], self.instruction, clip, row["text"], speaker=str(row["speaker_id"]))
            for row, clip in table_clips(table)
        ]
        return unique(items, source or self.hub_id)

    def _from_openslr(self, folder: Path) -> list[Item]:
        items, transcribed = [], False
        for chapter in sorted(folder.glob("*/*")):
            lines = [line for file in sorted(chapter.glob("*.trans.txt")) for line in read_lines(file)]
            transcripts = dict(line.partition(" ")[::2] for line in lines)
            transcribed |= bool(transcripts)
            # A recording without transcript and a transcript without recording are both named by the run.
            for name in sorted(transcripts.keys() | {file.stem for file in chapter.glob("*.flac")}):
                clip = FileClip(chapter / f"{name}.flac")
                speaker = chapter.parent.name
                items.append(spoken_item(name, self.instruction, clip, transcripts.get(name), speaker=speaker))
        if not transcribed:
            raise DataError(f"{folder} holds no <speaker>/<chapter>/*.trans.txt with transcripts.")
        return unique(items, folder)


BENCHMARKS = (LibriSpeech("clean", 2620), LibriSpeech("other", 2939))
