"""Drafted against plain greedy decoding on the trained tiny model, in turn on the same clips.

    python benchmarks/drafting.py
    python benchmarks/drafting.py --clips 16 --repeats 3

Sentences of the grammar that training never saw, spoken by voices it never heard (espeak-ng). Two times per batch
size: "generate", the whole call from log-mel to ids, and "llm", what of it drafting can save: the same call with the
speech side's embeddings and the drafts given. Writes results/drafting.json.
"""

import argparse
import random
from collections.abc import Sequence

import numpy as np
import torch

try:
    from benchmarks import common
except ImportError:  # run as a script
    import common  # type: ignore[no-redef]

BATCH_SIZES = (1, 8)
MAX_NEW_TOKENS = 64


def spoken(clips: int) -> list[np.ndarray]:
    """Held-out sentences in unheard voices, 16 kHz."""
    from soundwave.training.tiny.grammar import draw_split
    from soundwave.training.tiny.synthesizer import UNSEEN_VOICES
    from soundwave.training.tiny.utterances import Job, speak

    texts = [sentence.text for sentence in draw_split(random.Random(5), "test", clips, distinct=True)]
    voices = [UNSEEN_VOICES[i % len(UNSEEN_VOICES)] for i in range(clips)]
    return [speak(Job(f"u{i}", (texts[i],), voices[i], i, False)).samples for i in range(clips)]


def batches_of(model, processor, waveforms: list[np.ndarray], batch_size: int) -> tuple[list[dict], list[dict]]:
    """Inputs of `generate` per batch: from log-mel, and with embeddings and drafts made before."""
    whole, ready = [], []
    for start in range(0, len(waveforms), batch_size):
        inputs = processor(audio=waveforms[start : start + batch_size], sampling_rate=common.SAMPLING_RATE)
        audio = {name: inputs[name] for name in model.AUDIO_FEATURES if name in inputs}
        text = {name: inputs[name] for name in inputs if name not in audio}
        with torch.no_grad():
            features = model.get_audio_features(**audio)
        drafts = model.transcribe_ids(**audio)
        whole.append({**inputs, "drafts": True})
        ready.append({**text, "audio_embeds": features.embeds, "audio_lengths": features.lengths, "drafts": drafts})
    return whole, ready


def answer(model, batches: list[dict], drafted: bool) -> dict:
    """Answers to all batches, and what they cost in forwards."""
    totals = {"llm_forwards": 0, "draft_tokens": 0, "draft_accepted": 0}
    answers = []
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "drafts"}
        if drafted:
            inputs["ctc_draft"] = batch["drafts"]
        out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, return_dict_in_generate=True)
        totals["llm_forwards"] += out.llm_forwards
        if drafted:
            totals["draft_tokens"] += int(out.draft_tokens.sum())
            totals["draft_accepted"] += int(out.draft_accepted.sum())
        answers += out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return {**totals, "answers": answers}


def compare(model, batches: list[dict], repeats: int) -> dict:
    """Plain and drafted decoding of the same batches, timed in turn: medians, and the median of the paired ratios."""
    plain, drafted = answer(model, batches, False), answer(model, batches, True)
    seconds = common.paired(
        {name: lambda name=name: answer(model, batches, name == "drafted") for name in ("plain", "drafted")}, repeats
    )
    ratios = [p / d for p, d in zip(seconds["plain"], seconds["drafted"], strict=True)]
    return {
        "llm_forwards": {"plain": plain["llm_forwards"], "drafted": drafted["llm_forwards"]},
        "times_fewer_forwards": plain["llm_forwards"] / drafted["llm_forwards"],
        "seconds": {name: common.median(values) for name, values in seconds.items()},
        "times_less_wall_time": common.median(ratios),
        "times_less_wall_time_range": [min(ratios), max(ratios)],
        "draft_tokens": drafted["draft_tokens"],
        "draft_accepted": drafted["draft_accepted"],
        "answers_that_differ": sum(a != b for a, b in zip(plain["answers"], drafted["answers"], strict=True)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    from soundwave import SoundwaveForConditionalGeneration, SoundwaveProcessor
    from soundwave.assets import TINY

    torch.set_num_threads(options.threads)
    model = SoundwaveForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    processor = SoundwaveProcessor.from_pretrained(TINY)
    waveforms = spoken(options.clips)
    figures: dict = {
        "clips": options.clips,
        "audio_s": sum(map(len, waveforms)) / common.SAMPLING_RATE,
        "repeats": options.repeats,
    }
    for batch_size in BATCH_SIZES:
        parts = zip(("generate", "llm"), batches_of(model, processor, waveforms, batch_size), strict=True)
        for part, batches in parts:
            result = figures.setdefault(f"batch {batch_size}", {})[part] = compare(model, batches, options.repeats)
            print(
                f"batch {batch_size}, {part}: {result['times_fewer_forwards']:.2f}x fewer forwards, "
                f"{result['times_less_wall_time']:.2f}x less wall time, {result['answers_that_differ']} differ",
                flush=True,
            )
    common.write("drafting", figures)


if __name__ == "__main__":
    main()
