"""docs/mlflow.md: every snippet runs with a plain MLflow client, and every name of a run record is documented."""

import re
from dataclasses import fields
from pathlib import Path

import mlflow
import pytest
from mlflow.tracking import MlflowClient
from simulate import make_record

from lmu_dist import records
from lmu_dist.records import RunRecord
from lmu_dist.report.write import ReportFiles

PAGE = (Path(__file__).parents[2] / "docs" / "mlflow.md").read_text()
DEFAULT_URI = "sqlite:///mlflow.db"  # the store of the first snippet, replaced by that of the test
SNIPPETS = re.findall(r"```(python|filter)\n(.*?)```", PAGE, re.DOTALL)


def test_every_snippet_of_the_documentation_runs(written: ReportFiles, tracking: str, capsys: pytest.CaptureFixture):
    assert sum(text.count(DEFAULT_URI) for _, text in SNIPPETS) == 1, "the first snippet names the store"
    namespace: dict = {}
    try:
        for kind, text in SNIPPETS:
            if kind == "python":
                exec(text.replace(DEFAULT_URI, tracking), namespace)
            else:
                found = MlflowClient(tracking).search_runs([namespace["experiment"].experiment_id], text.strip())
                assert found, text
    finally:
        mlflow.set_tracking_uri(None)
    assert {kind for kind, _ in SNIPPETS} == {"python", "filter"}
    output = capsys.readouterr().out
    assert "loss is nan at step 7" in output
    assert "efficiency_factor/lmu_over_transformer/laws/1000000_low" in output
    assert "report.html" in output
    assert len(namespace["cells"]) >= 1
    assert len(namespace["by_position"]) == 256


def test_every_name_of_a_record_is_documented():
    names = [name for kind in ("params", "metrics", "tags") for name in record_names(kind)]
    names += [value for key, value in vars(records).items() if key.isupper() and isinstance(value, str) and "/" in value]
    assert len(names) > len(fields(RunRecord))
    for name in names:
        assert f"`{name}`" in PAGE, name


def record_names(kind: str) -> list[str]:
    return list(make_record("lmu", 1000, 1000, 0, 4.0).columns(kind))
