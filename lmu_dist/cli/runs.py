"""Commands that make runs, or plan them: prepare, train, ladder, tune, plan. Heavy imports are inside, for a fast --help."""

import json
from dataclasses import asdict

import click

from lmu_dist import show
from lmu_dist.cli.common import as_json, cli, job, loaded, place, settings, tell, tracking_uri
from lmu_dist.config import open_folder
from lmu_dist.storage import local_first


@cli.command()
@job
@settings
@as_json
def prepare(config: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Text to packed token rows; resumable; skips what is done."""
    from lmu_dist.launch.corpus import prepared

    merged = loaded(config, overrides)
    with show.bars() as bars:
        corpus = prepared(merged, bars.show)
    manifest = corpus.manifest
    if as_json:
        print(json.dumps({"folder": str(corpus.folder), **asdict(manifest)}))
        return
    for split, facts in manifest.splits.items():
        print(f"{split:<12}{facts['tokens']:>14,} tokens {facts['bytes']:>16,} bytes {facts['documents']:>10,} documents")
    listed = f", listed in {corpus.folder / 'problems.jsonl'}" if manifest.problems else ""
    print(f"left out    {', '.join(f'{n} {kind}' for kind, n in manifest.problems.items()) or 'nothing'}{listed}")
    print(f"folder      {corpus.folder}\nnext        lmu-dist train {config}")


@cli.command()
@job
@settings
@as_json
def train(config: str, overrides: tuple[str, ...], as_json: bool) -> int:
    """One run on the cluster (or a local one started for it); resumable; skips what is done."""
    merged = loaded(config, overrides)
    from lmu_dist.launch.trainer import train as train_run

    with show.bars() as bars:
        finished = train_run(merged, tracking_uri(), bars.show, lambda latest: bars.show_training(merged, latest))
    record, folder = finished.record, finished.cell.folder
    tell(finished.notes)
    if as_json:
        facts = {"run_id": finished.run_id, "folder": str(folder), "tracking_uri": finished.tracking_uri}
        print(json.dumps(facts | asdict(record)))
    else:
        print(
            f"{'was done' if finished.already_done else record.status:<12}{finished.cell.name}\n"
            f"model       {record.family}, N = {record.n_params:,}, with head {record.n_params_with_head:,}\n"
            f"tokens      {record.tokens:,} in {record.steps:,} steps, {record.training_seconds:.0f} s of training\n"
            f"validation  {record.val_loss_nats:.4f} +- {record.val_loss_standard_error_nats:.4f} nats per token, "
            f"{record.val_bits_per_byte:.4f} bits per byte\n"
            f"MLflow      run {finished.run_id} in {finished.tracking_uri}\n"
            f"folder      {folder}\n"
            f"next        lmu-dist generate {folder} --prompt 'import '"
        )
    return 0 if record.status == "complete" else 1


@cli.command()
@job
@settings
@click.option(
    "--rerun",
    multiple=True,
    metavar="KEY",
    help="Run a cell again though it has ended, by (the start of) its key; to go on after an interruption leave it out.",
)
@as_json
def ladder(config: str, overrides: tuple[str, ...], rerun: tuple[str, ...], as_json: bool) -> int:
    """Every missing cell of a size x token x family x seed grid, exactly once; resumable."""
    merged = loaded(config, overrides)
    from lmu_dist.launch.ladder import ladder as run_ladder

    with show.bars() as bars:
        result = run_ladder(merged, tracking_uri(), bars.show, rerun)
    tell(result.notes)
    if as_json:
        cells = [
            asdict(f.record) | {"run_id": f.run_id, "folder": str(f.cell.folder), "was_done": f.already_done}
            for f in result.finished
        ]
        print(json.dumps({"cells": cells, "failures": result.failures}))
    else:
        show.ladder(result, tracking_uri())
    return 1 if result.failures else 0


@cli.command()
@job
@settings
@click.option("-o", "--output", default="tuned.yaml", show_default=True, help="Where the winners go.")
@as_json
def tune(config: str, overrides: tuple[str, ...], output: str, as_json: bool) -> int:
    """Hyper-parameter search with ASHA, per family and size; writes the winners as a YAML fragment for ladders."""
    merged = loaded(config, overrides)
    from lmu_dist.launch.tune import tune as search
    from lmu_dist.launch.winners import sensitivity, write_winners

    with show.bars() as bars:
        searches, notes = search(merged, tracking_uri(), bars.show)
    winners = open_folder(place(output))
    figure = winners.with_suffix(".png")
    with local_first(winners.parent) as folder:
        write_winners(folder / winners.name, merged, searches)
        sensitivity(folder / figure.name, merged, searches)
    tell(notes)
    if as_json:
        print(json.dumps({"searches": [asdict(s) for s in searches], "winners": str(winners), "figure": str(figure)}))
    else:
        show.tune(searches, winners, figure)
    return 0 if all(s.best and not s.failures for s in searches) else 1


@cli.command()
@job
@settings
@click.option("--calibrate", is_flag=True, help="First measure a step of every cell, on the cluster (or a local one).")
@as_json
def plan(config: str, overrides: tuple[str, ...], calibrate: bool, as_json: bool) -> None:
    """The whole ladder without running it: cells, parameters, FLOPs, memory, time, cost, and what it could tell."""
    merged = loaded(config, overrides)
    from lmu_dist.planning.cost import plan as cost_of
    from lmu_dist.planning.power import power

    if calibrate:
        from lmu_dist.launch.calibrate import calibrate as measure

        with show.bars() as bars:
            measure(merged, bars.show)
    costs, told = cost_of(merged), power(merged)
    if as_json:
        print(json.dumps({"cells": [asdict(line) for line in costs.lines], "power": asdict(told), **costs.totals()}))
    else:
        show.plan(costs, told, merged.plan)
