"""What all kinds of models have in common: the interface, its errors, greedy decoding, and where weights are from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import GenerationConfig

from soundwave.eval.items import CutAnswer, Item
from soundwave.eval.provenance import describe_model, weights_hash

#: Spelt out, because generation configurations of published models sample and penalise repetitions.
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


class AudioModel(Protocol):
    """A model that is evaluated."""

    #: Settings of the generation, for ``results.json``; the bound of an answer's length comes with every call.
    decoding: dict[str, Any]

    def answer(self, items: Sequence[Item], max_new_tokens: int) -> list[str]:
        """Greedy answers, one per item and in their order; those that ``max_new_tokens`` cut are ``CutAnswer``.

        Raises:
            ModelError: For items that this model cannot be asked.
            ModelUnavailableError: If no item can be asked any more.
        """

    def describe(self) -> dict[str, Any]:
        """For ``results.json``: ``name``, ``revision``, ``class``, ``parameters``, ``dtype`` and ``kind``."""


class ModelError(ValueError):
    """A model that cannot be loaded, or an item that it cannot be asked."""


class ModelUnavailableError(ModelError):
    """A model that was there and has gone: the run ends here, and goes on from its last answer when started again."""


def text_of(item: Item) -> str:
    """Text of the user's turn; empty where the recordings are all of it.

    Raises:
        ModelError: If the item has neither text nor recording, or is a conversation of several turns.
    """
    if item.messages:
        raise ModelError(f"item {item.id!r} is a conversation of several turns; only Soundwave models are asked those")
    if not item.instruction and not item.clips:
        raise ModelError(f"item {item.id!r} has neither a text nor a recording; give it one of them")
    return item.instruction or ""


def read_config(source: str, read: Any, **hub: Any) -> Any:
    """A configuration or a processor by its ``from_pretrained``.

    Raises:
        ModelError: If it cannot be read, with the library's reason.
    """
    try:
        return read(source, **hub)
    except Exception as error:  # a missing package, broken JSON, an unknown type: each library call has its own class
        part = read.__self__.__name__.removeprefix("Auto").lower()
        taken = "" if Path(source).is_dir() else " (there is no such folder here, so it was taken for a Hub id)"
        raise ModelError(f"{source}{taken}: its {part} cannot be read: {error}") from error


def load_weights(source: str, kind: Any, device: str, dtype: torch.dtype, **hub: Any) -> Any:
    """A model of the class ``kind``, in evaluation mode.

    Raises:
        ModelError: If weights are missing, damaged or of another shape: the library would go on with random ones.
    """
    try:
        model, info = kind.from_pretrained(source, dtype=dtype, output_loading_info=True, **hub)
    except (OSError, ValueError, RuntimeError, SafetensorError, ImportError) as error:
        raise ModelError(f"{source}: its weights cannot be loaded as {kind.__name__}: {error}") from error
    for problem in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, info[problem])):
            raise ModelError(
                f"{source}: {len(names)} {problem.replace('_', ' ')} among the weights of {kind.__name__}, such as "
                f"{names[0]}; fetch or write the folder again"
            )
    return model.to(device).eval()


def prepare_tokenizer(source: str, tokenizer: Any) -> None:
    """Make a tokenizer ready for batches: padding on the left, with the end of sequence where it has no other token.

    Raises:
        ModelError: If it has no words: the library makes up an empty one where its files are missing.
    """
    if not tokenizer.vocab_size or not tokenizer.encode("words", add_special_tokens=False):
        raise ModelError(f"{source}: its tokenizer has no vocabulary; fetch or write the folder again")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def keep_only_ids(model: Any, pad_token_id: int) -> None:
    """Leave of a generation configuration nothing but its token ids: what a publisher likes to sample with goes."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=pad_token_id
    )


def describe(model: Any, source: str, commit: str | None, kind: str) -> dict[str, Any]:
    """``AudioModel.describe`` of a model that was loaded from a folder or from the Hub.

    Args:
        model: In memory.
        source: Folder or Hub id; of a folder only the name is told.
        commit: Of the Hub; without one, the hash of the folder's weight files.
        kind: Of ``load_model``'s kinds.
    """
    folder = Path(source)
    if not folder.is_dir():
        snapshot = try_to_load_from_cache(source, "config.json", revision=commit) if commit else None
        weights = weights_hash(Path(snapshot).parent) if kind == "soundwave" and isinstance(snapshot, str) else None
        return describe_model(model, source, commit, weights) | {"kind": kind}
    weights = weights_hash(folder)
    revision = commit or (weights and f"sha256:{weights[:16]}")
    return describe_model(model, folder.resolve().name, revision, weights) | {"kind": kind}


def new_texts(model: Any, tokenizer: Any, ids: torch.Tensor, prompt_length: int, max_new_tokens: int) -> list[str]:
    """Texts of what was generated, without white space around them: ids (B, N + new) -> B texts.

    Those that had no room to end are ``CutAnswer``.
    """
    eos = model.generation_config.eos_token_id
    ends = {model.generation_config.pad_token_id, *(eos if isinstance(eos, list) else [eos])}
    new = ids[:, prompt_length:]  # (B, new)
    texts = [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    full = new.shape[1] >= max_new_tokens
    cut = [full and last not in ends for last in new[:, -1].tolist()]
    return [CutAnswer(text) if was_cut else text for text, was_cut in zip(texts, cut, strict=True)]
