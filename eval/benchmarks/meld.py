"""MELD: the emotion of an utterance from the series Friends, one of seven (accuracy)."""

from pathlib import Path

from soundwave.eval.benchmarks import Benchmark
from soundwave.eval.benchmarks.sources import (
    DataError,
    first_existing,
    read_hub_table,
    read_parquet_table,
    read_separated,
    spoken_item,
    table_clips,
    unique,
)
from soundwave.eval.items import FileClip, Item

LABELS = ("neutral", "joy", "anger", "surprise", "sadness", "disgust", "fear")
CSV = "test_sent_emo.csv"
CSV_COLUMNS = ("Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID")
HUB_COLUMNS = ("context", "instruction", "answer")
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3")
EXTRACT = "ffmpeg -i {name}.mp4 -vn -ac 1 -ar 16000 {name}.wav"


class MELD(Benchmark):
    """The test part of MELD.

    Prompt and strict rule are those of QwenLM/Qwen2-Audio ``eval_audio/evaluate_emotion.py``: the answer equals the
    label, case included; plain accuracy, not weighted F1. The lenient rule takes an answer that holds exactly one of
    the seven labels as a word. Soundwave's own prompt and parser are not published.
    """

    name = "meld"
    title = "MELD"
    licence = "GPL-3.0"
    hub_id = "AudioLLMs/meld_emotion_test"
    homepage = "https://github.com/declare-lab/MELD"
    size = 2610
    metric = "label_accuracy"
    also = ("lenient_label_accuracy",)
    settings = {"labels": LABELS}
    max_new_tokens = 32
    instruction = "Recognize the emotion with keywords in English:"

    def load(self, source: str | Path | None = None, revision: str | None = None) -> list[Item]:
        """Rows of ``test_sent_emo.csv`` with clips ``dia{D}_utt{U}`` as audio files, or of the Hub's parquet files."""
        if source is None:
            table = read_hub_table(self.hub_id, HUB_COLUMNS, revision=revision, audio="context")
        else:
            found = first_existing(source, [CSV, f"data/MELD/{CSV}", "data"])
            if found.suffix == ".csv":
                return self._from_csv(found, Path(source))
            table = read_parquet_table(Path(source), HUB_COLUMNS, audio="context")
        items = [
            spoken_item(str(number), self.instruction, clip, row["answer"], _unknown_label(row["answer"]))
            for number, (row, clip) in enumerate(table_clips(table, "context"))
        ]
        return unique(items, source or self.hub_id)

    def _from_csv(self, file: Path, folder: Path) -> list[Item]:
        rows = read_separated(file, CSV_COLUMNS)
        clips = first_existing(folder, ["output_repeated_splits_test", "test", "."])
        found = {path.name for path in clips.iterdir()}
        if not any(Path(name).suffix in AUDIO_SUFFIXES for name in found):
            raise DataError(
                f"{clips} holds no audio dia{{D}}_utt{{U}}{'|'.join(AUDIO_SUFFIXES)}; "
                f"extract it from the videos: {EXTRACT.format(name='dia0_utt0')}"
            )
        items = []
        for row in rows:
            name = f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}"
            audio = next((name + suffix for suffix in AUDIO_SUFFIXES if name + suffix in found), f"{name}.wav")
            error = _unknown_label(row["Emotion"])
            if audio not in found and f"{name}.mp4" in found:
                error = f"{name}.mp4 is a video; extract its audio: {EXTRACT.format(name=name)}"
            items.append(
                spoken_item(
                    name, self.instruction, FileClip(clips / audio), row["Emotion"], error, transcript=row["Utterance"]
                )
            )
        return unique(items, file)


def _unknown_label(label: object) -> str | None:
    return None if label in LABELS else f"the label is {label!r}, expected one of {', '.join(LABELS)}"


BENCHMARKS = (MELD(),)
