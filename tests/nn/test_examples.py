"""The three programs that docs/library.md explains, in a quick version."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("delay_line", "mackey_glass", "permuted_sequences")


def program(name: str) -> dict:
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


def test_delay_line():
    errors = program("delay_line")["main"](n_tokens=1024)
    assert all(errors[24, d] < 0.005 for d in (0, 16, 32, 63))
    assert all(errors[4, d] > 0.1 for d in (0, 16, 32, 63))  # too few coefficients for the signal


def test_mackey_glass():
    errors = program("mackey_glass")["main"](steps=40)
    assert errors["LMU"] < 0.5  # 1 is the error of a constant


def test_permuted_sequences():
    before, after = program("permuted_sequences")["main"](steps=60, n_test=200)
    assert before < 0.25  # ten classes
    assert after > 0.4


@pytest.mark.parametrize("name", NAMES)
def test_the_page_shows_the_programs_own_lines(name: str):
    """Every block of code that stands under a heading with the program's name is in the program, line by line."""
    page = (ROOT / "docs" / "library.md").read_text()
    [section] = re.findall(rf"^## [^\n]*\n\n\[examples/{name}\.py\].*?(?=^## |\Z)", page, re.DOTALL | re.MULTILINE)
    lines = {line.strip() for line in (ROOT / "examples" / f"{name}.py").read_text().splitlines()}
    [code] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert [line for line in code.splitlines() if line.strip() not in lines] == []
