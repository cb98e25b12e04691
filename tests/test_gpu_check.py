"""Tests of benchmarks/gpu without a GPU: the parts run on toy sizes, time limits hold, results survive, wheels are complete."""

import base64
import csv
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import psutil
import pytest
import torch
from gpu import check, mixers, table, targets, wheels

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


def only_record(folder: Path) -> dict:
    [path] = folder.glob("*.json")
    return json.loads(path.read_text())


def test_parts_run_on_toy_sizes(tmp_path: Path):
    """By the command that people use."""
    command = [BENCHMARKS / "gpu" / "check.sh", "operators", "--fast", "--seed", "1"]
    environment = os.environ | {"DEVICE": "cpu", "OUT_DIR": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = only_record(tmp_path)
    assert {name: part["status"] for name, part in record["parts"].items()} == {"card": "passed", "operators": "passed"}
    assert record["facts"]["card"] == "cpu"
    assert record["targets"] == []
    forms = record["parts"]["operators"]["tables"]["forms"]
    assert {row["form"].split(":")[0] for row in forms} == {"recurrent", "fft", "chunked", "fused"}
    assert all(0 < row["gradient_error"] < 3e-2 for row in forms)
    assert "| recurrent | float32 |" in done.stdout


def test_one_part_fails_and_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    part = """
import subprocess, time
def run(recorder):
    recorder.row("speed", n=1, tokens_per_second=2.0)
    {}
"""
    bodies = {
        "slow": "child = subprocess.Popen(['sleep', '60']); open(__file__ + '.pid', 'w').write(str(child.pid)); time.sleep(60)",
        "broken": "raise ValueError('no tape in the recorder')",
        "wrong": "recorder.expect(1 > 2, 'error 1.0, bound 0.1')",
        "last": "with recorder.attempt('division'): 1 / 0",
        "good": "recorder.note('nothing was left out')",
    }
    for name, body in bodies.items():
        (tmp_path / f"{name}.py").write_text(part.format(body))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(BENCHMARKS)]))
    monkeypatch.setattr(check, "PARTS", {name: check.Part(name, 0, 1 if name == "slow" else 20) for name in bodies})
    assert check.main(["--device", "cpu", "--out", str(tmp_path / "out")]) == 1
    parts = only_record(tmp_path / "out")["parts"]
    assert {name: part["failures"] for name, part in parts.items()} == {
        "slow": ["ran over its limit of 1 s"],
        "broken": ["ended with exit code 1: ValueError: no tape in the recorder"],
        "wrong": ["error 1.0, bound 0.1"],
        "last": ["division: ZeroDivisionError: division by zero"],
        "good": [],
    }
    assert all(part["tables"]["speed"] == [{"n": 1, "tokens_per_second": 2.0}] for part in parts.values())
    assert parts["good"]["status"] == "passed"
    child = int((tmp_path / "slow.py.pid").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_or_unknown_part_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture):
    for arguments, message in ((["--device", "cuda"], "set DEVICE=cpu"), (["mixer"], "no part 'mixer'")):
        with pytest.raises(SystemExit) as error:
            check.main([*arguments, "--out", str(tmp_path)])
        assert error.value.code == 2
        assert message in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def records_of(speed: float, memory: float, with_steps: bool = True) -> dict:
    steps = [
        {"family": f, "n_params": n, "tokens_per_second": speed, "speed_against_transformer": 0.6 if f == "lmu" else None}
        | {"counted_share_of_matmul_peak": 0.4, "peak_bytes": 1e9, "memory_over_plan": memory}
        for f in ("transformer", "lmu")
        for n in (1_000_000, 10_000_000, 100_000_000)
    ]
    crossing = [{"d": 204, "to_n": 16384, "overtakes_tokens": 5000.0, "speed_ratio": 2.0}]
    found = {"steps": {"steps": steps}} if with_steps else {}
    return {"parts": {name: {"tables": t} for name, t in (found | {"mixers": {"LMU against attention": crossing}}).items()}}


