"""From a YAML file and dotted overrides to one frozen, validated Config. Builds nothing.

Precedence: defaults < files under `include` < the YAML < `section.key=value`. Every command goes through `load`.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lmu_dist.config.run import ClusterConfig, DataConfig, ModelConfig, TrainConfig
from lmu_dist.config.study import LadderConfig, PlanConfig, TuneConfig
from lmu_dist.config.types import STRICT, ConfigError, Name, whole


@dataclass(frozen=True, config=STRICT)
class Config:
    """Everything a run, or a grid of runs, is made from."""

    experiment: Name = "lmu-dist"
    storage: str = "runs"  # prepared data, checkpoints, spools; shared by all nodes of the cluster
    seed: Annotated[int, BeforeValidator(whole), Field(ge=0, lt=2**63)] = 0
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    cluster: ClusterConfig = ClusterConfig()
    ladder: LadderConfig | None = None
    tune: TuneConfig | None = None
    plan: PlanConfig = PlanConfig()

    @property
    def storage_folder(self) -> Path:
        """Storage as an absolute path: Ray's workers run in folders of their own."""
        return Path(self.storage).expanduser().absolute()

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if "://" in self.storage:
            raise ValueError(f"storage: {self.storage!r} is no folder; give a path on a disk that all nodes share")
        train = self.train
        if self.ladder is None and train.warmup_steps >= train.n_steps:  # the ladder has budgets of its own
            raise ValueError(f"train.warmup_tokens ({train.warmup_tokens}) must be less than train.tokens ({train.tokens})")
        rows, workers = self.train.batch_rows, self.cluster.n_workers
        if rows % workers:
            raise ValueError(
                f"cluster.n_workers ({workers}) must divide the {rows} rows of a batch "
                "(train.batch_tokens / train.sequence_tokens)"
            )
        share, micro = rows // workers, self.cluster.micro_batch_rows
        if micro and share % micro:
            raise ValueError(f"cluster.micro_batch_rows ({micro}) must divide the {share} rows of a worker's batch")
        return self


GRIDS: dict[str, Any] = {"ladder": LadderConfig, "tune": TuneConfig}
_ADAPTER = TypeAdapter(Config)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file, applies `a.b=c` overrides in order, validates. Raises ConfigError with one line per fault.

    `include: FILE` (or a list) takes what the file does not say itself from others, paths relative to it; of several, the later
    holds. Sections are merged key by key, lists are replaced.
    """
    return parse(_override(_read(Path(path)), overrides))


def sources(path: Path) -> list[Path]:
    """The YAML file and all that it includes, for who sends them elsewhere. Raises ConfigError."""
    return [path, *(source for name in _parts(path)[1] for source in sources(path.parent / name))]


def _read(path: Path, including: tuple[Path, ...] = ()) -> dict[str, Any]:
    tree, names = _parts(path)
    merged: dict[str, Any] = {}
    for name in names:
        other = path.parent / name
        if other.resolve() in including:
            raise ConfigError(f"{path} includes {name}, which includes it; take one of the two out")
        merged = _merge(merged, _read(other, (*including, path.resolve())))
    return _merge(merged, tree)


def _parts(path: Path) -> tuple[dict[str, Any], list[str]]:
    """What a file says itself, and the names it includes."""
    yaml = YAML(typ="safe", pure=True)  # YAML 1.2: 1e-3 is a number, a key given twice is an error
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}; give the path of a YAML file such as jobs/train.yaml") from e
    except (YAMLError, ValueError) as e:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path} must hold keys and values, not a {type(tree).__name__}")
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
    """Validates a nested mapping. Raises ConfigError."""
    try:
        return _ADAPTER.validate_json(json.dumps(tree), strict=True)
    except TypeError as e:
        raise ConfigError(f"configuration: {e}; keys are words, values are numbers, text or lists") from e
    except ValidationError as e:
        raise ConfigError("\n".join(dict.fromkeys(_explain(error) for error in e.errors()))) from e


def to_dict(config: Config) -> dict[str, Any]:
    """The whole configuration, defaults included, as plain JSON types; `parse` gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}, the dotted keys of the command line."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """The configuration with some dotted keys set. Raises ConfigError."""
    tree = to_dict(config)
    for dotted, value in settings.items():
        _set(tree, dotted, value)
    return parse(tree)


def _override(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    yaml = YAML(typ="safe", pure=True)
    for text in overrides:
        dotted, equals, value = text.partition("=")
        if not equals or not dotted:
            raise ConfigError(f"override {text!r} is not of the form section.key=value")
        try:
            _set(tree, dotted, yaml.load(value) if value else None)
        except (YAMLError, ValueError) as e:
            if isinstance(e, ConfigError):
                raise
            raise ConfigError(f"{dotted}: cannot read the value {value!r}; quote it as in YAML") from e
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


def _explain(error: Any) -> str:
    """One line from one pydantic error: the dotted key, what is wrong, the fix."""
    key = ".".join(str(part) for part in error["loc"] if not str(part).startswith(("function-", "constrained-")))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [*flatten(to_dict(Config())), "include"]
        known += [f"{name}.{f.name}" for name, part in GRIDS.items() for f in dataclasses.fields(part)]
        near = difflib.get_close_matches(key, known, 1) or [k for k in known if k.endswith("." + key.split(".")[-1])]
        return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "; see lmu_dist/config/ for all keys")
    given = error.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{key + ': ' if key else ''}{message[:1].lower() + message[1:]}{shown}"
