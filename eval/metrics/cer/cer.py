"""Corpus-level character error rate for ``evaluate.load``; works without a network."""

# One import per line: `evaluate` finds a module's requirements by scanning these lines.
import datasets
import evaluate

from soundwave.eval.metrics import score_columns

_DESCRIPTION = (
    "Corpus-level character error rate: substitutions, deletions and insertions over the reference characters."
)
_INPUTS = """
Args:
    predictions (list of str): answers.
    references (list of str): what was said.
    normalizer (str): "none" (default), "basic" or "english" (Whisper's normalisers).
    spellings (str): folder or Hub id of a Whisper model, whose British and American spellings "english" then unifies.
Returns:
    cer (float), interval (two floats: 95% bootstrap), count (int).
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class Cer(evaluate.Metric):
    """Character error rate, see the module's description."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        normalizer: str = "none",
        spellings: str | None = None,
    ) -> dict:
        columns = {"answer": predictions, "reference": references}
        return score_columns(["cer"], columns, {"normalizer": normalizer, "spellings": spellings})
