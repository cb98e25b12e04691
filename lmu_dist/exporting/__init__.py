"""Trained models for other libraries: a run in; a folder that transformers loads without this package, out."""
