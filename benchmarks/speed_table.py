"""The README's tables of speed, from the result files: `python benchmarks/speed_table.py`."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def read(name: str) -> dict:
    """The figures of one benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table() -> str:
    """Markdown rows of ratios, each measured against its baseline in the same run."""
    peers, drafting, long_audio = read("peers"), read("drafting"), read("long_audio")
    first = {row["seconds"]: row["ratio"] for row in peers["qwen2_audio"]["time_to_first_token_s"]}
    batches = {row["batch"]: row["ratio"] for row in peers["qwen2_audio"]["clips_per_second_32_tokens"]}
    published = peers["published"]["ratio"]
    one, eight = drafting["batch 1"], drafting["batch 8"]
    peer, plain = "Qwen2-Audio of the same widths", "plain decoding"

    def drafted(part: str, figure: str) -> str:
        return times(one[part][figure], eight[part][figure])

    rows = [
        ("recordings per second, batch 1 / 8", "the published way", times(published["batch 1"], published["batch 8"])),
        ("time to the first token, 3 / 10 / 30 s clip", peer, times(first[3], first[10], first[30])),
        ("clips per second, 32 tokens, batch 1 / 8", peer, times(batches[1], batches[8])),
        ("second turn of a chat, kept embeddings", "encoded again", times(peers["chat_second_turn_s"]["ratio"])),
        ("LLM forwards saved by drafts, batch 1 / 8", plain, drafted("llm", "times_fewer_forwards")),
        ("speed of drafted decoding, batch 1 / 8", plain, drafted("llm", "times_less_wall_time")),
        ("the same, speech side included, batch 1 / 8", plain, drafted("generate", "times_less_wall_time")),
    ]
    for method, runs in long_audio["runs"].items():
        minutes = {round(run["audio_s"] / 60): run for run in runs}
        last = max(minutes)
        rows.append(
            (
                f"{method.upper()} transcript of {last} min: memory / time per second of audio",
                "of 10 min",
                times(
                    minutes[last]["process_mib"] / minutes[10]["process_mib"], pace(minutes[last]) / pace(minutes[10])
                ),
            )
        )
    return markdown(rows)


def training_table() -> str:
    """The same of training."""
    naive, logits, unshrunk = "`log_softmax`, `F.ctc_loss`", "logits of all positions", "the LLM on all frames"
    rows = []
    for run in read("ctc_loss")["widths"]:
        ratios = times(run["time_ratio"], run["memory_ratio"])
        rows.append((f"CTC loss over 128k tokens, width {run['width']}: time / peak memory", naive, ratios))
        what = f"with 40k of the tokens, width {run['width']}: time"
        rows.append((what, "all of them", times(run["time_ratio_restricted"])))
    for run in read("cross_entropy")["cases"]:
        ratios = times(run["time_ratio"], run["memory_ratio"])
        rows.append((f"answer loss, {run['case']}: time / peak memory", logits, ratios))
    for run in read("training")["runs"]:
        if run["gradient_checkpointing"]:  # no pair: the baseline, a frozen LLM, was not recomputed then
            continue
        steps, clip = run["steps"], f"{run['clip_s']:g} s clips"
        faster = [steps[stage]["times_faster_than_llm_on_all_frames"] for stage in ("stage I", "stage II")]
        rows.append((f"steps per second, stage I / II, {clip}", unshrunk, times(*faster)))
        against = steps["stage II"]["seconds_per_step"] / steps["stage I"]["seconds_per_step"]
        rows.append((f"steps per second, stage I, {clip}", "stage II", times(against)))
    ways = read("padding")["stage I"]["ways"]
    encoded = {way: figures["seconds_encoded_per_second"] for way, figures in ways.items()}
    less = [
        encoded[way] / encoded["30 s windows"] for way in ("drawn order", "bucket_batches", "max_seconds_per_batch")
    ]
    what = "seconds encoded, stage I: batches as drawn / `bucket_batches` / `max_seconds_per_batch`"
    rows.append((what, "30 s windows", times(*less)))
    return markdown(rows)


def markdown(rows: list[tuple[str, str, str]]) -> str:
    """A table of what, beside what, and the ratios."""
    lines = [f"| {what} | {baseline} | {ratio} |" for what, baseline, ratio in rows]
    return "\n".join(["| | baseline | ratio |", "| --- | --- | --- |", *lines])


def times(*ratios: float) -> str:
    """Ratios as text."""
    return " / ".join(f"{ratio:.2f}" for ratio in ratios)


def pace(run: dict) -> float:
    """Seconds of work per second of audio."""
    return run["seconds"] / run["audio_s"]


if __name__ == "__main__":
    print(table(), training_table(), sep="\n\n")
