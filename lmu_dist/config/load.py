"""Loading of configurations: a YAML file and dotted overrides in, one frozen, validated Config out.

Precedence: defaults < files under `include` < the YAML file < overrides `section.key=value`. Every command calls `load`.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from lmu_dist.config.explain import explain
from lmu_dist.config.run import ClusterConfig, DataConfig, ModelConfig, TrainConfig
from lmu_dist.config.study import LadderConfig, PlanConfig, TuneConfig
from lmu_dist.config.types import STRICT, ConfigError, Folder, Name, Section, open_folder, whole
from lmu_dist.config.yaml_files import MAX_BYTES, MAX_DEPTH, load_yaml


@dataclass(frozen=True, config=STRICT)
class Config:
    """The whole configuration of a run or of a grid of runs."""

    experiment: Name = "lmu-dist"  # name of the MLflow experiment and of the folder of its runs
    storage: str = (
        "runs"  # where corpora, checkpoints and records go: a folder that all nodes share, or a URI such as s3://bucket/runs
    )
    seed: Annotated[int, BeforeValidator(whole), Field(ge=0, lt=2**63)] = (
        0  # random seed of initial weights and of the order of rows
    )
    data: Annotated[DataConfig, Section] = DataConfig()
    model: Annotated[ModelConfig, Section] = ModelConfig()
    train: Annotated[TrainConfig, Section] = TrainConfig()
    cluster: Annotated[ClusterConfig, Section] = ClusterConfig()
    ladder: LadderConfig | None = None
    tune: TuneConfig | None = None
    plan: Annotated[PlanConfig, Section] = PlanConfig()

    @property
    def storage_folder(self) -> Folder:
        """`storage` as an absolute path, or as a universal-pathlib path for a URI."""
        return open_folder(self.storage)

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        try:
            open_folder(self.storage)
        except ConfigError as e:
            raise ValueError(f"storage: {e}") from e
        train = self.train
        if self.ladder is None and train.warmup_steps >= train.n_steps:  # the ladder has budgets of its own
            raise ValueError(
                f"train.warmup_tokens ({train.warmup_tokens}) must be less than train.tokens ({train.tokens}); change one"
            )
        if (self.ladder or self.tune) and (train.rate_token_exponent or train.earlier_tokens):
            raise ValueError(
                "train.rate_token_exponent is for a single run; in a ladder set ladder.learning_rate.token_exponent and "
                "at_tokens, and leave it out of a search, which has one budget"
            )
        rows, workers = self.train.batch_rows, self.cluster.n_workers
        if rows < workers:
            raise ValueError(
                f"cluster.n_workers ({workers}) must not be more than the {rows} rows of a batch "
                "(train.batch_tokens / train.sequence_tokens)"
            )
        if self.ladder is None and self.cluster.has_ranks_on_one_gpu:  # the cells of a ladder have their own n_workers
            raise ValueError(
                f"cluster.gpus_per_worker={self.cluster.gpus_per_worker:g} would put several of the {workers} workers of a run "
                "on one GPU, which NCCL refuses; set cluster.n_workers=1 (in a ladder, by ladder.workers), or "
                "cluster.gpus_per_worker=1"
            )
        return self


COMMON_MODEL_KEYS = ("family", "n_params", "n_blocks", "base_n_params")  # of every family
MAX_FILES = 100  # that a file may include, those that they include themselves counted too
_ADAPTER = TypeAdapter(Config)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `a.b=c` overrides in order and validates. Raises ConfigError with one line per mistake.

    `include: FILE` (or a list of files) supplies keys that the file itself does not set. Paths are relative to the file; later
    files win over earlier ones. Sections are merged key by key, lists are replaced.
    """
    return parse(_override(_read(Path(path), {}), overrides))


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """A copy of the configuration with `a.b=c` overrides applied in order. Raises ConfigError as `load` does."""
    return parse(_override(to_dict(config), overrides))


def sources(path: Path) -> list[Path]:
    """The YAML file and all files it includes, recursively. Used to send them to a cluster. Raises ConfigError."""
    found = dict[Path, dict[str, Any]]()
    _read(path, found)
    return list(found)


