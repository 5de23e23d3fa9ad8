"""Evaluation: a checkpoint and rows in, ``answers.jsonl`` and ``results.json`` out.

``scoring`` (pure functions), ``tasks`` (what is asked and compared), ``results`` (the files), ``evaluate`` (the run).
"""
