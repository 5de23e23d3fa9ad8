"""AIR-Bench: 19 closed tasks on speech, sound and music (foundation), and open questions that a judge marks (chat)."""

import hashlib
import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

from soundwave.eval.benchmarks import Benchmark
from soundwave.eval.benchmarks.sources import DataError, read_json, require_list, require_object, spoken_item
from soundwave.eval.items import FileClip, Item
from soundwave.eval.judge import Prompt, mark, no_mark

#: Area -> task -> its sources. Spellings are the data's own; 19 tasks, 25 pairs of task and source.
TASKS: dict[str, dict[str, tuple[str, ...]]] = {
    "speech": {
        "Speech_Grounding": ("librispeech",),
        "Spoken_Language_Identification": ("covost2",),
        "Speaker_Gender_Recognition": ("common_voice_13_en", "meld"),
        "Speaker_Emotion_Recontion": ("iemocap", "meld"),
        "Speaker_Age_Prediction": ("common_voice_13.0_en",),
        "Speech_Entity_Reconition": ("slurp",),
        "Speaker_Intent_Classification": ("slurp",),
        "Speaker_Number_Verification": ("voxceleb1",),
        "Synthesized_Voice_Detection": ("fake_or_real",),
    },
    "sound": {
        "Audio_Grounding": ("AudioGrounding",),
        "vocal_sound_classification": ("VocalSound",),
        "Acoustic_Scene_Classification": ("CochlScene", "TUT2017"),
        "Sound_AQA": ("avqa", "clothoaqa"),
    },
    "music": {
        "Music_Instruments_Classfication": ("nsynth", "MTJ-Jamendo"),
        "Music_Genre_Recognition": ("fma", "MTJ-Jamendo"),
        "Music_Midi_Pitch_Analysis": ("nsynth",),
        "Music_Midi_Velocity_Analysis": ("nsynth",),
        "Music_AQA": ("music_avqa",),
        "Music_Mood_Recognition": ("MTJ-Jamendo",),
    },
}
#: Task of the chat part -> category that its items are averaged in.
CATEGORIES = {
    "speech_QA": "speech",
    "speech_dialogue_QA": "speech",
    "sound_QA": "sound",
    "sound_generation_QA": "sound",
    "music_QA": "music",
    "music_generation_analysis_QA": "music",
    "speech_and_sound_QA": "speech_and_sound",
    "speech_and_music_QA": "speech_and_music",
}
KEYS = ("path", "question", "answer_gt", "task_name", "dataset_name", "uniq_id")
TEXTS = {"path", "question", "task_name", "dataset_name", "meta_info"}
LETTERS = "ABCD"


