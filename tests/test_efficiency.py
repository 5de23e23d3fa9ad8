import copy
import json
import shutil
import time
from dataclasses import dataclass

import numpy as np
import pytest
import soundfile
import torch

from soundwave import SoundwaveForConditionalGeneration
from soundwave.apps.processes import Processes
from soundwave.assets import TINY
from soundwave.eval import evaluate
from soundwave.eval.efficiency import EFFICIENCY, get_efficiency
from soundwave.eval.efficiency_inference import (
    HeardClip,
    measure_compression,
    measure_similarity,
    measure_ttft,
)
from soundwave.eval.efficiency_training import measure_training_speed
from soundwave.eval.items import FileClip, Item
from soundwave.eval.measures import deviation
from soundwave.eval.models.soundwave import SoundwaveAudioModel
from soundwave.eval.results import read_answers, read_results, rescore
from soundwave.eval.resuming import claim
from soundwave.eval.runner import Runner
from soundwave.eval.scoring import score_rows
from soundwave.model_card.build_card import build_card
from soundwave.processing import SAMPLING_RATE
from tests.conftest import tone
from tests.sounds import noise
from tests.training_rows import WORDS

WINDOW_POSITIONS = 100  # of the tiny encoder's 2 s, at 50 per second


@pytest.fixture(scope="module")
def model(tiny_model, processor):
    """A copy: the evaluation clears the generation configuration."""
    return SoundwaveAudioModel(copy.deepcopy(tiny_model), processor, "tiny")


@pytest.fixture
def items():
    return [spoken(f"i{k}", noise(int((0.5 + 0.3 * k) * SAMPLING_RATE), k), WORDS[k]) for k in range(5)]


def spoken(name, waveform, said):
    return Item(name, "Transcribe the speech.", [HeardClip(f"{name}.wav", waveform)], said)


def rows(*numbers, **fields):
    return [{"id": str(k), "error": None, "fields": one} | fields for k, one in enumerate(numbers)]


def broken(items, tmp_path):
    missing = Item("missing", None, [FileClip(tmp_path / "gone.wav")], "three")
    named = Item("named", None, [], "three", fields={"error": "the answer is none of the options"})
    return [items[0], missing, named, items[1]]


# -- figures worked out by hand


def test_ratios_are_pooled_and_averaged():
    measured = rows(
        {"positions": 10, "padded_positions": 100, "speech_positions": 20},
        {"positions": 30, "padded_positions": 100, "speech_positions": 40},
        {"positions": 20, "padded_positions": 400, "speech_positions": 340},
    )
    expected = {
        "ratio_padded": 60 / 600,
        "ratio_padded_mean": (0.1 + 0.3 + 0.05) / 3,
        "ratio_speech": 60 / 400,
        "ratio_speech_mean": (0.5 + 0.75 + 20 / 340) / 3,
    }
    assert {name: score_rows(measured, name).value for name in expected} == pytest.approx(expected)


def test_times_have_a_median_and_a_mean():
    measured = rows(*({"ttft_ms": ms, "features_ms": 2 * ms} for ms in (10.0, 90.0, 20.0)))
    values = {name: score_rows(measured, name).value for name in ("ttft", "ttft_mean", "features_time")}
    assert values == pytest.approx({"ttft": 20, "ttft_mean": 40, "features_time": 40})
    low, high = score_rows(measured, "ttft").interval
    assert (low, high) == (10, 90)  # of three, the resampled medians are the three values


def test_a_median_is_not_added_up_over_groups():
    measured = rows({"ttft_ms": 1.0}, group="a") + rows({"ttft_ms": 2.0}, group="b")
    with pytest.raises(ValueError, match="ttft does not add up over groups"):
        score_rows(measured, "ttft")


def test_similarity_has_a_mean_and_a_deviation():
    measured = rows(*({"cosine": value, "shuffled": value / 2} for value in (0.2, 0.4, 0.9)))
    assert score_rows(measured, "similarity").value == pytest.approx(0.5)
    assert score_rows(measured, "similarity_std").value == pytest.approx(np.std([0.2, 0.4, 0.9]))
    assert score_rows(measured, "shuffled_similarity").value == pytest.approx(0.25)
    assert deviation(np.array([3 * 0.1**2, 3 * 0.1, 3])) == pytest.approx(0, abs=1e-8)  # rounding goes below zero


def test_speed_is_steps_over_seconds_by_stage():
    measured = rows({"seconds": 0.5, "audio_s": 8}, {"seconds": 0.25, "audio_s": 8}, group="align")
    measured += [row | {"id": "x" + row["id"]} for row in rows({"seconds": 2.0, "audio_s": 8}, group="shrink")]
    figures = score_rows(measured, "steps_per_second")
    assert {stage: figure["value"] for stage, figure in figures.groups.items()} == pytest.approx(
        {"align": 2 / 0.75, "shrink": 0.5}
    )
    assert score_rows(measured, "audio_seconds_per_second").groups["align"]["value"] == pytest.approx(16 / 0.75)


