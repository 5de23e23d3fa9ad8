"""Loading and saving of Soundwave models by the library's own loader, and new models over pretrained components."""

import copy
import os

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from .configuration_soundwave import SoundwaveConfig
from .pipeline_soundwave import CUSTOM_PIPELINES
from .same_llm_soundwave import check_embeddings, check_sizes, check_vocabulary
from .weights_soundwave import (
    EMBEDDINGS,
    LLM_PREFIX,
    WeightsError,
    damage_named,
    embedding_rows,
    read_encoder,
    saved_state_dict,
    stage_state_dict,
)

SPEECH_MODULES = ("audio_tower", "alignment_adapter", "ctc_head", "shrinking_adapter")
OUTPUT_LAYERS = ("language_model.lm_head", "language_model.embed_out")  # what LLM families call their output layers
# What quantization configurations call the modules to leave as they are.
SKIPPED_BY_QUANTIZERS = ("modules_to_not_convert", "llm_int8_skip_modules", "skip_modules")
HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


def resolve_commit(model_id: str, revision: str | None = None) -> str | None:
    """The commit of a Hub repository that ``revision`` means now; ``None`` for a local folder, which has none."""
    if os.path.isdir(model_id):
        return None
    # Configurations do not say which commit they are of; the folder that the cache keeps them in does.
    return extract_commit_hash(cached_file(model_id, "config.json", revision=revision), None)


def pin_component(config: SoundwaveConfig, kind: str, model_id: str, commit: str | None) -> None:
    """Remember where a component comes from: Hub id and commit. A local folder has neither (no path gets saved)."""
    setattr(config, f"{kind}_model_id", None if commit is None else model_id)
    setattr(config, f"{kind}_model_revision", commit)


def quantize_llm_only(quantization_config):
    """A copy of a quantization configuration that leaves the speech side, and the LLM's output layer, as they are.

    Modules that it names itself stay as they are too.

    Raises:
        WeightsError: for a configuration without a list of such modules.
    """
    field = next((name for name in SKIPPED_BY_QUANTIZERS if hasattr(quantization_config, name)), None)
    if field is None:
        raise WeightsError(
            f"{type(quantization_config).__name__} has no list of modules to leave as they are (one of "
            f"{', '.join(SKIPPED_BY_QUANTIZERS)}), and only the LLM is to be quantized; use TorchAoConfig."
        )
    changed = copy.deepcopy(quantization_config)
    named = getattr(changed, field)
    setattr(changed, field, [*SPEECH_MODULES, *(OUTPUT_LAYERS if named is None else named)])
    return changed


def _load_llm(model_id: str, commit: str | None, dtype):
    with damage_named(f"a weight file of {model_id}"):
        return AutoModelForCausalLM.from_pretrained(model_id, revision=commit, dtype=dtype)


