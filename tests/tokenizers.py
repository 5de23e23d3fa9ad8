"""Tiny tokenizers whose chat templates behave like those of LLM families, made on the spot: nothing is downloaded.

| family | what its template does |
| --- | --- |
| `llama3` | headers, a date in the system turn, trimmed texts, a beginning-of-sequence token |
| `qwen3` | ChatML, a line feed behind every closing token, thoughts that can be switched off, none of a beginning |
| `gemma` | no system role, roles user and model that must alternate, trimmed texts, spaces as visible characters |
| `mistral` | brackets instead of headers, a space before every answer (and before whatever is encoded on its own) |
| `phi3` | a line feed behind every closing token, then a token that ends the conversation |
| `words` | one tag per role, every text begins with a space: the layout of the tiny preset |
"""

from functools import lru_cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FAMILIES = ("llama3", "qwen3", "gemma", "mistral", "phi3", "words")

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}{% set rest = messages[1:] %}
{%- else %}
    {%- set system = '' %}{% set rest = messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nKnowledge: 2023\\nToday: ' + date_string + '\\n\\n' }}
{{- system + '<|eot_id|>' }}
{%- for message in rest %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

QWEN3 = """{%- for message in messages %}
    {%- if message.role == 'assistant' and '</think>' in message.content %}
        {%- set text = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- else %}
        {%- set text = message.content %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' + text.lstrip('\\n') }}
    {%- else %}{{- text }}{% endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

GEMMA = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('there is no system role') }}{% endif %}
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('must alternate') }}{% endif %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""

MISTRAL = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '[INST] ' + message.content + ' [/INST]' }}
    {%- elif message.role == 'assistant' %}{{- ' ' + message.content + eos_token }}
    {%- else %}{{- raise_exception('only user and assistant') }}{% endif %}
{%- endfor %}"""

PHI3 = """{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% else %}{{- eos_token }}{% endif %}"""

WORDS = """{{- '<bos>' }}
{%- for message in messages %}{{- '<' + message.role + '>' + message.content + '<eot>' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<assistant>' }}{% endif %}"""

# Template, special tokens (beginning, end, the others), added tokens that are not special.
SETTINGS: dict[str, tuple[str, str | None, str, list[str], list[str]]] = {
    "llama3": (
        LLAMA3,
        "<|begin_of_text|>",
        "<|eot_id|>",
        ["<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
        [],
    ),
    "qwen3": (QWEN3, None, "<|im_end|>", ["<|im_start|>", "<|endoftext|>"], ["<think>", "</think>", "<tool_call>"]),
    "gemma": (GEMMA, "<bos>", "<eos>", ["<pad>", "<start_of_turn>", "<end_of_turn>"], ["\n\n"]),
    "mistral": (MISTRAL, "<s>", "</s>", ["<unk>", "[INST]", "[/INST]"], []),
    "phi3": (PHI3, None, "<|endoftext|>", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], []),
    "words": (
        WORDS,
        "<bos>",
        "<eot>",
        ["<pad>", "<system>", "<user>", "<assistant>", "<|audio|>"],
        ["<cough>", "<laughter>"],
    ),
}

CORPUS = [
    "the red boxes are in the garage, please bring three of them to the kitchen.",
    "You are a helpful language and speech assistant. Transcribe the speech. What is said?",
    "system user assistant model Today Knowledge: 2023, 26 Jul 2024",
    "schließe die braune Kiste im Garten\n\nhow much is two plus three? five!",
] * 3


@lru_cache(maxsize=8)
def _backend(family: str) -> str:
    """A byte-complete tokenizer as JSON, trained on a handful of sentences."""
    byte_level = family in ("llama3", "qwen3", "phi3", "words")
    if byte_level:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=family == "words")
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        if family == "gemma":
            tokenizer.normalizer = normalizers.Replace(" ", "▁")
            tokenizer.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            )
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
            tokenizer.decoder = decoders.Sequence(
                [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
            )
        specials = ["<unk>", *(f"<0x{value:02X}>" for value in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False, max_token_length=8)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A new tokenizer of one of `FAMILIES`, with its chat template."""
    template, bos, eos, specials, plain = SETTINGS[family]
    backend = Tokenizer.from_str(_backend(family))
    names = [name for name in (bos, eos, *specials) if name]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in plain])
    pad = {"pad_token": "<pad>"} if "<pad>" in specials else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, chat_template=template, **pad
    )
