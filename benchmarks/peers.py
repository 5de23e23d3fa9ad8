"""Soundwave beside the published code's way of running it, and beside Qwen2-Audio of the same widths, on a CPU.

    python benchmarks/peers.py --data ../shared/data

Random weights, an LLM of 8 layers and width 512, V = 32,000, an encoder of 6 layers and width 384, 128 mel bins. CTC
labels are injected at 3.3 tokens per second, since random weights compress nothing (`contenders.py`). Times are from
the waveform on. Contenders take turns within one process; absolute times depend on the machine, ratios hardly do.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from common import RESULTS, SAMPLING_RATE, command, figure, median, noise, paired, save, timed, write
from contenders import SMALL, TOKENS_PER_SECOND, Published, Qwen2Audio, Soundwave

BATCH = 8
SECONDS = (1, 3, 10, 30)
BATCHES = (1, 2, 4, 8, 16)
# Lengths of 160 clips of read speech, for a machine without recordings: (count, seconds).
LENGTHS = [(20, 2.0), (40, 5.0), (40, 9.0), (40, 13.0), (20, 16.0)]


def clips(data: Path | None) -> list[np.ndarray]:
    """The waveforms, shortest first: recorded speech where the folder is there, noise of such lengths elsewhere.

    Clips over 30 s are cut there for all: the published code hears no more of them.
    """
    if data is None or not (data / "manifest.jsonl").is_file():
        return [noise(seconds, seed) for count, seconds in LENGTHS for seed in range(count)]
    from soundwave.processing import load_audio

    rows = [json.loads(line) for line in (data / "manifest.jsonl").read_text().splitlines()]
    speech = [row for row in rows if row["path"].startswith("speech/")]
    return sorted((load_audio(str(data / row["path"]))[: 30 * SAMPLING_RATE] for row in speech), key=len)


def against_published(soundwave: Soundwave, recordings: list[np.ndarray]) -> dict:
    """(a) Transcripts of all clips: an answer has 3.3 tokens per second of its clip."""
    published = Published(soundwave)

    def tokens(group):
        return max(1, round(TOKENS_PER_SECOND * len(group[-1]) / SAMPLING_RATE))

    def one_by_one(contender, group):
        for waveform in group:
            contender.answer([waveform], tokens([waveform]))

    total = {"published way": 0.0, "batch 1": 0.0, f"batch {BATCH}": 0.0}
    groups = [recordings[start : start + BATCH] for start in range(0, len(recordings), BATCH)]
    one_by_one(published, groups[0])  # warm
    one_by_one(soundwave, groups[0])
    for group in groups:
        total["published way"] += timed(one_by_one, published, group)
        total["batch 1"] += timed(one_by_one, soundwave, group)
        total[f"batch {BATCH}"] += timed(soundwave.answer, group, tokens(group))
    rates = {name: len(recordings) / seconds for name, seconds in total.items()}
    return {
        "clips": len(recordings),
        "seconds_of_audio": round(sum(map(len, recordings)) / SAMPLING_RATE, 1),
        "clips_per_second": rates,
        "ratio": {name: rate / rates["published way"] for name, rate in rates.items()},
    }


def against_qwen2_audio(soundwave: Soundwave, repeats: int) -> dict:
    """(b) Time to the first token by length, and 32 tokens of 10 s clips by batch size."""
    peer = Qwen2Audio(SMALL)
    first = []
    for seconds in SECONDS:
        clip = [noise(seconds)]
        took = paired({c.name: lambda c=c, clip=clip: c.answer(clip, 1) for c in (soundwave, peer)}, repeats)
        medians = {name: median(values) for name, values in took.items()}
        first.append({"seconds": seconds, **medians, "ratio": medians[soundwave.name] / medians[peer.name]})
    batches = []
    for size in BATCHES:
        group = [noise(10, seed) for seed in range(size)]
        took = paired(
            {c.name: lambda c=c, group=group: c.answer(group, 32) for c in (soundwave, peer)}, max(2, repeats // 4)
        )
        rates = {name: size / median(values) for name, values in took.items()}
        batches.append({"batch": size, **rates, "ratio": rates[soundwave.name] / rates[peer.name]})
    return {"time_to_first_token_s": first, "clips_per_second_32_tokens": batches}


def chat(soundwave: Soundwave, repeats: int) -> dict:
    """The second turn of a chat about a 30 s recording: kept embeddings beside encoding it again."""
    import torch

    inputs = soundwave.inputs([noise(30)])
    with torch.inference_mode():
        kept = soundwave.model.get_audio_features(
            **{name: inputs[name] for name in soundwave.model.AUDIO_FEATURES if name in inputs}
        )
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    reuse = {**text, "audio_embeds": kept.embeds, "audio_lengths": kept.lengths}
    took = paired(
        {
            "encoded again": lambda: soundwave.model.generate(**inputs, max_new_tokens=1),
            "kept": lambda: soundwave.model.generate(**reuse, max_new_tokens=1),
        },
        repeats,
    )
    medians = {name: median(values) for name, values in took.items()}
    return {**medians, "ratio": medians["kept"] / medians["encoded again"]}


def plots(figures: dict) -> None:
    """`results/peers_first_token.png`, `results/peers_throughput.png`."""
    names = (Soundwave.name, Qwen2Audio.name)
    canvas, axes = figure("Time to the first token (CPU, small shape)", "seconds of audio", "seconds")
    rows = figures["qwen2_audio"]["time_to_first_token_s"]
    for name in names:
        axes.plot([row["seconds"] for row in rows], [row[name] for row in rows], "o-", label=name)
    axes.set_ylim(bottom=0)
    axes.legend()
    save(canvas, "peers_first_token")
    canvas, axes = figure("32 tokens about 10 s clips (CPU, small shape)", "batch", "clips per second")
    rows = figures["qwen2_audio"]["clips_per_second_32_tokens"]
    for name in names:
        axes.plot([row["batch"] for row in rows], [row[name] for row in rows], "o-", label=name)
    axes.set_ylim(bottom=0)
    axes.legend()
    save(canvas, "peers_throughput")


def main() -> None:
    """Measure, write `results/peers.json` and the plots."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with manifest.jsonl and speech/; without: noise")
    parser.add_argument("--clips", type=int, help="only every so many clips: a quick look")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only-published", action="store_true", help="measure (a) anew, keep the rest of the results")
    arguments = parser.parse_args()
    recordings = clips(arguments.data)
    recordings = recordings[:: max(1, len(recordings) // arguments.clips)] if arguments.clips else recordings
    soundwave = Soundwave(SMALL)
    if arguments.only_published:
        kept = json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))
        kept["published"] = {"command": command(), **against_published(soundwave, recordings)}
        (RESULTS / "peers.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        print(json.dumps(kept["published"], indent=1))
        return
    figures = {
        "note": "random weights; CTC labels injected at 3.3 tokens per second",
        "qwen2_audio": against_qwen2_audio(soundwave, arguments.repeats),
        "chat_second_turn_s": chat(soundwave, arguments.repeats),
        "published": against_published(soundwave, recordings),
    }
    print(json.dumps(figures, indent=1))
    write("peers", figures)
    plots(figures)


if __name__ == "__main__":
    main()
