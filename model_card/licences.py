"""What the licences of the base models ask of whoever builds on them: a name, a line in the card, a licence."""

import re
from collections.abc import Mapping
from typing import Any

from soundwave.model_card.facts import CardFacts
from soundwave.model_card.figures import CardError

#: Licences of base models as their authors state them; of others the card names the place to look.
BASE_LICENCES = {"openai/whisper": "Apache-2.0", "facebook/w2v-bert-2.0": "MIT"}
#: Llama 3.1 and later: a model built on them must say so and carry the name in front (section 1.b of the licences).
LLAMA = re.compile(r"llama[-_.]?3(?:[-_.](\d)(?![\db]))?", re.IGNORECASE)  # the 8 of Llama-3-8B is its size
LLAMA_VOCABULARY = 128256


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


def weights_licence(config: Mapping[str, Any], facts: CardFacts) -> str:
    """The Hub's id of the licence of this repository's weights."""
    llama = llama_version(config)
    return facts.license or (f"llama{llama}" if llama else "apache-2.0")


def base_models(config: Mapping[str, Any], facts: CardFacts) -> list[dict[str, str]]:
    """The encoder and the LLM, a row each: ``part``, ``model`` with its commit, ``licence``."""
    return [
        _base_model("audio encoder", config, "audio", facts.encoder, facts.base_licences.get("encoder")),
        _base_model("LLM", config, "text", facts.llm, facts.base_licences.get("llm")),
    ]


def _base_model(
    part: str, config: Mapping[str, Any], key: str, described: str | None, stated: str | None
) -> dict[str, str]:
    hub_id, revision = config[f"{key}_model_id"], config[f"{key}_model_revision"]
    if hub_id is None:
        model = described or "saved in this repository"
        return {"part": part, "model": model, "licence": stated or "as this repository"}
    known = next((licence for prefix, licence in BASE_LICENCES.items() if hub_id.startswith(prefix)), None)
    if key == "text" and (llama := llama_version(config)):
        known = f"Llama {llama} Community License"
    at = f" at `{revision}`" if revision else ", changed by the training and saved here"
    return {
        "part": part,
        "model": f"[{hub_id}](https://huggingface.co/{hub_id}){at}",
        "licence": stated or known or "see its repository",
    }
