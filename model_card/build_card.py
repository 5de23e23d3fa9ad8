"""Render a stage's model card from the files beside its weights.

    python -m soundwave.model_card.build_card RUN [--repo-id OWNER/NAME | --push OWNER/NAME]

It reads ``config.json``, ``stage_config.yaml``, ``results.json`` with ``answers.jsonl``, and ``card.yaml``, what only
people know: what the data are, their licences, whose speech it is. Figures come out of ``figures.Figures`` alone.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCardData
from safetensors import safe_open

from soundwave.model_card.figures import CardError, Figures

CARD_FACTS = "card.yaml"
STAGE_CONFIG = "stage_config.yaml"

#: Name in the stage table -> number, title, what the model does after it.
STAGES = {
    "align": ("I", "alignment", "It turns speech into vectors of the LLM's space and spells them with its CTC head."),
    "shrink": ("II", "shrinking", "It shrinks speech to about one vector per token, from which the LLM goes on."),
    "instruct": ("III", "instruction", "It follows written and spoken instructions about speech and sound."),
}
#: Licences of base models as their authors state them; of others the card names the place to look.
BASE_LICENCES = {"openai/whisper": "Apache-2.0", "facebook/w2v-bert-2.0": "MIT"}
#: Llama 3.1 and later: a model built on them must say so and carry the name in front (section 1.b of the licences).
LLAMA = re.compile(r"llama[-_.]?3(?:[-_.](\d))?", re.IGNORECASE)
LLAMA_VOCABULARY = 128256
UNSTATED = "not stated"
TRAINING_FIELDS = {
    "trains": "trained",
    "steps": "steps",
    "global_batch": "rows per step",
    "learning_rate": "learning rate, peak",
    "warmup_steps": "warm-up steps",
    "spec_augment": "SpecAugment",
    "temperature_start": "mixture temperature, first epoch",
    "temperature_step": "mixture temperature, added per epoch",
    "lora_r": "LoRA rank",
    "lora_alpha": "LoRA alpha",
    "seed": "seed",
}

SNIPPETS = {
    "align": """\
from transformers import AutoModelForCTC, AutoProcessor

model = AutoModelForCTC.from_pretrained("{repo}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{repo}", trust_remote_code=True)

audio = processor.audio_features([processor.load_audio("recording.wav")])
print(processor.tokenizer.batch_decode(model.transcribe_ids(**audio))[0])""",
    "instruct": """\
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{repo}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{repo}", trust_remote_code=True)

conversation = [{{"role": "user", "content": [
    {{"type": "audio", "path": "recording.wav"}},
    {{"type": "text", "text": "{instruction}"}},
]}}]
inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, add_generation_prompt=True)
ids = model.generate(**inputs, max_new_tokens=64)
print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0])""",
}


@dataclass
class CardFacts:
    """What no file of the run knows; saved as ``card.yaml`` beside the weights.

    Attributes:
        speech: What kind of speech the model was trained and tested on.
        data: One row per source: ``name``, ``task``, ``rows``, ``hours``, ``licence`` (``data_summary`` makes them).
        attributions: Whom the data's licences ask to name, one line each.
        datasets: Ids of Hub datasets among them.
        languages: ISO 639-1 codes.
        limits: Sentences on what it cannot do.
        encoder: What the audio encoder is, where it has no Hub id.
        llm: What the LLM is, where it has no Hub id.
        license: Of the repository's weights; by default that of the base models' rules, else Apache-2.0.
    """

    speech: str | None = None
    data: list[dict[str, Any]] = field(default_factory=list)
    attributions: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    languages: list[str] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    encoder: str | None = None
    llm: str | None = None
    license: str | None = None

    @classmethod
    def read(cls, run_dir: str | Path) -> "CardFacts":
        """Facts of a folder's ``card.yaml``; none if there is no such file.

        Raises:
            CardError: If it holds a field that does not exist.
        """
        path = Path(run_dir) / CARD_FACTS
        values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise CardError(
                f"{CARD_FACTS} holds {', '.join(unknown)}; the fields are {', '.join(cls.__dataclass_fields__)}"
            )
        return cls(**values)

    def save(self, run_dir: str | Path) -> None:
        """Write ``card.yaml``."""
        text = yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True)
        (Path(run_dir) / CARD_FACTS).write_text(text, encoding="utf-8")


def data_summary(rows: Iterable[Mapping[str, Any]], licences: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Rows and hours per source and task, with licences by source, for ``CardFacts.data``."""
    sums: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        entry = sums.setdefault((row.get("source") or "unnamed", row["task"]), [0, 0.0])
        entry[0] += 1
        entry[1] += row.get("duration_s") or 0.0
    licences = licences or {}
    return [
        {
            "name": name,
            "task": task,
            "rows": int(n),
            "hours": round(s / 3600, 2),
            "licence": licences.get(name, UNSTATED),
        }
        for (name, task), (n, s) in sorted(sums.items())
    ]


