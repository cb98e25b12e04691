"""Training: schedule, DeepSpeed engine, the loop, evaluation, checkpoints. Knows neither Ray nor MLflow."""
