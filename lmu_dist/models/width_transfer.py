"""Learning rates that hold at every width: a Shape with a base in, factors of scores, logits and rates out.

The maximal update parametrization (muP; Yang et al. 2022, arXiv 2203.03466, table 8) for Adam. At the widths of the base the
model is the ordinary one. A wider model is changed so that a step at the same rate changes every activation and every logit by
as much. docs/recipes.md has the derivation, tests/train/test_width_transfer.py the coordinate check. Called by lm, the
families and train/engine.
"""

from torch import nn

from lmu_dist.models.family import Family
from lmu_dist.models.shape import Shape


def width_ratio(shape: Shape) -> float:
    """d_model of the base by that of the shape: the factor of logits, and of scores that are sums over all channels.

    It is 1 without a base.
    """
    return 1.0 if shape.base is None else shape.base.d_model / shape.d_model


def score_scale(shape: Shape) -> float | None:
    """Factor of the scores of attention with `n_heads` heads of E channels: sqrt(E of the base) / E. Without a base: None.

    None stands for 1/sqrt(E). Queries and keys agree more and more while they are trained, so their products grow as E.
    """
    if shape.base is None:
        return None
    base_channels, channels = (s.d_model // s.n_heads for s in (shape.base, shape))
    return base_channels**0.5 / channels


def rate_factors(model: nn.Module, shape: Shape, family: Family) -> dict[str, float]:
    """Factor of the learning rate of every parameter of the sublayers, by its name in the LanguageModel.

    A matrix has the fan-in of the base by its own, and so has a vector that its module multiplies with a matrix
    (`row_vectors`), by its length. All other parameters have 1: embeddings, norms, biases. Empty without a base.
    """
    if shape.base is None:
        return {}
    base = dict(nn.ModuleList(family.meta_sublayers(shape.base)).named_parameters(prefix="sublayers"))
    rows = {f"{name}.{row}" for name, module in model.named_modules() for row in getattr(module, "row_vectors", ())}
    return {
        name: base[name].shape[-1] / parameter.shape[-1]
        for name, parameter in model.named_parameters()
        if name in base and (parameter.ndim > 1 or name in rows)
    }