def llama_version(config: Mapping[str, Any]) -> str | None:
    """``"3.1"`` and the like if the LLM is a Llama 3 by its id, or by its vocabulary; ``None`` for others."""
    match = LLAMA.search(config.get("text_model_id") or "")
    if match:
        return f"3.{match[1]}" if match[1] else "3"
    text = config["text_config"]
    return "3.1" if text.get("model_type") == "llama" and text.get("vocab_size") == LLAMA_VOCABULARY else None


def check_name(name: str, llama: str | None) -> None:
    """Refuse a name that breaks the base model's licence.

    Raises:
        CardError: If a model built on Llama is not called ``Llama-...``.
    """
    if llama and not name.startswith("Llama-"):
        raise CardError(
            f"the repository is called {name!r}, but its LLM is a Llama {llama}, whose licence asks for a name that "
            f"begins with 'Llama'; call it 'Llama-{name}'"
        )


def build_card(run_dir: str | Path, repo_id: str | None = None, answers_stay: bool = True) -> str:
    """Text of a stage's ``README.md``, metadata block included.

    Args:
        run_dir: Folder of a saved stage.
        repo_id: Repository it will be pushed to; the folder's name if not given.
        answers_stay: Whether ``answers.jsonl`` remains in the folder, so that the card may point at it.

    Raises:
        CardError: If results and answers disagree, a figure was not measured, or the name breaks a licence.
    """
    folder = Path(run_dir)
    config = _config(folder)
    settings = _stage_settings(folder)
    facts = CardFacts.read(folder)
    figures = Figures(folder)
    repo = repo_id or folder.resolve().name
    name = repo.rsplit("/", 1)[-1]
    llama = llama_version(config)
    check_name(name, llama)
    license_id = facts.license or (f"llama{llama}" if llama else "apache-2.0")
    stage = settings.get("stage") or ("align" if config["architectures"] == ["SoundwaveForCTC"] else "instruct")
    roman, title, does = STAGES[stage]

    text = _template().render(
        name=name,
        built_with_llama=llama is not None,
        summary=f"A Soundwave speech model after stage {roman}, {title}. {does}",
        snippet=SNIPPETS["align" if stage == "align" else "instruct"].format(
            repo=repo, instruction=_instruction(folder)
        ),
        shapes=_shapes(stage),
        architecture=_architecture(folder, config),
        roman=roman,
        stage_title=title,
        start=_start(settings, stage),
        training={label: _shown(settings[key]) for key, label in TRAINING_FIELDS.items() if _matters(key, settings)},
        speech=facts.speech,
        data=facts.data,
        attributions=facts.attributions,
        figures=figures,
        answers_stay=answers_stay,
        limits=[*facts.limits, *_general_limits(stage)],
        parts=_base_models(config, facts),
        license=license_id,
    )
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    own = text
    for attribution in facts.attributions:  # the words of others: their addresses hold escapes such as take2%20b
        own = own.replace(f"- {attribution}\n", "")
    figures.check(own)
    return f"---\n{_metadata(name, stage, config, settings, facts, figures, license_id).to_yaml()}\n---\n\n{text}"


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise CardError(f"{folder} holds no config.json; give the folder of a saved stage")
    return json.loads(path.read_text(encoding="utf-8"))


def _stage_settings(folder: Path) -> dict[str, Any]:
    path = folder / STAGE_CONFIG
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _template() -> jinja2.Template:
    # Strict: a name that is not there is an error, not an empty place in the card.
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    source = files("soundwave.model_card").joinpath("template.md").read_text(encoding="utf-8")
    return environment.from_string(source)


def _metadata(
    name: str,
    stage: str,
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    facts: CardFacts,
    figures: Figures,
    license_id: str,
) -> ModelCardData:
    start = settings.get("start")
    bases = [start if start and start.count("/") == 1 else None, config["audio_model_id"], config["text_model_id"]]
    return ModelCardData(
        model_name=name,
        language=facts.languages or None,
        license=license_id,
        library_name="transformers",
        # Stage I has no LLM and takes no text.
        pipeline_tag="automatic-speech-recognition" if stage == "align" else "audio-text-to-text",
        base_model=[base for base in bases if base] or None,
        datasets=facts.datasets or None,
        tags=["soundwave", f"stage-{STAGES[stage][0].lower()}", "speech", "audio", "custom_code"],
        eval_results=figures.eval_results() or None,
    )


def _start(settings: Mapping[str, Any], stage: str) -> str | None:
    start = settings.get("start")
    if not start:
        return None
    before = "I" if stage == "shrink" else "II"
    revision = f" at `{settings['start_revision']}`" if settings.get("start_revision") else ""
    where = f"[{start}](https://huggingface.co/{start})" if start.count("/") == 1 else f"`{start}`"
    return (f"the result of stage {before}, " if stage != "align" else "") + where + revision


