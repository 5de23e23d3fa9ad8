"""The whole path, small and real: `soundwave quickstart [--output DIR] [--push ORG] [--recordings MANIFEST]`.

Speaks a corpus, pretrains a small encoder and LLM ("stage 0", standing in for Whisper and Llama), runs stages I, II
and III, evaluates, writes cards, saves or pushes each stage, reloads the last one in a fresh process and asks it
something.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from soundwave import SoundwaveForConditionalGeneration, SoundwaveForCTC, SoundwaveProcessor
from soundwave.apps.pictures import look_inside
from soundwave.apps.report import StageSummary, print_summary, write_report
from soundwave.eval.results import TaskResult
from soundwave.eval.rows import evaluate_files
from soundwave.model_card.build_card import write_card
from soundwave.model_card.facts import CardFacts, data_summary
from soundwave.model_card.push_to_hub import PushError, push_stage
from soundwave.training.checkpoints import LOG
from soundwave.training.data import load_rows
from soundwave.training.encoder_cache import EncoderCache
from soundwave.training.report import TITLES, read_curve
from soundwave.training.stages import load_config
from soundwave.training.tiny.corpus import CorpusSettings, build_corpus
from soundwave.training.tiny.pretrain import pretrain
from soundwave.training.tiny.pretrain_encoder import EncoderSettings
from soundwave.training.tiny.pretrain_llm import LanguageModelSettings
from soundwave.training.tiny.recordings import RecordingSettings, build_recordings
from soundwave.training.tiny.tokenizer import SYSTEM_PROMPT
from soundwave.training.train import run_stage

CONFIGS = Path(__file__).parents[1] / "training" / "configs" / "tiny"
TRAINED = {
    "align": "alignment adapter and CTC head, by CTC; no LLM",
    "shrink": "both adapters and LoRA, by cross-entropy and CTC",
    "instruct": "LoRA, by cross-entropy on all tasks",
}
#: What each stage answers; a file that the corpus lacks is left out.
TEST_SETS = {
    "align": ("asr_seen", "asr_unseen", "asr_accent"),
    "shrink": ("asr_seen", "asr_unseen", "st_seen"),
    "instruct": (
        "asr_seen",
        "asr_unseen",
        "asr_accent",
        "st_seen",
        "st_unseen",
        "sound",
        "intent",
        "sound_class",
        "spoken_qa",
        "text_qa",
    ),
}
LIMITS = [
    "A demonstration of the method, trained in minutes: it knows the words of its small corpus and nothing else.",
    "It hears one sentence well; on several in a row, up to any length, its error rate is several times higher.",
    "Other voices, accents, languages, noise and free speech are outside what it has heard; expect wrong answers.",
]
ENCODER = "a Whisper-style encoder, pretrained by `soundwave quickstart` on frame labels of the same speech (stage 0)"
LLM = "a Llama-style model, pretrained by `soundwave quickstart` on texts of the same grammar (stage 0)"
MADE = "made by `soundwave quickstart`"  # in the place of a licence

PUSH_PATIENCE_S = 600.0  # then the quickstart goes on without the Hub

# Runs where the package cannot be imported: what a user of the repository has.
ASK_IN_A_FRESH_PROCESS = """
import sys
sys.modules["soundwave"] = None
from transformers import AutoModel, AutoProcessor
source, recording, instruction = sys.argv[1:]
model = AutoModel.from_pretrained(source, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
content = [{"type": "audio", "path": recording}, {"type": "text", "text": instruction}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True
)
ids = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0].strip())
"""


@dataclass
class Quickstart:
    """One run.

    Attributes:
        output: folder of the run.
        manifest: of recorded clips, in place of synthesized speech.
        organisation: Hub user or organisation that the stages are pushed to; `None` = they stay in the folder.
        seed: of everything.
        smoke: tens of rows and steps, to see that all parts fit; the figures mean nothing.
        progress: show bars.
    """

    output: Path
    manifest: str | None = None
    organisation: str | None = None
    seed: int = 0
    smoke: bool = False
    progress: bool = True
    summaries: list[StageSummary] = field(default_factory=list)
    not_pushed: set[str] = field(default_factory=set)  # stages that the Hub did not take
    facts: dict[str, Any] = field(default_factory=dict)

    def run(self) -> Path:
        """Do everything; return the report's path."""
        start = time.perf_counter()
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.build_corpus()
        self.pretrain()
        torch.set_num_threads(max(1, os.cpu_count() or 1))
        for stage in ("align", "shrink", "instruct"):
            self.train(stage)
        answer = self.ask()
        return self.report(answer, time.perf_counter() - start)

    @property
    def corpus(self) -> Path:
        """Folder of the spoken rows."""
        return self.output / "corpus"

    def build_corpus(self) -> None:
        """Speak the grammar, or string recordings together."""
        started = time.perf_counter()
        if self.manifest is None:
            settings = CorpusSettings.smoke() if self.smoke else CorpusSettings()
            self.facts = build_corpus(self.corpus, self.seed, settings, self.progress)
        else:
            recorded = RecordingSettings.smoke() if self.smoke else RecordingSettings()
            self.facts = build_recordings(self.manifest, self.corpus, self.seed, recorded, self.progress)
        say(f"corpus: {self.facts['utterances']} utterances, {self.facts['hours']} h", started)

    def pretrain(self) -> None:
        """Stage 0, the stand-ins for Whisper and Llama, side by side in two processes of one thread each."""
        started = time.perf_counter()
        encoder_settings = EncoderSettings.smoke() if self.smoke else EncoderSettings()
        llm_settings = LanguageModelSettings.smoke() if self.smoke else LanguageModelSettings()
        folders = (self.corpus, self.output / "encoder", self.output / "llm")
        figures = pretrain(*folders, encoder_settings, llm_settings, self.seed, self.progress)
        heard, read = figures["encoder"], figures["language_model"]
        gates = [heard["gate"], *read["gates"]]
        missed = [f"{gate['name']} is below {gate['at_least']:.0%}" for gate in gates if not gate["passed"]]
        text = self.evaluate("text", TEST_SETS["instruct"][-1:]) if self.test_files(("text_qa",)) else []
        exact = {f"{name} exact": f"{value:.0%}" for name, value in read["dev_exact"].items()}
        self.summaries += [
            StageSummary(
                "Stage 0a: encoder",
                "a Whisper-style encoder, by frame labels",
                heard["seconds"],
                heard["steps"],
                heard["loss_curve"],
                figures={"dev frame accuracy": f"{heard['dev_frame_accuracy'] or 0:.1%}"},
            ),
            StageSummary(
                "Stage 0b: LLM",
                "a Llama-style LLM, by next token of answers",
                read["seconds"],
                read["steps"],
                read["loss_curve"],
                self.output / "llm" if text else None,
                figures={name: exact[name] for name in ("asr exact", "st exact") if name in exact},
            ),
        ]
        say("stage 0: encoder and LLM" + "".join(f"; WARNING: {gate}" for gate in missed), started, text)

    def train(self, stage: str) -> None:
        """Train one stage, answer its test sets, write its card, push it."""
        started = time.perf_counter()
        before = {"shrink": "align", "instruct": "shrink"}.get(stage)
        settings = [
            f"output_dir={_quoted(self.folder(stage))}",
            f"data_root={_quoted(self.corpus)}",
            f"encoder_cache={_quoted(self.output / 'features')}",
            f"seed={self.seed}",
            f"progress={self.progress}",
            "device=cpu",
        ]
        encoder, llm = (_quoted(self.output / part) for part in ("encoder", "llm"))
        settings += [f"text_model={llm}"] if stage != "instruct" else []
        settings += [f"audio_model={encoder}" if before is None else f"start={_quoted(self.folder(before))}"]
        settings += ["steps=6", "warmup_steps=2", "logging_steps=2", "bucket_batches=0"] if self.smoke else []
        config = load_config(CONFIGS / f"{stage}.yaml", settings, stage)
        config.data = [source for source in config.data if (self.corpus / source).is_file()]
        run_stage(config)
        seconds = time.perf_counter() - started
        results = self.evaluate(stage, TEST_SETS[stage])
        folder = self.folder(stage)
        CardFacts(
            speech=self.facts["description"],
            data=self.data_table(config.data),
            attributions=self.facts.get("attributions", []),
            languages=["en", "de"] if (self.corpus / "train/st.jsonl").is_file() else ["en"],
            limits=LIMITS,
            encoder=ENCODER,
            llm=LLM,
            license=data_license(self.facts.get("licences", {})),
        ).save(folder)
        write_card(folder, self.repository(stage))
        if self.organisation:
            try:
                push_stage(folder, self.repository(stage), patience_s=PUSH_PATIENCE_S)
            except PushError as error:
                self.not_pushed.add(stage)
                print(
                    f"{error}\nPush it later: soundwave push {folder} --to {self.repository(stage)}", file=sys.stderr
                )
        self.summaries.append(
            StageSummary(TITLES[stage], TRAINED[stage], seconds, config.steps, read_curve(folder / LOG), folder)
        )
        say(TITLES[stage], started, results)

    def evaluate(self, stage: str, names: Sequence[str]) -> list[TaskResult]:
        """Answers and figures of a stage ("text": the LLM alone), written beside its weights."""
        if stage == "text":
            folder, model, cache = self.output / "llm", AutoModelForCausalLM.from_pretrained(self.output / "llm"), None
            encoder, llm = str(self.output / "encoder"), str(self.output / "llm")
            processor = SoundwaveProcessor.from_components(encoder, llm, system_prompt=SYSTEM_PROMPT)
        else:
            folder = self.folder(stage)
            kind = SoundwaveForCTC if stage == "align" else SoundwaveForConditionalGeneration
            model, processor = kind.from_pretrained(folder), SoundwaveProcessor.from_pretrained(folder)
            clips = (clip for file in self.test_files(names) for clip in load_rows(file)["audio"] if clip)
            cache = EncoderCache.build(self.output / "features", model, processor, clips, self.progress)
        return evaluate_files(
            model.eval(),
            processor,
            self.test_files(names),
            output_dir=folder,
            source=str(folder),
            encoder_cache=cache,
            progress=self.progress,
            command=self.command,
        )

    def test_files(self, names: Sequence[str]) -> list[str]:
        """Those test sets that the corpus has."""
        paths = [self.corpus / "test" / f"{name}.jsonl" for name in names]
        return [str(path) for path in paths if path.is_file()]

    def data_table(self, sources: Sequence[str]) -> list[dict[str, Any]]:
        """Rows and hours by task for the card; the voices and recordings are one source each."""
        rows = [dict(row) for row in load_rows(list(sources), self.corpus)]
        if self.manifest is None:
            licences = {"synthesized (espeak-ng)": MADE, "grammar": MADE}
            for row in rows:
                row["source"] = "synthesized (espeak-ng)" if row["audio"] else "grammar"
        else:
            licences = {"recordings": ", ".join(self.facts["licences"]), "texts": MADE}
            for row in rows:
                row["source"] = "recordings" if row["audio"] else "texts"
        return data_summary(rows, licences)

    def ask(self) -> dict[str, str]:
        """Put a question that the model never heard to the last stage, in a fresh process through `AutoModel`."""
        started = time.perf_counter()
        row = load_rows(self.test_files(("spoken_qa", "asr_seen"))[0])[0]
        pushed = self.organisation and "instruct" not in self.not_pushed
        source = self.repository("instruct") if pushed else str(self.folder("instruct").resolve())
        recording = str(Path(row["audio"]["path"]).resolve())
        environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        result = subprocess.run(
            [sys.executable, "-c", ASK_IN_A_FRESH_PROCESS, source, recording, row["instruction"]],
            capture_output=True,
            text=True,
            cwd=self.output,
            env=environment,
        )
        if result.returncode:
            raise ValueError(f"the last stage does not load in a fresh process: {result.stderr.strip()[-800:]}")
        answer = result.stdout.strip().splitlines()[-1] if result.stdout.strip() else ""
        say(f"a fresh process was asked {row['transcript']!r} and answered {answer!r}", started)
        return {"said": row["transcript"], "answer": answer, "recording": recording}

    def report(self, asked: dict[str, str], seconds: float) -> Path:
        """`report.md` with its pictures and samples, and the summary on the screen."""
        folder = self.folder("instruct")
        ctc, processor = SoundwaveForCTC.from_pretrained(folder), SoundwaveProcessor.from_pretrained(folder)
        example = load_rows(self.test_files(("asr_unseen", "asr_seen"))[0])[0]
        inside = look_inside(ctc, processor, example["audio"], said=example["transcript"])
        recording = os.path.relpath(asked["recording"], Path.cwd())
        next_steps = [
            f"soundwave transcribe {recording} --model {folder}",
            f'soundwave ask {recording} "Translate the speech into German." --model {folder}',
            "soundwave train align --config training/configs/paper/align.yaml  # your own data, at scale",
        ]
        speech = self.facts["description"]
        title = "Quickstart on recordings" if self.manifest else "Quickstart on synthesized speech"
        notes = [f"Asked in a fresh process: “{asked['said']}” It answered: “{asked['answer']}”"]
        notes += ["**A smoke run: the figures mean nothing.**"] if self.smoke else []
        report = write_report(
            self.output,
            title=title,
            speech=speech,
            stages=self.summaries,
            next_steps=next_steps,
            utterance=inside,
            command=self.command,
            seconds=seconds,
            notes=notes,
        )
        (self.output / "run.json").write_text(
            json.dumps({"seed": self.seed, "seconds": round(seconds, 1), "command": self.command}), encoding="utf-8"
        )
        print_summary(self.summaries, report, speech, next_steps)
        return report

    def folder(self, stage: str) -> Path:
        """Where a stage lies."""
        return self.output / stage

    def repository(self, stage: str) -> str:
        """What a stage is called on the Hub."""
        kind = "recordings" if self.manifest else "tiny"
        return f"{self.organisation or 'soundwave'}/soundwave-{kind}-{stage}"

    @property
    def command(self) -> str:
        """The command that does this again."""
        parts = ["soundwave quickstart", f"--seed {self.seed}"]
        parts += [f"--recordings {Path(self.manifest).name}"] if self.manifest else []
        return " ".join(parts + (["--smoke"] if self.smoke else []))


