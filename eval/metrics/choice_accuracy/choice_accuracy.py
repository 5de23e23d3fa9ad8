"""Accuracy of multiple choice by AIR-Bench's rule for ``evaluate.load``; works without a network."""

# One import per line: `evaluate` finds a module's requirements by scanning these lines.
import datasets
import evaluate

from soundwave.eval.metrics import score_columns

_DESCRIPTION = (
    "Accuracy of multiple choice. A letter is read as AIR-Bench's own scorer does; answers that it cannot read leave "
    "the denominator of choice_accuracy and count as wrong in choice_strict. parse_failures is their share."
)
_INPUTS = """
Args:
    predictions (list of str): answers.
    references (list of str): the text of the right option.
    choices (list of lists of str): the options' texts, in the order of the letters.
Returns:
    choice_accuracy (float, None if no answer could be read), choice_strict, parse_failures (floats),
    interval (two floats: 95% bootstrap), count (int).
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class ChoiceAccuracy(evaluate.Metric):
    """Accuracy of multiple choice, see the module's description."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text, "choices": datasets.Sequence(text)}),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        choices: list[list[str]],
    ) -> dict:
        fields = [{"choices": texts} for texts in choices]
        columns = {"answer": predictions, "reference": references, "fields": fields}
        found = score_columns(["choice_accuracy"], columns)
        return found | {name: score_columns([name], columns)[name] for name in ("choice_strict", "parse_failures")}
