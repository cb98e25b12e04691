"""The documentation: links lead somewhere, commands and their options exist, the configuration reference is up to date."""

import re
import runpy
import shlex
from pathlib import Path

import click
import pytest

from lmu_dist.cli import cli
from lmu_dist.config import load

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGURED = ("plan", "tune", "ladder", "prepare", "train", "submit")  # commands whose first argument is a configuration
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:^|[\s/(\"])lmu-dist +([a-z-]+)(.*)")
MAKE = re.compile(r"(?:^|\s)make +([a-z-]+)")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code_lines(page: Path) -> list[str]:
    """All lines of code blocks and inline code."""
    return [line.strip("`") for block in CODE.findall(page.read_text()) for line in block.splitlines()]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page: Path) -> list[tuple[str, click.Command, str]]:
    """(words, command, the rest of the line) of every lmu-dist command of a page."""
    found = list[tuple[str, click.Command, str]]()
    for line in code_lines(page):
        for name, rest in COMMAND.findall(line):
            assert name in cli.commands, f"{page.name}: no command {name} in: {line}"
            command = cli.commands[name]
            below = rest.split()[0] if rest.split() else ""
            if isinstance(command, click.Group) and re.fullmatch(r"[a-z]+", below):
                assert below in command.commands, f"{page.name}: no command {name} {below} in: {line}"
                command = command.commands[below]
            found.append((name, command, rest))
    return found


def test_the_configuration_reference_is_up_to_date():
    render = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))["render"]
    assert (ROOT / "docs" / "configuration.md").read_text() == render(), "renew it: make docs"


def test_every_key_of_the_reference_has_a_meaning():
    rows = re.findall(r"^\| `([\w.\[\]]+)` \|.*\| (.*) \|$", (ROOT / "docs" / "configuration.md").read_text(), re.MULTILINE)
    assert len(rows) > 80
    assert [key for key, meaning in rows if not meaning] == []


@pages
def test_relative_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target} does not exist"
        assert file.is_relative_to(ROOT), f"{page.name}: {target} is outside the repository"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target} has no such heading"


@pages
def test_commands_and_options_exist(page):
    for name, command, rest in commands(page):
        known = {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
        for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", rest.split(" # ")[0]):
            assert option in known, f"{page.name}: lmu-dist {name} has no option {option}"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in code_lines(page):
        for target in MAKE.findall(line):
            assert target in targets, f"{page.name}: no target {target} in the Makefile"


@pages
def test_jobs_in_commands_can_be_loaded_with_their_overrides(page):
    for name, _, rest in commands(page):
        words = shlex.split(re.split(r" {2,}| # ", rest.strip())[0]) if name in CONFIGURED else []
        if not words or not words[0].startswith("jobs/"):
            continue
        overrides = [word for word in words[1:] if re.match(r"[a-z_.]+=", word)]
        load(ROOT / words[0], overrides)


def test_the_images_are_small():
    assert sum(path.stat().st_size for path in (ROOT / "docs" / "images").glob("*.*")) < 500_000
