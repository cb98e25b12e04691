"""Checks the sizing table of cluster/README.md against `lmu-dist plan`. `python tests/cluster/test_sizing.py` updates it."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from lmu_dist.config import load
from lmu_dist.planning.cost import CellCost, plan, vocab_tokens
from lmu_dist.planning.grid import grid

ROOT = Path(__file__).parents[2]
README = ROOT / "cluster" / "README.md"
BEGIN, END = "<!-- sizing -->\n", "<!-- /sizing -->\n"
JOBS = ("paper", "orders6")
FLOPS_PER_SECOND = 1e14  # assumed sustained training speed of a GPU


def table() -> str:
    """The table: a row per job and size, with the cost of its cells of all families and budgets, and a row per whole job."""
    header = "| job | N | GPUs | ZeRO | smallest | GB per GPU | GPU-hours | hours |\n|---|--:|--:|--:|--:|--:|--:|--:|\n"
    return header + "".join(f"| {row} |\n" for job in JOBS for row in _rows(job))


def _rows(job: str) -> Iterator[str]:
    # A storage folder without corpus and calibration, so that the numbers are the same on every machine.
    config = load(ROOT / "jobs" / f"{job}.yaml", [f"plan.flops_per_second={FLOPS_PER_SECOND}", "storage=/nonexistent"])
    planned = plan(config)
    cells, _ = grid(config, vocab_tokens(config))
    lines = sorted(zip((cell.config.model.n_params for cell in cells), planned.cells, strict=True), key=lambda pair: pair[0])
    for n_params, pairs in groupby(lines, key=lambda pair: pair[0]):
        same = [line for _, line in pairs]
        first = same[0]
        stages = [line.smallest_stage for line in same]
        smallest = "none" if None in stages else max(stages)
        memory = max(line.memory_bytes[first.zero_stage] for line in same) / 1e9
        work = _gpu_hours(same)
        cost = f"{_number(work)} | {_number(work / first.n_workers)}"
        yield f"{job} | {n_params:,} | {first.n_workers} | {first.zero_stage} | {smallest} | {_number(memory)} | {cost}"
    assert planned.wall_seconds is not None
    cost = f"{_number(_gpu_hours(planned.cells))} | {_number(planned.wall_seconds / 3600)}"
    yield f"**{job}** | all | {planned.n_slots} | | | | {cost}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _gpu_hours(lines: Iterable[CellCost]) -> float:
    return sum((line.seconds or 0) * line.n_workers for line in lines) / 3600


def test_sizing_table_is_up_to_date():
    _, _, rest = README.read_text().partition(BEGIN)
    assert rest.partition(END)[0] == table(), "update it: python tests/cluster/test_sizing.py"


if __name__ == "__main__":
    before, _, rest = README.read_text().partition(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
