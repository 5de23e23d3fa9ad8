"""A folder of spoken rows for stages I to III, and what stage 0 needs: frame labels and text examples.

- `wav/ID.wav`: 16 kHz mono
- `train|dev|test/TASK.jsonl`: rows (task, audio, instruction, answer, transcript); audio is relative to the file;
  long utterances are in `train/asr_long.jsonl`, apart, as CTC starts badly with them
- `text/train|dev.jsonl`: stage 0 of the language model: content, instruction, answer
- `frames.npz`, `frames.json`: stage 0 of the encoder: phoneme and word of each 20 ms frame of train and dev utterances
- `corpus.json`: counts, seed, voices, rules
"""

import json
import multiprocessing
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from soundwave.training.tiny import synthesizer as voices
from soundwave.training.tiny.examples import INSTRUCTIONS, spoken_answer, text_examples
from soundwave.training.tiny.grammar import (
    HELD_OUT_PAIRS,
    Question,
    Sentence,
    all_questions,
    draw_split,
    question_split,
    text_question_split,
)
from soundwave.training.tiny.sounds import SAMPLING_RATE
from soundwave.training.tiny.utterances import SILENCE, SOUND_LABELS, Job, write_utterance

DESCRIPTION = (
    "Synthetic speech (espeak-ng voices reading sentences of a small grammar), with sounds made by formulas. "
    "No recording of a person."
)


JOBS_PER_PROCESS = 1_000  # a process starts in about half a second and speaks some 250 utterances a second


@dataclass(frozen=True)
class CorpusSettings:
    """How much to speak. Rows of a test set: `test_rows`; of a development set: `dev_rows`."""

    sentences: int = 5200  # training utterances of one sentence
    long_utterances: int = 600  # of several sentences, up to `longest_s`
    questions: int = 1500
    sounds: int = 1700
    encoder_only: int = 3000  # utterances heard in stage 0a alone; they cost little, as their features are not cached
    translations: int = 3000  # rows of training utterances with their German text
    intents: int = 1500
    text_questions: int = 600
    test_rows: int = 400
    dev_rows: int = 120
    longest_s: float = 24.0
    text_train: int = 30_000  # stage 0 examples of the language model
    text_dev: int = 600
    processes: int = 2

    @classmethod
    def smoke(cls) -> "CorpusSettings":
        """Return settings that take a second or two, for tests."""
        return cls(40, 2, 12, 12, 6, 20, 12, 12, 6, 6, 24.0, 300, 40, 1)


