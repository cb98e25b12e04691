"""Simulated studies with a known truth: losses from known laws plus noise, as RunRecords and as runs in an MLflow store."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from lmu_dist.records import POSITION_LOSS, RunRecord
from lmu_dist.scaling.laws import Chinchilla

# Similar to small models on a small corpus. The families share this law, but their tokens are worth different amounts.
TRUTH = Chinchilla(E=2.0, A=60.0, B=400.0, alpha=0.35, beta=0.37)
TOKEN_WORTH = {"lstm": 0.4, "transformer": 1.0, "lmu": 4.0, "lmu_attention": 5.0}
SIZES = tuple(int(n) for n in np.logspace(4, 6, 5))
BUDGETS = tuple(int(d) for d in np.logspace(6, 8, 5))
CODE, DATA = "c" * 64, "d" * 64


def law_of(family: str) -> Chinchilla:
    return replace(TRUTH, B=TRUTH.B * TOKEN_WORTH[family] ** -TRUTH.beta)


def make_record(family: str, n_params: int, tokens: int, seed: int, loss: float, **overrides: object) -> RunRecord:
    """Returns the record of a complete, decayed run of a model whose output head has 32 sqrt(N) parameters."""
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
    } | overrides
    identity = "/".join(
        str(values[k]) for k in ("family", "n_params", "tokens", "seed", "learning_rate", "status", "code_digest")
    )
    return RunRecord(key=str(values.pop("key", sha256(identity.encode()).hexdigest())), **values)


def simulate_study(
    families: Sequence[str] = tuple(TOKEN_WORTH),
    sizes: Sequence[int] = SIZES,
    budgets: Sequence[int] = BUDGETS,
    seeds: Sequence[int] = (0,),
    noise: float = 0.003,
    noise_seed: int = 0,
) -> list[RunRecord]:
    """Returns the records of a whole grid; `noise_seed` is the random seed of the noise."""
    rng = np.random.default_rng(noise_seed)
    return [
        make_record(family, n, d, seed, float(law_of(family).loss(n, d) * np.exp(rng.normal(0, noise))))
        for family in families
        for n in sizes
        for d in budgets
        for seed in seeds
    ]


def position_curve(record: RunRecord, flat_from: int = 0) -> np.ndarray:
    """Returns losses at positions 1 to n that fall as 1/sqrt(t), up to position `flat_from` if it is given."""
    t = np.arange(1, record.sequence_tokens + 1, dtype=float)
    shape = np.minimum(t, flat_from or t) ** -0.5
    return record.val_loss_nats + 2 * (shape - shape.mean())


def write_runs_to_mlflow(
    client: MlflowClient,
    experiment: str,
    records: Iterable[RunRecord],
    curves: bool = False,
    study_name: str = "ladder",
    settings: Mapping[str, object] | None = None,
) -> list[str]:
    """Writes runs as training does, with MLflow's own client, and returns their ids in order.

    `settings`: keys of the configuration, as in "train.beta2", that are logged as params of all the runs.
    """
    existing = client.get_experiment_by_name(experiment)
    artifact_folder = (
        Path(client.tracking_uri.removeprefix("sqlite:///")).parent / "mlartifacts" / experiment
    )  # otherwise MLflow writes to the current folder
    experiment_id = existing.experiment_id if existing else client.create_experiment(experiment, artifact_folder.as_uri())
    parent = client.create_run(experiment_id, tags={"lmu.study": study_name, "mlflow.runName": study_name}).info.run_id
    records, ids = list(records), []
    most_tokens, largest = max((r.tokens for r in records), default=0), max((r.n_params for r in records), default=0)
    for r in records:
        name = f"{r.family}-{r.n_params}-{r.planned_tokens}-s{r.seed}"
        run = client.create_run(experiment_id, tags={"mlflow.parentRunId": parent, "mlflow.runName": name})
        ids.append(run.info.run_id)
        metrics = [Metric(k, v, 0, r.steps) for k, v in r.columns("metrics").items()]
        if curves and (r.tokens == most_tokens or r.n_params == largest):  # a report reads no others, and they take long
            flat = 64 if r.family == "lmu" else 0
            metrics += [Metric(POSITION_LOSS, float(v), 0, t) for t, v in enumerate(position_curve(r, flat), 1)]
        params = {"data.source": "simulation", **r.columns("params"), **(settings or {})}
        client.log_batch(
            ids[-1],
            metrics=metrics,
            params=[Param(k, str(v)) for k, v in params.items()],
            tags=[RunTag(k, str(v)) for k, v in r.columns("tags").items()],
        )
        client.set_terminated(ids[-1])
    return ids