class AirBenchFoundation(Benchmark):
    """The 19 closed tasks: pick A, B, C or D. Chance is 50 % for gender and synthesised voices, 25 % elsewhere.

    Items, prompt layout and the official rule follow OFA-Sys/AIR-Bench ``Inference_Foundation.py`` and
    ``score_foundation.py``: the options in stored order, ``None`` in the place of an option that is absent, one pass.
    Only the first line, which asks for a letter, is worded anew; ``with_instruction`` puts the published one there.
    A task is scored over the items of all its sources, and an area is the unweighted mean over its tasks (paper,
    Tables 6 and 16).
    """

    name = "air_bench_foundation"
    title = "AIR-Bench foundation"
    licence = "CC BY-NC 4.0"
    hub_id = "qyang1021/AIR-Bench-Dataset"
    homepage = "https://github.com/OFA-Sys/AIR-Bench"
    metric = "choice_accuracy"
    also = ("choice_strict", "parse_failures")
    average = "groups"
    areas = {area: tuple(tasks) for area, tasks in TASKS.items()}
    max_new_tokens = 32
    instruction = (
        "From the options A, B, C and D pick the one that best answers the question in the next line. "
        "Reply only with A, B, C or D."
    )

    def load(self, source: str | Path | None = None, revision: str | None = None) -> list[Item]:
        """Items of ``Foundation/Foundation_meta.json``; recordings in ``Foundation/<task_name>_<dataset_name>``."""
        folder = _part(self.hub_id, "Foundation", source, revision)
        known = [task for tasks in TASKS.values() for task in tasks]
        entries = _entries(folder / "Foundation_meta.json", (*KEYS, "choice_a", "choice_b"), known)
        return [self._item(folder, name, entry) for name, entry in entries]

    def _item(self, folder: Path, name: str, entry: dict[str, Any]) -> Item:
        options = [_as_text(entry.get(f"choice_{letter.lower()}")) for letter in LETTERS]
        choices = [option for option in options if option is not None]
        reference, error = _as_text(entry["answer_gt"]), None
        if reference not in choices or not all(isinstance(option, str) for option in choices):
            right = reprlib.repr(reference)
            error = f"the right answer {right} is none of the options {choices}, or not all of them are texts"
        elif options[: len(choices)] != choices:
            error = f"the options {options} have a gap"
        lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
        path = entry["path"]
        if entry["task_name"] == "Audio_Grounding":
            path = path[:-3] + "flac"  # the list says .wav, the files are .flac
        fields = {"choices": choices, "source": entry["dataset_name"]} | ({"error": error} if error else {})
        return Item(
            id=name,
            instruction="\n".join([self.instruction, entry["question"], *lines]),
            clips=[FileClip(folder / f"{entry['task_name']}_{entry['dataset_name']}" / path)],
            reference=reference if isinstance(reference, str) else None,
            group=entry["task_name"],
            fields=fields,
        )


class AirBenchChat(Benchmark):
    """Open questions; a judge reads a description of the recording and marks two answers from 1 to 10.

    Model prompt (the question alone), the order of what the judge reads, the parsing of its marks and the sampling
    settings with ``official`` follow OFA-Sys/AIR-Bench ``Inference_Chat.py``, ``score_chat.py`` and ``cal_score.py``;
    the judge's instruction is worded anew. Every answer is judged twice, once on either side of the reference, as the
    repository's README demands: its mark is the mean. A category is the mean over its items, Mixed the mean of two
    categories, the average the mean of the four columns.
    """

    name = "air_bench_chat"
    title = "AIR-Bench chat"
    licence = "CC BY-NC 4.0"
    hub_id = "qyang1021/AIR-Bench-Dataset"
    homepage = "https://github.com/OFA-Sys/AIR-Bench"
    size = 2200
    metric = "judge_score"
    average = "areas"
    areas = {
        "Speech": ("speech",),
        "Sound": ("sound",),
        "Music": ("music",),
        "Mixed": ("speech_and_sound", "speech_and_music"),
    }
    also = ("judge_win_rate",)
    settings = {"scale": (1, 10), "judgements": 2}
    max_new_tokens = 512
    judged = True
    own_questions = True

    def load(self, source: str | Path | None = None, revision: str | None = None) -> list[Item]:
        """Items of ``Chat/Chat_meta.json``; recordings in ``Chat/<task_name>_<dataset_name>``.

        A few SpokenWOZ files are damaged, and the authors say to skip them: they fail when they are read.
        """
        folder = _part(self.hub_id, "Chat", source, revision)
        items = []
        for name, entry in _entries(folder / "Chat_meta.json", (*KEYS, "meta_info"), CATEGORIES):
            clip = FileClip(folder / f"{entry['task_name']}_{entry['dataset_name']}" / entry["path"])
            item = spoken_item(
                name,
                entry["question"],
                clip,
                entry["answer_gt"],
                source=entry["dataset_name"],
                task_name=entry["task_name"],
                meta_info=entry["meta_info"],
            )
            item.group = CATEGORIES[entry["task_name"]]
            items.append(item)
        return items

    def prompts(self, row: dict[str, Any], official: bool = False) -> list[Prompt]:
        """The answer after the reference, and before it."""
        reference, answer = row["reference"], row["answer"]
        return [
            Prompt(
                order,
                [{"role": "user", "content": _judge_text(row, *pair)}],
                {"max_tokens": 1024} | ({"temperature": _temperature(row["id"], order)} if official else {}),
                version="air-bench-chat-1",
            )
            for order, pair in (("reference_first", (reference, answer)), ("answer_first", (answer, reference)))
        ]

    def verdict(self, reply: str, order: str) -> dict[str, Any]:
        """Two whole numbers on one line with one space between them; anything else is no mark.

        The published script stops altogether at a mark above 10; here such a reply gives none, nor does one below 1.
        """
        try:
            first, second = map(int, reply.strip().replace("\n", "").split(" "))
        except ValueError:
            return no_mark("expected two whole numbers separated by one space")
        if not (1 <= first <= 10 and 1 <= second <= 10):
            return no_mark("expected marks from 1 to 10")
        score, reference = (second, first) if order == "reference_first" else (first, second)
        return mark(score, reference_score=reference)


