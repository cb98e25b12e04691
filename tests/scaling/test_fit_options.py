"""The small languages of `lmu-dist fit`: --fix, --tie, --at and --optimum; and what the command prints for several laws."""

import json
from pathlib import Path

import numpy as np
import pytest

from lmu_dist.cli import main
from lmu_dist.cli.fit_options import constraints_of, number_of, points_of
from lmu_dist.config import ConfigError
from lmu_dist.scaling.published import HOFFMANN


def test_constraints_and_points():
    constraints = constraints_of(["E=1.69"], ["alpha = beta"])
    assert constraints.held == {"E": 1.69}
    assert constraints.ties == (("alpha", "beta"),)
    n, d, unique = points_of(["7B,140B", "1e9,2e10"], False)
    assert n.tolist() == [7e9, 1e9]
    assert d.tolist() == [1.4e11, 2e10]
    assert unique is None
    assert points_of(["7B,140B,100B"], True)[2].tolist() == [1e11]  # pyright: ignore[reportOptionalMemberAccess]
    assert number_of("1e21", "--optimum") == 1e21


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: constraints_of(["E"], []), "--fix 'E' is not NAME=VALUE"),
        (lambda: constraints_of(["E=-1"], []), "--fix 'E=-1': E must be a positive number"),
        (lambda: constraints_of(["alpha=nan"], []), "--fix 'alpha=nan': alpha must be a finite number"),
        (lambda: constraints_of(["E=1", "E=2"], []), "--fix E is given twice"),
        (lambda: constraints_of([], ["alpha"]), "--tie 'alpha' is not A=B"),
        (lambda: constraints_of([], ["alpha=beta", "beta=alpha"]), "is tied already; tie every parameter once"),
        (lambda: points_of(["7B"], False), "--at '7B' is not N,D"),
        (lambda: points_of(["7B,140B"], True), "is not N,D,U"),
        (lambda: number_of("-1", "--optimum"), "--optimum '-1': not a positive number"),
        (lambda: number_of("many", "--at"), "--at 'many': not a positive number"),
    ],
)
def test_errors_name_the_option(call: object, message: str):
    with pytest.raises(ConfigError, match=message):
        call()  # pyright: ignore[reportCallIssue]


def test_fit_predicts_and_finds_the_optimum(tmp_path: Path, capfd: pytest.CaptureFixture):
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e7, 3e9, 5), np.geomspace(4e8, 2e11, 5)))
    loss = HOFFMANN.loss(n, d) * np.exp(np.random.default_rng(0).normal(0, 0.002, 25))
    path = tmp_path / "runs.csv"
    path.write_text("N,D,loss\n" + "\n".join(f"{a:.0f},{b:.0f},{c:.6f}" for a, b, c in zip(n, d, loss, strict=True)))
    arguments = ["fit", str(path), "--n", "N", "--d", "D", "--loss", "loss", "--resamples", "100"]
    assert main([*arguments, "--law", "chinchilla", "--at", "7B,140B", "--optimum", "1e21", "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    (point,) = facts["forecast"]["points"]
    assert point["low"] < HOFFMANN.loss(7e9, 1.4e11) < point["high"]
    parametric = facts["optimum"][-1]
    assert parametric["approach"] == "parametric"
    assert parametric["n_interval"][0] < HOFFMANN.optimum(1e21)[0] < parametric["n_interval"][1]
    points = tmp_path / "points.csv"
    points.write_text("N,D\n7e9,\n7e9,1.4e11\nOOM,1e9\n1e4,1e9\n")
    assert main([*arguments, "--law", "chinchilla", "--predict", str(points), "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)["forecast"]
    assert [point["name"] for point in facts["points"]] == ["row 2", "row 4"]
    assert sorted(row for out in facts["left_out"] for row in out["rows"]) == [1, 3]
    assert any("N is down to 1/1,000 of the smallest of the table" in warning for warning in facts["warnings"])
    for plot, message in (("nowhere/x.png", "there is no folder"), ("x.foo", "must end in one of .png, .svg, .pdf")):
        assert main([*arguments, "--plot", str(tmp_path / plot)]) == 2
        assert message in " ".join(capfd.readouterr().err.split())
    assert main([*arguments, "--law", "chinchilla", "--fix", "A=3"]) == 2
    assert "--fix A: chinchilla has these parameters without units" in capfd.readouterr().err


def test_a_chosen_law_whose_parameters_are_imprecise_is_not_determined(tmp_path: Path, capfd: pytest.CaptureFixture):
    n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(2e8, 2e10, 4)))
    loss = HOFFMANN.loss(n, d) * np.exp(np.random.default_rng(5).normal(0, 0.03, 16))
    path = tmp_path / "runs.csv"
    path.write_text("N,D,loss\n" + "\n".join(f"{a:.0f},{b:.0f},{c:.6f}" for a, b, c in zip(n, d, loss, strict=True)))
    arguments = ["fit", str(path), "--n", "N", "--d", "D", "--loss", "loss", "--resamples", "100", "--law", "all"]
    assert main(arguments) == 3
    printed = capfd.readouterr().out
    assert "NOT DETERMINED" in printed
    assert "predicts; parameters not determined" in printed
    assert "E is known too imprecisely" in printed
