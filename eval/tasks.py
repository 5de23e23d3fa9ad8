"""The tasks: how an answer is asked for, what it is compared with, and by which metric.

A row names its task (``design``: row format); this table says the rest. It is data: a new task is one entry.
"""

from dataclasses import dataclass

#: Compared with the transcript, and answered by the CTC head of stage I alone.
CTC = "ctc"


@dataclass(frozen=True)
class Task:
    """How one task is scored.

    Attributes:
        name: As in a row's ``task``.
        title: For tables.
        metric: Headline metric, a name of ``scoring.METRICS``.
        also: Further metrics that are reported beside it.
        reference: Field of the row that holds what is right.
        max_new_tokens: Bound of the answer's length, generous for one utterance of a few seconds.
        normalizer: How both sides are normalised (``scoring.normalize``). The grammar's text has one spelling, so the
            strict form is the fair one; recorded speech with free punctuation wants ``"basic"`` or ``"english"``.
    """

    name: str
    title: str
    metric: str
    also: tuple[str, ...] = ()
    reference: str = "answer"
    max_new_tokens: int = 64
    normalizer: str = "none"


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("asr", "Speech recognition", "wer", ("cer", "sentence_accuracy")),
        Task("st", "Speech translation", "wer", ("sentence_accuracy",)),
        Task("sound", "Transcript with sound labels", "wer", ("sound_accuracy",)),
        Task("intent", "Intent of a spoken command", "accuracy", max_new_tokens=16),
        Task("sound_class", "Class of a sound", "accuracy", max_new_tokens=16),
        Task("spoken_qa", "Spoken question", "final_label_accuracy", max_new_tokens=48),
        Task("text_qa", "Text question, no audio", "final_label_accuracy", max_new_tokens=48),
        Task(CTC, "CTC transcript, no LLM", "wer", ("cer", "sentence_accuracy"), reference="transcript"),
    )
}


def get_task(name: str | Task) -> Task:
    """The task of that name.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(name, Task):
        return name
    if name not in TASKS:
        raise ValueError(f"task {name!r} is unknown; choose one of {', '.join(TASKS)}, or pass a Task of your own")
    return TASKS[name]


def reference_of(row: dict, task: Task) -> str:
    """What a row's answer is compared with; of a conversation the last turn, unless the row names another answer.

    Raises:
        ValueError: If the row has no such text.
    """
    value = row.get(task.reference)
    if value is None and task.reference == "answer" and row.get("messages"):
        value = _said(row["messages"][-1])
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = " ".join(value)  # transcripts parallel to several recordings
    if not isinstance(value, str):
        raise ValueError(
            f"row {row.get('id')!r}: {task.reference!r} is {value!r}, expected the reference of task {task.name!r}"
        )
    return value


def _said(turn: dict) -> str | None:
    """Text of the assistant's turn; ``None`` for another's."""
    content = turn["content"]
    if turn["role"] != "assistant":
        return None
    return content if isinstance(content, str) else "\n".join(part.get("text") or "" for part in content)


__all__ = ["CTC", "TASKS", "Task", "get_task", "reference_of"]