def _read(path: Path, known: dict[Path, dict[str, Any]], including: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The keys of a file and of the files it includes. `known`: those of the files that were read before."""
    if path in known:
        return known[path]
    if len(known) >= MAX_FILES:
        raise ConfigError(f"{path}: more than {MAX_FILES} files include each other; write fewer files")
    known[path] = {}  # so that a file comes before those it includes
    tree, names = _parts(path)
    merged: dict[str, Any] = {}
    for name in names:
        other = path.parent / name
        if other.resolve() in (*including, path.resolve()):
            raise ConfigError(f"{path} includes {name}, which includes it; remove one of the two includes")
        merged = _merge(merged, _read(other, known, (*including, path.resolve())))
    known[path] = _merge(merged, tree)
    return known[path]


def _parts(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The keys that a file sets itself, and the names of the files it includes."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{path} has more than {MAX_BYTES / 1e6:.0f} MB; give a YAML file such as jobs/train.yaml")
        tree = load_yaml(content.decode("utf-8-sig"), str(path))
    except (OSError, ValueError) as e:
        if isinstance(e, ConfigError):
            raise
        reason = "it is not UTF-8 text" if isinstance(e, UnicodeDecodeError) else getattr(e, "strerror", None) or e
        raise ConfigError(f"cannot read {path}: {reason}; give the path of a YAML file such as jobs/train.yaml") from e
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path} must hold keys and values (key: value), not a {type(tree).__name__}")
    tree = tree or {}
    names = tree.pop("include", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: include must be the name of a file, or a list of names")
    return tree, names


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def parse(tree: dict[str, Any]) -> Config:
    """Validates a nested mapping and returns the Config. Raises ConfigError."""
    try:
        return _ADAPTER.validate_json(json.dumps(_with_recipe_except(_with_options(tree))), strict=True)
    except ValidationError as e:
        raise ConfigError(explain(e, Config)) from e


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration with all defaults, as plain JSON types. `parse` is the inverse."""
    # As by dataclasses.asdict, which copies every value first: for a grid of thousands of cells that takes seconds.
    tree = json.loads(json.dumps(config, default=_fields))
    tree["model"] |= tree["model"].pop("options")
    return tree


def _fields(section: Any) -> dict[str, Any]:
    return {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}


def _with_options(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with the keys of `model` that belong to a family under model.options, as ModelConfig has them.

    A key without a value is left to the family's default.
    """
    model = tree.get("model")
    if not isinstance(model, dict):
        return tree
    own = {key: value for key, value in model.items() if key in COMMON_MODEL_KEYS}
    options = {key: value for key, value in model.items() if key not in own and value is not None}
    return tree | {"model": own | {"options": options}}


def _with_recipe_except(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with the keys of `train` that it sets itself noted under train.recipe_except, if it names a recipe.

    Afterwards a key that was set to its default looks like one that was not set. In a tree that has all keys, as
    `to_dict` makes it, those that differ from their defaults count as set.
    """
    train = tree.get("train")
    if not isinstance(train, dict) or train.get("recipe") is None or train.get("recipe_except") is not None:
        return tree
    defaults = dataclasses.asdict(TrainConfig()) if "recipe_except" in train else {}
    own = [key for key, value in train.items() if key not in defaults or value != defaults[key]]
    return tree | {"train": train | {"recipe_except": [key for key in own if key not in ("recipe", "recipe_except")]}}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens a nested mapping to dotted keys: {'a': {'b': 1}} -> {'a.b': 1}."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """A copy of the configuration with some dotted keys set to new values. Raises ConfigError."""
    tree = to_dict(config)
    for dotted, value in settings.items():
        _set(tree, dotted, value)
    return parse(tree)


def _override(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")) or not key.isprintable():
            raise ConfigError(f"override {text[:100]!r} is not of the form section.key=value")
        if key.count(".") >= MAX_DEPTH:
            raise ConfigError(f"override {text[:60]!r}...: no key has that many sections")
        _set(tree, key, load_yaml(value, f"{key}={value[:60]!r}") if value else None)
    return tree


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise ConfigError(f"{dotted}: {section} is a value, not a section")
    tree[key] = value
