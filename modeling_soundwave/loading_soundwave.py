"""Stage repositories: what their weight file holds, and how it becomes one state dict again.

A repository holds the trained tensors, LoRA as ``*.lora_A.weight`` / ``*.lora_B.weight``, and those of the encoder and
the LLM only when they have no pinned commit on the Hub. Tensors are read through the memory-mapped safetensors files.
"""

import copy
import json
import os

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from .configuration_soundwave import SoundwaveConfig

SPEECH_PREFIXES = ("audio_tower.", "alignment_adapter.", "ctc_head.", "shrinking_adapter.")
LLM_PREFIX = "language_model."
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")  # what LLM families call their input embeddings
HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


class WeightsError(ValueError):
    """Weights that do not fit the model: a missing, surplus or unreadable tensor, named in the message."""


def find_shards(model_id: str, **hub_arguments) -> list[str]:
    """Local paths of a repository's safetensors files, downloaded if need be.

    Raises:
        WeightsError: when there is neither ``model.safetensors`` nor an index of shards.
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
    with open(index, encoding="utf-8") as file:
        names = sorted(set(json.load(file)["weight_map"].values()))
    return [cached_file(model_id, name, **arguments) for name in names]


def read_tensors(shards: list[str], wanted=None) -> dict[str, torch.Tensor]:
    """Tensors of some safetensors files by name; ``wanted(name) -> bool`` selects. Unselected ones are not read."""
    tensors = {}
    for path in shards:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                if wanted is None or wanted(name):
                    tensors[name] = file.get_tensor(name)
    return tensors


def encoder_state_dict(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keys of a Whisper checkpoint (whole model or encoder alone) -> ``audio_tower.*``."""
    for prefix in ("model.encoder.", "encoder."):
        found = {"audio_tower." + k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        if found:
            return found
    return {"audio_tower." + key: value for key, value in tensors.items()}


def embedding_rows(model_id: str, text_config, token_ids: list[int] | None, **hub_arguments) -> torch.Tensor:
    """The LLM's input embeddings (V, D), or some of their rows (R, D), without loading the LLM.

    Raises:
        WeightsError: when no tensor of shape (V, D) is called ``*embed_tokens.weight``, ``wte`` or ``embed_in``.
    """
    shape = [text_config.vocab_size, text_config.hidden_size]
    for path in find_shards(model_id, **hub_arguments):
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in file.keys():  # noqa: SIM118
                if not name.endswith(EMBEDDINGS):
                    continue
                rows = file.get_slice(name)
                if rows.get_shape() == shape:
                    return rows[:] if token_ids is None else rows[:][torch.tensor(token_ids)]
    raise WeightsError(f"{model_id} has no input embedding of shape {shape} (V, D); is it a causal language model?")


def stage_state_dict(model_id: str, config, merge: bool, with_llm: bool, **hub_arguments) -> dict[str, torch.Tensor]:
    """Everything a model needs: a stage repository's own tensors, and those of its pinned encoder and LLM.

    Args:
        model_id: folder or Hub id of the stage repository.
        config: its `SoundwaveConfig`.
        merge: whether LoRA is added to the LLM's matrices (in fp32).
        with_llm: whether the model has an LLM; without, only its embedding rows are read.
        **hub_arguments: of the stage repository (revision, token, ...).
    """
    tensors = read_tensors(find_shards(model_id, **hub_arguments))
    shared = {key: hub_arguments.get(key) for key in ("cache_dir", "token", "local_files_only")}
    if config.audio_model_revision is not None:
        shards = find_shards(config.audio_model_id, revision=config.audio_model_revision, **shared)
        tensors |= encoder_state_dict(
            read_tensors(shards, lambda name: "decoder" not in name and "proj_out" not in name)
        )
    if config.text_model_revision is not None:
        pinned = {"revision": config.text_model_revision, **shared}
        if with_llm:
            llm = read_tensors(find_shards(config.text_model_id, **pinned))
            tensors |= {LLM_PREFIX + key: value for key, value in llm.items()}
        elif config.ctc_head == "tied":
            rows = embedding_rows(config.text_model_id, config.text_config, config.ctc_token_ids, **pinned)
            tensors["ctc_head.weight"] = rows
    if config.lora is not None:
        lora = pop_lora(tensors)
        if merge and with_llm:
            merge_lora(tensors, lora, config.lora)
    return tensors


def pop_lora(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Take the LoRA tensors out of a state dict."""
    return {key: tensors.pop(key) for key in list(tensors) if ".lora_A." in key or ".lora_B." in key}


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
    """The LoRA tensors of a stage repository, ``language_model...lora_A.weight`` (r, in) and ``lora_B`` (out, r)."""
    return read_tensors(find_shards(model_id, **hub_arguments), lambda name: ".lora_A." in name or ".lora_B." in name)


def saved_name(name: str) -> str:
    """Parameter name of a model with injected LoRA -> name in the file."""
    return name.replace(".base_layer.", ".").replace(".default.weight", ".weight")


def saved_state_dict(config, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a stage repository holds of a model's state dict: all but the parts pinned to a Hub commit."""

    def pinned(name: str) -> bool:
        if name.startswith("audio_tower."):
            return config.audio_model_revision is not None
        if name.startswith(LLM_PREFIX):
            return config.text_model_revision is not None and ".lora_" not in name
        # The rows of a tied head without its LLM are read from the LLM's own shards.
        return name == "ctc_head.weight" and config.ctc_head == "tied" and config.text_model_revision is not None

    return {saved_name(name): tensor for name, tensor in state_dict.items() if not pinned(name)}


def pin_component(config: SoundwaveConfig, kind: str, model_id: str) -> None:
    """Remember where a component comes from: Hub id and commit. A local folder has neither (no path gets saved)."""
    local = os.path.isdir(model_id)
    setattr(config, f"{kind}_model_id", None if local else model_id)
    # Configurations do not say which commit they are of; the folder that the cache keeps them in does.
    commit = None if local else extract_commit_hash(cached_file(model_id, "config.json"), None)
    setattr(config, f"{kind}_model_revision", commit)


class SoundwaveLoadingMixin:
    """Loading and saving of stage repositories for every Soundwave model."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, config=None, merge_lora: bool = True, **kwargs
    ):
        """Load a stage repository or a standalone model by the library's own loader.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            *model_args: as in the library.
            config: a `SoundwaveConfig` in place of the saved one.
            merge_lora: add the saved LoRA to the LLM's matrices; ``False`` leaves it out: a trainer injects it.
            **kwargs: as in the library (``dtype``, ``device_map``, ``quantization_config``, ``revision``, ...).

        Raises:
            WeightsError: when a tensor is missing or unexpected, naming it.
        """
        if pretrained_model_name_or_path is None or "state_dict" in kwargs:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        path = str(pretrained_model_name_or_path)
        hub_arguments = {name: kwargs.pop(name, None) for name in HUB_ARGUMENTS}
        hub_arguments = {name: value for name, value in hub_arguments.items() if value is not None}
        if config is None:  # settings of the model go into the configuration; the loader's own stay loader arguments
            names = set(cls.config_class.__dataclass_fields__) - {"dtype"}
            fields = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
            config = cls.config_class.from_pretrained(path, **hub_arguments, **fields)
        config = copy.deepcopy(config)
        if cls._holds_llm and config.architectures == ["SoundwaveForCTC"]:
            raise WeightsError(
                f"{path} is a stage I repository: it has no LLM. Load it with AutoModelForCTC or SoundwaveForCTC, or "
                "start stage II from it with SoundwaveForConditionalGeneration.from_ctc."
            )
        tensors = stage_state_dict(path, config, merge_lora, cls._holds_llm, **hub_arguments)
        if config.lora is not None:
            if merge_lora:
                config.text_model_revision = None  # the LLM differs from its commit now: it would be saved whole
            config.lora = None
        if not cls._holds_llm:
            tensors = cls._without_llm(config, tensors)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            None, *model_args, config=config, state_dict=tensors, output_loading_info=True, **kwargs
        )
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if wrong := info[kind]:
                listed = ", ".join(str(name) for name in sorted(wrong)[:5])
                raise WeightsError(f"{path}: {len(wrong)} {kind.replace('_', ' ')} for {cls.__name__}: {listed}.")
        if cls._holds_llm and cached_file(
            path, "generation_config.json", _raise_exceptions_for_missing_entries=False, **hub_arguments
        ):
            model.generation_config = GenerationConfig.from_pretrained(path, **hub_arguments)
        model.config._name_or_path = model.name_or_path = path
        return (model, info) if wants_info else model

    @classmethod
    def _without_llm(cls, config, tensors):
        """The tensors that a model without an LLM takes from a repository with one."""
        if config.ctc_head == "tied" and "ctc_head.weight" not in tensors:
            llm = {name: rows for name, rows in tensors.items() if name.startswith(LLM_PREFIX)}
            for rows in (rows for name, rows in llm.items() if name.endswith(EMBEDDINGS)):
                tensors["ctc_head.weight"] = rows if config.ctc_token_ids is None else rows[config.ctc_token_ids]
        unused = (LLM_PREFIX,) if hasattr(cls, "shrink") else (LLM_PREFIX, "shrinking_adapter.")
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}

    def save_pretrained(self, save_directory, state_dict: dict | None = None, **kwargs):
        """Write a stage repository: the tensors that are ours, config, code files (``safetensors`` only).

        Parts pinned to a Hub commit (``config.audio_model_revision``, ``config.text_model_revision``) are left out.
        """
        module = type(self).__module__.rsplit(".", 1)[-1]
        self.config.auto_map = {"AutoConfig": "configuration_soundwave.SoundwaveConfig"}
        self.config.auto_map |= {name: f"{module}.{type(self).__name__}" for name in self._AUTO_CLASSES}
        if self._holds_llm:
            self.config.auto_map["AutoModelForCTC"] = "speech_soundwave.SoundwaveForCTC"
        for config in (self.config.audio_config, self.config.text_config):
            config._name_or_path = ""  # a folder of this machine, or what audio_model_id and text_model_id say
        tensors = saved_state_dict(self.config, self.state_dict() if state_dict is None else state_dict)
        super().save_pretrained(save_directory, state_dict=tensors, **kwargs)

    @classmethod
    def from_components(
        cls, audio_model: str, text_model: str, audio_token_id: int | None = None, dtype="auto", **fields
    ):
        """A new model over a pretrained encoder and LLM; adapters (fp32) start as `init_from_embeddings` says.

        Args:
            audio_model: folder or Hub id of a Whisper checkpoint.
            text_model: folder or Hub id of a causal LLM. A model without LLM reads its embedding rows only.
            audio_token_id: the processor's ``audio_token_id``.
            dtype: of encoder and LLM; ``"auto"`` = as they were saved.
            **fields: fields of `SoundwaveConfig`.
        """
        audio_config, text_config = AutoConfig.from_pretrained(audio_model), AutoConfig.from_pretrained(text_model)
        config = SoundwaveConfig(
            audio_config=audio_config, text_config=text_config, audio_token_id=audio_token_id, **fields
        )
        pin_component(config, "audio", audio_model)
        pin_component(config, "text", text_model)
        parts = {}
        if cls._holds_llm:
            parts["language_model"] = AutoModelForCausalLM.from_pretrained(text_model, dtype=dtype)
        model = cls(config, **parts)
        shards = find_shards(audio_model, revision=config.audio_model_revision)
        encoder = encoder_state_dict(
            read_tensors(shards, lambda name: "decoder" not in name and "proj_out" not in name)
        )
        model.audio_tower.load_state_dict({k.removeprefix("audio_tower."): v for k, v in encoder.items()})
        model.audio_tower.to(next(iter(encoder.values())).dtype if dtype == "auto" else dtype)
        if cls._holds_llm:
            model.init_from_embeddings()
        else:
            rows = embedding_rows(text_model, text_config, config.ctc_token_ids, revision=config.text_model_revision)
            model.ctc_head.init_from_embeddings(rows)
        return model.eval()

    @classmethod
    def from_ctc(
        cls, ctc_model: str, text_model: str | None = None, dtype="auto", revision: str | None = None, **fields
    ):
        """Stage II's start: a stage I repository, its LLM, and a new shrinking adapter (fp32).

        Args:
            ctc_model: folder or Hub id of a `SoundwaveForCTC`.
            text_model: folder or Hub id of the LLM; ``None`` = the one that stage I was aligned to.
            dtype: of encoder and LLM; ``"auto"`` = fp32, and the LLM as it was saved.
            revision: of the stage I repository.
            **fields: fields of `SoundwaveConfig` to change.

        Raises:
            WeightsError: for an unknown field, an unknown LLM, or one of another width than stage I was aligned to.
        """
        from .speech_soundwave import SoundwaveForCTC

        if unknown := sorted(fields.keys() - cls.config_class.__dataclass_fields__.keys()):
            raise WeightsError(
                f"SoundwaveConfig has no field {', '.join(unknown)}; see its docstring for those it has."
            )
        aligned = SoundwaveForCTC.from_pretrained(ctc_model, dtype=torch.float32, revision=revision)
        if dtype != "auto":
            aligned.audio_tower.to(dtype)
        config = cls.config_class.from_dict({**aligned.config.to_dict(), **fields})  # checked as a new one
        source = text_model or config.text_model_id
        if source is None:
            raise WeightsError(
                f"{ctc_model} names no LLM on the Hub; give text_model, the folder stage I was aligned to."
            )
        pinned = config.text_model_revision if text_model is None else None
        language_model = AutoModelForCausalLM.from_pretrained(source, revision=pinned, dtype=dtype)
        sizes = [(c.vocab_size, c.hidden_size) for c in (language_model.config, config.text_config)]
        if sizes[0] != sizes[1]:
            raise WeightsError(
                f"{source} has {sizes[0]} (V, D), but {ctc_model} was aligned to an LLM of {sizes[1]}; give that LLM."
            )
        config.text_config = language_model.config
        if text_model is not None:
            pin_component(config, "text", source)
        model = cls(config, audio_tower=aligned.audio_tower, language_model=language_model)
        model.init_from_embeddings()
        model.alignment_adapter.load_state_dict(aligned.alignment_adapter.state_dict())
        head = aligned.ctc_head.state_dict()
        if model.ctc_head.weight is None:
            head.pop("weight")
        model.ctc_head.load_state_dict(head)
        return model.eval()

    @torch.no_grad()
    def init_from_embeddings(self) -> None:
        """Set what depends on the LLM's embeddings: the CTC head's loudness and the shrinking adapter's gain."""
        embedding = self.get_input_embeddings()
        rows = embedding.weight
        self.ctc_head.init_from_embeddings(self.ctc_head.allowed_rows(rows))
        self.shrinking_adapter.init_from_embeddings(embedding(torch.arange(len(rows), device=rows.device)))
