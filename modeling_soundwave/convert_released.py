"""The published checkpoint in this package's layout: `soundwave convert SRC OUT`.

`RENAMED` is the whole mapping of names. The switches that make our model compute what the published inference code
computes are in `RELEASED_SWITCHES`; each differs from the paper's text.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, WhisperConfig, WhisperFeatureExtractor
from transformers.utils import cached_file

from soundwave.modeling_soundwave.configuration_soundwave import SoundwaveConfig
from soundwave.modeling_soundwave.modeling_soundwave import SoundwaveForConditionalGeneration
from soundwave.modeling_soundwave.weights_soundwave import WeightsError, find_shards, read_encoder, read_tensors

# Released prefix -> ours; the first that fits counts, so the LLM's own come last.
RENAMED = (
    ("model.audio_tower.encoder.", "audio_tower."),
    ("model.audio_tower.", "audio_tower."),
    ("model.mm_projector1.", "alignment_adapter.proj."),
    ("model.asr_transformer_encoder.layers.0.", "alignment_adapter.layer."),
    ("model.out_norm.", "alignment_adapter.norm."),
    ("model.audio_feature_head.", "ctc_head."),
    ("model.lbm.encoder_attn.", "shrinking_adapter.cross_attn."),
    ("model.lbm.atten_layer_norm.", "shrinking_adapter.norm."),
    ("lm_head.", "language_model.lm_head."),
    ("model.", "language_model.model."),
)
# `torch.nn.MultiheadAttention` stacks the three input projections; we keep them apart, so that LoRA can address them.
FUSED = {f"in_proj_{kind}": [f"{part}_proj.{kind}" for part in "qkv"] for kind in ("weight", "bias")}
COMPUTED = "rotary_emb.inv_freq"  # a buffer that older libraries saved and newer ones compute

RELEASED_SWITCHES = {
    "alignment_attention": "frame",
    "mask_padding": False,
    "shrink_context": "kept",
    "keep_blanks": True,
    "audio_padding": "max_length",
}
PLACEHOLDER = "<audio_patch>"
# The published inference code has a comma that App. C of the paper lacks.
SYSTEM_PROMPT = (
    "You are a helpful language and speech assistant. You are able to understand the speech content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
# Llama 3's headers with one line break after each, where Llama's own template has two.
CHAT_TEMPLATE = (
    "{{ '<|begin_of_text|>' }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n' }}{% endif %}"
)


class ConversionError(ValueError):
    """The source is no checkpoint in the released layout, or does not fit its own configuration."""


def convert(src: str | Path, out: str | Path, audio_tower: str | Path | None = None) -> Path:
    """Write a released-layout checkpoint as a folder that `from_pretrained` loads.

    Args:
        src: folder or Hub id with config.json and model.safetensors, or its shards and their index.
        out: folder to write: config, weights, and a processor if the source has a tokenizer.
        audio_tower: folder or Hub id of the Whisper encoder; `None` = what the configuration's `audio_tower` names, a
            sub-folder of the source or a Hub id.

    Returns:
        The folder written. It has a processor exactly if the source has a tokenizer.

    Raises:
        ConversionError: for a source in another layout, and for tensors that are missing, surplus or of another shape.
    """
    src, out = str(src), Path(out)
    if os.path.isdir(src) and out.exists() and os.path.samefile(src, out):
        raise ConversionError(f"SRC and OUT are the same folder, {src}; the converted checkpoint needs one of its own")
    released = _released_config(src)
    tower, subfolder = _audio_source(src, str(audio_tower or released["audio_tower"]))
    audio_config = WhisperConfig.from_pretrained(tower, subfolder=subfolder)
    tokenizer = _tokenizer(src)
    placeholder = _placeholder_id(released, tokenizer, src)

    try:
        tensors, origin = rename(read_tensors(find_shards(src)))
        if not any(name.startswith("audio_tower.") for name in tensors):
            # The published class keeps the encoder outside its own weights.
            tensors |= read_encoder(tower, audio_config.model_type, subfolder=subfolder)
    except WeightsError as error:
        raise ConversionError(str(error)) from error
    model = _assemble(released, audio_config, placeholder, tensors, origin)
    if cached_file(src, "generation_config.json", _raise_exceptions_for_missing_entries=False) is not None:
        generation = GenerationConfig.from_pretrained(src)
        # Sampling is a choice of the caller.
        generation.update(do_sample=False, temperature=None, top_p=None, top_k=None)
        model.generation_config = generation
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    if tokenizer is not None:
        _processor(tokenizer, audio_config, placeholder).save_pretrained(out)
    return out


def rename(released: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors under our names, and for each of our names the released one it comes from.

    Raises:
        ConversionError: for a name that the table does not know.
    """
    tensors, origin = {}, {}
    for name, tensor in released.items():
        if name.endswith(COMPUTED):
            continue
        new = next((ours + name.removeprefix(theirs) for theirs, ours in RENAMED if name.startswith(theirs)), None)
        if new is None:
            raise ConversionError(f"surplus tensor {name}: nothing in the released layout has this name")
        stem, _, leaf = new.rpartition(".")
        if leaf in FUSED:
            # Copies: parts of one storage cannot be saved side by side.
            for part, chunk in zip(FUSED[leaf], tensor.chunk(3), strict=True):
                tensors[f"{stem}.{part}"], origin[f"{stem}.{part}"] = chunk.clone(), name
        else:
            tensors[new], origin[new] = tensor, name
    return tensors, origin


