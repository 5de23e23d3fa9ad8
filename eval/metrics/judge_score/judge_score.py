"""Mean mark of a judge for ``evaluate.load``; works without a network."""

# One import per line: `evaluate` finds a module's requirements by scanning these lines.
import datasets
import evaluate

from soundwave.eval.metrics import score_columns

_DESCRIPTION = (
    "Mean mark of a judge. An item has the marks of its judgements, two where it was judged in both orders, and their "
    "mean counts; an item with a failed judgement (None) is left out and counted."
)
_INPUTS = """
Args:
    predictions (list of lists of float or None): the marks of each item.
    scale (two floats): the lowest and the highest mark; a mark outside is an error.
    judgements (int): how many an item needs, 1 by default.
Returns:
    judge_score (float, None if no item was judged), interval (two floats: 95% bootstrap), count (int),
    judge_failures (int).
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class JudgeScore(evaluate.Metric):
    """Mean mark of a judge, see the module's description."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float64"))}),
        )

    def _compute(
        self,
        predictions: list[list[float | None]],
        scale: tuple[float, float] | None = None,
        judgements: int = 1,
    ) -> dict:
        rows = [
            [{"score": mark, "error": "no mark" if mark is None else None} for mark in marks] for marks in predictions
        ]
        return score_columns(["judge_score"], {"judgements": rows}, {"scale": scale, "judgements": judgements})
