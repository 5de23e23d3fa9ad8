"""Figures of several quickstart runs together, as the README shows them.

    for seed in 0 1 2; do soundwave quickstart --seed $seed --output runs/seed$seed; done
    python benchmarks/pool_quickstarts.py runs/seed0 runs/seed1 runs/seed2

Scores all answers of the runs as one test set, writes `benchmarks/results/NAME.json` and prints the README's table.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from soundwave.eval.results import pool, read_results
from soundwave.eval.scoring import METRICS

RESULTS = Path(__file__).parent / "results"
STAGES = {
    "llm": "LLM alone",
    "align": "after stage I (CTC head)",
    "shrink": "after stage II",
    "instruct": "after stage III",
}
ROWS = {
    "asr_seen": "transcript, known voices",
    "asr_unseen": "transcript, unheard voices",
    "asr_accent": "transcript, unheard accent",
    "st_seen": "spoken English to German, known voices",
    "st_unseen": "spoken English to German, unheard voices",
    "sound": "transcript with sound labels",
    "sound_class": "class of a sound",
    "intent": "intent of a command",
    "spoken_qa": "spoken questions never heard in training",
    "text_qa": "text questions, no audio",
}


def pooled(runs: Sequence[Path]) -> dict:
    """What several runs scored together: value, interval and count by stage and test set."""
    first = {stage: {entry["name"]: entry for entry in read_results(runs[0] / stage)} for stage in STAGES}
    scores = {}
    for stage, entries in first.items():
        scores[stage] = {
            name: {
                "metric": entries[name]["metric"],
                "value": round(score.value, 5),
                "interval": [round(bound, 5) for bound in score.interval],
                "count": score.count,
            }
            for name, score in pool([run / stage for run in runs]).items()
        }
    # Without their times: other work may have gone on beside a run.
    commands = [json.loads((run / "run.json").read_text(encoding="utf-8"))["command"] for run in runs]
    facts = json.loads((runs[0] / "corpus" / "corpus.json").read_text(encoding="utf-8"))
    entry = next(iter(first["instruct"].values()))
    return {
        "runs": commands,
        "speech": facts["description"],
        "hardware": entry["hardware"],
        "packages": entry["packages"],
        "scores": scores,
    }


def table(results: dict) -> str:
    """Markdown: a row per test set, a column per stage."""
    lines = ["| " + " | ".join(["test", *STAGES.values()]) + " |", "|" + " --- |" * (len(STAGES) + 1)]
    for name, title in ROWS.items():
        found = [results["scores"][stage].get(name) for stage in STAGES]
        if not any(found):
            continue
        metric = next(entry["metric"] for entry in found if entry)
        cells = [f"{100 * entry['value']:.1f} %" if entry else "" for entry in found]
        lines.append(f"| {title} ({METRICS[metric].title}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a quickstart")
    parser.add_argument("--name", default="quickstart", help="of the results file (default: quickstart)")
    a = parser.parse_args()
    results = pooled(a.runs)
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    (RESULTS / f"{a.name}.json").write_text(text, encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
