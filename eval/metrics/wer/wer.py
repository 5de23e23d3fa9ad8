"""Corpus-level word error rate for ``evaluate.load``; works without a network."""

# One import per line: `evaluate` finds a module's requirements by scanning these lines.
import datasets
import evaluate

from soundwave.eval.scoring import score

_DESCRIPTION = "Corpus-level word error rate: substitutions, deletions and insertions over the reference words."
_INPUTS = """
Args:
    predictions (list of str): answers.
    references (list of str): what was said.
    normalizer (str): "none" (default), "basic" or "english" (Whisper's normalisers).
Returns:
    wer (float), interval (two floats: 95% bootstrap), count (int).
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class Wer(evaluate.Metric):
    """Word error rate, see the module's description."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string", id="sequence")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str], normalizer: str = "none") -> dict:
        result = score("wer", references, predictions, normalizer)
        return {"wer": result.value, "interval": list(result.interval), "count": result.count}
