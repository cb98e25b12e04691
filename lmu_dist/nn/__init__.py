"""The LMU for models of your own: PyTorch modules that need only torch and numpy. docs/library.md explains them."""

from lmu_dist.models.mixers.lmu.mixer import LMU
from lmu_dist.nn.legendre_memory import LegendreMemory

__all__ = ["LMU", "LegendreMemory"]
