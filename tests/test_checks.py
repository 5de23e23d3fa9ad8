"""The checks before a push: a card that says what was measured, licences stated, a model that loads for a stranger."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from soundwave.eval.provenance import weights_hash
from soundwave.eval.results import (
    RESULTS_FILE,
    AnswerLog,
    JudgementLog,
    TaskResult,
    metric_settings,
    save_result,
    score_answers,
)
from soundwave.model_card.build_card import build_card, main, write_card
from soundwave.model_card.checks import check_card, check_stage
from soundwave.model_card.facts import CardFacts
from soundwave.model_card.loading import missing_components
from soundwave.model_card.push_to_hub import CheckFailed

ANSWERS = [("speech", "a b c", "a b c"), ("speech", "a b", "a x"), ("music", "c d", "c d"), ("music", "d", "e")]


def add_result(folder: Path, name: str = "asr_seen", revision: str = "sha256:1", dataset: str = "ours") -> None:
    """A result of four answers, two groups and an area of both, as the runner writes it."""
    rows = [
        {"name": name, "task": "asr", "id": str(i), "reference": said, "answer": heard, "group": group, "error": None}
        for i, (group, said, heard) in enumerate(ANSWERS)
    ]
    settings = metric_settings(average="groups", areas={"sounds": ["speech", "music"]})
    figures, also = score_answers(rows, "wer", ["cer"], settings)
    AnswerLog(folder, name).append(rows)
    JudgementLog(folder, name).append([{"name": name, "id": "0", "order": None, "model": "a-judge", "score": 1}])
    about = {
        "dataset": {"name": dataset, "revision": revision, "rows": len(rows)},
        "model": {"name": "m", "weights": weights_hash(folder), "class": "SoundwaveForConditionalGeneration"},
        "decoding": {"strategy": "greedy", "max_new_tokens": 8},
    }
    result = TaskResult(
        name=name,
        task="asr",
        metric="wer",
        settings=settings,
        value=figures.value,
        interval=figures.interval,
        count=figures.count,
        failures=0,
        failed={},
        also=also,
        groups=figures.groups,
        areas=figures.areas,
        notes=figures.notes,
        judge={"model": "a-judge", "temperature": 0.0},
        hardware={},
        packages={},
        time="2026-01-02T03:04:05+00:00",
        seconds=1.0,
        command="soundwave evaluate",
        **about,
    )
    save_result(folder, result)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_model, processor) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "stage"
    tiny_model.save_pretrained(folder)
    processor.save_pretrained(folder)
    (folder / "stage_config.yaml").write_text(yaml.safe_dump({"stage": "instruct", "trains": ["lora"]}))
    return folder


@pytest.fixture
def stage(saved, tmp_path) -> Path:
    """A saved stage III with a result and its card."""
    folder = tmp_path / "stage"
    shutil.copytree(saved, folder)
    add_result(folder)
    write_card(folder, "ours/stage")
    return folder


def edit_results(folder: Path, **changed) -> None:
    path = folder / RESULTS_FILE
    content = json.loads(path.read_text())
    content["results"][0] |= changed
    path.write_text(json.dumps(content))


def test_groups_areas_and_the_judge_are_in_the_card(stage):
    check_card(stage, "ours/stage")
    text = (stage / "README.md").read_text()
    assert re.search(r"\| sounds \| mean of groups \| \d+\.\d% \| \d+\.\d% to \d+\.\d% \| 4 \|", text)
    assert re.search(r"\| music \| group \| 33\.3% \|", text) and "| speech | group | 20.0% |" in text
    assert "judge: model a-judge, temperature 0.0" in text
    assert "| asr_seen | Speech recognition | word error rate | 26.7% |" in text


@pytest.mark.parametrize("part", ["groups", "areas"])
def test_a_figure_of_a_part_that_the_answers_do_not_give(part, stage):
    parts = json.loads((stage / RESULTS_FILE).read_text())["results"][0][part]
    name, figure = next(iter(parts.items()))
    edit_results(stage, **{part: parts | {name: figure | {"value": 0.01}}})
    with pytest.raises(CheckFailed, match=f"README.md is not published: .*{part} {name} value.*soundwave card"):
        check_card(stage, "ours/stage")


def test_a_result_of_another_model_is_not_ours(stage):
    edit_results(stage, model={"name": "peer", "class": "Qwen2AudioForConditionalGeneration"})
    with pytest.raises(CheckFailed, match="was measured on a Qwen2AudioForConditionalGeneration, not on this model"):
        check_card(stage, "ours/stage")


def test_a_result_cut_short_is_said(stage):
    (stage / RESULTS_FILE).write_text('{"results": [{"name"')
    with pytest.raises(CheckFailed, match="cannot be scored again.*evaluate again"):
        check_card(stage, "ours/stage")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: text.replace("26.7%", "6.7%"), r"would print 6\.7%, not found in results.json"),
        (lambda text: text.replace("value: 26.67", "value: 6.67"), r"README.md states 6\.67, not a headline figure"),
        (lambda text: text.replace("license: apache-2.0\n", ""), "states no licence: add license:"),
        (lambda text: "---\n[\n---\n" + text, "cannot read its metadata"),
        (lambda text: "# By hand\n", "states no licence"),
    ],
)
def test_a_card_that_was_edited(change, expected, stage):
    path = stage / "README.md"
    path.write_text(change(path.read_text()))
    with pytest.raises(CheckFailed, match=expected):
        check_card(stage, "ours/stage")


def test_a_card_that_is_missing_and_data_without_a_licence(stage):
    (stage / "README.md").unlink()
    with pytest.raises(CheckFailed, match="README.md is missing: soundwave card .* --repo-id ours/stage"):
        check_card(stage, "ours/stage")
    row = {"name": "tapes", "task": "asr", "rows": 1, "hours": 1, "licence": "not stated"}
    CardFacts(data=[row]).save(stage)
    write_card(stage, "ours/stage")
    with pytest.raises(CheckFailed, match="card.yaml states no licence of tapes"):
        check_card(stage, "ours/stage")


def test_eval_results_are_written_for_the_hubs_data_and_checked(stage):
    """A local test set has no leaderboard; one of the Hub at a commit has, and its file says what the card says."""
    assert not (stage / ".eval_results").exists()
    add_result(stage, "librispeech_clean", "a" * 40, "openslr/librispeech_asr")
    write_card(stage, "ours/stage")
    path = stage / ".eval_results" / "soundwave-librispeech_clean.yaml"
    (entry,) = yaml.safe_load(path.read_text())
    assert entry["dataset"]["id"] == "openslr/librispeech_asr" and entry["dataset"]["revision"] == "a" * 40
    assert entry["value"] == 26.67 and entry["date"].startswith("2026-01-02")
    check_card(stage, "ours/stage")
    path.write_text(path.read_text().replace("26.67", "6.67"))
    with pytest.raises(CheckFailed, match=r"soundwave-librispeech_clean.yaml states 6\.67"):
        check_card(stage, "ours/stage")
    (stage / RESULTS_FILE).unlink()
    write_card(stage, "ours/stage")
    assert not path.exists()
    assert "has not been evaluated" in build_card(stage, "ours/stage")


def test_a_stage_loads_and_answers_in_a_process_without_the_package(stage):
    assert check_stage(stage, "ours/stage") == []


def test_a_stage_that_does_not_load_for_a_stranger(stage):
    tensors = load_file(stage / "model.safetensors")
    lost = next(name for name in tensors if name.startswith("shrinking_adapter"))
    del tensors[lost]
    save_file(tensors, stage / "model.safetensors", {"format": "pt"})
    (stage / RESULTS_FILE).unlink()  # of other weights now
    write_card(stage, "ours/stage")
    with pytest.raises(CheckFailed, match=f"in a process without this package: .*{re.escape(lost)}.*--no-check"):
        check_stage(stage, "ours/stage")
    (remark,) = check_stage(stage, "ours/stage", load=False)
    assert "NOT checked" in remark


def test_a_base_model_that_is_not_here_leaves_a_remark(stage):
    config = json.loads((stage / "config.json").read_text())
    config |= {"audio_model_id": "nobody/whisper", "audio_model_revision": "c" * 40}
    (stage / "config.json").write_text(json.dumps(config))
    assert missing_components(config) == [("nobody/whisper", "c" * 40)]
    write_card(stage, "ours/stage")
    (remark,) = check_stage(stage, "ours/stage")
    assert "not checked: nobody/whisper at cccc" in remark and "hf download nobody/whisper --revision" in remark


def test_test_sets_of_one_data_set_keep_their_names_in_the_model_index(stage):
    """LibriSpeech's clean and other are one repository at one commit."""
    for name in ("librispeech_clean", "librispeech_other"):
        add_result(stage, name, "a" * 40, "openslr/librispeech_asr")
    write_card(stage, "ours/stage")
    (index,) = yaml.safe_load((stage / "README.md").read_text().split("---")[1])["model-index"]
    assert [result["dataset"]["name"] for result in index["results"]] == [
        "asr_seen",
        "librispeech_clean",
        "librispeech_other",
    ]


