"""Scaling laws and data efficiency: run records in, fitted laws and factors with intervals out. Uses neither torch nor Ray."""
