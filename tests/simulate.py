"""Studies with a known truth: losses drawn from laws, as Rows, as RunRecords, and as runs of an MLflow store."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from lmu_dist.records import POSITION_LOSS, RunRecord
from lmu_dist.scaling.laws import Chinchilla

# Roughly what small models on a small corpus do; another family is the same with its tokens worth more.
TRUTH = Chinchilla(E=2.0, A=60.0, B=400.0, alpha=0.35, beta=0.37)
WORTH = {"lstm": 0.4, "transformer": 1.0, "lmu": 4.0, "lmu_attention": 5.0}
SIZES = tuple(int(n) for n in np.logspace(4, 6, 5))
BUDGETS = tuple(int(d) for d in np.logspace(6, 8, 5))
CODE, DATA = "c" * 64, "d" * 64


def law_of(family: str) -> Chinchilla:
    return replace(TRUTH, B=TRUTH.B * WORTH[family] ** -TRUTH.beta)


def record(family: str, n_params: int, tokens: int, seed: int, loss: float, **changed: object) -> RunRecord:
    """A complete, decayed run; its counts are those of a model with a head of 32 sqrt(N) parameters."""
    head = int(32 * n_params**0.5)
    values: dict = {
        "family": family,
        "n_params": n_params,
        "n_params_with_head": n_params + head,
        "n_params_total": n_params + head,
        "d_model": int((n_params / 24) ** 0.5) + 1,
        "n_blocks": 2,
        "sequence_tokens": 256,
        "vocab_tokens": 4096,
        "planned_tokens": tokens,
        "planned_steps": tokens // 1024,
        "batch_tokens": 1024,
        "learning_rate": 0.01,
        "schedule": "wsd",
        "precision": "fp32",
        "seed": seed,
        "training_flops_per_token": 6.0 * n_params + 6.0 * head,
        "training_flops_per_token_kaplan": 6.0 * n_params,
        "data_digest": DATA,
        "code_digest": CODE,
        "tokens": tokens,
        "steps": tokens // 1024,
        "train_loss_nats": loss,
        "val_loss_nats": loss,
        "val_loss_standard_error_nats": 0.003 * loss,
        "val_bits_per_byte": loss / 2.4,
        "training_seconds": tokens * n_params / 1e9,
        "status": "complete",
        "phase": "decayed",
        "stop_rule": "",
        "fork_step": 0,
        "retry_of": "",
    } | changed
    identity = "/".join(
        str(values[k]) for k in ("family", "n_params", "tokens", "seed", "learning_rate", "status", "code_digest")
    )
    return RunRecord(key=str(values.pop("key", sha256(identity.encode()).hexdigest())), **values)


def study(
    families: Sequence[str] = tuple(WORTH),
    sizes: Sequence[int] = SIZES,
    budgets: Sequence[int] = BUDGETS,
    seeds: Sequence[int] = (0,),
    noise: float = 0.003,
    draw: int = 0,
) -> list[RunRecord]:
    """Records of a whole grid; `draw` seeds the noise."""
    rng = np.random.default_rng(draw)
    return [
        record(family, n, d, seed, float(law_of(family).loss(n, d) * np.exp(rng.normal(0, noise))))
        for family in families
        for n in sizes
        for d in budgets
        for seed in seeds
    ]


def position_curve(record: RunRecord, flat_from: int = 0) -> np.ndarray:
    """Loss at position 1 .. n, falling as 1/sqrt(t), until `flat_from` if given."""
    t = np.arange(1, record.sequence_tokens + 1, dtype=float)
    shape = np.minimum(t, flat_from or t) ** -0.5
    return record.val_loss_nats + 2 * (shape - shape.mean())


def write(
    client: MlflowClient, experiment: str, records: Iterable[RunRecord], curves: bool = False, study_name: str = "ladder"
) -> list[str]:
    """Writes runs as the trainer would have them, through MLflow's own API: their ids, in order."""
    found = client.get_experiment_by_name(experiment)
    beside = Path(client.tracking_uri.removeprefix("sqlite:///")).parent / "mlartifacts" / experiment  # not where tests are run
    experiment_id = found.experiment_id if found else client.create_experiment(experiment, beside.as_uri())
    parent = client.create_run(experiment_id, tags={"lmu.study": study_name, "mlflow.runName": study_name}).info.run_id
    ids = []
    for r in records:
        name = f"{r.family}-{r.n_params}-{r.planned_tokens}-s{r.seed}"
        run = client.create_run(experiment_id, tags={"mlflow.parentRunId": parent, "mlflow.runName": name})
        ids.append(run.info.run_id)
        metrics = [Metric(k, v, 0, r.steps) for k, v in r.columns("metrics").items()]
        if curves:
            flat = 64 if r.family == "lmu" else 0
            metrics += [Metric(POSITION_LOSS, float(v), 0, t) for t, v in enumerate(position_curve(r, flat), 1)]
        client.log_batch(
            ids[-1],
            metrics=metrics,
            params=[Param(k, str(v)) for k, v in {"data.source": "simulation", **r.columns("params")}.items()],
            tags=[RunTag(k, str(v)) for k, v in r.columns("tags").items()],
        )
        client.set_terminated(ids[-1])
    return ids