class _Builder:
    """Collects jobs and the rows that use their audio."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.jobs: list[Job] = []
        self.rows: dict[str, list[dict]] = {}

    def say(self, name: str, parts: Sequence[str], pool: Sequence[str], training: bool = False) -> Job:
        """Add an utterance in a voice of the pool."""
        number = len(self.jobs)
        seed = self.rng.getrandbits(32)
        self.jobs.append(Job(f"{name}_{number:05d}", tuple(parts), self.rng.choice(pool), seed, training))
        return self.jobs[-1]

    def add(self, file: str, task: str, answer: str, job: Job | None = None, instruction: str = "") -> None:
        """Add a row to a file; the training rows of a task vary its wording."""
        wordings = INSTRUCTIONS.get(task, (instruction,))
        pick = self.rng.choice(wordings) if file.startswith("train/") and self.rng.random() < 0.3 else wordings[0]
        rows = self.rows.setdefault(file, [])
        rows.append(
            {
                "id": f"{file.replace('/', '_')}_{len(rows):05d}",
                "audio": f"../wav/{job.id}.wav" if job else None,
                "task": task,
                "instruction": instruction or pick,
                "answer": answer,
                "transcript": job.transcript if job else None,
                "language": "de" if task == "st" else "en",
                "source": f"espeak-ng {job.voice}" if job else "grammar",
                "duration_s": None,
            }
        )


def _with_sound(sentence: Sentence, rng: random.Random) -> tuple[str, list[str]]:
    """Return a sound label, and the parts of an utterance with that sound before, after or instead of a sentence."""
    label, spot = rng.choice(SOUND_LABELS), rng.random()
    if spot < 0.06:
        return label, [label]
    return label, [label, sentence.text] if spot < 0.53 else [sentence.text, label]


def _questions(split: str) -> list[Question]:
    return [question for question in all_questions() if question_split(question) == split]


def _add_training(builder: _Builder, settings: CorpusSettings) -> None:
    rng, pool = builder.rng, voices.SEEN_VOICES
    sentences = draw_split(rng, "train", settings.sentences)
    spoken = []
    for sentence in sentences:
        job = builder.say("train", [sentence.text], pool, training=True)
        builder.add("train/asr", "asr", job.transcript, job)
        spoken.append((sentence, job))
    for sentence, job in spoken[: settings.translations]:
        builder.add("train/st", "st", sentence.german, job)
    for sentence, job in spoken[-settings.intents :]:
        builder.add("train/intent", "intent", sentence.intent, job)
    for index in range(settings.long_utterances):
        # 2.1 s a sentence, pauses included; many of two and three sentences, some as long as they may be
        most = int(settings.longest_s / 2.6)
        count = rng.randint(2, 3) if index % 3 else rng.randint(4, most)
        job = builder.say("long", [s.text for s in rng.sample(sentences, count)], pool, training=True)
        builder.add("train/asr_long", "asr", job.transcript, job)
    questions = _questions("train")
    for index in range(settings.questions):
        question = questions[index % len(questions)]
        job = builder.say("question", [question.text], pool, training=True)
        builder.add("train/asr", "asr", job.transcript, job)
        builder.add("train/spoken_qa", "spoken_qa", spoken_answer(question), job)
    for sentence in draw_split(rng, "train", settings.sounds):
        label, parts = _with_sound(sentence, rng)
        job = builder.say("sound", parts, pool, training=True)
        builder.add("train/sound", "sound", job.transcript, job)
        builder.add("train/sound_class", "sound_class", label[1:-1], job)
    for sentence in draw_split(rng, "train", settings.encoder_only):
        builder.say("extra", [sentence.text], pool, training=True)
    _add_text_questions(builder, "train", settings.text_questions)


def _add_text_questions(builder: _Builder, split: str, rows: int) -> None:
    questions = [question for question in all_questions() if text_question_split(question) == split]
    builder.rng.shuffle(questions)
    repeats = -(-rows // len(questions)) if split == "train" else 1
    for question in (questions * repeats)[:rows]:
        builder.add(f"{split}/text_qa", "text_qa", question.answer, instruction=question.text)


def _add_evaluation(builder: _Builder, split: str, rows: int) -> None:
    rng = builder.rng
    unseen, accent = voices.UNSEEN_VOICES, voices.ACCENT_VOICES
    if split == "dev":
        unseen, accent = voices.DEV_UNSEEN_VOICES, voices.DEV_ACCENT_VOICES
    groups = {"seen": voices.SEEN_VOICES, "unseen": unseen, "accent": accent}
    for group, pool in groups.items():
        for index, sentence in enumerate(draw_split(rng, split, rows, distinct=True)):
            job = builder.say(f"{split}_{group}", [sentence.text], pool)
            builder.add(f"{split}/asr_{group}", "asr", job.transcript, job)
            if group != "accent":
                builder.add(f"{split}/st_{group}", "st", sentence.german, job)
                if index % 2:  # half of the intents from each group
                    builder.add(f"{split}/intent", "intent", sentence.intent, job)
    for sentence in draw_split(rng, split, rows, distinct=True):
        label, parts = _with_sound(sentence, rng)
        job = builder.say(f"{split}_sound", parts, voices.SEEN_VOICES)
        builder.add(f"{split}/sound", "sound", job.transcript, job)
        builder.add(f"{split}/sound_class", "sound_class", label[1:-1], job)
    questions = _questions(split)
    rng.shuffle(questions)
    for index in range(rows):
        question = questions[index % len(questions)]
        job = builder.say(f"{split}_question", [question.text], voices.SEEN_VOICES)
        builder.add(f"{split}/spoken_qa", "spoken_qa", spoken_answer(question), job)
    _add_text_questions(builder, split, rows)


def _speak_all(jobs: Sequence[Job], folder: Path) -> list[tuple]:
    return [write_utterance(job, folder) for job in jobs]


def _render(jobs: Sequence[Job], folder: Path, processes: int, progress: bool) -> dict[str, tuple]:
    """Speak all jobs; return {id: (samples, phoneme names, word names)}.

    espeak-ng carries its oscillators' phases from one utterance to the next. Each process therefore speaks one fixed
    share of the jobs from its start to its end, so that a seed gives the same samples on any number of processes.
    """
    shares = [jobs[start : start + JOBS_PER_PROCESS] for start in range(0, len(jobs), JOBS_PER_PROCESS)]
    spoken: dict[str, tuple] = {}
    # "spawn": the caller may have started the threads of torch, which a fork would copy half alive.
    context = multiprocessing.get_context("spawn")
    with (
        tqdm(total=len(jobs), desc="speaking the corpus", unit="utterance", disable=not progress) as bar,
        ProcessPoolExecutor(processes, mp_context=context, max_tasks_per_child=1) as pool,
    ):
        for results in pool.map(partial(_speak_all, folder=folder), shares):
            spoken.update({name: rest for name, *rest in results})
            bar.update(len(results))
    return spoken


def write_frames(folder: str | Path, labels: dict[str, tuple[Sequence[str], Sequence[str]]]) -> None:
    """Write the stage 0 targets of the encoder.

    Args:
        folder: the corpus.
        labels: for each utterance (the stem of its WAV file) the phoneme and the word of each 20 ms frame, E names
            each with E = 2 * ceil(samples / 640); "sil" where nothing is said, `<label>` in both where there is a
            sound, and "" where it is not known.
    """
    names = [[SILENCE, *sorted({n for pair in labels.values() for n in pair[i]} - {SILENCE, ""})] for i in (0, 1)]
    columns = []
    for index in (0, 1):
        number = {name: position for position, name in enumerate(names[index])} | {"": -1}
        columns.append(np.array([number[n] for pair in labels.values() for n in pair[index]], np.int16))
    lengths = np.array([len(pair[0]) for pair in labels.values()], np.int32)
    np.savez(
        Path(folder) / "frames.npz", ids=np.array(list(labels)), lengths=lengths, phonemes=columns[0], words=columns[1]
    )
    classes = {"phonemes": names[0], "words": names[1]}
    (Path(folder) / "frames.json").write_text(json.dumps(classes, ensure_ascii=False), encoding="utf-8")


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    """Write one JSON object per line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def build_corpus(
    folder: str | Path, seed: int = 0, settings: CorpusSettings | None = None, progress: bool = True
) -> dict:
    """Speak and write the corpus; return what `corpus.json` holds.

    Args:
        folder: where to write; created if needed.
        seed: of every draw. The split of a sentence does not depend on it.
        settings: sizes.
        progress: show a progress bar.
    """
    folder, settings = Path(folder), settings or CorpusSettings()
    builder = _Builder(seed)
    _add_training(builder, settings)
    _add_evaluation(builder, "dev", settings.dev_rows)
    _add_evaluation(builder, "test", settings.test_rows)
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    spoken = _render(builder.jobs, folder / "wav", settings.processes, progress)
    for file, rows in builder.rows.items():
        for row in rows:
            if row["audio"]:
                row["duration_s"] = round(spoken[Path(row["audio"]).stem][0] / SAMPLING_RATE, 3)
        write_jsonl(folder / f"{file}.jsonl", rows)
    write_frames(folder, {name: (said[1], said[2]) for name, said in spoken.items() if not name.startswith("test_")})
    write_jsonl(folder / "text/train.jsonl", text_examples(settings.text_train, seed))
    write_jsonl(folder / "text/dev.jsonl", text_examples(settings.text_dev, seed + 1, "dev"))
    durations = np.array([samples for samples, *_ in spoken.values()]) / SAMPLING_RATE
    facts = {
        "description": DESCRIPTION,
        "seed": seed,
        "settings": asdict(settings),
        "utterances": len(durations),
        "hours": round(float(durations.sum()) / 3600, 2),
        "seconds": {"mean": round(float(durations.mean()), 2), "longest": round(float(durations.max()), 2)},
        "rows": {file: len(rows) for file, rows in sorted(builder.rows.items())},
        "held_out": "md5 of the text, and the colour-object pairs " + ", ".join(map(" ".join, HELD_OUT_PAIRS)),
        "voices": {
            "training": len(voices.SEEN_VOICES),
            "unseen": voices.UNSEEN_VOICES,
            "accent": voices.ACCENT_VOICES,
            "dev_unseen": voices.DEV_UNSEEN_VOICES,
            "dev_accent": voices.DEV_ACCENT_VOICES,
        },
    }
    (folder / "corpus.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False), encoding="utf-8")
    return facts
