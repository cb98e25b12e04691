"""Makes the published study from its tables of records: numbers.json, README.md and the figures. `make study` runs it.

    .venv/bin/python docs/study/make.py [FOLDER]

FOLDER, by default the one of this file, has runs.csv, and if there are any forecasts.csv, position_losses.csv and tuning.csv
(runs of searches, which are counted only), as `lmu-dist report` writes them, and own_keys.csv (searches of families' own keys).
Its folder `until` has runs.csv of a ladder with `ladder.until`, and each folder in `contexts` runs.csv and
position_losses.csv of one length of context. README.md.in is the text: a Jinja template in which every number is an expression,
such as {{ pairs.lmu_over_llama.sizes["9980"] | factor }}. A number that is no result, such as one of the paper, is written as
{{ fixed("ten") }}; other digits in the text are an error. tests/test_study.py computes all numbers again and compares them, and
the text, with what is here.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from further_numbers import context_numbers, own_key_numbers
from jinja2 import Environment, StrictUndefined, TemplateError
from study_figures import draw_contexts, draw_study
from study_numbers import cost_of, study_comparisons, study_numbers, until_numbers

from lmu_dist.report.forecasts import score_forecasts
from lmu_dist.report.inputs import RUNS, inputs_from_tables
from lmu_dist.report.panels import si
from lmu_dist.scaling.intervals import N_RESAMPLES
from lmu_dist.scaling.results import analyse, default_pair
from lmu_dist.scaling.run_csv import read_run_csv

HERE = Path(__file__).parent
NUMBERS, TEMPLATE, TEXT, FIGURES, TUNING = "numbers.json", "README.md.in", "README.md", "figures", "tuning.csv"
UNTIL = "until"  # folder of the tables of a ladder with `ladder.until`
CONTEXTS = "contexts"  # folder of the folders of tables, one for each length of context
OWN_KEYS, OWN_KEYS_SIZE = "own_keys.csv", "30000"  # runs of searches of families' own keys, and their size in tuning.csv
NOTE = "<!-- Made by `make study` from README.md.in and numbers.json; edit README.md.in. -->\n"
UNCHECKED = re.compile(r"```.*?```|`[^`\n]+`|\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}|<!--.*?-->|\]\([^)\s]*\)", re.DOTALL)
TOLERANCE = 1e-4  # relative, of a number that another processor computes; the text has four digits at most


def compute(folder: Path, n_resamples: int = N_RESAMPLES, figures: Path | None = None) -> dict[str, Any]:
    """Returns all numbers of the tables in a folder, and draws the figures into another one if it is given."""
    inputs = inputs_from_tables([folder / RUNS])
    tuning = read_run_csv([folder / TUNING]) if (folder / TUNING).exists() else None
    study = inputs.study
    results = analyse(study, inputs.curves, n_resamples, default_pair(study, planned=inputs.stored.baseline))
    forecasts = score_forecasts(study, inputs.forecasts)
    numbers: dict[str, Any] = {**study_numbers(inputs, results, forecasts, tuning), "n_resamples": n_resamples}
    if (folder / UNTIL / RUNS).exists():
        numbers["until"] = until_numbers(inputs_from_tables([folder / UNTIL / RUNS]), n_resamples)
    if (folder / OWN_KEYS).exists():
        trials = read_run_csv([folder / OWN_KEYS])
        numbers["own_keys"] = own_key_numbers(trials, numbers["tuned"]["losses"][OWN_KEYS_SIZE])
        numbers["cost"]["own_keys"] = cost_of(trials.runs)
    contexts = {int(found.parent.name): inputs_from_tables([found]) for found in folder.glob(f"{CONTEXTS}/*/{RUNS}")}
    of_contexts = {n: (given, analyse(given.study, given.curves, n_resamples)) for n, given in sorted(contexts.items())}
    if contexts:
        numbers["contexts"] = {str(n): context_numbers(*found) for n, found in of_contexts.items()}
        numbers["cost"]["contexts"] = cost_of([run for given in contexts.values() for run in given.stored.runs])
    if figures is not None:
        for old in [*figures.glob("*.png"), *figures.glob("*.svg")]:
            old.unlink()
        draw_study(study, results, study_comparisons(study, results), forecasts, numbers["order"], figures)
        draw_contexts({n: (given.study, found) for n, (given, found) in of_contexts.items()}, study.digest, figures)
    return numbers


def render(template: str, numbers: Mapping[str, Any]) -> str:
    """Returns the text. Raises ValueError for digits that are no expression, and for an expression that names no number."""
    if stray := stray_digits(template):
        raise ValueError(f"{TEMPLATE} has numbers that are no expressions: {'; '.join(stray)}")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= FILTERS
    environment.globals["fixed"] = str
    try:
        return NOTE + environment.from_string(template).render(numbers)
    except TemplateError as e:
        raise ValueError(f"{TEMPLATE}, line {getattr(e, 'lineno', None) or _line_of(e)}: {e}") from e


def _line_of(error: BaseException) -> str:
    trace, line = error.__traceback__, "unknown"
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = str(trace.tb_lineno)
        trace = trace.tb_next
    return line


def stray_digits(template: str) -> list[str]:
    """Returns the lines of a template that have digits outside of expressions, code and links, each with its number."""
    prose = UNCHECKED.sub(lambda found: "\n" * found.group().count("\n"), template)
    return [f"line {i}: {line.strip()}" for i, line in enumerate(prose.splitlines(), 1) if re.search(r"\d", line)]


def check_text(folder: Path) -> None:
    """Raises ValueError, with the line, if the text in a folder is not that of its template and numbers."""
    wanted = render((folder / TEMPLATE).read_text(), json.loads((folder / NUMBERS).read_text()))
    found = (folder / TEXT).read_text()
    if found == wanted:
        return
    pairs = zip([*found.splitlines(), "(end)"], [*wanted.splitlines(), "(end)"], strict=False)
    number, (is_there, should_be) = next((i, pair) for i, pair in enumerate(pairs, 1) if pair[0] != pair[1] or "(end)" in pair)
    raise ValueError(f"{TEXT}, line {number}: {is_there!r} should be {should_be!r}; run `make study`")


def check_numbers(folder: Path, numbers: Mapping[str, Any]) -> None:
    """Raises ValueError, with its key, if a number in a folder is not the computed one.

    Of a law that is not determined only that is compared: its optimum is flat, and so another processor finds another one.
    """
    _compare("", _without_flat_optima(json.loads((folder / NUMBERS).read_text())), _without_flat_optima(numbers))


def _without_flat_optima(numbers: Mapping[str, Any]) -> dict[str, Any]:
    kept = json.loads(json.dumps(numbers))
    for laws in (kept["laws"], kept.get("until", {}).get("laws", {})):
        for law in laws.values():
            if not law["determined"]:
                law.clear()
    return kept


def _compare(key: str, kept: Any, computed: Any) -> None:
    if isinstance(kept, dict) and isinstance(computed, dict) and kept.keys() == computed.keys():
        for name, value in kept.items():
            _compare(f"{key}.{name}".lstrip("."), value, computed[name])
    elif isinstance(kept, list) and isinstance(computed, list) and len(kept) == len(computed):
        for i, value in enumerate(kept):
            _compare(f"{key}[{i}]", value, computed[i])
    elif isinstance(kept, float) and isinstance(computed, float):
        if not math.isclose(kept, computed, rel_tol=TOLERANCE, abs_tol=1e-9):
            raise ValueError(f"{NUMBERS}, {key}: {kept!r}, but the runs give {computed!r}; run `make study`")
    elif kept != computed:
        raise ValueError(f"{NUMBERS}, {key}: {kept!r}, but the runs give {computed!r}; run `make study`")


def make(folder: Path, n_resamples: int = N_RESAMPLES) -> None:
    """Writes numbers and figures, and the text if the folder has a template."""
    numbers = compute(folder, n_resamples, folder / FIGURES)
    (folder / NUMBERS).write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n")
    if (folder / TEMPLATE).exists():
        (folder / TEXT).write_text(render((folder / TEMPLATE).read_text(), numbers))


def _g(value: float | None, digits: int = 3) -> str:
    """Formats a number with so many significant digits, without an exponent."""
    if value is None:
        return "not known"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{decimals}f}"


def _percent(value: float | None, decimals: int = 1) -> str:
    return "not known" if value is None else f"{100 * value:.{decimals}f} %"


def _interval(value: Mapping[str, Any], digits: int = 3) -> str:
    return "no interval" if value["low"] is None else f"{_g(value['low'], digits)} to {_g(value['high'], digits)}"


def _factor(value: Mapping[str, Any], digits: int = 3) -> str:
    """Formats a factor with its interval, as in "1.17 (0.92 to 1.49)", or its bound, as in "more than 3.1"."""
    if value["value"] is not None:
        return f"{_g(value['value'], digits)} ({_interval(value, digits)})"
    if value["bound"] is not None:
        return f"{'more' if value['side'] == '>' else 'less'} than {_g(value['bound'], digits)}"
    return "not determined"


def _nats(value: Mapping[str, Any]) -> str:
    """Formats a difference of losses with its interval, as in "-0.040 (-0.101 to 0.022)"."""
    ends = "no interval" if value["low"] is None else f"{value['low']:.3f} to {value['high']:.3f}"
    return f"{value['value']:.3f} ({ends})"


FILTERS: dict[str, Callable[..., str]] = {
    "g": _g,
    "n": lambda value: f"{value:,}" if isinstance(value, int) else f"{value:,.0f}",
    "si": lambda value: si(float(value)),
    "percent": _percent,
    "interval": _interval,
    "factor": _factor,
    "nats": _nats,
    "p": lambda value: "no test" if value is None else f"p = {value:.2g}" if value >= 1e-6 else "p < 1e-6",
}


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
