"""Adam for a model's parameters by role: a LanguageModel and TrainConfig in, torch's optimizer out. Used by train/engine."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.optim import AdamW

from lmu_dist.config import TrainConfig
from lmu_dist.models import registry
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.width_transfer import rate_factors


class ParameterGroup(NamedTuple):
    """Parameters with the same learning rate, as a factor of that of the step, and the same weight decay."""

    parameters: list[torch.nn.Parameter]
    rate_factor: float
    weight_decay: float


def parameter_groups(model: torch.nn.Module, train: TrainConfig) -> list[ParameterGroup]:
    """The parameters of a model by role: matrices, vectors (biases, norms, p), embeddings. Roles with equal settings are one
    group. Vectors get no weight decay. If the model has a base, rates also depend on fan-ins (models/width_transfer); what
    decay takes off a weight in a step does not.
    """
    embedded = {id(p) for module in model.modules() if isinstance(module, torch.nn.Embedding) for p in module.parameters()}
    found = dict[tuple[float, float], list[torch.nn.Parameter]]()
    by_width = dict[str, float]()
    if isinstance(model, LanguageModel):
        by_width = rate_factors(model, model.shape, registry.family_of(model.shape))
    for name, parameter in model.named_parameters():
        is_vector, of_width = parameter.ndim < 2, by_width.get(name, 1.0)
        factor = train.embedding_rate if id(parameter) in embedded else train.vector_rate if is_vector else train.matrix_rate
        decay = 0.0 if is_vector else train.weight_decay / of_width
        found.setdefault((factor * of_width, decay), []).append(parameter)
    return [ParameterGroup(parameters, *settings) for settings, parameters in found.items()]


def adam(groups: Sequence[ParameterGroup], train: TrainConfig) -> torch.optim.Optimizer:
    """torch's AdamW, which is Adam when weight_decay is 0."""
    # foreach is torch's default on GPUs; on CPUs it saves one of two temporaries.
    settings = {"lr": train.learning_rate, "betas": (train.beta1, train.beta2), "eps": train.eps, "foreach": True}
    by_group = [{"params": group.parameters, "weight_decay": group.weight_decay} for group in groups]
    return EagerAdamW(by_group, **settings)


def _unguarded(name: str) -> Any:
    return inspect.unwrap(getattr(AdamW, name))


class EagerAdamW(AdamW):
    """torch's AdamW with its methods as they are below their wrappers for torch.compile. No run compiles.

    The wrappers import torch._dynamo at their first call: 1.3 s of a core and 74 MB in every worker
    (findings/torch-adam-imports-the-compiler.sh). At stage 3 DeepSpeed imports it, and torch for activation checkpointing.
    """

    add_param_group = _unguarded("add_param_group")
    zero_grad = _unguarded("zero_grad")
    state_dict = _unguarded("state_dict")
    load_state_dict = _unguarded("load_state_dict")
    step = torch.no_grad()(_unguarded("step"))
