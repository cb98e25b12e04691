"""The command line: --help is fast, invalid input exits with 2 and one line and leaves no files, and `fit` prints laws."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmu_dist.cli import main
from lmu_dist.scaling.laws import HOFFMANN

JOB = str(Path(__file__).parents[1] / "jobs" / "train.yaml")


def test_help_imports_nothing_heavy():
    code = "import sys, lmu_dist.cli; print([m for m in ('torch', 'ray', 'mlflow', 'deepspeed') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", JOB, "train.lerning_rate=1"], "did you mean train.learning_rate?"),
        (["train", JOB, "train.tokens=x"], "train.tokens"),
        (["train", "missing.yaml"], "cannot read missing.yaml"),
        (["train", JOB, "data.source=files", "data.files=[none/*.txt]"], "no file matches none/*.txt"),
        (["prepare", JOB, "data.tokenizer.kind=file", "data.tokenizer.path=none.json"], "no tokenizer at none.json"),
        (["generate", "no-such-run"], "no-such-run"),
        (["export", "no-such-run", "out"], "no-such-run"),
        (["report", "no-such-experiment", "-o", "out"], "no experiment 'no-such-experiment'"),
        (["fit", "missing.csv", "--n", "N", "--d", "D", "--loss", "L"], "missing.csv does not exist"),
        (["fit", JOB, "--n", "N", "--d", "D", "--loss", "L"], "no column 'N'"),
    ],
)
def test_invalid_input_exits_with_two(arguments, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    started_at = time.monotonic()
    assert main(arguments) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("lmu-dist:")]) == 1
    assert not (tmp_path / "out").exists()
    assert not any(p.name.startswith("lmu-") for p in tmp_path.rglob("*"))
    assert time.monotonic() - started_at < 60


def write_table(path: Path, sizes: tuple[float, ...]) -> None:
    rows = [
        (n, d, float(HOFFMANN.loss(n, d)) * (1 + 0.002 * (-1) ** i))
        for n in sizes
        for i, d in enumerate((1e8, 1e9, 1e10, 1e11))
    ]
    path.write_text("N,D,L,kind\n" + "".join(f"{n},{d},{loss},a\n" for n, d, loss in rows) + "1,1,nan,a\n1e7,1e9,9,b\n")


def test_fit_prints_a_law_of_a_csv_table(tmp_path: Path, capfd: pytest.CaptureFixture):
    arguments = [
        "fit",
        str(tmp_path / "t.csv"),
        "--n",
        "N",
        "--d",
        "D",
        "--loss",
        "L",
        "--where",
        "kind=a",
        "--resamples",
        "100",
    ]
    write_table(tmp_path / "t.csv", (1e6, 1e7, 1e8, 1e9))
    assert main([*arguments, "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["law"] == "chinchilla"
    assert facts["n_rows"] == 16
    assert facts["parameters"].keys() == facts["intervals"].keys() == {"E", "A", "B", "alpha", "beta"}
    assert facts["parameters"]["alpha"] == pytest.approx(0.34, rel=0.05)
    assert facts["certificate"]["ok"] is True
    assert facts["holdout"]["n_rows"] == 4
    assert [(out["reason"], out["rows"]) for out in facts["left_out"]] == [
        ("excluded by --where", [18]),
        ("L is missing or not finite", [17]),
    ]
    assert main(arguments) == 0
    output = capfd.readouterr().out
    assert f"{facts['parameters']['alpha']:.6g}" in output
    assert "left out     1 row: L is missing" in output
    write_table(tmp_path / "t.csv", (1e7,))
    assert main([*arguments, "--json"]) == 3
    facts = json.loads(capfd.readouterr().out)
    assert facts["certificate"]["ok"] is False
    assert facts["parameters"] == facts["intervals"] == {}
    assert main(arguments) == 3
    assert "NOT DETERMINED" in capfd.readouterr().out


def test_relative_paths_in_a_ray_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lmu_dist.cli import common

    monkeypatch.chdir(tmp_path)
    assert common.resolve_path("runs") == str(tmp_path / "runs")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert common.resolve_path("runs") == str(tmp_path / "home" / "lmu-dist" / "runs")
    assert common.tracking_uri() == f"sqlite:///{tmp_path}/home/lmu-dist/mlflow.db"
    monkeypatch.setenv("LMU_DIST_HOME", "s3://bucket/studies/")
    assert common.resolve_path("runs") == "s3://bucket/studies/runs"
    assert common.resolve_path("/data/runs") == "/data/runs"
    assert common.resolve_path("s3://other/runs") == "s3://other/runs"


def test_ctrl_c_prints_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lmu_dist.cli.runs.load_config", interrupt)
    assert main(["plan", "jobs/train.yaml"]) == 1
    [line] = [line for line in capfd.readouterr().err.splitlines() if line]
    assert line == "lmu-dist: interrupted; run the same command again to continue"
