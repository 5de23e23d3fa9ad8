"""Time spans in answers for ``evaluate.load``; works without a network."""

# One import per line: `evaluate` finds a module's requirements by scanning these lines.
import datasets
import evaluate

from soundwave.eval.metrics import score_columns

_DESCRIPTION = (
    "Time spans such as '[1.2, 1.5]' or '1.2 to 1.5 s'. grounding is the mean intersection over union of the answer's "
    "spans with the reference's, 0 for an answer without one; grounding_choice, given the options, the share of "
    "answers that choose the right span by its letter or by times nearest to it."
)
_INPUTS = """
Args:
    predictions (list of str): answers.
    references (list of str): the right span or spans of each, in seconds.
    choices (list of lists of str): the spans to choose from; without them there is no grounding_choice.
Returns:
    grounding, grounding_choice (floats), interval (two floats: 95% bootstrap), count (int),
    parse_failures (int: answers without a span).
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class Grounding(evaluate.Metric):
    """Time spans, see the module's description."""

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
        choices: list[list[str]] | None = None,
    ) -> dict:
        columns: dict = {"answer": predictions, "reference": references}
        found = score_columns(["grounding"], columns)
        if choices is None:
            return found
        columns["fields"] = [{"choices": texts} for texts in choices]
        return found | {"grounding_choice": score_columns(["grounding_choice"], columns)["grounding_choice"]}
