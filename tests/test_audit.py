"""The audit of dependencies: a hole fails, silence is said."""

import json

from audit import verdict


def answer(*vulns: dict) -> str:
    return json.dumps(
        {"dependencies": [{"name": "a", "version": "1.0", "vulns": list(vulns)}, {"name": "b", "skip_reason": "?"}]}
    )


def test_a_known_hole_fails():
    code, said = verdict(1, answer({"id": "CVE-1", "fix_versions": ["1.1"]}), "")
    assert code == 1
    assert "a 1.0: CVE-1, mended in 1.1" in said


def test_what_was_not_asked_is_said():
    assert verdict(0, answer(), "") == (
        0,
        "audit: no known hole in 1 of 2 packages; the others have no advisories to ask for",
    )
    code, said = verdict(1, "", "ERROR: connection refused")
    assert code == 0
    assert "not done" in said
    assert "connection refused" in said
