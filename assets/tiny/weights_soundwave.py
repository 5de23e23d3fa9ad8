"""The tensors of stage repositories: what a weight file holds, and how it becomes one state dict again.

A repository holds the trained tensors, LoRA as ``*.lora_A.weight`` / ``*.lora_B.weight``, and those of the encoder and
the LLM only when they have no pinned commit on the Hub. Tensors are read through the memory-mapped safetensors files.
"""

import json
from contextlib import contextmanager

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from .encoders_soundwave import audio_encoder

LLM_PREFIX = "language_model."
ENCODER_PREFIX = "audio_tower."
VALUES_AT_ONCE = 2**20  # of the embeddings: 4 MiB in fp32
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")  # what LLM families call their input embeddings


class WeightsError(ValueError):
    """Weights that do not fit the model: a missing, surplus or unreadable tensor, named in the message."""


@contextmanager
def damage_named(source: str):
    """Say which file it is that safetensors cannot read: its own error does not.

    Args:
        source: what the message calls the file.

    Raises:
        WeightsError: when the file is damaged or was cut short.
    """
    try:
        yield
    except SafetensorError as error:
        raise WeightsError(
            f"{source} cannot be read ({error}): expected a whole safetensors file, and this one is damaged or was "
            "cut short; fetch or write it again."
        ) from error


@contextmanager
def open_shard(path: str):
    """The handle of a safetensors file.

    Raises:
        WeightsError: when it is damaged, at opening or at reading.
    """
    with damage_named(path), safe_open(path, framework="pt", device="cpu") as file:
        yield file


def find_shards(model_id: str, **hub_arguments) -> list[str]:
    """Local paths of a repository's safetensors files, downloaded if need be.

    Raises:
        WeightsError: when there is neither ``model.safetensors`` nor an index of shards, or the index is damaged.
    """
    arguments = {key: value for key, value in hub_arguments.items() if value is not None}
    optional = {"_raise_exceptions_for_missing_entries": False, **arguments}
    single = cached_file(model_id, "model.safetensors", **optional)
    if single is not None:
        return [single]
    index = cached_file(model_id, "model.safetensors.index.json", **optional)
    if index is None:
        raise WeightsError(
            f"{model_id} holds neither model.safetensors nor model.safetensors.index.json; "
            "save it with save_pretrained (safetensors) first."
        )
    try:
        with open(index, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{index} cannot be read ({error!r}): expected JSON with the shard of each tensor under weight_map; fetch "
            "or write it again."
        ) from error
    return [cached_file(model_id, name, **arguments) for name in names]


def read_tensors(shards: list[str], wanted=None) -> dict[str, torch.Tensor]:
    """Tensors of some safetensors files by name; ``wanted(name) -> bool`` selects. Unselected ones are not read.

    Raises:
        WeightsError: for a damaged file.
    """
    tensors = {}
    for path in shards:
        with open_shard(path) as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                if wanted is None or wanted(name):
                    tensors[name] = file.get_tensor(name)
    if "ctc_head.log_scale" in tensors:  # a scalar in older files
        tensors["ctc_head.log_scale"] = tensors["ctc_head.log_scale"].reshape(1)
    return tensors


def read_encoder(model_id: str, model_type: str, **hub_arguments) -> dict[str, torch.Tensor]:
    """The encoder's tensors of a checkpoint (whole model or encoder alone) as ``audio_tower.*``; others are not read.

    Args:
        model_id: folder or Hub id.
        model_type: of the encoder.
        **hub_arguments: revision, token, ...

    Raises:
        WeightsError: when there are none, or a file is damaged.
    """
    encoder = audio_encoder(model_type)

    def prefix_of(name: str) -> str | None:
        rest = ((prefix, name.removeprefix(prefix)) for prefix in encoder.prefixes if name.startswith(prefix))
        return next((prefix for prefix, part in rest if part.startswith(encoder.parts)), None)

    tensors = read_tensors(find_shards(model_id, **hub_arguments), lambda name: prefix_of(name) is not None)
    if not tensors:
        raise WeightsError(f"{model_id} holds no tensors of a {model_type} encoder; is it the checkpoint of one?")
    return {ENCODER_PREFIX + key.removeprefix(prefix_of(key) or ""): value for key, value in tensors.items()}