def _part(hub_id: str, part: str, source: str | Path | None, revision: str | None) -> Path:
    """Folder of one of the two parts; from the Hub, where it has tens of gigabytes, downloaded first."""
    if source is None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            source = snapshot_download(hub_id, repo_type="dataset", revision=revision, allow_patterns=f"{part}/*")
        except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise DataError(
                f"{hub_id}: cannot be downloaded ({error}); give the folder that holds {part} as the source."
            ) from error
    return Path(source) / part


def _entries(path: Path, keys: tuple[str, ...], tasks: Any) -> list[tuple[str, dict[str, Any]]]:
    """(id, entry) of a list of objects, each checked for its keys and for a known task.

    ``uniq_id`` counts within a task and source. Should it stand there twice, the later item gets a number.
    """
    entries = require_list(read_json(path), str(path))
    if not entries:
        raise DataError(f"{path} holds no items.")
    named, seen = [], Counter[str]()
    for number, entry in enumerate(entries):
        where = f"{path}, item {number}"
        require_object(entry, keys, where)
        for key in set(keys) & TEXTS:
            if not isinstance(entry[key], str):
                raise DataError(f"{where}: {key} is {reprlib.repr(entry[key])}, expected text.")
        if entry["task_name"] not in tasks:
            raise DataError(f"{where}: task_name {entry['task_name']!r} is unknown; known are {', '.join(tasks)}.")
        name = f"{entry['task_name']}/{entry['dataset_name']}/{entry['uniq_id']}"
        seen[name] += 1
        named.append((name if seen[name] == 1 else f"{name}#{seen[name]}", entry))
    return named


def _as_text(value: Any) -> Any:
    """A number as it is printed in the prompt; anything else as it is."""
    return str(value) if isinstance(value, int | float) else value


def _judge_text(row: dict[str, Any], first: str, second: str) -> str:
    return (
        "You compare answers to questions about recordings, with care and without favour.\n"
        f"[What is heard in the recording]\n{row['fields']['meta_info']}\n"
        f"[Question]\n{row['instruction']}\n"
        f"[Answer 1 begins]\n{first}\n[Answer 1 ends]\n"
        f"[Answer 2 begins]\n{second}\n[Answer 2 ends]\n"
        "[Your task]\n"
        "The description above tells you what the recording holds. Mark each of the two answers for its helpfulness, "
        "relevance, accuracy and comprehensiveness with one whole number from 1 (worst) to 10 (best). Which answer "
        "comes first must not matter. Print one line and nothing else: the mark of answer 1, a space, the mark of "
        "answer 2."
    )


def _temperature(name: str, order: str) -> float:
    """2.0 for half of the questions and 1.0 for the others; the script tosses a coin, here the id decides."""
    return 2.0 if hashlib.sha256(f"{name} {order}".encode()).digest()[0] % 2 else 1.0


BENCHMARKS = (AirBenchFoundation(), AirBenchChat())