def _matters(key: str, settings: Mapping[str, Any]) -> bool:
    if key not in settings or (key.startswith("lora") and "lora" not in settings["trains"]):
        return False
    return not key.startswith("temperature") or not settings.get("task_weights")


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(value) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)


def _instruction(folder: Path) -> str:
    """What the processor asks when it is given a recording alone: an instruction that the model knows."""
    path = folder / "processor_config.json"
    return json.loads(path.read_text(encoding="utf-8"))["transcription_prompt"] if path.is_file() else "What is said?"


def _shapes(stage: str) -> str:
    line = "log-mel (B,M,T) -> encoder (B,E,D_e) -> alignment adapter (B,A,D) -> CTC head (B,A,V)"
    if stage == "align":
        return line + " -> text"
    return (
        line
        + "\n  -> collapse and look back (B,K,D) -> between the prompt's embeddings (B,L,D) -> LLM (B,L,V) -> text"
    )


def _architecture(folder: Path, config: Mapping[str, Any]) -> list[str]:
    audio, text = config["audio_config"], config["text_config"]
    if audio["model_type"] == "whisper":
        layers, width, seconds = audio["encoder_layers"], audio["d_model"], audio["max_source_positions"] // 50
    else:  # w2v-BERT has no bound of its own
        layers, width, seconds = audio["num_hidden_layers"], audio["hidden_size"], config.get("window_seconds") or 30
    lines = [
        f"Encoder: {audio['model_type']}, {layers} layers of width {width}, windows of up to {seconds} s; frozen.",
        f"LLM: {text['model_type']}, {text['num_hidden_layers']} layers of width {text['hidden_size']}, vocabulary "
        f"{text['vocab_size']}, never resized.",
        f"CTC head over the LLM's vocabulary ({config['ctc_head']}), attention {config['alignment_attention']}; "
        f"blanks {'kept' if config['keep_blanks'] else 'dropped'}, look-back at frames: {config['shrink_context']}.",
    ]
    count = _count_parameters(folder)
    return [*lines, f"{count:,} parameters are stored in this repository."] if count else lines


def _count_parameters(folder: Path) -> int:
    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                size = 1
                for dimension in file.get_slice(key).get_shape():
                    size *= dimension
                count += size
    return count


def _general_limits(stage: str) -> list[str]:
    limits = ["Speech and sounds unlike those of the data above were not tested; expect more errors there."]
    if stage == "align":
        limits.append("It transcribes only: this stage has no LLM and takes no instruction.")
    else:
        limits.append("Answers can be wrong, and wrong fluently; nothing here was trained to refuse or to be safe.")
    return limits


def _base_models(config: Mapping[str, Any], facts: CardFacts) -> list[dict[str, str]]:
    parts = []
    for part, key, described in (("audio encoder", "audio", facts.encoder), ("LLM", "text", facts.llm)):
        hub_id, revision = config[f"{key}_model_id"], config[f"{key}_model_revision"]
        if hub_id is None:
            parts.append(
                {"part": part, "model": described or "saved in this repository", "licence": "as this repository"}
            )
            continue
        known = [licence for prefix, licence in BASE_LICENCES.items() if hub_id.startswith(prefix)]
        if key == "text" and llama_version(config):
            known = [f"Llama {llama_version(config)} Community License"]
        at = f" at `{revision[:12]}`" if revision else ""
        model = f"[{hub_id}](https://huggingface.co/{hub_id}){at}"
        parts.append({"part": part, "model": model, "licence": known[0] if known else "see its repository"})
    return parts


def main(argv: list[str] | None = None) -> int:
    """Write ``README.md`` of a saved stage. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="soundwave card", description="Write the model card of a saved stage.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the stage")
    parser.add_argument("--repo-id", help="repository it will be pushed to (default: the folder's name)")
    parser.add_argument("--output", type=Path, help="file to write (default: RUN/README.md)")
    parser.add_argument("--push", metavar="REPO", help="then push the stage, card included, to this repository")
    arguments = parser.parse_args(argv)
    if arguments.push and (arguments.repo_id or arguments.output):
        parser.error("--push REPO writes RUN/README.md for REPO; leave out --repo-id and --output")
    try:
        text = build_card(arguments.run, arguments.push or arguments.repo_id)
    except CardError as error:
        sys.stderr.write(f"soundwave card: {error}\n")
        return 1
    output = arguments.output or arguments.run / "README.md"
    output.write_text(text, encoding="utf-8")
    sys.stdout.write(f"wrote {output}\n")
    if arguments.push:
        from soundwave.apps.push import push  # which imports this module

        sys.stdout.write(f"pushed: {push(arguments.run, arguments.push)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
