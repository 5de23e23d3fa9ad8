"""Alpaca-Audio and OpenHermes-Audio of AudioBench: spoken instructions, answers marked from 0 to 5 by a judge."""

import hashlib
import re
from pathlib import Path
from typing import Any

from soundwave.eval.benchmarks import Benchmark
from soundwave.eval.benchmarks.sources import read_hub_table, read_parquet_table, spoken_item, table_clips, unique
from soundwave.eval.items import Item
from soundwave.eval.judge import Prompt, mark, no_mark

HUB_COLUMNS = ("context", "instruction", "speech_instruction", "answer")
#: Ways of asking for what the recording asks for; the protocol has ten, of which these are the sense.
REQUESTS = (
    "Do what the speaker asks for.",
    "Listen to the request in the recording and carry it out.",
    "The recording holds an instruction. Respond to it.",
    "Give the answer that the spoken request calls for.",
    "Hear the task in the audio and complete it.",
    "Reply to what is asked in the audio clip.",
    "Act on the instruction that you hear.",
    "Please fulfil the request spoken in this recording.",
    "Someone tells you what they need. Help them with it.",
    "Take the audio as your instruction and respond accordingly.",
)
LEVELS = (
    "0: has nothing to do with the question, or is wrong throughout.",
    "1: touches the question, but is mostly wrong or off the point.",
    "2: is partly right, with grave errors or gaps.",
    "3: agrees with the reference in the main points, with errors or gaps in details.",
    "4: is right and relevant, and misses only small details.",
    "5: says what the reference says, fully and correctly.",
)
RATING = re.compile(r"rating\W*?(-?\d+(?:\.\d+)?)", re.IGNORECASE)


class AudioInstructions(Benchmark):
    """Spoken requests; a judge compares the answer with a reference.

    Data, order of what the judge reads and the parsing follow AudioLLMs/AudioBench ``dataset_src`` and
    ``eval_methods/eval_llama3_70b.py``; texts are worded anew. AudioBench draws one of ten requests per item without a
    seed: here the item's number decides. SiM (Table 6) reports the mean from 0 to 5; AudioBench prints it times 20.

    A reply's last token must be the mark, 0 to 5. Other replies have no mark, are left out of the figure, and are
    counted and named. ``judge_score_official`` counts them as 0, as AudioBench does; ``judge_score_lenient`` also
    reads replies that go on after their last ``Rating: <number>``. The published judge is Llama-3-70B-Instruct, its
    temperature not set.
    """

    homepage = "https://github.com/AudioLLMs/AudioBench"
    size = 100
    metric = "judge_score"
    also = ("judge_score_official", "judge_score_lenient")
    settings = {"scale": (0, 5)}
    max_new_tokens = 512
    judged = True

    def load(self, source: str | Path | None = None, revision: str | None = None) -> list[Item]:
        """Rows of the split ``test``: on the Hub, or the parquet files of its repository in a local folder."""
        if source is None:
            table = read_hub_table(self.hub_id, HUB_COLUMNS, revision=revision, audio="context")
        else:
            table = read_parquet_table(Path(source), HUB_COLUMNS, audio="context")
        items = []
        for number, (row, clip) in enumerate(table_clips(table, "context")):
            question = row["speech_instruction"]
            valid = isinstance(question, str) and question.strip()
            error = None if valid else f"speech_instruction is {question!r}, expected the text of the spoken request"
            request = self.instruction or REQUESTS[_draw(f"{self.name} {number}", len(REQUESTS))]
            items.append(spoken_item(str(number), request, clip, row["answer"], error, speech_instruction=question))
        return unique(items, source or self.hub_id)

    def prompts(self, row: dict[str, Any], official: bool = False) -> list[Prompt]:
        """One question; ``official`` leaves the temperature to the server, as AudioBench does."""
        text = (
            f"[Reference answer]\n{row['reference']}\n\n"
            f"[Answer of the model]\n{row['answer']}\n\n"
            f"[Question]\n{row['fields']['speech_instruction']}\n\n"
            "[Your task]\n"
            "Mark the answer of the model: how well does it agree with the reference, how accurate is it, and how "
            "relevant to the question? Look closely at details and be strict.\n"
            "An answer that\n" + "\n".join(LEVELS) + "\n\n"
            "Reply in this form and end with the number:\n"
            "Explanation: (your reasons in a few sentences)\n"
            "Rating: (a whole number from 0 to 5)"
        )
        messages = [{"role": "user", "content": text}]
        return [Prompt("once", messages, {"max_tokens": 512}, version="audio-instructions-1")]

    def verdict(self, reply: str, order: str) -> dict[str, Any]:
        """The number that the reply ends with, and the last one that follows the word Rating."""
        stated = RATING.findall(reply)
        lenient = _on_scale(stated[-1]) if stated else None
        score = _on_scale(reply.split()[-1])
        if score is None:
            return no_mark("expected a number from 0 to 5 at the end", lenient_score=lenient)
        return mark(score, lenient_score=score if lenient is None else lenient)


def _on_scale(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number <= 5 else None  # never true of NaN


def _draw(name: str, count: int) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % count


class AlpacaAudio(AudioInstructions):
    """Requests of the Alpaca data, read aloud."""

    name = "alpaca_audio"
    title = "Alpaca-Audio"
    hub_id = "AudioLLMs/alpaca_audio_test"


class OpenHermesAudio(AudioInstructions):
    """Requests of the OpenHermes data, read aloud."""

    name = "openhermes_audio"
    title = "OpenHermes-Audio"
    hub_id = "AudioLLMs/openhermes_instruction_test"


BENCHMARKS = (AlpacaAudio(), OpenHermesAudio())
