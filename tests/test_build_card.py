"""The card: rendered from a run's files, executable, and unable to print a figure that was not measured."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import yaml
from huggingface_hub import ModelCard
from jinja2 import UndefinedError

from soundwave.apps.quickstart import data_license
from soundwave.eval.results import ANSWERS_FILE, RESULTS_FILE, read_results
from soundwave.eval.rows import evaluate_ctc, evaluate_rows
from soundwave.model_card import build_card as card_module
from soundwave.model_card.build_card import MARK, build_card, main, write_card
from soundwave.model_card.diagram import FIGURE
from soundwave.model_card.facts import CardFacts
from soundwave.model_card.figures import CardError, Figures
from soundwave.training.stages import StageConfig
from tests.conftest import SAMPLING_RATE, tone
from tests.local_hub import LocalHub

ROOT = Path(__file__).parents[1]

FACTS = CardFacts(
    speech="Synthesized tones, nobody speaks.",
    data=[{"name": "tones", "task": "asr", "rows": 3, "hours": 0.01, "licence": "CC0-1.0"}],
    languages=["en", "de"],
    limits=["It knows tones only."],
    encoder="a random encoder",
    llm="a random LLM",
)


def rows_in(folder):
    rows = []
    for i, seconds in enumerate((0.5, 0.8, 1.1)):
        path = folder / f"{i}.wav"
        soundfile.write(path, tone(seconds, 300 + 100 * i), SAMPLING_RATE)
        rows.append(
            {
                "id": str(i),
                "audio": str(path),
                "task": "asr",
                "instruction": "Transcribe the speech.",
                "answer": "one two three",
                "transcript": "one two three",
                "duration_s": seconds,
            }
        )
    return rows


@pytest.fixture
def instruct_run(tiny_model, processor, tmp_path):
    run = tmp_path / "soundwave-tones-instruct"
    tiny_model.save_pretrained(run)
    processor.save_pretrained(run)
    settings = StageConfig.for_stage(
        "instruct", start="someone/soundwave-tones-shrink", start_revision="abc123", steps=7
    )
    settings.save(run / "stage_config.yaml")
    FACTS.save(run)
    evaluate_rows(
        tiny_model,
        processor,
        rows_in(tmp_path),
        "asr",
        name="asr_seen",
        output_dir=run,
        source=str(run),
        max_new_tokens=3,
        progress=False,
    )
    return run


@pytest.fixture
def align_run(tiny_ctc, processor, tmp_path):
    run = tmp_path / "soundwave-tones-align"
    tiny_ctc.save_pretrained(run)
    processor.save_pretrained(run)
    StageConfig.for_stage("align", steps=5).save(run / "stage_config.yaml")
    return run


def test_figures_come_from_the_results(instruct_run):
    (entry,) = read_results(instruct_run)
    card = ModelCard(build_card(instruct_run))
    shown = f"{100 * entry['value']:.1f}%"
    assert f"| asr_seen | Speech recognition | word error rate | {shown} |" in card.text
    low, high = entry["interval"]
    assert f"{100 * low:.1f}% to {100 * high:.1f}%" in card.text
    assert "max new tokens 3" in card.text and "normaliser none: asr_seen" in card.text
    result = card.data.eval_results[0]
    assert (result.metric_type, result.metric_value) == ("wer", round(100 * entry["value"], 2))
    assert result.dataset_revision == entry["dataset"]["revision"]


def test_metadata_is_what_the_hub_takes(instruct_run):
    data = yaml.safe_load(build_card(instruct_run, "someone/tones").split("---")[1])
    assert data["pipeline_tag"] == "audio-text-to-text"
    assert data["library_name"] == "transformers"
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == ["someone/soundwave-tones-shrink"]
    assert data["language"] == ["en", "de"]
    assert data["model-index"][0]["name"] == "tones"
    assert "stage-iii" in data["tags"]


def test_lineage_data_and_limits(instruct_run):
    text = build_card(instruct_run)
    assert "## Stage III: instruction" in text
    assert "the result of stage II, [someone/soundwave-tones-shrink]" in text and "at `abc123`" in text
    assert "| steps | 7 |" in text and "| learning rate, peak | 3e-05 |" in text
    assert "| tones | asr | 3 | 0.01 | CC0-1.0 |" in text
    assert "Synthesized tones, nobody speaks." in text and "It knows tones only." in text
    assert "| LLM | a random LLM | as this repository |" in text
    assert "\n\n\n" not in text and "{{" not in text
    assert str(instruct_run.parent) not in text


@pytest.mark.parametrize("stage", ["instruct", "align"])
def test_the_snippet_runs_without_the_package(stage, request):
    """As a stranger runs it: from the card as it is, in a process that cannot import `soundwave`."""
    run = request.getfixturevalue(f"{stage}_run")
    soundfile.write(run.parent / "recording.wav", tone(0.7), SAMPLING_RATE)
    (snippet,) = re.findall(r"```python\n(.*?)```", build_card(run), re.DOTALL)
    assert f'"{run.name}"' in snippet
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.modules['soundwave'] = sys.modules['peft'] = None\n{snippet}"],
        cwd=run.parent,  # where the folder has the name that the card knows it by
        env=os.environ | {"HF_MODULES_CACHE": str(run.parent / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")  # a random model may say anything, also nothing


def test_the_figure_and_the_mark_go_with_the_card(instruct_run, tmp_path):
    card = write_card(instruct_run)
    assert card == instruct_run / "README.md" and MARK in card.read_text()
    assert f"]({FIGURE})" in card.read_text() and (instruct_run / FIGURE).read_text().startswith("<svg")
    (tmp_path / "elsewhere").mkdir()
    write_card(instruct_run, output=tmp_path / "elsewhere" / "card.md")
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"card.md", FIGURE}


def test_nothing_is_written_of_a_card_that_is_refused(instruct_run):
    (instruct_run / "card.yaml").write_text("speech: It is 99 % right.\n")
    with pytest.raises(CardError, match="99 %"):
        write_card(instruct_run)
    assert not (instruct_run / "README.md").exists() and not (instruct_run / FIGURE).exists()


def test_a_full_disk_leaves_the_card_that_was_there(instruct_run, monkeypatch):
    write_card(instruct_run)
    before = {path.name: path.read_bytes() for path in instruct_run.iterdir() if path.is_file()}
    (instruct_run / "card.yaml").write_text("limits: [It is new.]\n")
    before["card.yaml"] = (instruct_run / "card.yaml").read_bytes()

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_card(instruct_run)
    assert {path.name: path.read_bytes() for path in instruct_run.iterdir()} == before


def test_a_folder_for_the_card_that_is_not_there(instruct_run, tmp_path, capsys):
    assert main([str(instruct_run), "--output", str(tmp_path / "none" / "card.md")]) == 1
    assert f"there is no folder {tmp_path / 'none'}; make it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("extra.safetensors", "", "extra.safetensors cannot be read .*expected a whole safetensors file"),
        ("config.json", "{", "config.json of .* is not JSON .*save the model again"),
        ("config.json", "{}", "config.json of .* is not of a saved Soundwave model: expected model_type 'soundwave'"),
    ],
)
def test_a_damaged_file_is_named(name, content, expected, align_run):
    (align_run / name).write_text(content)
    with pytest.raises(CardError, match=expected):
        build_card(align_run)


def test_stage_one_has_no_llm(align_run):
    """Nor a look-back: it says what of an LLM it knows all the same."""
    text = build_card(align_run)
    assert "LLM: none in this stage; of the llama that the next ones add, it knows the vocabulary of" in text
    assert "look-back" not in text and "LLM: llama" not in text


def test_what_of_the_base_models_is_changed(instruct_run):
    assert "windows of up to 2 s; frozen in this stage." in build_card(instruct_run)
    settings = StageConfig.for_stage("instruct", trains=["lora", "encoder_lora", "audio_tower.layers.1"])
    settings.save(instruct_run / "stage_config.yaml")
    path = instruct_run / "config.json"
    lora = {"r": 8, "alpha": 16, "target_modules": ["q_proj"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"encoder_lora": lora, "lora": lora | {"r": 4}}))
    text = build_card(instruct_run)
    assert "LoRA of rank 8 and alpha 16 in q_proj; unfrozen in this stage: `audio_tower.layers.1`." in text
    assert "never resized; LoRA of rank 4 and alpha 16 in q_proj." in text
    assert "| LoRA rank in the encoder | 16 |" in text and "| LoRA in | q_proj, k_proj, v_proj, o_proj |" in text


def test_what_it_took_is_measured_or_said_not_to_be(instruct_run):
    text = build_card(instruct_run)
    assert "| training time | not measured |" in text and "| energy | not measured |" in text
    lines = [
        {"accelerator": "NVIDIA H100", "devices": 8, "step": 0},
        {"loss": 1.0, "steps_per_second": 0.001, "audio_seconds": 7200, "step": 9},
    ]
    (instruct_run / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "| GPU hours, NVIDIA H100 | 20 |" in build_card(instruct_run)


def test_a_stage_without_evaluation_says_so(align_run):
    text = build_card(align_run)
    assert "This stage has not been evaluated." in text
    assert "%" not in text.split("---", 2)[2]
    assert "model-index" not in text
    assert yaml.safe_load(text.split("---")[1])["pipeline_tag"] == "automatic-speech-recognition"


def test_stage_one_with_ctc_figures(align_run, tiny_ctc, processor):
    options = {"name": "ctc_seen", "output_dir": align_run, "source": str(align_run), "progress": False}
    evaluate_ctc(tiny_ctc, processor, rows_in(align_run.parent), **options)
    text = build_card(align_run)
    assert "greedy CTC, batch size 50, normaliser none: ctc_seen" in text
    assert "takes no instruction" in text


def test_an_edited_result_is_refused(instruct_run):
    path = instruct_run / RESULTS_FILE
    content = json.loads(path.read_text())
    content["results"][0]["value"] /= 2
    path.write_text(json.dumps(content))
    with pytest.raises(CardError, match="asr_seen: value is .* but the answers give"):
        build_card(instruct_run)


def test_attributions_and_licence_of_the_data(instruct_run):
    named = ["Ada (https://example.org/ada), CC BY-SA 4.0", "Zoe, The judge, https://example.org/take2%20b, CC BY 4.0"]
    CardFacts(attributions=named, license=data_license(["CC0", "CC BY-SA 4.0", "CC BY 4.0"])).save(instruct_run)
    text = build_card(instruct_run)
    assert "".join(f"- {name}\n" for name in named) in text
    assert "The weights of this repository: cc-by-sa-4.0." in text
    assert yaml.safe_load(text.split("---")[1])["license"] == "cc-by-sa-4.0"
    FACTS.save(instruct_run)
    assert "Attribution" not in build_card(instruct_run)


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["CC-BY-3.0", "CC0-1.0"], "cc-by-4.0"),
        (["cc_by_sa", "CC BY 4.0"], "cc-by-sa-4.0"),
        (["CC BY-NC 4.0", "CC BY 4.0"], "cc-by-nc-4.0"),
        (["CC0", ""], None),
        ([], None),
    ],
)
def test_licence_that_the_data_ask_for(licences, expected):
    assert data_license(licences) == expected


def test_answers_that_do_not_stay_are_not_pointed_at(instruct_run):
    assert ANSWERS_FILE in build_card(instruct_run)
    assert ANSWERS_FILE not in build_card(instruct_run, answers_stay=False)


def test_results_without_their_answers_are_refused(instruct_run):
    (instruct_run / ANSWERS_FILE).unlink()
    with pytest.raises(CardError, match="holds no answer"):
        build_card(instruct_run)


def test_figures_of_other_weights_are_refused(instruct_run, tiny_model, processor):
    weights = instruct_run / "model.safetensors"
    measured = weights.read_bytes()
    weights.write_bytes(measured[:-4] + b"\0\0\0\1")  # trained on, perhaps
    with pytest.raises(CardError, match="asr_seen in results.json .* not measured on the weights that lie there"):
        build_card(instruct_run)
    weights.write_bytes(measured)
    assert build_card(instruct_run)
    rows = rows_in(instruct_run.parent)
    evaluate_rows(tiny_model, processor, rows, "asr", output_dir=instruct_run, max_new_tokens=3, progress=False)
    with pytest.raises(CardError, match="asr in results.json .* not measured on the weights"):  # of a model in memory
        build_card(instruct_run)


def test_a_figure_that_was_not_measured_is_refused(instruct_run):
    figures = Figures(instruct_run)
    with pytest.raises(CardError, match=r"'st_seen'.*evaluated are: asr_seen"):
        figures.value("st_seen")
    with pytest.raises(CardError, match="sound_accuracy of 'asr_seen'"):
        figures.value("asr_seen", "sound_accuracy")


@pytest.mark.parametrize(
    "claim",
    [
        "Only 1.3% of words are wrong.",
        "It is 99 % right.",
        "It errs in 2 percent of cases.",
        "Its BLEU is 31.4 on all pairs.",
        "The judge gave it 6.51 of 10.",
        "Accuracy: .97, or so.",
        "It is 99 &#37; right, or 99 \uff05.",
        "Its WER_2.1_ is low, and its WER is _3.1_.",
        "It beats others (2.0 vs 3.1).",
    ],
)
def test_a_figure_in_prose_is_refused(instruct_run, claim):
    for facts in (CardFacts(speech=claim), CardFacts(attributions=[f"Ada, {claim}"])):
        facts.save(instruct_run)
        with pytest.raises(CardError, match="not found in results.json"):
            build_card(instruct_run)


def test_a_template_that_asks_for_more_is_refused(instruct_run, monkeypatch):
    template = card_module._template().environment.from_string("{{ figures.value('st') }} {{ undefined_name }}")
    monkeypatch.setattr(card_module, "_template", lambda: template)
    with pytest.raises((CardError, UndefinedError)):
        build_card(instruct_run)


def test_llama_names(instruct_run):
    path = instruct_run / "config.json"
    config = json.loads(path.read_text())
    config |= {
        "text_model_id": "meta-llama/Llama-3.1-8B-Instruct",
        "text_model_revision": "0e9e39f249a16976918f6564b8830bc894c89659",
        "audio_model_id": "openai/whisper-large-v3",
        "audio_model_revision": "06f233fe06e710322aca913c1bc4249a0d71fce1",
    }
    path.write_text(json.dumps(config))
    with pytest.raises(CardError, match="call it 'Llama-soundwave-tones-instruct'"):
        build_card(instruct_run)
    text = build_card(instruct_run, "someone/Llama-soundwave")
    assert "**Built with Llama.**" in text
    data = yaml.safe_load(text.split("---")[1])
    assert data["license"] == "llama3.1"
    assert data["base_model"][1:] == ["openai/whisper-large-v3", "meta-llama/Llama-3.1-8B-Instruct"]
    assert "Llama 3.1 Community License" in text and "Apache-2.0" in text


def test_command(instruct_run, capsys):
    assert main([str(instruct_run)]) == 0
    assert (instruct_run / "README.md").read_text() == build_card(instruct_run)
    (instruct_run / "card.yaml").write_text("")
    assert main([str(instruct_run)]) == 0
    assert "The data of this stage are not described." in (instruct_run / "README.md").read_text()
    assert main([str(instruct_run / "nothing")]) == 1
    assert "config.json" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0


def test_push(align_run, tmp_path, capsys):
    """Card and stage in one command; the Hub client reads its endpoint at import, hence a process."""
    with pytest.raises(SystemExit):
        main([str(align_run), "--push", "me/one", "--repo-id", "me/two"])
    with pytest.raises(SystemExit):
        main([str(align_run), "--push", "mine"])
    assert "--push mine has no owner; give OWNER/mine" in capsys.readouterr().err
    FACTS.save(align_run)
    with LocalHub(tmp_path / "hub") as hub:
        command = [sys.executable, "-m", "soundwave.model_card.build_card", str(align_run), "--push", "me/one"]
        environment = os.environ | hub.environment("home") | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "pushed: http" in done.stdout
        assert {"README.md", "model.safetensors"} <= hub.listing("me/one")[1].keys()
        assert hub.content("me/one", "README.md").decode() == build_card(align_run, "me/one")
        assert hub.content("me/one", FIGURE) == (align_run / FIGURE).read_bytes()
