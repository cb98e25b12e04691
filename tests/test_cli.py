"""The command line: --help is fast, invalid input exits with 2 and one line and leaves no files, and `fit` prints laws."""

import io
import json
import os
import platform
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from ray.exceptions import GetTimeoutError, RayTaskError
from rich.console import Console

from lmu_dist import show
from lmu_dist.cli import main, progress
from lmu_dist.config import ConfigError, FailedError
from lmu_dist.scaling.published import HOFFMANN
from lmu_dist.show import tables
from lmu_dist.tracking.progress import Row

JOB = str(Path(__file__).parents[1] / "jobs" / "train.yaml")


def test_help_imports_nothing_heavy():
    code = "import sys, lmu_dist.cli; print([m for m in ('torch', 'ray', 'mlflow', 'deepspeed') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", JOB, "train.lerning_rate=1"], "did you mean train.learning_rate?"),
        (["train", JOB, "storage=../../x"], "../../x leads out of"),
        (["plan", JOB, "storage=s3:/bucket/x"], "a URI has two slashes, as in s3://bucket/runs"),
        (
            ["plan", JOB, "model.family=lmu_modern", "model.form=fused", "model.qk_norm=true"],
            "model.qk_norm: form=fused has no QK-norm; set qk_norm to false, or form to chunked or null",
        ),
        (["train", "lmu-56K-2.5M-s0-0123456789ab"], "neither a YAML file such as jobs/train.yaml nor a run: there is"),
        (["train", JOB, "train.tokens=x"], "train.tokens"),
        (["train", "missing.yaml"], "cannot read missing.yaml"),
        (["train", JOB, "data.source=files", "data.files=[none/*.txt]"], "no file matches 'none/*.txt'"),
        (["prepare", JOB, "data.tokenizer.kind=file", "data.tokenizer.path=none.json"], "no tokenizer at none.json"),
        (["generate", "no-such-run"], "no-such-run"),
        (["export", "no-such-run", "out"], "no-such-run"),
        (["report", "no-such-experiment", "-o", "out"], "there is no MLflow store in "),
        (["fit", "missing.csv", "--n", "N", "--d", "D", "--loss", "L"], "missing.csv does not exist"),
        (["fit", JOB, "--n", "N", "--d", "D", "--loss", "L"], "no column 'N'"),
    ],
)
def test_invalid_input_exits_with_two(arguments, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    if "storage=../../x" in arguments:
        monkeypatch.setenv("LMU_DIST_HOME", str(tmp_path / "home"))
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
    assert (facts["version"], facts["file"], facts["level"]) == (2, str(tmp_path / "t.csv"), 0.9)
    assert facts["formula"] == "L = E + A/N^alpha + B/D^beta"
    assert (facts["columns"], facts["conditions"]) == ({"n": "N", "d": "D", "loss": "L"}, ["kind=a"])
    assert facts["n_rows"] == 16
    assert facts["parameters"].keys() == facts["intervals"].keys() == {"E", "A", "B", "alpha", "beta"}
    assert facts["parameters"]["alpha"] == pytest.approx(0.34, rel=0.05)
    assert facts["certificate"]["ok"] is True
    assert facts["holdout"]["n_rows"] == 4
    assert 0 < facts["misfit"]["typical_miss"] < 0.002  # the table's noise
    assert set(facts["misfit"]["worst_rows"]) <= set(map(str, range(1, 17)))
    assert [(out["reason"], out["rows"]) for out in facts["left_out"]] == [
        ("excluded by --where", [18]),
        ("L is missing or not finite", [17]),
    ]
    assert main(arguments) == 0
    output = capfd.readouterr().out
    assert f"{facts['parameters']['alpha']:.6g}" in output
    assert "left out     1 row: L is missing" in output
    assert "L = E + A/N^alpha + B/D^beta; N parameters, D training tokens, L nats per token" in output
    assert f"misses       {facts['misfit']['typical_miss']:.2%} at the median; the largest:\n" in output
    write_table(tmp_path / "t.csv", (1e7,))
    assert main([*arguments, "--json"]) == 3
    facts = json.loads(capfd.readouterr().out)
    assert facts["certificate"]["ok"] is False
    assert facts["parameters"] == facts["intervals"] == {}
    assert main(arguments) == 3
    assert "NOT DETERMINED" in capfd.readouterr().out


def test_fit_reads_standard_input_and_names_runs(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    rows = [
        f"n{n:g}d{d:g};{n:g};{share * d:g};{str(float(HOFFMANN.loss(n, share * d))).replace('.', ',')}\n"
        for n in (1e6, 1e7, 1e8, 1e9)
        for d in (1e8, 1e9, 1e10, 1e11)
        for share in (0.5, 1)
    ]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(("name;N;D;L\n" + "".join(rows)).encode())))
    arguments = ["--n", "N", "--d", "D", "--loss", "L", "--run", "name", "--resamples", "100"]
    assert main(["fit", "-", *arguments, "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert (facts["file"], facts["columns"]["run"], facts["n_rows"]) == ("-", "name", 16)
    assert facts["left_out"] == [{"reason": "not the last row of its run (name)", "rows": list(range(1, 33, 2))}]
    assert facts["parameters"]["alpha"] == pytest.approx(0.34, rel=1e-3)


def test_progress_is_shown_of_slow_work_only(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    monkeypatch.setattr(progress, "TICK_SECONDS", 0.02)
    with progress.slow_progress("fitting"):
        time.sleep(0.3)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.1)
    with progress.slow_progress("fitting") as report:
        time.sleep(0.6)
        report("resamples", 30, 1000)
        time.sleep(0.6)
    output = capfd.readouterr()
    assert [line.split(":")[0].split()[0] for line in output.err.splitlines()] == ["fitting", "resamples"]
    assert output.out == ""


def test_relative_paths_in_a_ray_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lmu_dist.cli import common

    monkeypatch.chdir(tmp_path)
    assert common.resolve_path("runs") == str(tmp_path / "runs")
    assert common.resolve_path("../a/../runs") == str(tmp_path.parent / "runs")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert common.resolve_path("runs") == str(tmp_path / "home" / "lmu-dist" / "runs")
    assert common.tracking_uri() == f"sqlite:///{tmp_path}/home/lmu-dist/mlflow.db"
    monkeypatch.setenv("LMU_DIST_HOME", "s3://bucket/studies/")
    assert common.resolve_path("runs") == "s3://bucket/studies/runs"
    assert common.resolve_path("/data/runs") == "/data/runs"
    assert common.resolve_path("s3://other/runs") == "s3://other/runs"
    for base in ("s3://bucket/studies/", str(tmp_path / "home")):
        monkeypatch.setenv("LMU_DIST_HOME", base)
        with pytest.raises(ConfigError, match=r"a/../../x leads out of .*; give the absolute path, such as"):
            common.resolve_path("a/../../x")


def test_a_narrow_terminal_shows_fewer_columns_and_whole_names(monkeypatch: pytest.MonkeyPatch, capfd):
    name = "lmu_attention-31.9K-1.6M-s0-3143091b173e"
    row = Row(name, "k", "r", "running", 5, 10, 1.5, 1e3, 2, 1, 60.0, "a remark")
    for width, expected in ((65, ["cell", "state", "tokens", "loss"]), (80, ["cell", "state", "tokens", "of", "loss", "ETA"])):
        console = Console(width=width, force_terminal=True, color_system=None)
        monkeypatch.setattr(tables, "_result_console", lambda console=console: console)
        show.print_status(lambda: [row], live=False)
        header, first, *caption = capfd.readouterr().out.splitlines()
        assert header.split() == expected
        assert first.startswith(f"{name}  running")
        assert "not shown on a terminal of this width: attempts, workers," in " ".join(" ".join(caption).split())


def raise_in_a_command(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("lmu_dist.cli.runs.load_config", fail)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 1, "interrupted; run the same command again to continue"),
        (FailedError("it broke"), 1, "it broke; run the same command again to continue"),
        (MemoryError(), 1, "not enough memory (MemoryError); use fewer workers (cluster.n_workers) or a smaller "),
        (PermissionError(13, "Permission denied", "/var/x"), 1, "Permission denied: /var/x; correct this and run the same "),
        (OSError(28, "No space left on device"), 1, "the disk is full; free some space and run the same command again"),
        (OSError(28, "No space left on device", "/tmp/x", None, "/data/x"), 1, "the disk is full: /data/x; free some space"),
        (sqlite3.OperationalError("database is locked"), 1, "an SQLite database failed: database is locked; run the same"),
        (GetTimeoutError("Get timed out"), 1, "Ray failed: Get timed out; run the same command again to continue"),
        (BrokenProcessPool("a child\nwas killed"), 1, "a process of this command was killed, perhaps because memory ran out"),
        (RayTaskError("f", "a traceback\n", ConfigError("a: wrong")).as_instanceof_cause(), 2, "a: wrong"),
        (RayTaskError("f", "a traceback\n", FailedError("it broke")).as_instanceof_cause(), 1, "it broke; run the same"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_a_failure_is_one_line(error, code, message, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    raise_in_a_command(error, monkeypatch)
    assert main(["plan", "jobs/train.yaml"]) == code
    [line] = [line for line in capfd.readouterr().err.splitlines() if line]
    assert line.startswith(f"lmu-dist: {message}")


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch):
    for error in (KeyError("x"), RayTaskError("f", "a traceback\n", AssertionError("x")).as_instanceof_cause()):
        raise_in_a_command(error, monkeypatch)
        with pytest.raises(type(error)):
            main(["plan", "jobs/train.yaml"])


def test_bf16_on_a_processor_without_it_is_a_note(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    note = "note: this processor has no bfloat16 arithmetic"
    monkeypatch.setattr("lmu_dist.models.precision.has_bfloat16_products", lambda: False)
    searched = "tune={families: lmu, n_params: 10k, space: {train.precision: {choice: [fp32, bf16]}}}"
    for arguments, expected in (
        (["train.precision=bf16"], 1),
        ([searched], 1),
        ([], 0),
        (["train.precision=bf16", "cluster.gpus_per_worker=1"], 0),
        (["train.precision=bf16", "cluster.address=10.0.0.1:6379"], 0),
    ):
        assert main(["plan", JOB, *arguments]) == 0
        assert capfd.readouterr().err.count(note) == expected


@pytest.mark.skipif(platform.machine() != "x86_64", reason="hides instructions of x86 processors")
def test_bf16_products_are_missing_where_avx512_is_hidden():
    code = "from lmu_dist.models.precision import has_bfloat16_products; print(has_bfloat16_products())"
    hidden = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=hidden)
    assert done.stdout.strip() == "False"


def start_command(body: str) -> subprocess.Popen[str]:
    """Starts `lmu-dist test`, a command with this body."""
    lines = ["import os, subprocess, sys, time", "from lmu_dist.cli import cli, main", "@cli.command()", f"def test(): {body}"]
    code = "\n".join([*lines, "sys.exit(main(['test']))"])
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_only_results_are_on_stdout():
    process = start_command("os.write(1, b'from C\\n'); subprocess.run(['echo', 'from a child']); print('{}', '\\udcff')")
    out, err = process.communicate()
    assert (process.returncode, out, err) == (0, "{} \\udcff\n", "from C\nfrom a child\n")


def test_a_closed_pipe_ends_a_command_silently():
    process = start_command("[print(i) for i in range(100_000)]")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (141, "")
    process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_interrupt_a_command(number: signal.Signals):
    process = start_command("print('started', flush=True); time.sleep(60)")
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(number)
    assert process.communicate()[1].strip() == "lmu-dist: interrupted; run the same command again to continue"
    assert process.returncode == 1


def test_json_has_no_numbers_that_other_readers_refuse(capfd: pytest.CaptureFixture[str]):
    show.print_json({"loss": float("nan"), "rows": [(1.5, float("inf"))]})
    assert capfd.readouterr().out == '{"loss": null, "rows": [[1.5, null]]}\n'
