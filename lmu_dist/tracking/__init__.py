"""Tracking, the only package that imports MLflow: studies and runs, the metrics log of a run, and its upload to MLflow."""
