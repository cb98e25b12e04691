"""lmu-dist: distributed training of Legendre Memory Unit language models, and the scaling study around it."""

__version__ = "0.1.0"
