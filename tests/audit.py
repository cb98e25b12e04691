"""Looks for known holes in the exact versions of requirements.lock: `make check` runs it, and fails if there is one.

The advisories are asked for over the network by pip-audit. Where nobody answers, that is said and nothing fails.
"""

import json
import subprocess
import sys
from pathlib import Path

LOCK = Path(__file__).parents[1] / "requirements.lock"


def verdict(code: int, out: str, err: str) -> tuple[int, str]:
    """(exit code, what to print) for an answer of pip-audit."""
    try:
        packages = json.loads(out)["dependencies"]
    except (ValueError, KeyError):
        last = (err.strip().splitlines() or ["no reason given"])[-1]
        return 0, f"audit: not done, the advisories cannot be asked for ({last[:160]})"
    holes = [
        f"{p['name']} {p['version']}: {v['id']}, mended in {', '.join(v['fix_versions']) or 'no version'}"
        for p in packages
        for v in p.get("vulns", ())
    ]
    if holes:
        return 1, "\n".join(["audit: known holes; raise these in pyproject.toml and requirements.lock", *holes])
    asked = sum("vulns" in p for p in packages)
    if not asked:
        return 0, f"audit: not done, whoever was asked knows none of the {len(packages)} packages"
    return code, f"audit: no known hole in {asked} of {len(packages)} packages; the others have no advisories to ask for"


def main() -> int:
    """Asks and prints."""
    command = [sys.executable, "-m", "pip_audit", "-r", str(LOCK), "--no-deps", "--disable-pip", "--format", "json"]
    done = subprocess.run([*command, "--progress-spinner", "off"], capture_output=True, text=True)
    code, said = verdict(done.returncode, done.stdout, done.stderr)
    print(said)
    return code


if __name__ == "__main__":
    sys.exit(main())
