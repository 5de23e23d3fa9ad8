"""What is said in recorded strings of words and asked about them; texts of the language model's stage 0 alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from soundwave.training.tiny.examples import INSTRUCTIONS
from soundwave.training.tiny.grammar import sentence_split

LONG_SHARE = 0.03  # of the training utterances have 8 to 25 words
ASKED_WORDS = 6  # questions are about strings of at most so many words
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
QUESTION_WORDS = "How many words are said What Is the first last largest smallest number word yes no".split()
TEXT_WEIGHTS = {"asr": 0.4, "words": 0.12, "sound": 0.12, "sound_class": 0.06, "spoken_qa": 0.15, "text_qa": 0.15}


def draw_text(words: Sequence[str], rng: np.random.Generator, split: str, longest: int = 25) -> list[str]:
    """Words of one utterance: mostly two to six; in training also one, and now and then many more, up to `longest`.

    Three words and more belong to one split by the hash of their text; shorter texts are too few to be held out.
    """
    while True:
        if split != "train":
            n = int(rng.integers(2, 7))
        elif rng.random() < LONG_SHARE:
            n = int(rng.integers(8, 26))
        else:
            n = int(rng.choice(6, p=[0.04, 0.14, 0.2, 0.22, 0.2, 0.2])) + 1
        drawn = [words[int(i)] for i in rng.integers(len(words), size=min(n, longest))]
        if belongs(drawn, split):
            return drawn


def belongs(words: Sequence[str], split: str) -> bool:
    """Whether a text may be used in a split; see `draw_text`."""
    return len(words) < 3 or sentence_split(" ".join(words)) == split


def question(words: Sequence[str], vocabulary: Sequence[str], rng: np.random.Generator) -> tuple[str, str]:
    """A question about a string of words, and its answer."""
    values = [NUMBERS.index(word) for word in words if word in NUMBERS]
    kinds = ["first", "last", "contains"] + ["count"] * (len(words) < len(NUMBERS))
    kinds += ["largest", "smallest"] * (len(values) == len(words))
    kind = kinds[int(rng.integers(len(kinds)))]
    if kind == "contains":
        # Asked about a word that is there as often as not.
        word = str(rng.choice(list(words) if rng.random() < 0.5 else list(vocabulary)))
        return f"Is the word {word} said?", "yes" if word in words else "no"
    if kind == "count":
        return "How many words are said?", NUMBERS[len(words)]
    if kind in ("first", "last"):
        return f"What is the {kind} word?", words[0] if kind == "first" else words[-1]
    return f"What is the {kind} number?", NUMBERS[max(values) if kind == "largest" else min(values)]


def text_examples(
    vocabulary: Sequence[str], sounds: dict[str, str], count: int, split: str, rng: np.random.Generator
) -> list[dict]:
    """Stage 0 examples of the language model, {"task", "content", "instruction", "answer"}; see `examples.py`.

    Args:
        vocabulary: the words that are said.
        sounds: the name of each sound and its label in a transcript.
        count: how many.
        split: of the texts ("train" or "dev").
        rng: of the draws.
    """
    # Whatever is ever answered must be an answer here.
    names = [word for name in sounds for word in name.split()]
    everything = [*vocabulary, *NUMBERS, *QUESTION_WORDS, *sounds.values(), *names]
    weights = {task: w for task, w in TEXT_WEIGHTS.items() if sounds or not task.startswith("sound")}
    tasks = rng.choice(list(weights), size=count, p=np.array(list(weights.values())) / sum(weights.values()))
    return [_example(str(task), vocabulary, sounds, everything, split, rng) for task in tasks]


def _example(
    task: str,
    vocabulary: Sequence[str],
    sounds: dict[str, str],
    everything: Sequence[str],
    split: str,
    rng: np.random.Generator,
) -> dict:
    words = draw_text(vocabulary, rng, split, ASKED_WORDS if task in ("spoken_qa", "text_qa") else 25)
    wordings = INSTRUCTIONS["asr" if task in ("words", "text_qa") else task]
    content = answer = " ".join(words)
    instruction = wordings[0] if rng.random() < 0.7 else str(rng.choice(wordings))
    if task == "words":
        drawn = [str(word) for word in rng.choice(everything, size=int(rng.integers(1, 11)))]
        while not belongs(drawn, split):
            drawn = [str(word) for word in rng.choice(everything, size=int(rng.integers(1, 11)))]
        content = answer = " ".join(drawn)
    elif task.startswith("sound"):
        name = sorted(sounds)[int(rng.integers(len(sounds)))]
        place = int(rng.choice([0, len(words)]))
        alone = rng.random() < (0.7 if task == "sound_class" else 0.2)
        content = sounds[name] if alone else " ".join([*words[:place], sounds[name], *words[place:]])
        answer = content if task == "sound" else name
    elif task in ("spoken_qa", "text_qa"):
        instruction, answer = question(words, vocabulary, rng)
        if task == "spoken_qa":
            answer = f"{content} : {answer}"
        else:
            content, instruction = "", text_question(words, instruction)
    return {"task": task, "content": content, "instruction": instruction, "answer": answer}


def text_question(words: Sequence[str], asked: str) -> str:
    """A question about words that are written instead of said."""
    return f"{' '.join(words)} . {asked}"
