"""Render a stage's model card from the files beside its weights.

    python -m soundwave.model_card.build_card RUN [--repo-id OWNER/NAME | --push OWNER/NAME]

It reads ``config.json``, ``stage_config.yaml``, ``train_log.jsonl``, ``results.json`` with ``answers.jsonl``, and
``card.yaml``, what only people know (``facts``). Figures come out of ``figures.Figures`` alone. With the card go the
figure of the architecture and the Hub's ``.eval_results``.
"""

import argparse
import json
import math
import re
import sys
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from soundwave.model_card.cost import training_cost
from soundwave.model_card.diagram import FIGURE, boxes, draw
from soundwave.model_card.facts import UNSTATED, CardFacts
from soundwave.model_card.figures import CardError, Figures
from soundwave.model_card.licences import base_models, check_name, llama_version, weights_licence
from soundwave.model_card.lineage import STAGES, read_config, read_lineage, read_stage_settings, stage_of
from soundwave.model_card.metadata import card_data, write_eval_results
from soundwave.modeling_soundwave.weights_soundwave import WeightsError, open_shard
from soundwave.training.checkpoints import write_whole

CARD = "README.md"
#: In every card that this module wrote: such a card is written anew before a push, one of somebody's own is kept.
MARK = "<!-- Made by `soundwave card` from the files of the run: edit card.yaml, not this text. -->"

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
    "lora_targets": "LoRA in",
    "encoder_lora_r": "LoRA rank in the encoder",
    "encoder_lora_alpha": "LoRA alpha in the encoder",
    "encoder_lora_targets": "LoRA in the encoder's",
    "quantization": "LLM under LoRA, quantized to",
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
    {{"type": "text", "text": {instruction}}},
]}}]
inputs = processor.apply_chat_template(conversation, tokenize=True, return_dict=True, add_generation_prompt=True)
ids = model.generate(**inputs, max_new_tokens=64)
print(processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)[0])""",
}


def write_card(
    run_dir: str | Path, repo_id: str | None = None, answers_stay: bool = True, output: str | Path | None = None
) -> Path:
    """Write a stage's card, the figure in it and its ``.eval_results``; return the card's path.

    Args:
        run_dir: Folder of a saved stage.
        repo_id: Repository it will be pushed to; the folder's name if not given.
        answers_stay: Whether ``answers.jsonl`` remains in the folder.
        output: File of the card, the rest goes beside it; ``None``: the folder's README.md.

    Raises:
        CardError: As `build_card`, or for an output in a folder that is not there; nothing is written then.
        OSError: If the disk is full; the card that was there stays.
    """
    folder = Path(run_dir)
    path = folder / CARD if output is None else Path(output)
    figures = Figures(folder)
    text = _card(folder, figures, repo_id, answers_stay)
    if not path.parent.is_dir():
        raise CardError(f"{path} cannot be written: there is no folder {path.parent}; make it, or name another file")
    settings = read_stage_settings(folder)
    flow = boxes(stage_of(folder, settings), read_config(folder), settings.get("trains") or [])
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="_card-") as made:  # a disk that is full keeps no half
        figure, card = Path(made, FIGURE), Path(made, CARD)
        write_whole(figure, draw(flow))
        write_whole(card, text)
        write_eval_results(path.parent, figures)
        figure.replace(path.parent / FIGURE)
        card.replace(path)  # whole: a half one would have no mark, and be taken for one of somebody's own
    return path


def is_free(path: str | Path) -> bool:
    """Whether a card may be written there: there is none, or one that this module made."""
    return not Path(path).exists() or MARK.encode() in Path(path).read_bytes()


def build_card(run_dir: str | Path, repo_id: str | None = None, answers_stay: bool = True) -> str:
    """Text of a stage's ``README.md``, metadata block included.

    Args:
        run_dir: Folder of a saved stage.
        repo_id: Repository it will be pushed to; the folder's name if not given.
        answers_stay: Whether ``answers.jsonl`` remains in the folder, so that the card may point at it.

    Raises:
        CardError: If results and answers disagree, a figure was not measured, or the name breaks a licence.
    """
    return _card(Path(run_dir), Figures(run_dir), repo_id, answers_stay)


def _card(folder: Path, figures: Figures, repo_id: str | None, answers_stay: bool) -> str:
    config = read_config(folder)
    settings = read_stage_settings(folder)
    facts = CardFacts.read(folder)
    lineage = read_lineage(folder)
    repo = repo_id or folder.resolve().name
    name = repo.rsplit("/", 1)[-1]
    llama = llama_version(config)
    check_name(name, llama)
    license_id = weights_licence(config, facts)
    stage = stage_of(folder, settings)
    roman, title, does = STAGES[stage]

    text = _template().render(
        mark=MARK,
        name=name,
        built_with_llama=llama is not None,
        summary=f"A Soundwave speech model after stage {roman}, {title}. {does}",
        snippet=SNIPPETS["align" if stage == "align" else "instruct"].format(
            repo=repo, instruction=json.dumps(_instruction(folder), ensure_ascii=False)
        ),
        figure=FIGURE,
        shapes=_shapes(stage),
        architecture=_architecture(folder, config, settings),
        roman=roman,
        stage_title=title,
        lineage=lineage,
        training={label: _shown(settings[key]) for key, label in TRAINING_FIELDS.items() if _matters(key, settings)},
        cost=training_cost(folder, facts),
        speech=facts.speech,
        data=facts.data,
        attributions=facts.attributions,
        figures=figures,
        unscored=figures.unscored(),
        answers_stay=answers_stay,
        limits=[*facts.limits, *_general_limits(stage)],
        parts=base_models(config, facts),
        license=license_id or UNSTATED,
    )
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    figures.check(text)
    return f"---\n{card_data(name, stage, config, lineage, facts, figures, license_id).to_yaml()}\n---\n\n{text}"


def _template() -> jinja2.Template:
    # Strict: a name that is not there is an error, not an empty place in the card.
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["cell"] = lambda value: str(value).replace("|", "\\|").replace("\n", " ")  # of a table
    source = files("soundwave.model_card").joinpath("template.md").read_text(encoding="utf-8")
    return environment.from_string(source)


def _matters(key: str, settings: Mapping[str, Any]) -> bool:
    if settings.get(key) is None:
        return False
    trains = settings.get("trains") or []
    for prefix in ("encoder_lora", "lora"):
        if key.startswith(f"{prefix}_") and prefix not in trains:
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


def _architecture(folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    audio, text = config["audio_config"], config["text_config"]
    if audio["model_type"] == "whisper":
        layers, width, seconds = audio["encoder_layers"], audio["d_model"], audio["max_source_positions"] // 50
    else:  # w2v-BERT has no bound of its own
        layers, width, seconds = audio["num_hidden_layers"], audio["hidden_size"], config.get("window_seconds") or 30
    lines = [
        f"Encoder: {audio['model_type']}, {layers} layers of width {width}, windows of up to {seconds} s; "
        f"{_changes(config, settings, 'audio')}.",
    ]
    head = f"CTC head over the LLM's vocabulary ({config['ctc_head']}), attention {config['alignment_attention']}"
    if stage_of(folder, settings) == "align":
        lines += [
            f"LLM: none in this stage; of the {text['model_type']} that the next ones add, it knows the vocabulary of "
            f"{text['vocab_size']} and the width of {text['hidden_size']}.",
            f"{head}.",
        ]
    else:
        lines += [
            f"LLM: {text['model_type']}, {text['num_hidden_layers']} layers of width {text['hidden_size']}, "
            f"vocabulary {text['vocab_size']}, never resized; {_changes(config, settings, 'text')}.",
            f"{head}; blanks {'kept' if config['keep_blanks'] else 'dropped'}, look-back at frames: "
            f"{config['shrink_context']}.",
        ]
    count = _count_parameters(folder)
    return [*lines, f"{count:,} parameters are stored in this repository."] if count else lines


def _changes(config: Mapping[str, Any], settings: Mapping[str, Any], key: str) -> str:
    """What of the encoder or the LLM this repository holds in another form than its base model has."""
    module, lora = {"audio": ("audio_tower", "encoder_lora"), "text": ("language_model", "lora")}[key]
    trains = settings.get("trains") or []
    said = []
    if fields := config.get(lora):  # models of an earlier version have no field for the encoder's
        targets = ", ".join(fields["target_modules"])
        said.append(f"LoRA of rank {fields['r']} and alpha {fields['alpha']:g} in {targets}")
    if whole := [name for name in trains if name.partition(".")[0] == module]:
        said.append(f"unfrozen in this stage: {', '.join(f'`{name}`' for name in whole)}")
    elif config[f"{key}_model_id"] and config[f"{key}_model_revision"] is None:
        said.append("not that of its base model any more: an earlier stage, or a merge, changed it")
    return "; ".join(said) or "frozen in this stage"


def _count_parameters(folder: Path) -> int:
    try:
        return sum(map(_count_in, sorted(folder.glob("*.safetensors"))))
    except WeightsError as error:
        raise CardError(str(error)) from error


def _count_in(path: Path) -> int:
    with open_shard(str(path)) as file:
        return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 (not a dict)


def _general_limits(stage: str) -> list[str]:
    limits = ["Speech and sounds unlike those of the data above were not tested; expect more errors there."]
    if stage == "align":
        limits.append("It transcribes only: this stage has no LLM and takes no instruction.")
    else:
        limits.append("Answers can be wrong, and wrong fluently; nothing here was trained to refuse or to be safe.")
    return limits


def main(argv: list[str] | None = None) -> int:
    """Write ``README.md`` of a saved stage. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="soundwave card", description="Write the model card of a saved stage.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the stage")
    parser.add_argument("--repo-id", help="repository it will be pushed to (default: the folder's name)")
    parser.add_argument("--output", type=Path, help="file to write, the figure beside it (default: RUN/README.md)")
    parser.add_argument("--push", metavar="REPO", help="then push the stage, card included, to this repository")
    arguments = parser.parse_args(argv)
    if arguments.push and (arguments.repo_id or arguments.output):
        parser.error("--push REPO writes RUN/README.md for REPO; leave out --repo-id and --output")
    if arguments.push and "/" not in arguments.push:
        parser.error(f"--push {arguments.push} has no owner; give OWNER/{arguments.push}")
    card = arguments.output or arguments.run / CARD
    if not is_free(card):
        sys.stderr.write(
            f"soundwave card: {card} is not of this command, and is kept; move it away, or name another file with "
            "--output\n"
        )
        return 1
    try:
        written = write_card(arguments.run, arguments.push or arguments.repo_id, output=arguments.output)
    except CardError as error:
        sys.stderr.write(f"soundwave card: {error}\n")
        return 1
    sys.stdout.write(f"wrote {written}\n")
    if arguments.push:
        from soundwave.apps.push import push  # which imports this module

        sys.stdout.write(f"{push(arguments.run, arguments.push)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
