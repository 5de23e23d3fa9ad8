"""A corpus folder from recorded clips: single words strung together into utterances, with sounds, and sounds alone.

The folder is that of `corpus.py`, so everything after it runs on both. The tasks are those that labels of words and
sounds can answer: transcripts, transcripts with sounds, sounds by name, and questions about a string of words.

    python -m soundwave.training.tiny.recordings MANIFEST OUTPUT
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
from tqdm.auto import tqdm

from soundwave.training.tiny import clips as audio
from soundwave.training.tiny.clips import label_of
from soundwave.training.tiny.corpus import write_frames, write_jsonl
from soundwave.training.tiny.examples import INSTRUCTIONS
from soundwave.training.tiny.manifest import Clip, ClipPool, HoldOut, read_manifest, split_clips
from soundwave.training.tiny.recording_texts import ASKED_WORDS, draw_text, question, text_examples, text_question
from soundwave.training.tiny.sounds import SAMPLING_RATE
from soundwave.training.tiny.synthesizer import SEEN_VOICES
from soundwave.training.tiny.utterances import Job, Spoken, frame_count, frame_names, speak

SOUND_S = (0.5, 1.2)  # seconds of a sound beside words: an event, not a scene
SOUND_ALONE_S = (1.5, 3.0)
AUGMENTATION = audio.Augmentation()
# A synthesized voice has a wider band than many recordings: more often it goes through a narrow line.
SYNTHESIZED = replace(AUGMENTATION, band_probability=0.7)
SYNTHESIZED_TOO = " {} more strings of the training (none of a test) are synthesized by espeak-ng."
DESCRIPTION = "Recordings of people saying single words, strung together into utterances, and recorded sounds."


@dataclass(frozen=True)
class RecordingSettings:
    """How many utterances and rows to make."""

    strings: int = 3000  # training utterances of recorded words
    synthesized: int = 3000  # more of them in synthesized voices: recorded speakers are few
    sounds: int = 1600  # recorded words with a sound
    sounds_alone: int = 900
    questions: int = 1500  # rows about the recorded strings
    text_questions: int = 800
    test_rows: int = 400
    dev_rows: int = 120
    text_train: int = 24_000  # stage 0 examples of the language model
    text_dev: int = 600
    processes: int = 2

    @classmethod
    def smoke(cls) -> RecordingSettings:
        """Return settings that take a second or two, for tests."""
        return cls(24, 4, 12, 8, 12, 12, 8, 6, 200, 40, 1)


@dataclass(frozen=True)
class Take:
    """An utterance to make: clips in order (sounds cropped to some seconds), or words in a synthesized voice."""

    id: str
    clips: tuple[Clip, ...]
    seed: int
    training: bool
    voice: str = ""
    seconds: tuple[float, float] = SOUND_S
    said: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        """What is said, without sounds."""
        return self.said or tuple(clip.text for clip in self.clips if clip.kind == "word")

    @property
    def transcript(self) -> str:
        """What is heard, with sounds as labels."""
        return " ".join(
            self.said or (label_of(clip.text) if clip.kind == "sound" else clip.text for clip in self.clips)
        )


class _Builder:
    """Collects utterances and the rows that use them."""

    def __init__(self, pools: dict[str, ClipPool], seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.pools = pools
        self.vocabulary = sorted({word for said in pools["train"].words.values() for word in said})
        # Name -> label in a transcript.
        self.sounds = {name: label_of(name) for name in sorted(pools["train"].sounds)}
        self.takes: list[Take] = []
        self.rows: dict[str, list[dict]] = {}

    def take(self, name: str, clips: Sequence[Clip], training: bool = False, **fields) -> Take:
        seed = int(self.rng.integers(2**32))
        self.takes.append(Take(f"{name}_{len(self.takes):05d}", tuple(clips), seed, training, **fields))
        return self.takes[-1]

    def string(self, pool: str, split: str, longest: int = 25) -> list[Clip]:
        """Recordings of one speaker that make a text of the split, of at most `longest` words."""
        while True:
            said = self.pools[pool].words
            speaker = sorted(said)[int(self.rng.integers(len(said)))]
            if len(said[speaker]) > 1:  # a speaker of one word makes no strings
                words = draw_text(sorted(said[speaker]), self.rng, split, longest)
                return self.pools[pool].draw_words(speaker, words, self.rng)

    def with_sound(self, pool: str, split: str) -> list[Clip]:
        """A string of words with a sound before or after it, now and then between two words."""
        clips = self.string(pool, split, 5)
        place = self.rng.choice([0, len(clips), int(self.rng.integers(len(clips) + 1))], p=[0.45, 0.45, 0.1])
        return [*clips[:place], self.pools[pool].draw_sound(self.rng), *clips[place:]]

    def add(self, file: str, task: str, answer: str, take: Take | None = None, instruction: str = "") -> None:
        rows = self.rows.setdefault(file, [])
        wordings = INSTRUCTIONS[task] if not instruction else (instruction,)
        varied = file.startswith("train/") and self.rng.random() < 0.3
        source = "labels"
        if take:
            source = (
                f"espeak-ng {take.voice}" if take.voice else ", ".join(sorted({str(c.path.stem) for c in take.clips}))
            )
        rows.append(
            {
                "id": f"{file.replace('/', '_')}_{len(rows):05d}",
                "audio": f"../wav/{take.id}.wav" if take else None,
                "task": task,
                "instruction": str(self.rng.choice(wordings)) if varied else wordings[0],
                "answer": answer,
                "transcript": take.transcript if take else None,
                "language": "en",
                "source": source,
                "duration_s": None,
            }
        )

    def ask(self, file: str, take: Take) -> None:
        """Add a question about what is said, answered by the words first (chain of thought)."""
        asked, answer = question(take.words, self.vocabulary, self.rng)
        self.add(file, "spoken_qa", f"{take.transcript} : {answer}", take, asked)

    def ask_text(self, split: str, rows: int) -> None:
        for _ in range(rows):
            words = draw_text(self.vocabulary, self.rng, split, ASKED_WORDS)
            asked, answer = question(words, self.vocabulary, self.rng)
            self.add(f"{split}/text_qa", "text_qa", answer, instruction=text_question(words, asked))


def _add_training(builder: _Builder, settings: RecordingSettings) -> None:
    rng = builder.rng
    recorded = []
    for _ in range(settings.strings):
        recorded.append(builder.take("train", builder.string("train", "train"), True))
        builder.add("train/asr", "asr", recorded[-1].transcript, recorded[-1])
    for _ in range(settings.synthesized):
        voice = SEEN_VOICES[int(rng.integers(len(SEEN_VOICES)))]
        said = tuple(draw_text(builder.vocabulary, rng, "train"))
        take = builder.take("synthesized", (), True, voice=voice, said=said)
        builder.add("train/asr", "asr", take.transcript, take)
    for index in range(settings.questions):
        take = recorded[index % len(recorded)]
        if len(take.words) <= ASKED_WORDS:
            builder.ask("train/spoken_qa", take)
    if builder.sounds:
        for _ in range(settings.sounds):
            take = builder.take("sound", builder.with_sound("train", "train"), True)
            builder.add("train/sound", "sound", take.transcript, take)
        for _ in range(settings.sounds_alone):
            take = builder.take("sound", [builder.pools["train"].draw_sound(rng)], True, seconds=SOUND_ALONE_S)
            builder.add("train/sound", "sound", take.transcript, take)
            builder.add("train/sound_class", "sound_class", take.clips[0].text, take)
    builder.ask_text("train", settings.text_questions)


def _add_evaluation(builder: _Builder, split: str, rows: int) -> None:
    known = "dev" if split == "dev" else "test_seen"
    for group, pool in (("seen", known), ("unseen", "test_unseen")):
        if group == "unseen" and (split == "dev" or not builder.pools[pool].words):
            continue
        for _ in range(rows):
            take = builder.take(f"{split}_{group}", builder.string(pool, split))
            builder.add(f"{split}/asr_{group}", "asr", take.transcript, take)
            if group == "seen":
                builder.ask(f"{split}/spoken_qa", take)
    if builder.pools[known].sounds:
        for index in range(rows):
            take = builder.take(f"{split}_sound", builder.with_sound(known, split))
            builder.add(f"{split}/sound", "sound", take.transcript, take)
            # Every clip in turn: there are fewer of them than rows, so they are heard in several crops.
            clips = [clip for _, said in sorted(builder.pools[known].sounds.items()) for clip in said]
            take = builder.take(f"{split}_sound", [clips[index % len(clips)]], seconds=SOUND_ALONE_S)
            builder.add(f"{split}/sound_class", "sound_class", take.clips[0].text, take)
    builder.ask_text(split, rows)


_WAVES: dict[Path, np.ndarray] = {}  # of this process


def _load(clips: Sequence[Clip]) -> None:
    """Read all clips into this process, words trimmed."""
    for clip in clips:
        if clip.path not in _WAVES:
            wave = audio.read_clip(clip.path)
            _WAVES[clip.path] = audio.trim(wave) if clip.kind == "word" else wave


def make(take: Take) -> Spoken:
    """The utterance of a take; its clips must be loaded."""
    rng = np.random.default_rng(take.seed)
    if take.voice:
        spoken = speak(Job(take.id, (" ".join(take.said),), take.voice, take.seed, take.training))
        return replace(spoken, samples=audio.limit(audio.augment(spoken.samples, rng, SYNTHESIZED)))
    pieces = []
    for clip in take.clips:
        wave = _WAVES[clip.path]
        if clip.kind == "sound":
            wave = audio.crop_sound(wave, rng.uniform(*take.seconds), rng)
        pieces.append((clip, wave))
    return audio.string_together(pieces, rng, AUGMENTATION if take.training else None)


def _write(take: Take, folder: Path) -> tuple[str, int, list[str], list[str]]:
    spoken = make(take)
    soundfile.write(folder / f"{take.id}.wav", spoken.samples, SAMPLING_RATE, subtype="PCM_16")
    frames = frame_count(len(spoken.samples))
    return take.id, len(spoken.samples), frame_names(spoken.phonemes, frames), frame_names(spoken.words, frames)


def _render(takes: Sequence[Take], folder: Path, processes: int, progress: bool) -> dict[str, tuple]:
    clips = list({clip.path: clip for take in takes for clip in take.clips}.values())
    bar = partial(tqdm, total=len(takes), desc="stringing recordings", unit="utterance", disable=not progress)
    work = partial(_write, folder=folder)
    if processes == 1:
        _load(clips)
        return {name: rest for name, *rest in bar(map(work, takes))}
    # "spawn": the caller may have started the threads of torch, which a fork would copy half alive.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=_load, initargs=(clips,)) as pool:
        return {name: rest for name, *rest in bar(pool.map(work, takes, chunksize=32))}


def build_recordings(
    manifest: str | Path,
    folder: str | Path,
    seed: int = 0,
    settings: RecordingSettings | None = None,
    progress: bool = True,
    **hold_out,
) -> dict:
    """Write the corpus folder of a manifest of recordings; return what `corpus.json` holds.

    Args:
        manifest: see `manifest.py`.
        folder: where to write; created if needed.
        seed: of every draw; which recordings and texts are held out does not depend on it.
        settings: sizes.
        progress: show a progress bar.
        **hold_out: `takes`, `dev_takes`, `speaker`, `fold` of `HoldOut.from_clips`; by default from the manifest.

    Raises:
        ManifestError: if the manifest cannot be used.
        ImportError: if synthesized speech is asked for and espeak-ng is not installed.
    """
    folder, settings = Path(folder), settings or RecordingSettings()
    clips = read_manifest(manifest)
    held = HoldOut.from_clips(clips, **hold_out)
    pools, dropped = split_clips(clips, held)
    builder = _Builder(pools, seed)
    _add_training(builder, settings)
    for split, rows in (("dev", settings.dev_rows), ("test", settings.test_rows)):
        _add_evaluation(builder, split, rows)
    (folder / "wav").mkdir(parents=True, exist_ok=True)
    made = _render(builder.takes, folder / "wav", settings.processes, progress)
    for file, listed in builder.rows.items():
        for row in listed:
            if row["audio"]:
                row["duration_s"] = round(made[Path(row["audio"]).stem][0] / SAMPLING_RATE, 3)
        write_jsonl(folder / f"{file}.jsonl", listed)
    write_frames(folder, {name: pair for name, (_, *pair) in made.items() if not name.startswith("test_")})
    for split, count in (("train", settings.text_train), ("dev", settings.text_dev)):
        examples = text_examples(builder.vocabulary, builder.sounds, count, split, builder.rng)
        write_jsonl(folder / f"text/{split}.jsonl", examples)
    facts = _facts(builder, made, clips, held, dropped, seed, settings)
    (folder / "corpus.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False), encoding="utf-8")
    return facts


def _facts(builder, made, clips, held, dropped, seed, settings) -> dict:
    """What `corpus.json` says: counts, what is held out, whose recordings under which licences."""
    used = {clip.path for take in builder.takes for clip in take.clips}
    durations = np.array([samples for samples, *_ in made.values()]) / SAMPLING_RATE
    pools = {}
    for split, pool in builder.pools.items():
        words = {speaker or "unknown": sum(map(len, said.values())) for speaker, said in sorted(pool.words.items())}
        pools[split] = {"words": words, "sounds": sum(map(len, pool.sounds.values()))}
    return {
        "description": DESCRIPTION + (SYNTHESIZED_TOO.format(settings.synthesized) if settings.synthesized else ""),
        "seed": seed,
        "settings": asdict(settings),
        "augmentation": asdict(AUGMENTATION),
        "utterances": len(durations),
        "hours": round(float(durations.sum()) / 3600, 2),
        "seconds": {"mean": round(float(durations.mean()), 2), "longest": round(float(durations.max()), 2)},
        "rows": {file: len(rows) for file, rows in sorted(builder.rows.items())},
        "vocabulary": builder.vocabulary,
        "sounds": builder.sounds,
        "recordings": pools,
        "left_out": {"clips": sum(dropped.values()), "why": "too few recordings", "names": sorted(dropped)},
        "held_out": {
            "takes": sorted(held.takes),
            "dev_takes": sorted(held.dev_takes),
            "speaker": held.speaker,
            "fold": held.fold,
            "texts": "md5 of a text of three or more words",
        },
        "licences": dict(Counter(clip.licence for clip in clips if clip.path in used).most_common()),
        "attributions": sorted({clip.attribution for clip in clips if clip.path in used} - {""}),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Build a corpus folder and print what is in it."""
    program, about = "python -m soundwave.training.tiny.recordings", (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog=program, description=about)
    parser.add_argument("manifest", help="one JSON object per recording: path, kind, transcript, labels, speaker")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-takes", type=int, nargs="+", metavar="N", help="recordings held out for tests")
    parser.add_argument("--dev-takes", type=int, nargs="+", metavar="N", help="and for development")
    parser.add_argument("--unheard-speaker", metavar="NAME", help="speaker held out entirely")
    parser.add_argument("--fold", type=int, metavar="N", help="fold of the sounds held out")
    parser.add_argument("--no-synthesizer", action="store_true", help="recordings only, no synthesized voices")
    a = parser.parse_args(argv)
    settings = RecordingSettings(synthesized=0) if a.no_synthesizer else RecordingSettings()
    held = {"takes": a.test_takes, "dev_takes": a.dev_takes, "speaker": a.unheard_speaker, "fold": a.fold}
    facts = build_recordings(a.manifest, a.output, a.seed, settings, **held)
    print(json.dumps(facts["rows"], indent=2))  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
