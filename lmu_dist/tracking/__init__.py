"""Tracking, the only room that knows MLflow: studies and runs, the spool of what is to be told, and who delivers it."""
