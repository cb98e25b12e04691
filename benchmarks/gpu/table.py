"""Writes a record of the check as JSON and as Markdown, and compares two records.

    python -m gpu.table compare A.json B.json [--within 0.05]

Called by check.py after every measurement. `compare` says which speeds and peaks of memory differ by more than --within, and
ends with exit code 1 if any do.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tables

COMPARED = ("tokens_per_second", "flops_per_second", "bytes_per_second", "peak_bytes")  # ratios of these follow from them
FACTS = (
    "card",
    "memory_bytes",
    "driver",
    "cuda",
    "torch",
    "triton",
    "python",
    "ray",
    "deepspeed",
    "mlflow",
    "processor",
    "cpus",
)


def write(record: Mapping[str, Any], to: Path) -> None:
    """Writes `to`.json and `to`.md, each complete or not at all."""
    for suffix, text in ((".json", json.dumps(record, indent=1) + "\n"), (".md", markdown(record))):
        scratch = to.with_name(f".{to.name}{suffix}")
        scratch.write_text(text)
        os.replace(scratch, to.with_name(to.name + suffix))  # with_suffix would cut a name with a dot


def markdown(record: Mapping[str, Any]) -> str:
    """The record for readers: machine, targets, and the tables, notes and failures of every part."""
    facts = record["facts"]
    lines = [f"# GPU check, {record['date']}, {facts.get('card', record['device'])}", ""]
    known = [f"{name.removesuffix('_bytes')} {_value(name, facts[name])}" for name in FACTS if facts.get(name) is not None]
    commit = f"commit {record['commit'] or 'unknown'}{' with changes' if record['dirty'] else ''}"
    lines += [", ".join([commit, f"seed {record['seed']}", *known]) + ".", ""]
    if record["toy"]:
        lines += ["Toy sizes: this shows that the parts run. The speeds mean nothing, and there are no targets.", ""]
    if record["targets"]:
        rows = [{"target": t["target"], "measured": t["measured"], "result": t["result"]} for t in record["targets"]]
        lines += ["## Targets", "", *_table(rows), ""]
    for name, part in record["parts"].items():
        lines += [f"## {name}: {part['status']}, {part['seconds']:.0f} s of at most {part['limit_seconds']:.0f} s", ""]
        for failure in part["failures"]:
            lines.append(f"- **failed**: {failure}")
        lines += [f"- {note}" for note in part["notes"]]
        lines += [""] if part["failures"] or part["notes"] else []
        for table, found in part["tables"].items():
            lines += [f"**{table}**", "", *_table(found), ""]
    return "\n".join(lines)


def _value(name: str, value: Any) -> str:
    return tables.cell(name, float(value) if name.endswith("_bytes") else value) if not isinstance(value, str) else value


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(tables.heading(key) for key in columns) + " |"]
    lines.append("|" + "|".join(" :-- " if isinstance(rows[0].get(key), str) else " --: " for key in columns) + "|")
    for row in rows:
        cells = ("" if key not in row else tables.cell(key, row[key]) for key in columns)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return lines


def differences(a: Mapping[str, Any], b: Mapping[str, Any], within: float) -> tuple[list[str], int]:
    """Lines that name the figures of which b / a deviates from 1 by more than `within`, and the number of figures compared."""
    lines, n_compared = list[str](), 0
    for part, found in b["parts"].items():
        before = a["parts"].get(part, {"tables": {}})
        ratios = tables.ratios({"tables": before["tables"], "notes": []}, {"tables": found["tables"], "notes": []})
        for table, rows in ratios["tables"].items():
            for row in rows:
                conditions = " ".join(str(value) for _, value in tables.identity(row))
                for key in COMPARED:
                    if (ratio := row.get(key)) is not None:
                        n_compared += 1
                        if abs(ratio - 1) > within:
                            lines.append(f"{part}, {table}, {conditions}: {key} x {ratio:.3f}")
        lines += [f"{part}: {note}" for note in ratios["notes"]]
    return lines, n_compared


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["compare"])
    parser.add_argument("records", nargs=2, type=Path, metavar="RECORD.json")
    parser.add_argument("--within", type=float, default=0.05, help="largest deviation of a ratio from 1, default 0.05")
    given = parser.parse_args()
    first, second = (json.loads(path.read_text()) for path in given.records)
    lines, n_compared = differences(first, second, given.within)
    print(*lines, sep="\n")
    print(f"{n_compared} figures compared, {len(lines)} lines above: not within {given.within:.0%}, or in one record only")
    return 1 if lines or not n_compared else 0


if __name__ == "__main__":
    sys.exit(main())
