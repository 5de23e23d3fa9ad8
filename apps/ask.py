"""An answer about a recording: `soundwave ask FILE "question"`."""

import sys

import torch

from soundwave.apps.loading import load_model, load_processor, resolve_device, resolve_model


@torch.inference_mode()
def ask(
    file: str,
    question: str,
    model: str | None,
    max_new_tokens: int,
    device: str | None = None,
    dtype: str | None = None,
) -> int:
    """Print the answer to a question about a recording.

    Args:
        file: path or URL.
        question: the question or instruction.
        model: folder or Hub id; `None` = the tiny model that comes with the package.
        max_new_tokens: longest answer.
        device: `None` = a GPU where there is one.
        dtype: `None` = bfloat16 on a GPU, float32 on the CPU.

    Raises:
        ValueError: the recording cannot be read, which the message says with its name, or is too long for the LLM.
    """
    source = resolve_model(model)
    device, precision = resolve_device(device, dtype)
    processor = load_processor(source, [file])
    content = [{"type": "audio", "path": file}, {"type": "text", "text": question}]
    try:
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    except (ValueError, OSError) as error:
        raise ValueError(str(error) if file in str(error) else f"{file}: {error}") from error
    loaded = load_model(source, device, precision)
    ids = loaded.generate(**inputs.to(loaded.device, dtype=precision), max_new_tokens=max_new_tokens)
    answer = ids[0, inputs["input_ids"].shape[1] :]
    ends = torch.as_tensor(loaded.generation_config.eos_token_id, device=answer.device)
    if not torch.isin(answer, ends).any():
        print(f"soundwave ask: cut after {max_new_tokens} tokens; --max-new-tokens sets the limit", file=sys.stderr)
    print(processor.batch_decode(answer[None], skip_special_tokens=True)[0].strip(), flush=True)
    return 0