@pytest.mark.parametrize("value", [None, "fast", float("nan"), True])
def test_what_is_no_number_is_named(value):
    with pytest.raises(ValueError, match=r"item '0': fields\['ttft_ms'\] is "):
        score_rows(rows({"ttft_ms": value}), "ttft")


# -- measurements


def test_compression_counts_positions(model, processor):
    items = [
        spoken("short", noise(SAMPLING_RATE // 2), "three"),
        spoken("odd", noise(SAMPLING_RATE + 1), "three"),
        spoken("long", noise(3 * SAMPLING_RATE), "three"),  # two windows
    ]
    measured = [one.numbers for one in measure_compression(model, items)]
    assert [one["padded_positions"] for one in measured] == [WINDOW_POSITIONS, WINDOW_POSITIONS, 2 * WINDOW_POSITIONS]
    assert [one["speech_positions"] for one in measured] == [25, 51, 150]
    for item, one in zip(items, measured, strict=True):
        batch = processor([clip.read() for clip in item.clips], sampling_rate=SAMPLING_RATE)
        assert one["positions"] == int(model.model(**batch).audio_positions.sum())


def test_several_recordings_of_an_item_are_added_up(model):
    one, two = spoken("a", noise(8000), "x"), spoken("b", tone(0.7), "x")
    both = Item("both", None, [*one.clips, *two.clips], "x")
    numbers = [m.numbers for m in measure_compression(model, [one, two, both])]
    assert numbers[2] == {key: numbers[0][key] + numbers[1][key] for key in numbers[0]}


@torch.no_grad()
def test_similarity_is_the_cosine_of_the_means(model, processor, items):
    measured = {one.id: one.numbers for one in measure_similarity(model, items, sample=200, seed=0)}
    assert sorted(measured) == sorted(item.id for item in items)

    def speech(item):
        audio = processor.audio_features([item.clips[0].read()])
        return model.model.get_audio_features(**audio).embeds[0].mean(dim=0).numpy()

    def text(item):
        ids = processor.tokenizer(item.reference, add_special_tokens=False)["input_ids"]
        return model.model.get_input_embeddings().weight[ids].mean(dim=0).numpy()

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    by_id = {item.id: item for item in items}
    for name, numbers in measured.items():
        other = by_id[numbers["shuffled_with"]]
        assert numbers["cosine"] == pytest.approx(cosine(speech(by_id[name]), text(by_id[name])), abs=1e-5)
        assert numbers["shuffled"] == pytest.approx(cosine(speech(by_id[name]), text(other)), abs=1e-5)


def test_similarity_draws_a_sample_and_pairs_nobody_with_itself(model, items):
    def drawn(seed):
        found = list(measure_similarity(model, items, sample=3, seed=seed))
        return [(one.id, one.numbers["shuffled_with"]) for one in found]

    assert drawn(0) == drawn(0) and len(drawn(0)) == 3
    assert any(drawn(seed) != drawn(0) for seed in range(1, 5))
    for name, other in drawn(0):
        assert name != other
    assert sorted(name for name, _ in drawn(0)) == sorted(other for _, other in drawn(0))


def test_capitals_stand_for_no_case(model, items):
    loud = [Item(item.id, None, item.clips, item.reference.upper()) for item in items]
    cosines = [[one.numbers["cosine"] for one in measure_similarity(model, i, 200, 0)] for i in (items, loud)]
    assert cosines[0] == cosines[1]


def test_the_transcript_is_what_is_said_and_no_translation(model, items):
    translated = [
        Item(item.id, None, item.clips, "ganz andere Worte", fields={"transcript": item.reference}) for item in items
    ]
    cosines = [[one.numbers["cosine"] for one in measure_similarity(model, i, 200, 0)] for i in (items, translated)]
    assert cosines[0] == cosines[1]


@pytest.mark.parametrize("task", ["similarity", "training_speed"])
def test_labels_are_no_transcripts(task):
    with pytest.raises(ValueError, match="esc_sounds has no transcripts.*librispeech_clean.*covost2_en_de"):
        get_efficiency(f"{task}:esc_sounds")
    assert get_efficiency(f"{task}:spoken_digits").name == f"{task}:spoken_digits"
    assert get_efficiency("ttft:esc_sounds").name == "ttft:esc_sounds"


def test_similarity_needs_two_transcripts(model, items):
    untold = [Item("a", None, items[0].clips, None), items[1]]
    with pytest.raises(ValueError, match="needs two recordings with transcripts; 1 of 2 can be used"):
        list(measure_similarity(model, untold, sample=200, seed=0))


def test_the_first_token_is_timed_after_a_warm_up(model, items):
    passes = []
    hook = model.model.language_model.register_forward_hook(lambda *_: passes.append(1))
    measured = [one.numbers for one in measure_ttft(model, items[:3])]
    hook.remove()
    assert len(passes) == 4  # one token each, and one for the warm-up
    for one in measured:
        assert 0 < one["ttft_ms"] < one["total_ms"]
        assert one["features_ms"] == pytest.approx(one["total_ms"] - one["ttft_ms"])
    assert "generate" not in vars(model.model)  # the method of the class again


def test_time_for_features_is_apart_from_the_first_token(model, items):
    """A recording that takes long to become features must not make the first token slow."""
    waited = copy.copy(model)
    waited.processor = copy.copy(model.processor)
    features = model.processor.audio_features

    def slow(waveforms):
        time.sleep(0.2)
        return features(waveforms)

    waited.processor.audio_features = slow
    (one,) = measure_ttft(waited, items[:1])
    assert one.numbers["features_ms"] >= 200 > one.numbers["ttft_ms"]


@dataclass
class Remote:
    """A model elsewhere: only the whole call can be timed."""

    model: str = "name at a server"

    def answer(self, items, max_new_tokens):
        assert max_new_tokens == 1
        return ["yes"] * len(items)


def test_of_a_model_elsewhere_the_whole_call_counts(items):
    (one,) = measure_ttft(Remote(), items[:1])
    assert one.numbers["ttft_ms"] == one.numbers["total_ms"] and one.numbers["features_ms"] == 0


@pytest.mark.parametrize("measure", [measure_ttft, measure_compression])
def test_what_cannot_be_measured_is_named(measure, model, items, tmp_path):
    good, missing, named, last = measure(model, broken(items, tmp_path))
    assert good.numbers and last.numbers and good.error is None
    assert missing.numbers is None and "gone.wav" in missing.error
    assert named.error == "the answer is none of the options"


@pytest.mark.parametrize("name", ["compression", "similarity", "training_speed"])
def test_other_models_are_refused(name, items):
    with pytest.raises(ValueError, match=f"{name} looks inside a whole Soundwave model .* this is a Remote"):
        EFFICIENCY[name](Remote(), items, dataset={"name": "x"}, progress=False)


def test_a_ctc_head_has_no_first_token(tiny_ctc, processor, items):
    heard = SoundwaveAudioModel(copy.deepcopy(tiny_ctc), processor, "tiny")
    with pytest.raises(ValueError, match="ttft needs a model that generates; a SoundwaveForCTC has no LLM"):
        measure_ttft(heard, items)


@pytest.mark.parametrize("ctc_head", ["tied", "separate"])
def test_every_stage_trains_on_a_copy(ctc_head, encoder_folder, llm_folder, processor, items, tmp_path):
    whole = SoundwaveForConditionalGeneration.from_components(
        encoder_folder, llm_folder, processor.audio_token_id, audio_padding="longest", ctc_head=ctc_head
    )
    model = SoundwaveAudioModel(whole, processor, "tiny")
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    missing = Item("missing", None, [FileClip(tmp_path / "gone.wav")], "three")
    measured = list(measure_training_speed(model, [missing, *items], most_rows=2, steps=2, warm_up=1))
    assert measured[0].id == "missing" and "gone.wav" in measured[0].error
    assert [(one.group, one.id) for one in measured[1:]] == [
        (stage, f"{stage}-{step}") for stage in ("align", "shrink", "instruct") for step in range(2)
    ]
    for one in measured[1:]:
        assert one.numbers["seconds"] > 0 and one.numbers["rows"] == 2
        assert one.numbers["audio_s"] == pytest.approx(0.5 + 0.8)
    after = model.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_training_speed_needs_transcripts(model, items):
    silent = [Item(item.id, None, item.clips, None) for item in items]
    with pytest.raises(ValueError, match="needs recordings with transcripts"):
        list(measure_training_speed(model, silent, most_rows=2, steps=1, warm_up=1))


# -- as a task


@pytest.mark.parametrize("name", ["ttft", "compression", "similarity"])
def test_figures_follow_from_the_rows(name, model, items, tmp_path):
    measured = broken(items, tmp_path)
    dataset = {"name": "noise", "revision": "abc"}
    result = EFFICIENCY[name](model, measured, dataset=dataset, output_dir=tmp_path, progress=False)
    (entry,) = read_results(tmp_path)
    assert (entry["name"], entry["task"], entry["count"], entry["failures"]) == (name, name, 2, 2)
    assert sorted(entry["failed"]) == ["missing", "named"]
    assert rescore(entry, read_answers(tmp_path)) == []
    assert list(entry["also"]) == list(EFFICIENCY[name].also)
    assert entry["dataset"] == {"rows": 4, **dataset}
    how = entry["settings"]["measured"]
    assert (how["device"], how["dtype"]) == ("cpu", "float32") and how["attention"]["language_model"] == "sdpa"
    assert json.loads(json.dumps(entry))["value"] == result.value
    assert "/" not in read_answers(tmp_path)[0]["audio"][0]


def test_measuring_again_replaces_the_rows(model, items, tmp_path):
    for _ in range(2):
        EFFICIENCY["compression"](model, items, dataset={"name": "x"}, output_dir=tmp_path, progress=False)
    assert len(read_answers(tmp_path)) == len(items) and len(read_results(tmp_path)) == 1


def test_a_folder_belongs_to_one_run(model, items, tmp_path):
    def measure(data):
        return EFFICIENCY["compression"](model, data, dataset={"name": "x"}, output_dir=tmp_path, progress=False)

    with claim(tmp_path), pytest.raises(ValueError, match="another run is writing to .*; wait for its end"):
        measure(items)
    assert read_answers(tmp_path) == [] and read_results(tmp_path) == []
    held = []

    class Watched(HeardClip):
        def read(self):
            with pytest.raises(ValueError, match="another run is writing"), claim(tmp_path):
                pass
            held.append(self.name)
            return super().read()

    measure([Item("a", None, [Watched("a.wav", noise(8000))], "x")])
    assert held == ["a.wav"] and len(read_answers(tmp_path)) == 1


def test_several_processes_measure_and_write_nothing(model, items, tmp_path):
    processes = Processes("cpu")
    processes.count = 2
    runner = Runner(model, tmp_path / "out", processes=processes, progress=False)
    with pytest.raises(ValueError, match="compression is measured by one process; start it without accelerate"):
        EFFICIENCY["compression"].run(runner, items, {"name": "x"})
    assert not (tmp_path / "out").exists()


def test_nothing_to_measure_is_an_error(model):
    with pytest.raises(ValueError, match="ttft needs recordings to measure on; x has no items"):
        EFFICIENCY["ttft"](model, [], dataset={"name": "x"})


def test_the_command_measures_on_librispeech(tmp_path, capsys):
    chapter = tmp_path / "LibriSpeech" / "test-clean" / "1" / "2"
    chapter.mkdir(parents=True)
    for k in range(3):
        soundfile.write(chapter / f"1-2-{k}.flac", noise(SAMPLING_RATE, k), SAMPLING_RATE)
    (chapter / "1-2.trans.txt").write_text("".join(f"1-2-{k} {said.upper()}\n" for k, said in enumerate(WORDS[:3])))
    output = tmp_path / "out"
    shutil.copytree(TINY, output, ignore=shutil.ignore_patterns("results.json", "README.md"))
    names = ("compression", "similarity", "training_speed")
    tasks = ["--tasks", ",".join(names), "--source", *(f"{name}={tmp_path}" for name in names)]
    evaluate.main(["--model", str(output), *tasks, "--output", str(output), "--device", "cpu"])
    out = capsys.readouterr().out
    assert "compression: ratio_padded " in out and "similarity: similarity " in out and "3 items, 0 failed" in out
    assert "training_speed: steps_per_second, align " in out and "  steps_per_second, shrink: " in out
    entries = {entry["name"]: entry for entry in read_results(output)}
    assert entries["compression"]["dataset"]["rows"] == 3
    assert all(rescore(entry, read_answers(output)) == [] for entry in entries.values())
    card = build_card(output)
    speeds = [line for line in card.splitlines() if line.startswith("| training_speed")]
    assert len(speeds) == 6 and all("Training speed by stage" in line for line in speeds)  # none over all stages
    assert "- training_speed: measured: most rows 8" in card and "device cpu, threads 1" in card
    assert "steps_per_second" not in card.split("---")[1]


def test_a_measurement_is_found_by_its_task_name():
    assert get_efficiency("librispeech_clean") is None
    assert get_efficiency("ttft") is EFFICIENCY["ttft"]
    other = get_efficiency("ttft:meld")
    assert (other.name, other.task, other.metric) == ("ttft:meld", "ttft", "ttft")
    assert other.hub_id != EFFICIENCY["ttft"].hub_id
    with pytest.raises(ValueError, match="benchmark 'nothing' is unknown"):
        get_efficiency("ttft:nothing")
    with pytest.raises(ValueError, match="another prompt cannot replace"):
        EFFICIENCY["ttft"].with_instruction("Say it.")
