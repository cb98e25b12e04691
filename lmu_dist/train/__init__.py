"""Training: schedule, DeepSpeed engine, the loop, evaluation, checkpoints. Knows neither Ray nor MLflow."""

# Part of every run's key. Raise it when a change in this package, in the parts of models/ that all families share, or of a
# default in config's TrainConfig moves losses by more than rounding: tests/train/test_golden.py and tests/models/test_golden.py
# fail until it is raised. Finished runs of every family are then trained again.
VERSION = 1
