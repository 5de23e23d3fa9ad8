"""Accuracy of labels, strict and lenient, for ``evaluate.load``; works without a network."""

# One import per line: `evaluate` finds a module's requirements by scanning these lines.
import datasets
import evaluate

from soundwave.eval.metrics import score_columns

_DESCRIPTION = (
    "Accuracy of labels: label_accuracy wants the very label, case included; lenient_label_accuracy an answer where "
    "exactly one known label stands as a word, the right one."
)
_INPUTS = """
Args:
    predictions (list of str): answers.
    references (list of str): the right label of each.
    labels (list of str): all labels; those of the references if not given.
    synonyms (dict): further word -> the label that it stands for; none by default.
Returns:
    label_accuracy, lenient_label_accuracy (floats), interval (two floats: 95% bootstrap), count (int),
    parse_failures (int: answers with no label or several).
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class LabelAccuracy(evaluate.Metric):
    """Accuracy of labels, see the module's description."""

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
        labels: list[str] | None = None,
        synonyms: dict[str, str] | None = None,
    ) -> dict:
        columns = {"answer": predictions, "reference": references}
        settings = {"labels": labels or sorted(set(references)), "synonyms": synonyms}
        lenient = score_columns(["lenient_label_accuracy"], columns, settings)
        return lenient | score_columns(["label_accuracy"], columns)
