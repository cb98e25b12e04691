"""Runs `lmu-dist fit` on every table of a folder and prints what it says, as rows of a Markdown table.

    PYTHONPATH=CHECKOUT python benchmarks/fit_cases.py FOLDER [OPTION ...]

Further options go to every command. Columns are those of COLUMNS, by the start of the file's name, or else N, D and loss. It
shows what a change does to tables as people have them, of which tests/scaling/test_cases.py has small copies.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

COLUMNS = {"22": ("N", "D", "ppl"), "42": ("params.n_params", "metrics.tokens_seen", "metrics.eval/loss")}


def result_of(path: Path, options: list[str]) -> tuple[str, str, float]:
    """Returns the command, what it says in one line, and its seconds."""
    n, d, loss = COLUMNS.get(path.name[:2], ("N", "D", "loss"))
    arguments = ["fit", str(path), "--n", n, "--d", d, "--loss", loss, *options]
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "lmu_dist.cli", *arguments, "--json"], capture_output=True, text=True)
    seconds = time.monotonic() - begin
    command = " ".join(["fit", path.name, *arguments[2:]])
    if done.returncode not in (0, 3):
        lines = done.stderr.strip().splitlines() or [""]
        said = "traceback: " + lines[-1] if "Traceback" in done.stderr else lines[-1].replace(f"{path.parent}/", "")
        return command, said, seconds
    facts = json.loads(done.stdout)
    values = ", ".join(f"{name} {value:.4g}" for name, value in facts["parameters"].items() if name not in ("A", "B"))
    said = f"{facts['n_rows']} rows: {values or 'not determined: ' + '; '.join(facts['certificate']['reasons'])}"
    out = [f"{len(some['rows'])} left out: {some['reason']}" for some in facts["left_out"]]
    return command, "; ".join([said, *out, *facts.get("notes", []), *facts.get("warnings", [])]), seconds


def main() -> None:
    """Prints a row per table."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: fit_cases.py FOLDER [OPTION ...]; FOLDER has the tables")
    folder, *options = sys.argv[1:]
    print("| command | result | seconds |\n|---|---|---|")
    for path in sorted(Path(folder).iterdir()):
        command, said, seconds = result_of(path, options)
        print(f"| `{command}` | {said} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