def data_license(licences: Iterable[str]) -> str | None:
    """The Hub's name of a licence that the weights can have, whatever the recordings' licences ask to pass on.

    `None` where they ask for nothing: CC0, or speech made by the quickstart.
    """
    asked = [re.sub(r"[\s_]+", "-", licence.strip().lower()) for licence in licences]
    asked = [licence for licence in asked if "cc-by" in licence]
    if not asked:
        return None
    passed_on = [part for part in ("nc", "sa") if any(f"-{part}" in licence for licence in asked)]
    return "-".join(["cc-by", *passed_on, "4.0"])


def say(what: str, started: float, results: Sequence[TaskResult] = ()) -> None:
    """One line per step: what, how long, figures."""
    figures = ", ".join(f"{r.name} {r.metric} {100 * r.value:.1f}%" for r in results)
    print(f"[{time.perf_counter() - started:4.0f} s] {what}" + (f": {figures}" if figures else ""), flush=True)


def _quoted(folder: Path) -> str:
    """A path as a setting, which is YAML."""
    return json.dumps(str(folder))


def output_folder(given: str | None) -> Path:
    """The folder of a run: the given one, still empty, or the first free `runs/quickstart[-N]`."""
    if given is not None:
        folder = Path(given)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--output {given} exists and is not empty; name another folder, or remove it first")
    else:
        number = 1
        while (folder := Path("runs") / ("quickstart" if number == 1 else f"quickstart-{number}")).exists():
            number += 1
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; `argv` without the program's name."""
    parser = argparse.ArgumentParser(
        prog="soundwave quickstart", description="Train the whole model small, from nothing, and ask it something."
    )
    parser.add_argument("--output", metavar="DIR", help="folder of the run (default: runs/quickstart)")
    parser.add_argument("--push", metavar="ORG", help="push each stage to this user or organisation of the Hub")
    parser.add_argument("--recordings", metavar="MANIFEST", help="recorded clips (JSONL) in place of a synthesizer")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--smoke", action="store_true", help="seconds instead of minutes; the figures mean nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    a = parser.parse_args(argv)
    if a.recordings is not None and not Path(a.recordings).is_file():
        raise ValueError(f"--recordings {a.recordings}: there is no such manifest file")
    Quickstart(output_folder(a.output), a.recordings, a.push, a.seed, a.smoke, not a.quiet).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