def _released_config(src: str) -> dict:
    """The released configuration as it is in the file."""
    if not os.path.isdir(src) and (src.count("/") != 1 or src.startswith((".", "/", "~"))):
        raise ConversionError(
            f"{src} is not a folder; give that of the published checkpoint, or its Hub id (owner/name)"
        )
    path = cached_file(src, "config.json", _raise_exceptions_for_missing_entries=False)
    if path is None:
        raise ConversionError(f"{src} holds no config.json; give the folder or Hub id of the published checkpoint")
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    lacking = [key for key in ("adapter_size", "audio_tower", "hidden_size", "vocab_size") if key not in config]
    if lacking:
        raise ConversionError(
            f"{src} is no checkpoint in the released layout: model_type is {config.get('model_type')!r}, and "
            f"config.json lacks {', '.join(lacking)}. A checkpoint of this package needs no conversion"
        )
    return config


def _audio_source(src: str, name: str) -> tuple[str, str]:
    """Where the encoder is: (folder or Hub id, sub-folder)."""
    if cached_file(src, f"{name}/config.json", _raise_exceptions_for_missing_entries=False) is not None:
        return src, name
    if os.path.isdir(name) or (name.count("/") <= 1 and not os.path.isabs(name)):
        return name, ""
    raise ConversionError(
        f"the configuration's audio_tower is {name!r}: neither a sub-folder of {src} with a config.json nor a Hub id; "
        "name the Whisper encoder it was trained with (--audio-tower, e.g. openai/whisper-large-v3)"
    )


def _tokenizer(src: str):
    """The source's tokenizer, `None` if it has none."""
    for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        if cached_file(src, file, _raise_exceptions_for_missing_entries=False) is not None:
            return AutoTokenizer.from_pretrained(src)
    return None


def _placeholder_id(released: dict, tokenizer, src: str) -> int:
    """Id of the audio placeholder, which is also the CTC blank."""
    stated = released.get("audio_patch_token")
    known = tokenizer.get_vocab().get(PLACEHOLDER) if tokenizer is not None else None
    if stated is None and known is None:
        raise ConversionError(
            f"{src} names no audio placeholder: config.json has no audio_patch_token, and no tokenizer knows "
            f"{PLACEHOLDER}; add the first"
        )
    if stated is not None and known is not None and stated != known:
        raise ConversionError(
            f"{src}: audio_patch_token is {stated} in config.json, but {PLACEHOLDER} is {known} in the tokenizer; "
            "correct one of them"
        )
    return next(int(number) for number in (stated, known) if number is not None)


