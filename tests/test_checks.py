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
from soundwave.model_card.checks import check_card, check_licences, check_stage
from soundwave.model_card.facts import CardFacts
from soundwave.model_card.loading import missing_components
from soundwave.model_card.push_to_hub import CheckFailed

DATA = {"name": "tapes", "task": "asr", "rows": 4, "hours": 1, "licence": "CC0-1.0"}
ANSWERS = [("speech", "a b c", "a b c"), ("speech", "a b", "a x"), ("music", "c d", "c d"), ("music", "d", "e")]


def add_result(
    folder: Path, name: str = "asr_seen", revision: str = "sha256:1", dataset: str = "ours", answers=ANSWERS
) -> None:
    """A result of four answers, two groups and an area of both, as the runner writes it."""
    rows = [
        {"name": name, "task": "asr", "id": str(i), "reference": said, "answer": heard, "group": group, "error": None}
        for i, (group, said, heard) in enumerate(answers)
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
    CardFacts(data=[DATA]).save(folder)
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


def test_labels_are_compared_with_the_settings_of_the_answers(stage):
    (entry,) = json.loads((stage / RESULTS_FILE).read_text())["results"]
    asked = {key: entry[key] for key in ("task", "metric", "settings", "dataset", "model", "decoding")}
    (stage / "answers.settings.json").write_text(json.dumps({"asr_seen": asked}))
    check_card(stage, "ours/stage")
    edit_results(stage, decoding=entry["decoding"] | {"num_beams": 10})
    with pytest.raises(
        CheckFailed, match="asr_seen: decoding num_beams is 10 in results.json, but None in answers.sett"
    ):
        check_card(stage, "ours/stage")
    (stage / "answers.settings.json").write_text("[]")
    with pytest.raises(CheckFailed, match="answers.settings.json holds no settings .*--overwrite"):
        check_card(stage, "ours/stage")


def test_many_differences_are_counted(stage):
    (entry,) = json.loads((stage / RESULTS_FILE).read_text())["results"]
    lost = {f"item-{k}": "OSError: gone" for k in range(100)}
    edit_results(stage, value=0.0, interval=[0.0, 0.0], count=5, failures=100, failed=lost, groups={})
    with pytest.raises(CheckFailed, match=r"asr_seen: value is 0\.0 .*; and \d+ more\. Write it anew") as failure:
        check_card(stage, "ours/stage")
    assert str(failure.value).count("asr_seen: ") == 3 and len(str(failure.value)) < 1000


def test_a_test_set_that_was_taken_out_is_named_and_one_twice_is_refused(stage):
    add_result(stage, "asr_accent")
    path = stage / RESULTS_FILE
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"results": content["results"][:1]}))
    write_card(stage, "ours/stage")
    assert "\nAnswered, but not scored: asr_accent.\n" in (stage / "README.md").read_text()
    path.write_text(json.dumps({"results": [*content["results"], content["results"][0]]}))
    with pytest.raises(CheckFailed, match="results.json of stage holds asr_seen more than once"):
        check_card(stage, "ours/stage")


@pytest.mark.parametrize("content", ['{"results": [{"name"', "[]"])
def test_a_result_cut_short_is_said(content, stage):
    (stage / RESULTS_FILE).write_text(content)
    with pytest.raises(CheckFailed, match="cannot be scored again.*evaluate again.*expected"):
        check_card(stage, "ours/stage")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: text.replace("26.7%", "6.7%"), r"would print 6\.7%, not found in results.json"),
        (
            lambda text: text.replace("value: 26.67", "value: 6.67"),
            r"README.md states ours asr_seen wer 6\.67: not a headline",
        ),
        (lambda text: text.replace("name: asr_seen", "name: asr_unseen"), r"states ours asr_unseen wer 26\.67: not a"),
        (
            lambda text: text.replace("type: ours", "type: openslr/librispeech_asr"),
            "openslr/librispeech_asr asr_seen wer",
        ),
        (lambda text: "---\n[\n---\n" + text, "cannot read its metadata"),
    ],
)
def test_a_card_that_was_edited(change, expected, stage):
    path = stage / "README.md"
    path.write_text(change(path.read_text()))
    with pytest.raises(CheckFailed, match=expected):
        check_card(stage, "ours/stage")


@pytest.mark.parametrize("own", [None, "# By hand\n", "---\nlanguage: en\n---\n# By hand\n"])
def test_a_card_without_a_licence(own, stage):
    path = stage / "README.md"
    path.write_text(own or path.read_text().replace("license: apache-2.0\n", ""))
    check_card(stage, "ours/stage")
    with pytest.raises(CheckFailed, match="README.md states no licence: write license: into card.yaml"):
        check_stage(stage, "ours/stage", load=False)


