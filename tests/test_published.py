from itertools import combinations

import pytest

from soundwave.eval.benchmarks import BENCHMARKS
from soundwave.eval.efficiency import EFFICIENCY
from soundwave.eval.published import (
    all_published_figures,
    choose_models,
    citation,
    missing_tables,
    published_figures,
    published_models,
)
from soundwave.eval.scoring import METRICS

SOUNDWAVE = {  # read off the paper's tables by hand
    ("librispeech_clean", ""): [2.1],
    ("librispeech_other", ""): [5.0],
    ("covost2_en_de", ""): [30.6],
    ("mustc_en_ro", ""): [16.9],
    ("meld", ""): [0.635],
    ("vocalsound", ""): [0.905],
    ("air_bench_foundation", "Speech_Grounding"): [59.2],
    ("air_bench_foundation", "speech"): [75.5],
    ("air_bench_foundation", "sound"): [62.1, 62.1],
    ("air_bench_foundation", "Music_Midi_Velocity_Analysis"): [23.2],
    ("air_bench_chat", "Mixed"): [4.98],
    ("mmau_mini_2025_01", "speech"): [46.25],
}


@pytest.mark.parametrize(("where", "numbers"), SOUNDWAVE.items())
def test_figures_are_those_of_the_paper(where, numbers):
    assert [figure.number for figure in published_figures(*where, "Soundwave")] == numbers


def test_every_figure_has_a_place_among_the_benchmarks():
    known = {**BENCHMARKS, **EFFICIENCY}
    for figure in all_published_figures():
        benchmark = known[figure.benchmark]
        tasks = {task for area in benchmark.areas.values() for task in area}
        assert figure.group in {"", *benchmark.areas, *tasks}
        assert figure.metric in METRICS and figure.metric == benchmark.metric


@pytest.mark.parametrize("area", ["speech", "sound", "music"])
def test_areas_of_air_bench_are_the_unweighted_means_of_their_tasks(area):
    tasks = BENCHMARKS["air_bench_foundation"].areas[area]
    averages = published_figures("air_bench_foundation", area)
    assert averages
    for average in averages:
        values = [published_figures("air_bench_foundation", task, average.model)[0].number for task in tasks]
        assert sum(values) / len(values) == pytest.approx(average.number, abs=0.051)


def test_shares_and_percentages_are_on_one_scale():
    (meld,) = published_figures("meld", model="Soundwave")
    (wer,) = published_figures("librispeech_clean", model="Soundwave")
    (bleu,) = published_figures("covost2_en_de", model="Soundwave")
    assert (meld.value, meld.printed) == (0.635, "63.5")
    assert (wer.value, wer.printed) == (pytest.approx(0.021), "2.1")
    assert (bleu.value, bleu.printed) == (30.6, "30.6")


def test_wherever_two_tables_contradict_each_other_it_is_said():
    figures = all_published_figures()
    contradicting = [
        pair
        for pair in combinations(figures, 2)
        if len({(f.benchmark, f.group, f.model) for f in pair}) == 1 and not pair[0].agrees(pair[1])
    ]
    assert [{f.number for f in pair} for pair in contradicting] == [{6.51, 6.41}]
    assert all(figure.contradictions for pair in contradicting for figure in pair)


def test_prints_that_differ_by_rounding_agree():
    two = published_figures("air_bench_foundation", "sound", "Qwen-Audio Turbo")
    assert sorted(figure.number for figure in two) == [60.95, 61.0]
    assert two[0].agrees(two[1])


def test_a_later_version_of_the_data_names_the_one_that_was_measured():
    (figure,) = published_figures("mmau_mini_2025_08", "sound", "Qwen2-Audio")
    assert (figure.number, figure.measured_on) == (54.95, "mmau_mini_2025_01")


def test_models_are_chosen_by_name():
    assert choose_models(["qwen2-audio", "Soundwave", "QWEN2-AUDIO"]) == ["Qwen2-Audio", "Soundwave"]
    assert choose_models(["all"]) == published_models()
    assert published_models()[0] == "Soundwave"
    with pytest.raises(ValueError, match="no published figures of 'GPT-9'; choose among Soundwave, "):
        choose_models(["Soundwave", "GPT-9"])


def test_tables_without_figures_are_known():
    assert missing_tables("llama_questions") == [("sim", "7")]
    assert missing_tables("librispeech_clean") == [("sim", "1"), ("sim", "3"), ("sim", "4"), ("sim", "8")]
    assert missing_tables("meld") == []
    assert "arXiv 2502.12900" in citation("soundwave")
