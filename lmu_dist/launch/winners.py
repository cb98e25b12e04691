"""Writes the results of hyper-parameter searches: a YAML fragment for ladders, and a figure of loss against learning rate."""

from collections.abc import Sequence
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from lmu_dist import records
from lmu_dist.config import Config
from lmu_dist.launch.tune import SearchResult
from lmu_dist.report.sensitivity import SearchTrials, draw


def write_winners(path: Path, config: Config, searches: Sequence[SearchResult]) -> None:
    """Writes `ladder.tuned` with the best settings of every search, each with its loss and its key in a comment."""
    entries = []
    for search in searches:
        if search.best is None:
            continue
        record = search.best.record
        entry = CommentedMap(family=search.family, n_params=search.n_params, tokens=config.train.tokens)
        entry["settings"] = dict(search.best.settings)
        comment = f"{record.val_loss_nats:.4f} nats after {record.tokens:,} tokens, best of {len(search.trials)}"
        entry.yaml_set_start_comment(f"{comment}; key {record.key[:12]}", indent=4)
        entries.append(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    fragment = CommentedMap(ladder={"tuned": entries})
    comment = f"Best settings found by `lmu-dist tune` in experiment {config.experiment}. A ladder uses them with"
    fragment.yaml_set_start_comment(f"{comment}\n  include: {path.name}")
    yaml = YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    with open(path, "w", encoding="utf-8") as file:
        yaml.dump(fragment, file)


def plot_sensitivity(path: Path, config: Config, searches: Sequence[SearchResult]) -> Path:
    """Plots the loss against the learning rate, or against the first tuned numeric setting if the rate was not tuned."""
    assert config.tune is not None
    space = config.tune.space
    numeric = [key for key, r in space.items() if all(isinstance(v, int | float) for v in r.choice or ())]
    key = "train.learning_rate" if "train.learning_rate" in space else (numeric or list(space))[0]

    def points(search: SearchResult, complete: bool) -> list[tuple[float, float]]:
        chosen = [t for t in search.trials if (t.record.status == records.COMPLETE) == complete]
        return [(t.settings[key], t.record.val_loss_nats) for t in chosen if t.record.val_loss_nats == t.record.val_loss_nats]

    tries = [SearchTrials(f"{s.family}, N = {s.n_params:,}", points(s, True), points(s, False)) for s in searches]
    draw(path, key, tries, logarithmic=key == "train.learning_rate" or space[key].log is not None)
    return path
