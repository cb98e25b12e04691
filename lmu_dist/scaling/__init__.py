"""Scaling laws: what the records say, with the uncertainty it has. No torch, no Ray."""
