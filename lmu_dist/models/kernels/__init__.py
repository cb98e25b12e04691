"""Compiled parts of models/, each with a plain form beside it."""