def test_a_result_of_an_earlier_version_has_no_parts(stage):
    path = stage / RESULTS_FILE
    content = json.loads(path.read_text())
    (entry,) = content["results"]
    rows = [json.loads(line) | {"group": None} for line in (stage / "answers.jsonl").read_text().splitlines()]
    (stage / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry["settings"] |= {"average": "items", "areas": {}}
    figures, also = score_answers(rows, "wer", ["cer"], entry["settings"])
    entry |= {"value": figures.value, "interval": figures.interval, "also": also}
    for name in ("groups", "areas", "notes", "judge", "signature"):
        del entry[name]
    (stage / "judgements.jsonl").unlink()
    path.write_text(json.dumps(content))
    write_card(stage, "ours/stage")
    assert " in parts" not in (stage / "README.md").read_text()


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (b"---\nlicense: mit\n---\n\n| set | WER |\n| --- | --- |\n| clean | 1.3 |\n", r"would print 1\.3"),
        ("# G\u00fcte\n".encode("latin-1"), "README.md is not published: .*utf-8"),
    ],
)
def test_a_card_of_somebodys_own_is_kept_and_checked(own, expected, stage, capsys):
    """A table's header holds for all its rows; a card in another encoding is said, not a traceback."""
    (stage / "README.md").write_bytes(own)
    assert main([str(stage)]) == 1 and "is kept" in capsys.readouterr().err
    assert (stage / "README.md").read_bytes() == own
    with pytest.raises(CheckFailed, match=expected):
        check_card(stage, "ours/stage")