def embedding_rows(
    model_id: str, text_config, token_ids: list[int] | None, dtype: torch.dtype | None = None, **hub_arguments
) -> torch.Tensor:
    """The LLM's input embeddings (V, D), or some of their rows (R, D), without loading the LLM.

    Read a few at a time, so that the process grows by no more than what is returned: the pages of a memory-mapped file
    count as its own as long as the file is open.

    Args:
        model_id: folder or Hub id of the LLM.
        text_config: its configuration.
        token_ids: the rows that are wanted, ascending; ``None`` = all.
        dtype: of the result; ``None`` = as they are saved.
        **hub_arguments: revision, token, ...

    Raises:
        WeightsError: when no tensor of shape (V, D) is called ``*embed_tokens.weight``, ``wte`` or ``embed_in``.
    """
    V, D = text_config.vocab_size, text_config.hidden_size
    path, name = _find_embedding(find_shards(model_id, **hub_arguments), model_id, [V, D])
    wanted = torch.arange(V) if token_ids is None else torch.tensor(token_ids)
    blocks = range(0, V, max(1, VALUES_AT_ONCE // D))
    rows, done = torch.empty(0), 0
    for start in blocks:
        inside = wanted[(wanted >= start) & (wanted < start + blocks.step)] - start
        with open_shard(path) as file:
            block = file.get_slice(name)[start : start + blocks.step]
            if start == 0:
                rows = torch.empty(len(wanted), D, dtype=dtype or block.dtype)
            rows[done : done + len(inside)] = block[inside]
        done += len(inside)
        del block  # and with it the file's pages
    return rows


def _find_embedding(shards: list[str], model_id: str, shape: list[int]) -> tuple[str, str]:
    """File and name of the LLM's input embeddings."""
    for path in shards:
        with open_shard(path) as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith(EMBEDDINGS) and file.get_slice(name).get_shape() == shape:
                    return path, name
    raise WeightsError(f"{model_id} has no input embedding of shape {shape} (V, D); is it a causal language model?")


def stage_state_dict(model_id: str, config, merge: bool, with_llm: bool, **hub_arguments) -> dict[str, torch.Tensor]:
    """Everything a model needs: a stage repository's own tensors, and those of its pinned encoder and LLM.

    Args:
        model_id: folder or Hub id of the stage repository.
        config: its `SoundwaveConfig`.
        merge: whether LoRA is added to the matrices beside it (in fp32).
        with_llm: whether the model has an LLM; without, only its embedding rows are read.
        **hub_arguments: of the stage repository (revision, token, ...).
    """
    tensors = read_tensors(find_shards(model_id, **hub_arguments))
    shared = {key: hub_arguments.get(key) for key in ("cache_dir", "token", "local_files_only")}
    if config.audio_model_revision is not None:
        tensors |= read_encoder(
            config.audio_model_id, config.audio_config.model_type, revision=config.audio_model_revision, **shared
        )
    if config.text_model_revision is not None:
        pinned = {"revision": config.text_model_revision, **shared}
        if with_llm:
            llm = read_tensors(find_shards(config.text_model_id, **pinned))
            tensors |= {LLM_PREFIX + key: value for key, value in llm.items()}
        elif config.ctc_head == "tied":
            rows = embedding_rows(config.text_model_id, config.text_config, config.ctc_token_ids, **pinned)
            tensors["ctc_head.weight"] = rows
    kinds = ((config.lora, LLM_PREFIX, with_llm), (config.encoder_lora, ENCODER_PREFIX, True))
    for fields, prefix, present in kinds:
        if fields is not None:
            lora = pop_lora(tensors, prefix)
            if merge and present:
                merge_lora(tensors, lora, fields)
    return tensors


def pop_lora(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Take the LoRA tensors of encoder or LLM out of a state dict."""
    found = [key for key in tensors if key.startswith(prefix) and (".lora_A." in key or ".lora_B." in key)]
    return {key: tensors.pop(key) for key in found}


def merge_lora(tensors: dict[str, torch.Tensor], lora: dict[str, torch.Tensor], fields: dict) -> None:
    """Add ``alpha / r * B A`` to the matrices of a state dict, in fp32 (Hu et al. 2022).

    Raises:
        WeightsError: for a LoRA pair without its other half or without its matrix.
    """
    scale = fields["alpha"] / fields["r"]
    for key, down in lora.items():
        if ".lora_A." not in key:
            continue
        up, target = lora.get(key.replace(".lora_A.", ".lora_B.")), key.replace(".lora_A.", ".")
        if up is None or target not in tensors:
            raise WeightsError(f"LoRA tensor {key} has no {'lora_B half' if up is None else 'matrix ' + target}.")
        matrix = tensors[target]
        tensors[target] = matrix.float() + scale * (up.float() @ down.float())  # the loader rounds it, once


def lora_state_dict(model_id: str, **hub_arguments) -> dict[str, torch.Tensor]:
    """The LoRA tensors of a stage repository, ``...lora_A.weight`` (r, in) and ``...lora_B.weight`` (out, r)."""
    return read_tensors(find_shards(model_id, **hub_arguments), lambda name: ".lora_A." in name or ".lora_B." in name)


def saved_name(name: str) -> str:
    """Parameter name of a model with injected LoRA -> name in the file."""
    return name.replace(".base_layer.", ".").replace(".default.weight", ".weight")


def saved_state_dict(config, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a stage repository holds of a model's state dict: all but the parts pinned to a Hub commit."""

    def pinned(name: str) -> bool:
        if ".lora_" in name:
            return False
        if name.startswith(ENCODER_PREFIX):
            return config.audio_model_revision is not None
        if name.startswith(LLM_PREFIX):
            return config.text_model_revision is not None
        # The rows of a tied head without its LLM are read from the LLM's own shards.
        return name == "ctc_head.weight" and config.ctc_head == "tied" and config.text_model_revision is not None

    return {saved_name(name): tensor for name, tensor in state_dict.items() if not pinned(name)}
