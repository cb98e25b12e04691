"""Keys of cells: what is in them, and what is not."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_corpus

from lmu_dist.config import Config, parse, with_settings
from lmu_dist.config.run import TrainConfig
from lmu_dist.data.corpus import Corpus
from lmu_dist.data.prepare import prepare
from lmu_dist.launch import cell as cells
from lmu_dist.launch.cell import Cell, at_half_rate, make_cell
from lmu_dist.models import registry

OWN = """
from lmu_dist.models.family import Family
from lmu_dist.models.mixers.feed_forward import FeedForward

class Plain(Family):
    def mixer(self, shape, options):
        return FeedForward(shape.d_model, shape.d_model)
"""


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    write_corpus(tmp_path / "corpus")
    config = configured(tmp_path)
    return prepare(config.data, config.storage_folder)


def configured(folder: Path, **model: object) -> Config:
    return parse(
        {
            "storage": str(folder / "runs"),
            "data": {"source": "files", "files": [str(folder / "corpus" / "*.jsonl")], "tokenizer": {"vocab_tokens": 400}},
            "model": {"n_params": 3000, **model},
            "train": {"tokens": 25_600, "batch_tokens": 256, "sequence_tokens": 32, "warmup_tokens": 2560},
        }
    )


def test_a_key_is_what_it_was(tmp_path: Path, corpus: Corpus):
    """A cell whose key changes without a change of meaning is trained again by everybody who has finished it.

    A new key of `train` is listed in cell.ADDED_TRAIN_KEYS with the value that changes nothing. A changed default, or anything
    else that moves losses, raises a version, and then the key here changes too.
    """
    config = configured(tmp_path)
    key = cells.key_of(
        config, cells.to_dict(config)["train"], make_cell(config, corpus).shape, registry.find("lmu"), data_digest="d"
    )
    assert key.startswith("593837d756de"), f"the key is {key}"


def test_neither_workers_nor_storage_nor_form_are_in_the_key(tmp_path: Path, corpus: Corpus):
    base = configured(tmp_path)
    same = {"cluster.n_workers": 1, "cluster.zero_stage": 3, "storage": str(tmp_path / "elsewhere"), "model.form": "fft"}
    assert make_cell(with_settings(base, same), corpus).key == make_cell(base, corpus).key
    for other in ({"model.theta_tokens": 16}, {"train.beta2": 0.9}, {"seed": 1}, {"model.n_params": 3100}):
        assert make_cell(with_settings(base, other), corpus).key != make_cell(base, corpus).key


def test_a_raised_version_changes_the_keys_of_its_family_only(tmp_path: Path, corpus: Corpus, monkeypatch):
    def keys() -> dict[str, str]:
        return {name: make_cell(configured(tmp_path, family=name), corpus).key for name in registry.names()}

    before = keys()
    monkeypatch.setattr(type(registry.find("lmu_attention")), "version", 2)
    after = keys()
    assert {name for name in before if before[name] != after[name]} == {"lmu_attention"}
    monkeypatch.setattr(cells, "VERSION", 2)
    assert not set(keys().values()) & {*before.values(), *after.values()}


def test_the_text_of_the_code_is_recorded_and_not_in_the_key(tmp_path: Path, corpus: Corpus, monkeypatch):
    before = make_cell(configured(tmp_path), corpus)
    monkeypatch.setattr(cells, "code_digest", lambda: "after a comment")
    after = make_cell(configured(tmp_path), corpus)
    assert (after.code_digest, after.key, after.trunk) == ("after a comment", before.key, before.trunk)


def test_an_added_key_of_train_changes_no_key_at_the_value_that_changes_nothing(tmp_path: Path, corpus: Corpus, monkeypatch):
    config = configured(tmp_path)
    arguments = (make_cell(config, corpus).shape, registry.find("lmu"), "d")
    train = cells.to_dict(config)["train"]
    assert train.keys() == TrainConfig.__dataclass_fields__.keys()
    before = cells.key_of(config, train, *arguments)
    monkeypatch.setattr(cells, "ADDED_TRAIN_KEYS", {"label_smoothing": 0.0})
    assert cells.key_of(config, train | {"label_smoothing": 0.0}, *arguments) == before
    assert cells.key_of(config, train | {"label_smoothing": 0.1}, *arguments) != before


def test_a_users_family_is_known_by_its_text_wherever_it_lies(tmp_path: Path, corpus: Corpus):
    def cell(folder: str, text: str) -> Cell:
        path = tmp_path / folder / "plain.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        registry._user_families.clear()  # as in another process
        return make_cell(configured(tmp_path, family=f"{path}:Plain"), corpus)

    first, moved, changed = cell("a", OWN), cell("b", OWN), cell("a", OWN + "# more\n")
    assert first.key == moved.key != changed.key
    assert first.name.startswith("plain-3k-25.6k-s0-")
    assert first.family_source is not None
    assert (first.family_version, first.family_source.text) == (first.family_source.digest, OWN)
    registry.register(changed.family_source)
    assert at_half_rate(changed).retry_of == changed.key
    assert replace(first, family_source=None).folder == first.folder
