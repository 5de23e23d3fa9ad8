"""What the licences of the base models ask of whoever builds on them: a name, a line in the card, a licence."""

import re
from collections.abc import Mapping
from typing import Any

from soundwave.model_card.facts import CARD_FACTS, UNSTATED, CardFacts
from soundwave.model_card.figures import CardError

#: Licences of base models as their authors state them; of others whoever publishes states it (``base_licences``).
BASE_LICENCES = {"openai/whisper": "Apache-2.0", "facebook/w2v-bert-2.0": "MIT"}
#: Llama 3.1 and later: a model built on them must say so and carry the name in front (section 1.b of the licences).
LLAMA = re.compile(r"llama[-_.]?3(?:[-_.](\d)(?![\db]))?", re.IGNORECASE)  # the 8 of Llama-3-8B is its size
LLAMA_VOCABULARY = 128256
BUILT_WITH_LLAMA = "Built with Llama"
#: The base models by their name in ``base_licences``: what they are, beginning of their fields in the configuration.
PARTS = {"encoder": ("audio encoder", "audio"), "llm": ("LLM", "text")}
OWN = "as this repository"
#: Licences of base models under which the weights made from them may be Apache-2.0.
PERMISSIVE = re.compile(rf"(?:{OWN}|apache-2\.0|mit)\b", re.IGNORECASE)


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


def weights_licence(config: Mapping[str, Any], facts: CardFacts) -> str | None:
    """The Hub's id of the licence of this repository's weights; ``None`` where nobody stated what must be stated.

    Raises:
        CardError: If ``card.yaml`` states another one than a Llama's, whose licence stays.
    """
    if llama := llama_version(config):
        if facts.license not in (None, f"llama{llama}"):
            raise CardError(
                f"{CARD_FACTS} has license: {facts.license}, but the LLM is a Llama {llama}, whose licence the "
                f"weights keep: leave it out, or write llama{llama}"
            )
        return f"llama{llama}"
    free = all(PERMISSIVE.match(base_licence(config, facts, part) or "") for part in PARTS)
    return facts.license or ("apache-2.0" if free else None)


def check_terms(text: str, license_id: Any, llama: str | None) -> None:
    """Refuse a card that leaves out what the licence of a Llama asks for, whoever wrote it.

    Args:
        text: Of the card, without its metadata.
        license_id: ``license`` of its metadata.
        llama: The LLM's `llama_version`.

    Raises:
        CardError: Naming what is missing.
    """
    if llama and BUILT_WITH_LLAMA not in text:
        raise CardError(
            f"it does not say {BUILT_WITH_LLAMA!r}, as the licence of its LLM asks, a Llama {llama}; add the line"
        )
    if llama and license_id != f"llama{llama}":
        raise CardError(
            f"it states the licence {license_id}, but its LLM is a Llama {llama}, whose licence the weights keep: "
            f"write license: llama{llama} into its metadata"
        )


def base_licence(config: Mapping[str, Any], facts: CardFacts, part: str) -> str | None:
    """The licence of a base model, ``"encoder"`` or ``"llm"``; ``None`` where it is not known and nobody stated it.

    Raises:
        CardError: If ``card.yaml`` states another one than its authors.
    """
    hub_id, stated = config[f"{PARTS[part][1]}_model_id"], facts.base_licences.get(part)
    if hub_id is None:
        return stated or OWN
    known = next((licence for prefix, licence in BASE_LICENCES.items() if hub_id.startswith(prefix)), None)
    if part == "llm" and (llama := llama_version(config)):
        known = f"Llama {llama} Community License"
    if known and stated not in (None, known):
        raise CardError(
            f"{CARD_FACTS} has base_licences: {part}: {stated}, but {hub_id} is under {known}: leave it out"
        )
    return known or stated


def base_models(config: Mapping[str, Any], facts: CardFacts) -> list[dict[str, str]]:
    """The encoder and the LLM, a row each: ``part``, ``model`` with its commit, ``licence``."""
    rows = []
    for part, (title, key) in PARTS.items():
        hub_id, revision = config[f"{key}_model_id"], config[f"{key}_model_revision"]
        at = f" at `{revision}`" if revision else ", changed by the training and saved here"
        own = getattr(facts, part) or "saved in this repository"
        model = f"[{hub_id}](https://huggingface.co/{hub_id}){at}" if hub_id else own
        licence = base_licence(config, facts, part) or f"{UNSTATED} here, see its repository"
        rows.append({"part": title, "model": model, "licence": licence})
    return rows