def _place(name: str, device_map: dict):
    """Where a tensor goes: where the innermost module that the map names does."""
    modules = [module for module in device_map if f"{name}.".startswith(f"{module}." if module else "")]
    return device_map[max(modules, key=len)] if modules else None


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
            merge_lora: add the saved LoRA to the matrices; ``False`` leaves it out: a trainer injects it.
            **kwargs: as in the library (``dtype``, ``device_map``, ``revision``, ...). ``quantization_config`` changes
                the LLM only, without its output layer.

        Raises:
            WeightsError: when a tensor is missing or unexpected, naming it, a file is damaged, there is no LLM to
                quantize, or ``device_map`` parts tied tensors.
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
        if kwargs.get("quantization_config") is not None:
            if not cls._holds_llm:
                raise WeightsError(f"{cls.__name__} has no LLM to quantize; leave out quantization_config.")
            kwargs["quantization_config"] = quantize_llm_only(kwargs["quantization_config"])
        source, weights = cls._find_weights(path, config, merge_lora, hub_arguments)
        if merge_lora and config.lora is not None:
            config.text_model_revision = None  # the LLM differs from its commit now: it would be saved whole
        if merge_lora and config.encoder_lora is not None:
            config.audio_model_revision = None
        if "quantization_config" in kwargs:  # the library saves a quantized model whole
            config.audio_model_revision = config.text_model_revision = None
        config.lora = config.encoder_lora = None
        wants_info = kwargs.pop("output_loading_info", False)
        if "state_dict" in weights and kwargs.get("offload_folder") is not None:
            cls._add_tied(config, weights["state_dict"], kwargs.get("device_map"))
        with damage_named(f"a weight file of {path}"):
            model, info = super().from_pretrained(
                source, *model_args, config=config, output_loading_info=True, **weights, **kwargs
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
        model.freeze()  # the library's loader lets everything learn
        return (model, info) if wants_info else model

    @classmethod
    def _find_weights(cls, path: str, config, merge_lora: bool, hub_arguments: dict) -> tuple[str | None, dict]:
        """What the library's loader is given: (source, arguments). Usually no source, but a state dict."""
        if getattr(config, "quantization_config", None) is not None:
            if cls._holds_llm:  # its own loader reads what its quantizer wrote, which is whole
                return path, hub_arguments
            del config.quantization_config  # the speech side is not quantized
        tensors = stage_state_dict(path, config, merge_lora, cls._holds_llm, **hub_arguments)
        return None, {"state_dict": tensors if cls._holds_llm else cls._without_llm(config, tensors)}

    @classmethod
    def _without_llm(cls, config, tensors):
        """The tensors that a model without an LLM takes from a repository with one."""
        if config.ctc_head == "tied" and "ctc_head.weight" not in tensors:
            llm = {name: rows for name, rows in tensors.items() if name.startswith(LLM_PREFIX)}
            for rows in (rows for name, rows in llm.items() if name.endswith(EMBEDDINGS)):
                tensors["ctc_head.weight"] = rows if config.ctc_token_ids is None else rows[config.ctc_token_ids]
        unused = (LLM_PREFIX,) if hasattr(cls, "shrink") else (LLM_PREFIX, "shrinking_adapter.")
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}

    @classmethod
    def _add_tied(cls, config, tensors: dict[str, torch.Tensor], device_map) -> None:
        """Put tied tensors under each of their names: the library's offloading to disk looks for all of them.

        Raises:
            WeightsError: for a ``device_map`` with one of them on disk and the other elsewhere.
        """
        with torch.device("meta"):
            tied = cls(copy.deepcopy(config)).all_tied_weights_keys
        for name, kept in tied.items():
            places = {_place(each, device_map) for each in (name, kept)} if isinstance(device_map, dict) else set()
            if "disk" in places and len(places) > 1:
                raise WeightsError(
                    f"device_map has one of {name} and {kept} on disk, but they are the same tensor; give both "
                    "modules the same place."
                )
            if kept in tensors:
                tensors.setdefault(name, tensors[kept])

    def save_pretrained(self, save_directory, state_dict: dict | None = None, **kwargs):
        """Write a stage repository: the tensors that are ours, config, code files (``safetensors`` only).

        Parts pinned to a Hub commit (``config.audio_model_revision``, ``config.text_model_revision``) are left out.
        """
        kind = type(self)
        # FSDP2 makes a class of its own of a model, and the library would save torch's files as its code.
        self.__class__ = next(base for base in kind.__mro__ if not base.__name__.startswith("FSDP"))
        try:
            self._save_repository(save_directory, self.state_dict() if state_dict is None else state_dict, **kwargs)
        finally:
            self.__class__ = kind

    def _save_repository(self, save_directory, state_dict: dict, **kwargs) -> None:
        module = type(self).__module__.rsplit(".", 1)[-1]
        self.config.auto_map = {"AutoConfig": "configuration_soundwave.SoundwaveConfig"}
        self.config.auto_map |= {name: f"{module}.{type(self).__name__}" for name in self._AUTO_CLASSES}
        if self._holds_llm:
            self.config.auto_map["AutoModelForCTC"] = "speech_soundwave.SoundwaveForCTC"
        self.config.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)  # the library puts classes into a loaded one
        for config in (self.config.audio_config, self.config.text_config):
            config._name_or_path = ""  # a folder of this machine, or what audio_model_id and text_model_id say
        super().save_pretrained(save_directory, state_dict=saved_state_dict(self.config, state_dict), **kwargs)

    @classmethod
    def from_components(
        cls,
        audio_model: str,
        text_model: str,
        audio_token_id: int | None = None,
        dtype="auto",
        audio_revision: str | None = None,
        text_revision: str | None = None,
        **fields,
    ):
        """A new model over a pretrained encoder and LLM; adapters (fp32) start as `init_from_embeddings` says.

        Args:
            audio_model: folder or Hub id of a Whisper or w2v-BERT 2.0 checkpoint.
            text_model: folder or Hub id of a causal LLM. A model without LLM reads its embedding rows only.
            audio_token_id: the processor's ``audio_token_id``.
            dtype: of encoder and LLM; ``"auto"`` = as they were saved.
            audio_revision: branch, tag or commit of the encoder's repository; its commit is remembered.
            text_revision: the same of the LLM's.
            **fields: fields of `SoundwaveConfig`.
        """
        audio_commit, text_commit = (
            resolve_commit(audio_model, audio_revision),
            resolve_commit(text_model, text_revision),
        )
        text_config = AutoConfig.from_pretrained(text_model, revision=text_commit)
        if not hasattr(text_config, "vocab_size"):
            raise WeightsError(
                f"{text_model} is a {text_config.model_type}, which nests its LLM in a larger model; give a text-only "
                "causal LLM."
            )
        config = SoundwaveConfig(
            audio_config=AutoConfig.from_pretrained(audio_model, revision=audio_commit),
            text_config=text_config,
            audio_token_id=audio_token_id,
            **fields,
        )
        pin_component(config, "audio", audio_model, audio_commit)
        pin_component(config, "text", text_model, text_commit)
        if cls._holds_llm:
            llm = _load_llm(text_model, text_commit, dtype)
            model = cls(config, language_model=llm)
            model.init_from_embeddings()
        else:
            own = None if config.ctc_head == "tied" else torch.float32  # these train
            rows = embedding_rows(text_model, text_config, config.ctc_token_ids, own, revision=text_commit)
            model = cls(config, ctc_rows=rows)
            model._init_ctc(rows)
        encoder = read_encoder(audio_model, config.audio_config.model_type, revision=audio_commit)
        model.audio_tower.load_state_dict({k.removeprefix("audio_tower."): v for k, v in encoder.items()})
        model.audio_tower.to(next(iter(encoder.values())).dtype if dtype == "auto" else dtype)
        return model.eval()

    @classmethod
    def from_ctc(
        cls,
        ctc_model: str,
        text_model: str | None = None,
        dtype="auto",
        revision: str | None = None,
        merge_lora: bool = True,
        **fields,
    ):
        """Stage II's start: a stage I repository, its LLM, and a new shrinking adapter (fp32).

        Args:
            ctc_model: folder or Hub id of a `SoundwaveForCTC`.
            text_model: folder or Hub id of the LLM; ``None`` = the one that stage I was aligned to.
            dtype: of encoder and LLM; ``"auto"`` = fp32, and the LLM as it was saved.
            revision: of the stage I repository.
            merge_lora: of the encoder, as in `from_pretrained`.
            **fields: fields of `SoundwaveConfig` to change.

        Raises:
            WeightsError: for an unknown field, an unknown LLM, or another one than stage I was aligned to: other
                vocabulary size, width, tokenizer or embeddings. A fine-tuned variant of it is taken with a warning.
        """
        from .speech_soundwave import SoundwaveForCTC

        if unknown := sorted(fields.keys() - cls.config_class.__dataclass_fields__.keys()):
            raise WeightsError(
                f"SoundwaveConfig has no field {', '.join(unknown)}; see its docstring for those it has."
            )
        aligned = SoundwaveForCTC.from_pretrained(
            ctc_model, dtype=torch.float32, revision=revision, merge_lora=merge_lora
        )
        if dtype != "auto":
            aligned.audio_tower.to(dtype)
        config = cls.config_class.from_dict({**aligned.config.to_dict(), **fields})  # checked as a new one
        source = text_model or config.text_model_id
        if source is None:
            raise WeightsError(
                f"{ctc_model} names no LLM on the Hub; give text_model, the folder stage I was aligned to."
            )
        commit = config.text_model_revision if text_model is None else resolve_commit(source)
        if text_model is not None:
            text_config = AutoConfig.from_pretrained(source, revision=commit)
            check_sizes(text_config, config.text_config, source, ctc_model)
            check_vocabulary(source, commit, ctc_model, revision)
        language_model = _load_llm(source, commit, dtype)
        config.text_config = language_model.config
        if text_model is not None:
            pin_component(config, "text", source, commit)
        model = cls(config, audio_tower=aligned.audio_tower, language_model=language_model)
        if text_model is not None and aligned.ctc_head.tied:
            rows = aligned.ctc_head.allowed_rows(language_model.get_input_embeddings().weight)
            check_embeddings(rows, aligned.ctc_head.weight, source, ctc_model)
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
        self._init_ctc(self.ctc_head.allowed_rows(rows))
        self.shrinking_adapter.init_from_embeddings(embedding(torch.arange(len(rows), device=rows.device)))

    def _init_ctc(self, rows: torch.Tensor) -> None:
        """CTC head and alignment adapter, from the LLM's embeddings (R, D) that the head may emit."""
        self.ctc_head.init_from_embeddings(rows)
        self.alignment_adapter.init_towards(self.ctc_head.blank_of(rows), len(rows))