def test_targets_are_judged_on_the_measured_figures():
    judged = targets.judge(records_of(1.0, 1.05)["parts"])
    assert [row["result"] for row in judged] == ["miss", "pass", "pass", "pass", "pass", "not measured"]
    assert judged[-2]["measured"] == "6 of 6 within; the farthest is 1.05 of plan"
    assert "miss" in {row["result"] for row in targets.judge(records_of(1.0, 1.2)["parts"])[4:]}
    assert {row["result"] for row in targets.judge({})} == {"not measured"}


def test_two_records_are_compared():
    assert table.differences(records_of(100.0, 1.0), records_of(104.0, 1.0), 0.05) == ([], 12)
    lines, _ = table.differences(records_of(100.0, 1.0), records_of(110.0, 1.0), 0.05)
    assert lines[0] == "steps, steps, transformer 1000000: tokens_per_second x 1.100"
    lines, _ = table.differences(records_of(1.0, 1.0, with_steps=False), records_of(1.0, 1.0), 0.05)
    assert "only in head" in lines[0]


def test_crossover_is_interpolated():
    assert mixers.crossover([1024, 4096], [0.5, 2.0]) == pytest.approx(2048)
    assert mixers.crossover([1024, 2048, 4096], [2.0, 0.9, 1.1]) == pytest.approx(2048 * 2**0.525, rel=1e-2)
    assert mixers.crossover([1024, 2048], [1.5, 0.9]) is None
    assert mixers.crossover([1024, 2048], [1.1, 1.2]) == 1024


def test_wheels_are_those_that_a_machine_lacks(tmp_path: Path):
    everything = wheels.required("3.12", {})
    assert {"ray", "deepspeed", "mlflow", "datasets", "pydantic", "grpcio", "numpy"} <= set(everything)
    assert not {"torch", "lmu-dist", "pytest", "moto"} & set(everything)
    locked = wheels.installed_names(ROOT / "requirements.lock")
    assert all(locked[name] == version for name, version in everything.items())
    listed = tmp_path / "have.txt"
    listed.write_text("numpy==2.5.0\nPillow\npydantic==1.0\nsomething @ file:///x\n")
    lacking = wheels.required("3.12", wheels.installed_names(listed))
    assert set(everything) - set(lacking) == {"numpy", "pillow"}


def test_parts_of_wheels_stay_below_the_limit():
    sizes = {Path(name): size for name, size in (("a", 50), ("b", 30), ("c", 25), ("d", 9), ("e", 1))}
    assert [[p.name for p in part] for part in wheels.parts(sizes, 60)] == [["a", "d", "e"], ["b", "c"]]
    with pytest.raises(SystemExit, match="set --part-bytes"):
        wheels.parts(sizes, 40)


def test_slim_ray_has_a_correct_record(tmp_path: Path):
    wheel = tmp_path / "ray-1.0-py3-none-any.whl"
    kept = {"ray/__init__.py": b"x = 1\n", "ray/core/raylet": b"\x7fELF", "ray/dashboard/client.py": b""}
    dropped = {
        "ray/jars/ray_dist.jar": b"j" * 99,
        "ray/dashboard/client/build/static/js/a.js": b"j",
        "ray/include/ray/a.h": b"h",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in (kept | dropped).items():
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o755 << 16
            archive.writestr(info, data)
        archive.writestr("ray-1.0.dist-info/RECORD", "old")
    wheels.slim_ray(wheel)
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == {*kept, *wheels.RAY_PLACEHOLDERS, "ray-1.0.dist-info/RECORD"}
        assert archive.getinfo("ray/core/raylet").external_attr >> 16 & 0o111  # Ray's programs stay executable
        rows = list(csv.reader(archive.read("ray-1.0.dist-info/RECORD").decode().splitlines()))
        assert [row[0] for row in rows] == archive.namelist()
        for name, digest, size in rows[:-1]:
            data = archive.read(name)
            assert digest == "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            assert int(size) == len(data)
