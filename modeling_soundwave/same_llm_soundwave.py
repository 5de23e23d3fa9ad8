"""Whether an LLM is the one that stage I was aligned to: a CTC label *is* an LLM token id (§2.2.1).

Letters: V LLM vocabulary, D LLM width, R rows that the CTC head may emit.
"""

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer
from transformers.utils import cached_file, logging

from .weights_soundwave import WeightsError

logger = logging.get_logger(__name__)

ROWS_PER_CHUNK = 4096
EQUAL = 1e-5  # 1 - cosine of embeddings that differ by rounding only
VARIANT = 0.8  # cosine of the embeddings of a fine-tuned variant, at least; those of unrelated LLMs are near 0


def check_sizes(text_config, expected, source: str, ctc_model: str) -> None:
    """Refuse an LLM of other sizes.

    Args:
        text_config: of the LLM.
        expected: the configuration of the LLM that stage I was aligned to.
        source: what messages call the LLM.
        ctc_model: what they call the stage I repository.

    Raises:
        WeightsError: naming the size.
    """
    for field, name in (("vocab_size", "a vocabulary of"), ("hidden_size", "a width of")):
        given, aligned = getattr(text_config, field, None), getattr(expected, field)
        if given != aligned:
            raise WeightsError(
                f"{source} has {name} {given}, but {ctc_model} was aligned to an LLM with {name} {aligned}; give that "
                "LLM, or run stage I for this one."
            )


def check_vocabulary(source: str, source_revision: str | None, ctc_model: str, ctc_revision: str | None) -> None:
    """Refuse an LLM whose token ids stand for other pieces of text. Where a repository has no tokenizer, pass.

    Special and added tokens may differ: fine-tuning names them anew, and no transcript holds them.

    Raises:
        WeightsError: naming a token id.
    """
    theirs, ours = pieces(source, source_revision), pieces(ctc_model, ctc_revision)
    differing = sorted(token for token in theirs.keys() & ours.keys() if theirs[token] != ours[token])
    if differing:
        token = differing[0]
        raise WeightsError(
            f"{source} has another tokenizer than the LLM that {ctc_model} was aligned to: {len(differing)} token ids "
            f"differ, {token} is {theirs[token]!r} and was {ours[token]!r}; give that LLM, or run stage I anew."
        )


def pieces(model_id: str, revision: str | None) -> dict[int, str]:
    """Token ids and pieces of a repository's tokenizer, less special and added tokens; empty without a tokenizer."""
    optional = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    if cached_file(model_id, "tokenizer_config.json", **optional) is None:
        return {}
    # A stage's own code is no tokenizer: without the package the library would ask at the terminal.
    tokenizer = AutoTokenizer.from_pretrained(model_id, revision=revision, trust_remote_code=False)
    added = tokenizer.added_tokens_encoder
    return {token: piece for piece, token in tokenizer.get_vocab().items() if piece not in added}


@torch.no_grad()
def check_embeddings(rows: torch.Tensor, aligned: torch.Tensor, source: str, ctc_model: str) -> None:
    """Refuse an LLM whose embeddings point elsewhere than those that stage I was aligned to.

    Args:
        rows: the LLM's embeddings (R, D).
        aligned: those of stage I's tied head (R, D).
        source: what messages call the LLM.
        ctc_model: what they call the stage I repository.

    Raises:
        WeightsError: when the mean cosine is below `VARIANT`. Between it and equality a warning is logged.
    """
    total, count = 0.0, 0
    for ours, theirs in zip(aligned.split(ROWS_PER_CHUNK), rows.split(ROWS_PER_CHUNK), strict=True):
        cosine = F.cosine_similarity(ours.double(), theirs.to(ours.device).double(), dim=-1)
        used = ours.any(dim=-1) & theirs.any(dim=-1).to(ours.device)  # rows of padding may be 0
        total, count = total + float(cosine[used].sum()), count + int(used.sum())
    mean = total / max(count, 1)
    if mean < VARIANT:
        raise WeightsError(
            f"{source} has other embeddings than the LLM that {ctc_model} was aligned to (mean cosine {mean:.2f}, "
            f"expected at least {VARIANT}): speech would land at the wrong tokens; give that LLM, or run stage I for "
            "this one."
        )
    if mean < 1 - EQUAL:
        logger.warning(
            f"{source} is a variant of the LLM that {ctc_model} was aligned to: the mean cosine of their embeddings "
            f"is {mean:.4f}. Stage II goes on with an alignment adapter that fits the other one."
        )
