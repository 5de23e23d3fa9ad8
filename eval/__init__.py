"""Evaluation: a model and a benchmark in, ``answers.jsonl`` and ``results.json`` out.

``benchmarks`` and ``tasks`` (what is asked), ``models`` (who answers), ``runner`` (the run), ``judge`` (marks for open
answers), ``scoring`` (figures, over ``counting``, ``text``, ``choices``, ``grounding``), ``results`` and ``logs``
(the files), ``metrics`` (the same scoring for ``evaluate``), ``compare`` (several results side by side).
"""
