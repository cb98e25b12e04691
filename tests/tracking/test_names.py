"""Runs are found by what tables print of them: name, key, start of a key, MLflow id."""

from pathlib import Path

import pytest

from lmu_dist.config import ConfigError
from lmu_dist.tracking.names import folder_of
from lmu_dist.tracking.new_run import create_run
from lmu_dist.tracking.runs import retire_run
from lmu_dist.tracking.store import Store, default_uri
from lmu_dist.tracking.studies import open_study


def test_a_run_is_found_by_its_name_key_or_id(tmp_path: Path):
    store = Store(default_uri(tmp_path))
    keys = ["ab" * 32, "abab1" + "0" * 59]
    names = [f"lmu-3K-25K-s0-{key[:12]}" for key in keys]
    run_ids = list[str]()
    for experiment, key, name in zip("ef", keys, names, strict=True):
        (tmp_path / name).mkdir()
        run_ids.append(create_run(store, *open_study(store, experiment, "train"), name, key, str(tmp_path / name)))
    study = open_study(store, "e", "train")[1]
    for reference in (names[0], keys[0], keys[0][:12], keys[0][:5], run_ids[0]):
        assert folder_of(store, reference) == tmp_path / names[0]
    with pytest.raises(ConfigError, match=rf"'abab' names 2 runs .*; give one of: {names[1]} \({run_ids[1]}\), {names[0]}"):
        folder_of(store, "abab")
    for reference in ("nope", "x' OR 'y", study):
        with pytest.raises(ConfigError, match=r"no run with this name, key or id in .*; `lmu-dist status EXPERIMENT` prints"):
            folder_of(store, reference)
    retire_run(store, run_ids[0])
    assert folder_of(store, names[0]) == tmp_path / names[0]
    (tmp_path / names[0]).rmdir()
    with pytest.raises(ConfigError, match="is not on this machine; give the path that it has here"):
        folder_of(store, names[0])
