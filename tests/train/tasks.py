"""Functions that the ranks run in tests of the engine. In a module of their own, so that spawned processes can import them."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from lmu_dist.config import ClusterConfig, TrainConfig
from lmu_dist.data.batches import Batch, TokenDataset, row_indices
from lmu_dist.models import head
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.registry import built_in, find, options_of
from lmu_dist.models.sizing import shape_for
from lmu_dist.train.engine import Engine
from lmu_dist.train.evaluate import evaluate
from lmu_dist.train.loop import train_steps
from lmu_dist.train.schedule import learning_rate

VOCAB, LENGTH, ROWS = 61, 16, 8
TRAIN = TrainConfig(
    learning_rate=1e-2,
    beta2=0.999,
    tokens=20 * ROWS * LENGTH,
    batch_tokens=ROWS * LENGTH,
    sequence_tokens=LENGTH,
    warmup_tokens=5 * ROWS * LENGTH,
)


# Names of models, and the family and keys of each: all built-in families, and the modern LMU with all of its parts.
MODELS = {name: (name, {}) for name in built_in()}
MODELS["lmu_modern, all parts"] = ("lmu_modern", {"output_gate": True, "qk_norm": True})


def model(name: str = "lmu", base_n_params: int | None = None) -> LanguageModel:
    family, keys = MODELS[name]
    options = options_of(find(family), keys)
    sizes = {"vocab_tokens": VOCAB, "sequence_tokens": LENGTH, "options": options}
    shape = shape_for(family, 3000, **sizes)
    if base_n_params is not None:
        shape = replace(shape, base=shape_for(family, base_n_params, **sizes))
    return LanguageModel(shape, 3, options)


def batch(step: int, rank: int = 0, world_size: int = 1) -> Batch:
    """A rank's share of a batch of random rows. The global batch is the same for any number of ranks."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (40, LENGTH + 1))
    rows = torch.from_numpy(tokens[row_indices(40, 5, step, ROWS, rank, world_size)])
    return Batch(rows[:, :-1], rows[:, 1:])


def plain_adam(
    name: str = "lmu",
    n_steps: int = 20,
    rates: tuple[float, float, float] = (1.0, 1.0, 1.0),
    base_n_params: int | None = None,
) -> list[float]:
    """Losses of the same training in plain torch: one process, one thread, no DeepSpeed.

    `rates`: factors of the learning rate for embeddings, matrices and vectors.
    """
    torch.set_num_threads(1)
    net = model(name, base_n_params)
    base = dict(LanguageModel(net.shape.base or net.shape).named_parameters())
    factors = list[float]()
    for key, p in net.named_parameters():
        has_fan_in = role_of(key, p) == 1 or key.endswith(".p")
        factors.append(rates[role_of(key, p)] * (base[key].shape[-1] / p.shape[-1] if has_fan_in else 1.0))
    adam = torch.optim.Adam([{"params": p} for p in net.parameters()], betas=(TRAIN.beta1, TRAIN.beta2), eps=TRAIN.eps)
    losses = []
    for step in range(n_steps):
        for group, factor in zip(adam.param_groups, factors, strict=True):
            group["lr"] = factor * learning_rate(TRAIN, step)
        loss = net(batch(step).inputs, batch(step).targets).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), TRAIN.clip_norm)
        adam.step()
        losses.append(loss.item())
    return losses


def role_of(name: str, parameter: torch.Tensor) -> int:
    """0: embedding, 1: another matrix, 2: vector."""
    return 0 if name.startswith(("embedding.", "position.")) else 1 if parameter.ndim >= 2 else 2


ROLE_RATES = (0.5, 2.0, 4.0)  # of embeddings, matrices, vectors
BASE_N_PARAMS = 1000
BY_ROLE = dict(zip(("embedding_rate", "matrix_rate", "vector_rate"), ROLE_RATES, strict=True))


