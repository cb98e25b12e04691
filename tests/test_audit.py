"""Tests of the dependency audit: a known vulnerability fails, an unreachable database is reported."""

import json

from audit import verdict


def pip_audit_output(*vulns: dict) -> str:
    return json.dumps(
        {"dependencies": [{"name": "a", "version": "1.0", "vulns": list(vulns)}, {"name": "b", "skip_reason": "?"}]}
    )


def test_known_vulnerability_fails():
    code, message = verdict(1, pip_audit_output({"id": "CVE-1", "fix_versions": ["1.1"]}), "")
    assert code == 1
    assert "a 1.0: CVE-1, fixed in 1.1" in message


def test_unchecked_packages_are_reported():
    assert verdict(0, pip_audit_output(), "") == (
        0,
        "audit: no known vulnerability in 1 of 2 packages; the database lacks the others",
    )
    code, message = verdict(1, "", "ERROR: connection refused")
    assert code == 0
    assert "skipped" in message
    assert "connection refused" in message