def _assemble(
    released: dict, audio_config, placeholder: int, tensors: dict, origin: dict
) -> SoundwaveForConditionalGeneration:
    """The model around the tensors of the source, which stay memory-mapped: nothing is held twice."""
    known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"} - {
        "architectures",
        "transformers_version",
        "dtype",
    }
    text_config = LlamaConfig(**{key: value for key, value in released.items() if key in known - {"model_type"}})
    if "language_model.model.embed_tokens.weight" not in tensors:
        raise ConversionError("missing tensor model.embed_tokens.weight (language_model.model.embed_tokens.weight)")
    embeddings = tensors["language_model.model.embed_tokens.weight"]
    if text_config.tie_word_embeddings:
        tensors.setdefault("language_model.lm_head.weight", embeddings)
    tied = "ctc_head.weight" in tensors and torch.equal(tensors["ctc_head.weight"], embeddings)
    if tied:
        # The authors' head is a copy of the embeddings: kept once. The released scores have no scale, exp(0) = 1.
        del tensors["ctc_head.weight"]
        tensors["ctc_head.log_scale"] = torch.zeros(1)
    config = SoundwaveConfig(
        audio_config=audio_config,
        text_config=text_config,
        audio_token_id=placeholder,
        ctc_blank_id=placeholder,
        ctc_head="tied" if tied else "separate",
        pad_token_id=released.get("llm_pad_token_id", released.get("pad_token_id")),
        dtype=embeddings.dtype,
        **RELEASED_SWITCHES,
    )
    with torch.device("meta"):
        model = SoundwaveForConditionalGeneration(config)
    check(model.state_dict(), tensors, origin)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    return model.eval()


def check(expected: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], origin: dict[str, str]) -> None:
    """Compare names and shapes with those the model has.

    Raises:
        ConversionError: naming every tensor that is missing, surplus or of another shape.
    """
    complaints = [f"missing tensor {released_name(name)} ({name})" for name in expected if name not in tensors]
    complaints += [f"surplus tensor {origin.get(name, name)}" for name in tensors if name not in expected]
    complaints += [
        f"tensor {origin.get(name, name)} is {list(tensor.shape)}, expected {list(expected[name].shape)} for {name}"
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name].shape
    ]
    if complaints:
        raise ConversionError("the weights do not fit the configuration: " + "; ".join(complaints))


def released_name(name: str) -> str:
    """Our name of a tensor -> its name in the released layout."""
    for fused, parts in FUSED.items():
        for part in parts:
            if name.endswith(f"attn.{part}") and name.startswith(("alignment_adapter.", "shrinking_adapter.")):
                name = name.removesuffix(part) + fused
    theirs, ours = next(pair for pair in RENAMED[1:] if name.startswith(pair[1]))
    return theirs + name.removeprefix(ours)


def _processor(tokenizer, audio_config, placeholder: int):
    """A processor that builds the released prompt."""
    # Imported here: a model is converted without its processor when the source has no tokenizer.
    from soundwave.processing import SoundwaveProcessor

    # 50 encoder positions per second; everything else of Whisper's front end is the same for all of its sizes.
    extractor = WhisperFeatureExtractor(
        feature_size=audio_config.num_mel_bins,
        chunk_length=audio_config.max_source_positions // 50,
        return_attention_mask=True,
    )
    return SoundwaveProcessor(
        extractor,
        tokenizer,
        chat_template=CHAT_TEMPLATE,
        audio_token=tokenizer.convert_ids_to_tokens(placeholder),
        system_prompt=SYSTEM_PROMPT,
        audio_padding=RELEASED_SWITCHES["audio_padding"],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`soundwave convert`: convert and say what was written."""
    about = "Convert the published release into this package's format."
    parser = argparse.ArgumentParser(prog="soundwave convert", description=about)
    parser.add_argument("src", metavar="SRC", help="folder or Hub id of the published checkpoint")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    tower_help = "folder or Hub id of the Whisper encoder (default: what SRC's configuration names)"
    parser.add_argument("--audio-tower", metavar="ID", help=tower_help)
    arguments = parser.parse_args(argv)
    out = convert(arguments.src, arguments.out, arguments.audio_tower)
    print(f"{out}: model written.")  # noqa: T201
    if not (out / "processor_config.json").is_file():
        reason = (
            f"{arguments.src} has no tokenizer, so no processor was written: the model takes ids and log-mels only."
        )
        print(reason)  # noqa: T201
    return 0
