"""Prints the plan of a study. Used by cli/."""

from typing import TYPE_CHECKING

from lmu_dist.config import PlanConfig
from lmu_dist.show.tables import duration, fitted_table, number, print_table

if TYPE_CHECKING:  # these imports are slow, and only needed for annotations
    from lmu_dist.planning.cost import Plan
    from lmu_dist.planning.power import PowerEstimate

PROCESS_BYTES = 0.8e9  # resident memory of a worker without a model, for PyTorch, DeepSpeed and Ray


def print_plan(plan: "Plan", power: "PowerEstimate", assumed: PlanConfig) -> None:
    """Prints the table of a plan, its totals, and the statistical power of the study."""
    names = ("family", "N", "N with head", "d", "q", "tokens", "seed", "steps", "FLOPs", "executed", "rate", "batch", "workers")
    rows = list[tuple[str, ...]]()
    for line in plan.cells:
        stage = "none" if line.smallest_stage is None else str(line.smallest_stage)
        row = (
            line.family,
            f"{line.n_params:,}",
            f"{line.n_params_with_head:,}",
            str(line.d_model),
            str(line.widths.get("order", "")),
            f"{line.tokens:.3g}",
            str(line.seed),
            f"{line.steps:,}" + (f" ({line.shared_steps:,} shared)" if line.shared_steps else ""),
            f"{line.flops:.2e}",
            f"{line.executed_flops:.2e}",
            " > ".join(dict.fromkeys(f"{rate:.2g}" for rate in (line.first_learning_rate, line.learning_rate))),
            f"{line.batch_tokens:,}",
            str(line.n_workers),
            f"{line.zero_stage} (>= {stage})",
            " ".join(f"{b / 1e9:.2g}" for b in line.memory_bytes),
            duration(line.seconds),
            number(line.price, ",.2f"),
        )
        rows.append(row)
    optional = ("cost", "N with head", "executed", "seed", "q", "rate", "d", "batch", "steps", "ZeRO", "workers", "GB")
    print_table(fitted_table((*names, "ZeRO", "GB", "time", "cost"), rows, optional))
    each = f" of up to {plan.n_trials} trials" if plan.n_trials > 1 else ""
    print(
        f"{len(plan.cells)} cells{each}, {plan.flops:.3e} FLOPs, {plan.executed_flops:.3e} executed; "
        f"shared trunks save {plan.saved_share:.0%} of them"
    )
    print(
        "ZeRO: configured stage (>= smallest that fits plan.worker_memory_bytes)\n"
        "GB: memory of one worker at stages 0 1 2 3, for the model, its optimizer and its activations; a worker on CPUs needs "
        f"about {PROCESS_BYTES / 1e9:.1f} GB more, for Python and its libraries"
    )
    if offloaded := max(line.host_bytes for line in plan.cells):
        print(f"offload: up to {offloaded / 1e9:.2g} GB more of the CPU's memory for each worker, for the optimizer")
    for note in plan.notes:
        print(note)
    for name in plan.left_out:
        print(f"left out, because it exceeds ladder.max_cell_flops: {name}")
    if plan.worker_seconds is None:
        print("time: unknown; run `plan --calibrate` or set plan.flops_per_second")
    else:
        calibrated = plan.device and not assumed.flops_per_second
        source = f"measured on {plan.device}" if calibrated else "from plan.flops_per_second"
        wall = f", {duration(plan.wall_seconds)} with {plan.n_slots} workers at a time" if plan.wall_seconds is not None else ""
        print(f"time: {duration(plan.worker_seconds)} of a single worker{wall} ({source})")
        print("This excludes validation and the start of the workers, about 15 seconds per trunk.")
    if plan.price:
        print(f"cost: {plan.price:,.2f} at {assumed.price_per_worker_hour:g} per worker-hour")
    for text in power.lines():
        print(text)
