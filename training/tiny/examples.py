"""What the language model reads in stage 0: text in the place of speech, an instruction, and the answer.

A head and embeddings that stay frozen later can only say what they once answered here. So every word, question and
sound label is an answer of the copying tasks, and every class name of the naming ones.
"""

import random
from collections.abc import Sequence

from soundwave.training.tiny.grammar import (
    DIGITS,
    Question,
    Sentence,
    all_questions,
    draw_split,
    sentence_split,
)
from soundwave.training.tiny.utterances import SOUND_LABELS

# The first wording of each is the one that is evaluated.
INSTRUCTIONS = {
    "asr": ("Transcribe the speech.", "Write down what you hear.", "What is said?"),
    "st": ("Translate the speech to German.", "Say it in German."),
    "sound": ("Transcribe the speech and the sounds.", "Write down speech and sounds."),
    "intent": ("What does the speaker want?", "Name the intent."),
    "sound_class": ("Which sound do you hear?", "Name the sound."),
    "spoken_qa": ("Answer the question.", "Listen and answer."),
}
# How often each task is drawn. Copying is what recognition needs later, so it has the largest share.
TASK_WEIGHTS = {
    "asr": 0.24,
    "digits": 0.05,
    "words": 0.09,
    "question": 0.07,
    "st": 0.22,
    "sound": 0.07,
    "intent": 0.03,
    "sound_class": 0.03,
    "spoken_qa": 0.10,
    "text_qa": 0.10,
}


def spoken_answer(question: Question) -> str:
    """Return the answer to a spoken question: the question first (chain of thought), then the answer."""
    return f"{question.text} : {question.answer}"


def _instruction(task: str, rng: random.Random) -> str:
    first, *others = INSTRUCTIONS[task]
    return first if rng.random() < 0.7 else rng.choice(others)


def text_examples(count: int, seed: int, split: str = "train", questions: Sequence[Question] = ()) -> list[dict]:
    """Return `count` examples {"task", "content", "instruction", "answer"}; `content` stands where speech will be.

    Args:
        count: how many.
        seed: of the draws.
        split: the split of the sentences ("train" or "dev").
        questions: the questions to use; all of them if empty, as they are known to the model as text.
    """
    rng = random.Random(seed)
    questions = list(questions) or all_questions()
    sentences = draw_split(rng, split, count)
    vocabulary = sorted({word for sentence in sentences for word in sentence.text.split()})
    vocabulary = sorted(set(vocabulary) | {word for question in questions for word in question.text.split()})
    tasks = rng.choices(list(TASK_WEIGHTS), weights=list(TASK_WEIGHTS.values()), k=count)
    return [
        _example(task, sentence, sentences, questions, vocabulary, split, rng)
        for task, sentence in zip(tasks, sentences, strict=True)
    ]


def _random_words(words: Sequence[str], split: str, rng: random.Random) -> str:
    """One to ten words in a row that make no sentence of another split."""
    while True:
        text = " ".join(rng.choices(words, k=rng.randint(1, 10)))
        if sentence_split(text) == split:
            return text


def _example(
    task: str,
    sentence: Sentence,
    sentences: Sequence[Sentence],
    questions: Sequence[Question],
    vocabulary: Sequence[str],
    split: str,
    rng: random.Random,
) -> dict:
    content, answer, wording = sentence.text, sentence.text, task
    question = rng.choice(questions)
    label = rng.choice(SOUND_LABELS)
    if task == "asr" and rng.random() < 0.08:  # as long as the longest recordings; counted apart
        task, wording = "asr_long", "asr"
        content = answer = " ".join(s.text for s in rng.sample(sentences, rng.choice((2, 2, 2, 3, 3, 5, 8))))
    elif task in ("digits", "words"):
        wording = "asr"
        words = DIGITS if task == "digits" else [*vocabulary, *SOUND_LABELS]
        content = answer = _random_words(words, split, rng)
    elif task == "question":
        wording = "asr"
        content = answer = question.text
    elif task == "st":
        answer = sentence.german
    elif task in ("sound", "sound_class"):
        spot = rng.random()
        content = f"{label} {content}" if spot < 0.45 else (f"{content} {label}" if spot < 0.9 else label)
        answer = content if task == "sound" else label[1:-1]
    elif task == "intent":
        answer = sentence.intent
    elif task == "spoken_qa":
        content, answer = question.text, spoken_answer(question)
    elif task == "text_qa":
        return {"task": task, "content": "", "instruction": question.text, "answer": question.answer}
    return {"task": task, "content": content, "instruction": _instruction(wording, rng), "answer": answer}
