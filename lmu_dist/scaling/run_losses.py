"""The loss of a run with the trunk it belongs to: factors from curves and their noise come from it, here and in planning."""

from collections.abc import Iterable
from dataclasses import dataclass

from lmu_dist.records import RunRecord


@dataclass(frozen=True)
class RunLoss:
    """The loss of a finished run, in nats per token. Runs of one `group` share a part of their error."""

    family: str
    n_params: int
    tokens: int
    loss: float
    group: str


def group_of(family: str, n_params: int, seed: int) -> str:
    """The runs of a family with a part of their error in common: they see the same data, and with `wsd` share a trunk."""
    return f"{family}/{n_params}/{seed}"


def losses_of(records: Iterable[RunRecord]) -> list[RunLoss]:
    """Returns the losses of records of finished runs."""
    return [RunLoss(r.family, r.n_params, r.tokens, r.val_loss_nats, group_of(r.family, r.n_params, r.seed)) for r in records]
