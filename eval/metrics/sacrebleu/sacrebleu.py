"""Corpus-level sacreBLEU for ``evaluate.load``; works without a network."""

# One import per line: `evaluate` finds a module's requirements by scanning these lines.
import datasets
import evaluate

from soundwave.eval.metrics import score_columns

_DESCRIPTION = "Corpus-level BLEU in points, 0 to 100, as sacrebleu computes it: case kept, no normaliser."
_INPUTS = """
Args:
    predictions (list of str): translations; an empty one counts.
    references (list of str, or of lists of str): one or several right translations of each.
    tokenize (str): one of sacrebleu's tokenizers, "13a" by default.
Returns:
    sacrebleu (float), interval (two floats: 95% bootstrap), count (int), signature (str: sacrebleu's own).
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class Sacrebleu(evaluate.Metric):
    """sacreBLEU, see the module's description."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=[
                datasets.Features({"predictions": text, "references": text}),
                datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
            ],
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str] | list[list[str]],
        tokenize: str = "13a",
    ) -> dict:
        return score_columns(["sacrebleu"], {"answer": predictions, "reference": references}, {"tokenize": tokenize})
