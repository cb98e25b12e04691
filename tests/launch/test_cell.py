"""Keys of cells: which settings and versions change them, and which do not."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import write_corpus

from lmu_dist.config import Config, parse, with_settings
from lmu_dist.config.run import TrainConfig
from lmu_dist.data.corpus import Corpus
from lmu_dist.data.prepare import prepare
from lmu_dist.launch import new_cell as cells
from lmu_dist.launch.cell import Cell
from lmu_dist.launch.new_cell import at_half_rate, make_cell
from lmu_dist.launch.record import log_start
from lmu_dist.models import registry
from lmu_dist.tracking.metrics_log import MetricsLog

PLAIN_FAMILY = """
from lmu_dist.models.family import Family
from lmu_dist.models.mixers.feed_forward import FeedForward

class Plain(Family):
    def mixer(self, shape, options):
        return FeedForward(shape.d_model, shape.d_model)
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    write_corpus(tmp_path / "corpus")
    config = make_config(tmp_path)
    return prepare(config.data, config.storage_folder)


def make_config(folder: Path, **model: object) -> Config:
    return parse(
        {
            "storage": str(folder / "runs"),
            "data": {"source": "files", "files": [str(folder / "corpus" / "*.jsonl")], "tokenizer": {"vocab_tokens": 400}},
            "model": {"n_params": 3000, **model},
            "train": {"tokens": 25_600, "batch_tokens": 256, "sequence_tokens": 32, "warmup_tokens": 2560},
        }
    )


def test_key_is_unchanged(tmp_path: Path, corpus: Corpus):
    """If the key changes although the losses do not, all finished runs are trained again.

    List a new key of `train` in config.ADDED_TRAIN_KEYS with the value that changes nothing. If a default or anything else that
    moves losses changes, raise a version and update the key here.
    """
    config = make_config(tmp_path)
    key = cells.key_of(
        config, cells.to_dict(config)["train"], make_cell(config, corpus).shape, registry.find("lmu"), data_digest="d"
    )
    assert key.startswith("593837d756de"), f"the key is {key}"


