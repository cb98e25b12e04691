"""Checks the versions in requirements.lock for known vulnerabilities. `make check` runs it and fails if there are any.

pip-audit queries an advisory database over the network. If it cannot be reached, a message says so and the check passes.
"""

import json
import subprocess
import sys
from pathlib import Path

LOCK = Path(__file__).parents[1] / "requirements.lock"


def verdict(code: int, out: str, err: str) -> tuple[int, str]:
    """(exit code, message) for the exit code and output of pip-audit."""
    try:
        packages = json.loads(out)["dependencies"]
    except (ValueError, KeyError):
        last = (err.strip().splitlines() or ["no reason given"])[-1]
        return 0, f"audit: skipped, the advisory database cannot be reached ({last[:160]})"
    vulnerabilities = [
        f"{p['name']} {p['version']}: {v['id']}, fixed in {', '.join(v['fix_versions']) or 'no version'}"
        for p in packages
        for v in p.get("vulns", ())
    ]
    if vulnerabilities:
        header = "audit: known vulnerabilities; raise these versions in pyproject.toml and requirements.lock"
        return 1, "\n".join([header, *vulnerabilities])
    n_checked = sum("vulns" in p for p in packages)
    if not n_checked:
        return 0, f"audit: skipped, the advisory database knows none of the {len(packages)} packages"
    return code, f"audit: no known vulnerability in {n_checked} of {len(packages)} packages; the database lacks the others"


def main() -> int:
    """Runs pip-audit and prints the verdict."""
    command = [sys.executable, "-m", "pip_audit", "-r", str(LOCK), "--no-deps", "--disable-pip", "--format", "json"]
    done = subprocess.run([*command, "--progress-spinner", "off"], capture_output=True, text=True)
    code, message = verdict(done.returncode, done.stdout, done.stderr)
    print(message)
    return code


if __name__ == "__main__":
    sys.exit(main())