def train_by_role(cases: list[tuple[int, str]], n_steps: int) -> dict[tuple[int, str], list[float]]:
    """Losses with a learning rate for each role and width, by ZeRO stage and precision."""
    train = replace(TRAIN, **BY_ROLE)
    return {
        (stage, precision): [
            m.loss_nats
            for m in _train(_engine(stage, train=replace(train, precision=precision), base_n_params=BASE_N_PARAMS), 0, n_steps)
        ]
        for stage, precision in cases
    }


def _engine(
    stage: int,
    micro_rows: int | None = None,
    train: TrainConfig = TRAIN,
    name: str = "lmu",
    base_n_params: int | None = None,
) -> Engine:
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    net, cluster = model(name, base_n_params).to(dtype), ClusterConfig(zero_stage=stage, micro_batch_rows=micro_rows)
    return Engine(net, train, cluster, torch.device("cpu"))


def _train(engine: Engine, first: int, last: int) -> list:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rates = [learning_rate(TRAIN, step) for step in range(last)]
    stream = train_steps(engine, lambda s: batch(s, rank, world_size), rates.__getitem__, first, last, TRAIN.batch_tokens)
    return list(stream)


def train_stages(stages: list[int], micro_rows: int | None = None) -> dict[int, tuple[list[float], list[float], dict]]:
    """Losses, gradient norms and final weights of 20 steps, by ZeRO stage."""
    results = {}
    for stage in stages:
        engine = _engine(stage, micro_rows)
        metrics = _train(engine, 0, 20)
        results[stage] = [m.loss_nats for m in metrics], [m.grad_norm for m in metrics], engine.weights()
    return results


def train_models(cases: list[tuple[str, int, str]]) -> dict[tuple[str, int, str], list[float]]:
    """Losses of 2 steps, by name of the model, ZeRO stage and precision."""
    results = {}
    for name, stage, precision in cases:
        engine = _engine(stage, train=replace(TRAIN, precision=precision), name=name)
        results[name, stage, precision] = [m.loss_nats for m in _train(engine, 0, 2)]
        engine.close()
    return results


def train_with_blocked_head(stages: list[int]) -> dict[int, tuple[list[float], list[float], dict]]:
    """As `train_stages`, with cross-entropy in blocks of a few rows of logits."""
    head.MAX_LOGITS = 10 * VOCAB
    return train_stages(stages)


def train_and_resume(stages: list[int], folder: str) -> dict[int, tuple[list[float], list[float]]]:
    """By ZeRO stage: losses of 20 uninterrupted steps, and of 10 steps, save, load in a new engine, 10 steps."""
    results = {}
    for stage in stages:
        uninterrupted = _train(_engine(stage), 0, 20)
        first = _engine(stage)
        before = _train(first, 0, 10)
        first.save(Path(folder) / str(stage))
        dist.barrier()
        second = _engine(stage)
        second.load(Path(folder) / str(stage))
        after = _train(second, 10, 20)
        results[stage] = [m.loss_nats for m in uninterrupted], [m.loss_nats for m in before + after]
    return results


def train_stepped_trunk(folder: str) -> dict[int, tuple[list[float], list[float]]]:
    """Losses of three budgets whose rates are stepped, by their steps: as branches of a trunk, and as runs from step 0.

    A branch starts from the branch point of the budget before it, as in a ladder.
    """
    budgets = [n_steps * TRAIN.batch_tokens for n_steps in (10, 20, 40)]
    settings = {"schedule": "wsd", "rate_token_exponent": -0.5, "rate_at_tokens": budgets[0]}
    trains = [replace(TRAIN, tokens=d, earlier_tokens=tuple(budgets[:i]), **settings) for i, d in enumerate(budgets)]

    def losses(engine: Engine, train: TrainConfig, first: int, last: int) -> list[float]:
        def rate(step: int) -> float:
            return learning_rate(train, step)

        return [m.loss_nats for m in train_steps(engine, batch, rate, first, last, train.batch_tokens)]

    on_trunk, results = list[float](), {}
    engine = _engine(1)
    for i, train in enumerate(trains):
        if i:
            engine.load(Path(folder) / str(i - 1))
        on_trunk += losses(engine, train, len(on_trunk), train.decay_start)
        engine.save(Path(folder) / str(i))
        branch = on_trunk + losses(engine, train, train.decay_start, train.n_steps)
        results[train.n_steps] = branch, losses(_engine(1), train, 0, train.n_steps)
    return results