def test_budgets_that_repeat_the_corpus_are_logged(tmp_path: Path, corpus: Corpus, caplog: pytest.LogCaptureFixture):
    n_unique = corpus.manifest.unique_tokens("train", 32)
    enough, more = (with_settings(make_config(tmp_path), {"train.tokens": n}) for n in (n_unique // 256 * 256, 100 * 25_600))
    made = [make_cell(config, corpus) for config in (enough, more)]
    cells.log_repeats(made[:1])
    assert not caplog.messages
    cells.log_repeats(made)
    [line] = caplog.messages
    assert line.startswith(f"epochs: the corpus has {n_unique:,} training tokens; budgets above it repeat its rows")
    assert line.endswith(f"their runs: 2,560,000 ({2_560_000 / n_unique:.3g} epochs)")


def test_key_does_not_depend_on_workers_storage_and_form(tmp_path: Path, corpus: Corpus):
    base = make_config(tmp_path)
    same = {"cluster.n_workers": 1, "cluster.zero_stage": 3, "storage": str(tmp_path / "elsewhere"), "model.form": "fft"}
    same |= {"model.max_reduced_order": 10, "train.log_every_steps": 7}  # the first: above what this small model has
    changed, unchanged = make_cell(with_settings(base, same), corpus), make_cell(base, corpus)
    assert (changed.key, changed.trunk) == (unchanged.key, unchanged.trunk)
    for other in ({"model.theta_tokens": 16}, {"train.beta2": 0.9}, {"seed": 1}, {"model.n_params": 3100}):
        assert make_cell(with_settings(base, other), corpus).key != make_cell(base, corpus).key


def test_family_version_changes_only_the_keys_of_its_family(tmp_path: Path, corpus: Corpus, monkeypatch):
    def keys() -> dict[str, str]:
        return {name: make_cell(make_config(tmp_path, family=name), corpus).key for name in registry.names()}

    before = keys()
    monkeypatch.setattr(type(registry.find("lmu_attention")), "version", 2)
    after = keys()
    assert {name for name in before if before[name] != after[name]} == {"lmu_attention"}
    monkeypatch.setattr(cells, "VERSION", 2)
    assert not set(keys().values()) & {*before.values(), *after.values()}


def test_code_digest_is_recorded_and_does_not_change_the_key(tmp_path: Path, corpus: Corpus, monkeypatch):
    before = make_cell(make_config(tmp_path), corpus)
    monkeypatch.setattr(cells, "code_digest", lambda: "after a comment")
    after = make_cell(make_config(tmp_path), corpus)
    assert (after.code_digest, after.key, after.trunk) == ("after a comment", before.key, before.trunk)


def test_added_train_key_at_its_neutral_value_does_not_change_the_key(tmp_path: Path, corpus: Corpus, monkeypatch):
    config = make_config(tmp_path)
    arguments = (make_cell(config, corpus).shape, registry.find("lmu"), "d")
    train = cells.to_dict(config)["train"]
    assert train.keys() == TrainConfig.__dataclass_fields__.keys()
    before = cells.key_of(config, train, *arguments)
    monkeypatch.setitem(cells.ADDED_TRAIN_KEYS, "label_smoothing", 0.0)
    assert cells.key_of(config, train | {"label_smoothing": 0.0}, *arguments) == before
    assert cells.key_of(config, train | {"label_smoothing": 0.1}, *arguments) != before


def test_gradient_precision_is_in_the_key_where_it_changes_losses(tmp_path: Path, corpus: Corpus):
    shape = make_cell(make_config(tmp_path), corpus).shape

    def keys(precision: str) -> list[str]:
        """With gradients summed in fp32, in bf16, and as computed by a version without the setting."""
        config = with_settings(make_config(tmp_path), {"train.precision": precision})
        train = cells.to_dict(config)["train"]
        earlier = {key: value for key, value in train.items() if key != "gradient_precision"}
        settings = (train, {**train, "gradient_precision": "bf16"}, earlier)
        return [cells.key_of(config, each, shape, registry.find("lmu"), "d") for each in settings]

    assert len(set(keys("fp32"))) == 1
    in_fp32, in_bf16, earlier = keys("bf16")
    assert in_fp32 != in_bf16 == earlier


def test_rows_of_the_validation_split_are_in_the_key_unless_all_are_evaluated(tmp_path: Path, corpus: Corpus):
    """Earlier versions evaluated the first rows: their runs keep their keys only where that makes no difference."""
    config, n_tokens = make_config(tmp_path), corpus.n_rows("validation", 32) * 32

    def cell(eval_tokens: int) -> Cell:
        return make_cell(with_settings(config, {"train.eval_tokens": eval_tokens}), corpus)

    n_rows = n_tokens // 32
    found = [cell(n).validation_rows for n in (n_tokens + 31, n_tokens, n_tokens - 1, 31)]
    assert found == ["", "", f"{n_rows - 1} of {n_rows}", f"1 of {n_rows}"]
    part, train = cell(32), cells.to_dict(config)["train"] | {"eval_tokens": 32}
    assert cells.key_of(part.config, train, part.shape, registry.find("lmu"), corpus.manifest.data_digest) != part.key


def test_key_of_a_users_family_depends_on_its_text_and_not_on_its_path(tmp_path: Path, corpus: Corpus):
    def cell(folder: str, text: str) -> Cell:
        path = tmp_path / folder / "plain.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        registry._user_families.clear()  # as in another process
        return make_cell(make_config(tmp_path, family=f"{path}:Plain"), corpus)

    first, moved, changed = cell("a", PLAIN_FAMILY), cell("b", PLAIN_FAMILY), cell("a", PLAIN_FAMILY + "# more\n")
    assert first.key == moved.key != changed.key
    assert first.name.startswith("plain-3k-25.6k-s0-")
    assert first.family_source is not None
    assert (first.family_version, first.family_source.text) == (first.family_source.digest, PLAIN_FAMILY)
    registry.register(changed.family_source)
    assert at_half_rate(changed).retry_of == changed.key
    assert replace(first, family_source=None).folder == first.folder


def test_a_setting_that_may_change_or_is_not_set_is_no_param(tmp_path: Path, corpus: Corpus):
    """MLflow refuses all params of a request if one of them changes, and each makes every reading of a run slower."""
    log = MetricsLog(tmp_path / "log", "run")
    log_start(make_cell(make_config(tmp_path), corpus), log)
    [params] = [entry["values"] for _, entry in log.pending() if entry["kind"] == "params"]
    in_train = {key.removeprefix("train.") for key in params if key.startswith("train.")}
    assert in_train == {key for key, value in asdict(TrainConfig()).items() if value is not None} - {"log_every_steps"}
    assert "data.dataset" not in params
    assert params["model.base_n_params"] == "None"  # keys of `model` are logged: a family's option may be set to None
