"""Tests of benchmarks/speed.py on tiny shapes: sections run, the JSON is complete, failures are reported."""

import json
import math
from pathlib import Path

import measure
import pytest
import speed
import tables
import torch


def measured_values(found: dict) -> list[float]:
    return [v for rows in found["tables"].values() for row in rows for v in row.values() if isinstance(v, float)]


def test_bfloat16_is_left_out_where_the_processor_has_no_products_of_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert list(measure.dtypes(torch.device("cpu"))) == ["float32"]
    assert list(measure.dtypes(torch.device("cuda"))) == ["float32", "bfloat16"]
    section = measure.ceilings(torch.device("cpu"), quick=True)
    assert [row["ceiling"] for row in section.tables["ceilings"]] == ["matmul float32", "copy"]
    assert section.notes == ["bfloat16: left out, this processor has no arithmetic for it"]


def test_quick_run_writes_a_complete_json(tmp_path: Path, capfd: pytest.CaptureFixture):
    out = tmp_path / "bench.json"
    assert speed.main(["ceilings", "head", "--quick", "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert {"date", "command", "git", "machine", "load_before", "load_after", "sections"} <= set(record)
    assert {"cpu", "cpu_capability", "cpu_capabilities", "threads", "torch", "device_name"} <= set(record["machine"])
    assert list(record["sections"]) == ["ceilings", "head"]
    for found in record["sections"].values():
        assert measured_values(found)
        assert all(math.isfinite(v) and v > 0 for v in measured_values(found))
    rows = {(row["head"], row["dtype"]) for row in record["sections"]["head"]["tables"]["head"]}
    assert rows == {(head, dtype) for head in ("plain", "blocked") for dtype in measure.dtypes(torch.device("cpu"))}
    assert "memory against plain" in " ".join(capfd.readouterr().out.split())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_section_runs(tmp_path: Path):
    out = tmp_path / "bench.json"
    assert speed.main(["--quick", "--json", str(out)]) == 0
    sections = json.loads(out.read_text())["sections"]
    assert list(sections) == list(speed.SECTIONS)
    assert all(measured_values(found) for found in sections.values())


@pytest.mark.slow
def test_comparing_a_revision_with_itself_gives_ratios_near_one(tmp_path: Path):
    out = tmp_path / "bench.json"
    assert speed.main(["head", "--quick", "--base", "HEAD", "--rounds", "2", "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["base"]["commit"] == record["git"]["commit"]
    assert all(0.2 < value < 5 for value in measured_values(record["ratios"]["head"]))


def test_rounds_are_merged_by_the_conditions_of_rows():
    def found(share: float, note: str, *rows: dict) -> dict:
        return {"tables": {"points": list(rows)}, "notes": [note], "others_share": share}

    rounds = [
        found(0.01, "as always", {"n": 256, "seconds": 1.0}, {"n": 512, "seconds": 9.0}),
        found(0.40, "other processes: 40 %", {"n": 256, "seconds": 4.0}),
        found(0.02, "as always", {"n": 256, "seconds": 2.0}, {"n": 512, "seconds": 9.0}),
    ]
    merged = speed.median_of(rounds)
    assert merged["tables"]["points"] == [{"n": 256, "seconds": 2.0}]
    assert merged["others_share"] == 0.40
    assert merged["notes"] == ["as always", "other processes: 40 %"]


def test_failing_section_is_reported_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    (tmp_path / "broken.py").write_text("def measure(device, quick):\n    raise RuntimeError('no tape in the recorder')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(speed.SECTIONS, "broken", "broken:measure")
    out = tmp_path / "bench.json"
    assert speed.main(["broken", "ceilings", "--quick", "--json", str(out)]) == 1
    sections = json.loads(out.read_text())["sections"]
    assert sections["broken"] == {"error": "section broken failed (exit 1): RuntimeError: no tape in the recorder"}
    assert measured_values(sections["ceilings"])
    assert "no tape in the recorder" in capfd.readouterr().out


def test_unknown_section_or_revision_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture):
    for arguments, message in ((["heads"], "no section 'heads'"), (["head", "--base", "no-such-revision"], "no revision")):
        with pytest.raises(SystemExit) as error:
            speed.main([*arguments, "--quick", "--json", str(tmp_path / "bench.json")])
        assert error.value.code == 2
        assert message in capfd.readouterr().err


def test_ratios_match_rows_and_list_unmatched_ones():
    def section(*rows: dict) -> dict:
        return {"tables": {"points": list(rows)}, "notes": []}

    base = section({"mixer": "fft", "n": 256, "seconds": 4.0}, {"mixer": "fft", "n": 512, "seconds": None})
    head = section(
        {"mixer": "fft", "n": 256, "seconds": 1.0},
        {"mixer": "fft", "n": 512, "seconds": 1.0},
        {"mixer": "fused", "n": 256, "seconds": 1.0},
    )
    found = tables.ratios(base, head)
    assert found["tables"]["points"] == [
        {"mixer": "fft", "n": 256, "seconds": 0.25},
        {"mixer": "fft", "n": 512, "seconds": None},
    ]
    assert found["notes"] == ["points: only in head: fused 256"]
