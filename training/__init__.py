"""Training: rows of any source -> batches -> three stages, each ending in a repository of its own.

`stages` is the table of what each stage trains, `train.run_stage` runs one; `AlignmentTrainer`, `ShrinkingTrainer` and
`InstructionTrainer` in `trainer` are the same stages as Trainer subclasses for use from Python.
"""