# ZeRO stage, precision, weight decay (with which there are three parameter groups, as there is a learning rate for each role)
ELASTIC_CASES = ((0, "fp32", 0.0), (1, "fp32", 0.0), (2, "bf16", 0.1), (3, "fp32", 0.1))


class ElasticRun(NamedTuple):
    """A part of a run that changes its number of ranks: gathered states after every load, losses, and the last state."""

    loaded: dict[int, dict[str, Any]]  # by number of ranks that wrote the checkpoint
    losses: list[float]
    last: dict[str, Any]


def train_elastically(root: str, sources: tuple[int, ...], first: int, last: int) -> dict[tuple, ElasticRun]:
    """For ELASTIC_CASES: loads what `sources` ranks saved, one after the other, trains steps first .. last - 1, and saves."""
    results = {}
    for case in ELASTIC_CASES:
        stage, precision, weight_decay = case
        roles = BY_ROLE if weight_decay else {}
        engine = _engine(stage, train=replace(TRAIN, precision=precision, weight_decay=weight_decay, **roles))
        loaded = {}
        for n_ranks in sources:
            engine.load(Path(root) / f"{case}-{n_ranks}")
            loaded[n_ranks] = gathered_state(engine)
        losses = [m.loss_nats for m in _train(engine, first, last)]
        engine.save(Path(root) / f"{case}-{dist.get_world_size()}")
        results[case] = ElasticRun(loaded, losses, gathered_state(engine))
        engine.close()
    return results


def gathered_state(engine: Engine) -> dict[str, Any]:
    """All that a run needs to go on, gathered by DeepSpeed's own functions, which know nothing of checkpoints."""
    state: dict[str, Any] = {f"weight {name}": weight for name, weight in engine.weights().items()}
    stage, optimizer = engine._ds.zero_optimization_stage(), engine._ds.basic_optimizer
    if stage in (1, 2):  # DeepSpeed does this once, before Adam has a state
        engine._ds.optimizer._hp_optimizer_states_linked = False
        engine._ds.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.model.named_parameters():
        state[f"fp32 {name}"] = safe_get_full_fp32_param(parameter) if stage else parameter.data.clone()
        for key in ("exp_avg", "exp_avg_sq"):
            moment = safe_get_full_optimizer_state(parameter, key) if stage else optimizer.state[parameter][key].clone()
            state[f"{key} {name}"] = moment
    state["steps"] = sorted(int(s["step"]) for s in optimizer.state.values())
    state["settings"] = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return state


def bf16_stages() -> dict[int, list[float]]:
    """Losses in bf16, by ZeRO stage."""
    train = TrainConfig(**{**TRAIN.__dict__, "precision": "bf16"})
    return {stage: [m.loss_nats for m in _train(_engine(stage, train=train), 0, 20)] for stage in (0, 1, 2, 3)}


def non_finite(stage: int) -> tuple[list[float], list[float]]:
    """Losses and gradient norms until a loss is not finite."""
    engine = _engine(stage)
    _train(engine, 0, 2)
    with torch.no_grad():
        engine.model.norm.bias.fill_(torch.inf)
    metrics = _train(engine, 2, 20)
    return [m.loss_nats for m in metrics], [m.grad_norm for m in metrics]


def evaluate_on(path: str, n_rows: int, micro_rows: int | None = None) -> object:
    """Evaluates an untrained model on a token stream."""
    rows = TokenDataset(Path(path), "<u2", LENGTH)
    return evaluate(
        _engine(1, micro_rows), rows, np.arange(n_rows), dist.get_rank(), dist.get_world_size(), 0, bytes_per_token=2.0
    )
