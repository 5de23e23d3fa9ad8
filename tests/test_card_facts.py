"""What people state of a run: read from ``card.yaml``, refused where it is something else; names and licences."""

import pytest

from soundwave.model_card.facts import CardFacts, data_summary
from soundwave.model_card.figures import CardError
from soundwave.model_card.licences import base_models, check_name, llama_version, weights_licence


@pytest.mark.parametrize("text", ["", "\n", "# nothing yet\n", "---\n", "limits:\nspeech:\n"])
def test_a_file_with_nothing_in_it_states_nothing(text, tmp_path):
    (tmp_path / "card.yaml").write_text(text)
    assert CardFacts.read(tmp_path) == CardFacts()


def test_what_is_saved_is_read(tmp_path):
    facts = CardFacts(speech="a | b", languages=["en"], energy_kwh=1.5, energy_meter="the wall", limits=["Ünder"])
    facts.save(tmp_path)
    assert CardFacts.read(tmp_path) == facts
    assert CardFacts.read(tmp_path / "none") == CardFacts()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("speach: none\n", "card.yaml holds speach; the fields are speech"),
        ("- speech\n", "expected lines such as 'speech: read sentences'"),
        ("speech: [\n", "card.yaml is not YAML"),
        ("languages: en\n", "languages: 'en', expected a list of texts"),
        ("limits: [1]\n", r"limits: \[1\], expected a list of texts"),
        ("data: 5\n", "data: 5, expected a list of rows"),
        ("data: [tapes]\n", r"data row 1 is 'tapes', expected fields: each has name, task, rows, hours, licence"),
        (
            "data: [{name: a, task: asr, rows: 1, hours: 1, licence: MIT}, {name: b, task: asr, rows: 1, hours: 1}]\n",
            r"data row 2 \(b\) has no licence; each has name, task, rows, hours, licence",
        ),
        (
            "data: [{name: a, task: asr, rows: 1, hours: 1, licence: 4}]\n",
            r"data row 1 \(a\) has licence: 4, expected",
        ),
        ("base_licences: {whisper: MIT}\n", "expected encoder: LICENCE and llm: LICENCE"),
        ("energy_kwh: 2\n", "give both or neither"),
        ("{energy_kwh: -2, energy_meter: wall}\n", "a number above 0"),
        ("license: true\n", "license: True, expected a text"),
    ],
)
def test_what_cannot_be_a_fact_is_named(text, expected, tmp_path):
    (tmp_path / "card.yaml").write_text(text)
    with pytest.raises(CardError, match=expected):
        CardFacts.read(tmp_path)


def test_data_summary_counts_rows_and_hours():
    rows = [
        {"source": "voices", "task": "asr", "duration_s": 1800.0},
        {"source": "voices", "task": "asr", "duration_s": 1800.0},
        {"source": "text", "task": "text_qa", "duration_s": None},
        {"source": "tapes", "task": "asr", "duration_s": 1.0, "audio": {"path": "a.wav", "bytes": None}},
        {"source": "tapes", "task": "asr", "duration_s": None, "audio": {"path": "b.wav", "bytes": None}},
    ]
    assert data_summary(rows, {"voices": "CC0-1.0"}) == [
        {"name": "tapes", "task": "asr", "rows": 2, "hours": "unknown", "licence": "not stated"},
        {"name": "text", "task": "text_qa", "rows": 1, "hours": 0.0, "licence": "not stated"},
        {"name": "voices", "task": "asr", "rows": 2, "hours": 1.0, "licence": "CC0-1.0"},
    ]


def test_llama_is_known_by_its_vocabulary_too():
    text = {"model_type": "llama", "vocab_size": 128256}
    assert llama_version({"text_model_id": None, "text_config": text}) == "3.1"
    assert llama_version({"text_model_id": "meta-llama/Llama-3.2-1B", "text_config": text}) == "3.2"
    for size in ("8B", "70B"):  # of the first Llama 3
        assert llama_version({"text_model_id": f"meta-llama/Meta-Llama-3-{size}", "text_config": text}) == "3"
    assert llama_version({"text_model_id": "Qwen/Qwen3-8B", "text_config": {"model_type": "qwen3"}}) is None
    check_name("anything", None)


def test_licences_of_the_base_models():
    config = {
        "audio_model_id": "openai/whisper-large-v3",
        "audio_model_revision": None,
        "text_model_id": "Qwen/Qwen3-8B",
        "text_model_revision": "b" * 40,
        "text_config": {"model_type": "qwen3"},
    }
    stated = CardFacts(base_licences={"llm": "Apache-2.0, as its card says"})
    encoder, llm = base_models(config, stated)
    assert encoder["licence"] == "Apache-2.0" and "changed by the training" in encoder["model"]
    assert llm["licence"] == "Apache-2.0, as its card says" and "b" * 40 in llm["model"]
    assert weights_licence(config, stated) == "apache-2.0"
    assert weights_licence(config, CardFacts(license="cc-by-4.0")) == "cc-by-4.0"
    assert base_models(config, CardFacts())[1]["licence"] == "not stated here, see its repository"
    assert weights_licence(config, CardFacts()) is None  # nobody said that the LLM's licence allows another
    assert weights_licence(config, CardFacts(base_licences={"llm": "Gemma Terms of Use"})) is None
    with pytest.raises(CardError, match="encoder: MIT, but openai/whisper-large-v3 is under Apache-2.0: leave it out"):
        base_models(config, CardFacts(base_licences={"encoder": "MIT"}))


def test_a_llama_keeps_its_licence():
    config = {"text_model_id": "meta-llama/Llama-3.1-8B-Instruct", "text_config": {}}
    assert weights_licence(config, CardFacts()) == weights_licence(config, CardFacts(license="llama3.1")) == "llama3.1"
    with pytest.raises(CardError, match=r"license: mit, but the LLM is a Llama 3\.1, whose licence the weights keep"):
        weights_licence(config, CardFacts(license="mit"))


def test_a_draft_is_made_anew_until_somebody_changes_it(tmp_path):
    path = tmp_path / "card.yaml"
    first, second = (
        CardFacts(data=[{"name": name, "task": "asr", "rows": 1, "hours": 1.0, "licence": "not stated"}])
        for name in ("tapes", "discs")
    )
    first.save_draft(tmp_path)
    second.save_draft(tmp_path)
    assert CardFacts.read(tmp_path) == second
    path.write_text(path.read_text() + "# a word of a person\n")
    first.save_draft(tmp_path)
    assert CardFacts.read(tmp_path) == second and path.read_text().endswith("# a word of a person\n")
    path.write_text("")  # a person's, too
    first.save_draft(tmp_path)
    assert not path.read_text()