def test_values_of_one_test_set_do_not_stand_under_another(stage):
    """Each is measured, on other data."""
    add_result(stage, "asr_unseen", answers=ANSWERS[:3])
    write_card(stage, "ours/stage")
    path = stage / "README.md"
    seen, unseen = re.findall(r"value: ([\d.]+)", path.read_text())
    assert seen != unseen
    path.write_text(path.read_text().replace(f"value: {seen}", f"value: {unseen}"))
    with pytest.raises(CheckFailed, match=f"states ours asr_seen wer {unseen}: not a headline figure"):
        check_card(stage, "ours/stage")


def test_a_leaderboard_entry_of_another_data_set(stage):
    (stage / ".eval_results").mkdir()
    entry = {"dataset": {"id": "openslr/librispeech_asr", "task_id": "clean"}, "value": 26.67}
    (stage / ".eval_results" / "mine.yaml").write_text(yaml.safe_dump([entry]))
    with pytest.raises(CheckFailed, match=r"mine.yaml states openslr/librispeech_asr clean 26\.67: not a headline"):
        check_card(stage, "ours/stage")


def test_a_llamas_terms_hold_for_a_card_by_hand(stage):
    config = json.loads((stage / "config.json").read_text())
    config |= {"text_model_id": "meta-llama/Llama-3.1-8B-Instruct", "text_model_revision": "c" * 40}
    (stage / "config.json").write_text(json.dumps(config))
    path = stage / "README.md"
    path.write_text("---\nlicense: llama3.1\n---\n# mine\n")
    with pytest.raises(CheckFailed, match="does not say 'Built with Llama'"):
        check_card(stage, "ours/Llama-hand")
    path.write_text("---\nlicense: apache-2.0\n---\nBuilt with Llama\n")
    with pytest.raises(CheckFailed, match=r"states the licence apache-2.0, but its LLM is a Llama 3\.1"):
        check_card(stage, "ours/Llama-hand")
    path.write_text("---\nlicense: llama3.1\n---\nBuilt with Llama\n")
    check_card(stage, "ours/Llama-hand")


def test_base_models_of_an_unknown_licence_and_weights_without_one(stage):
    config = json.loads((stage / "config.json").read_text())
    config |= {"text_model_id": "nobody/llm", "text_model_revision": "c" * 40}
    (stage / "config.json").write_text(json.dumps(config))
    write_card(stage, "ours/stage")
    assert "The weights of this repository: not stated." in (stage / "README.md").read_text()
    with pytest.raises(CheckFailed, match=r"no licence of nobody/llm \(llm: LICENCE\): write it into base_licences:"):
        check_licences(stage)
    CardFacts(data=[DATA], base_licences={"llm": "Terms of Nobody"}).save(stage)
    write_card(stage, "ours/stage")
    with pytest.raises(CheckFailed, match="README.md states no licence: write license: into card.yaml"):
        check_licences(stage)
    CardFacts(data=[DATA], base_licences={"llm": "Terms of Nobody"}, license="other").save(stage)
    write_card(stage, "ours/stage")
    check_licences(stage)


def test_a_card_that_is_missing_and_data_without_a_licence(stage):
    (stage / "README.md").unlink()
    with pytest.raises(CheckFailed, match="README.md is missing: soundwave card .* --repo-id ours/stage"):
        check_card(stage, "ours/stage")
    CardFacts(data=[DATA, DATA | {"task": "st", "licence": "not stated"}]).save(stage)
    write_card(stage, "ours/stage")
    check_card(stage, "ours/stage")
    with pytest.raises(
        CheckFailed, match=r"card.yaml states no licence of tapes \(st\): write each into the licence:"
    ):
        check_stage(stage, "ours/stage", load=False)
    (stage / "card.yaml").unlink()
    with pytest.raises(CheckFailed, match="card.yaml states no data: .* for each source its name, task, rows, hours"):
        check_stage(stage, "ours/stage", load=False)
    (stage / "card.yaml").write_text("limit: [none]\n")
    with pytest.raises(CheckFailed, match="the licences cannot be checked: card.yaml holds limit"):
        check_licences(stage)


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
    with pytest.raises(CheckFailed, match=r"soundwave-librispeech_clean.yaml states .* 6\.67: not"):
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
    CardFacts(data=[DATA], base_licences={"encoder": "MIT"}).save(stage)
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
