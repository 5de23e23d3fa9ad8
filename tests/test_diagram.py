"""The figure of the architecture: an SVG that parses, with the parts of the stage, and what it trained in colour."""

from xml.etree import ElementTree

import pytest

from soundwave.model_card.diagram import TRAINED, WIDTH, boxes, draw
from soundwave.training.stage_table import STAGES

SVG = "{http://www.w3.org/2000/svg}"
CONFIG = {
    "audio_config": {"model_type": "whisper"},
    "text_config": {"model_type": "a<b&c", "vocab_size": 128256},
    "lora": {"r": 4},
    "encoder_lora": None,
}


@pytest.mark.parametrize(
    ("stage", "trained"),
    [
        ("align", ["Alignment adapter", "CTC head"]),
        ("shrink", ["Alignment adapter", "Shrinking adapter", "LLM"]),
        ("instruct", ["Shrinking adapter", "LLM"]),
    ],
)
def test_each_stage_shows_what_it_trained(stage, trained):
    flow = boxes(stage, CONFIG, STAGES[stage].trains)
    assert [box.title for box in flow if box.trained] == trained
    assert ("LLM" in [box.title for box in flow]) == (stage != "align")
    assert [box.title for box in flow if box.beside] == (["LLM"] if stage != "align" else [])
    picture = ElementTree.fromstring(draw(flow))
    filled = [r for r in picture.findall(f"{SVG}rect") if r.get("fill") == TRAINED[0]]
    assert len(filled) == len(trained) + 1  # the legend's
    words = [text.text for text in picture.findall(f"{SVG}text")]
    assert {box.title for box in flow} <= set(words)
    assert ("written instruction" in words) == (stage != "align")
    assert WIDTH >= 160, "bold letters of DejaVu, where there is no Helvetica, take 150 pixels for the longest title"
    width = int(picture.get("width"))
    assert all(
        0 <= int(r.get("x", 0)) and int(r.get("x", 0)) + int(r.get("width")) <= width
        for r in picture.iter(f"{SVG}rect")
    )


def test_encoder_that_trains():
    for trains in (["encoder_lora"], ["audio_tower.layers.3"]):
        flow = boxes("align", CONFIG | {"encoder_lora": {"r": 2}}, trains)
        assert [box.title for box in flow if box.trained] == ["Encoder"]
        assert flow[1].detail == "whisper + LoRA"
