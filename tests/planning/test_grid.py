"""Cells of a grid: every combination once, settings by the rules of the ladder, and errors that name the cell and the key."""

from pathlib import Path

import pytest

from lmu_dist.config import Config, ConfigError, parse, to_dict, with_settings
from lmu_dist.models import accounting, registry
from lmu_dist.models.family import Family as FamilyOfModels
from lmu_dist.models.recipe import Recipe
from lmu_dist.planning.cost import plan
from lmu_dist.planning.grid import grid, shape_of, trunk_settings

FAMILIES = list(registry.built_in())


def make_config(**ladder: object) -> Config:
    defaults = {"families": FAMILIES, "n_params": [3000, 30_000], "tokens": [1_000_000, 4_000_000]}
    return parse({"train": {"warmup_tokens": 50_000}, "ladder": defaults | ladder})


def test_grid_has_every_combination_once_sorted_by_flops():
    cells, left_out = grid(make_config(seeds=[0, 1]), 400)
    assert len(cells) == len(FAMILIES) * 2 * 2 * 2
    assert not left_out
    seen = {(c.config.model.family, c.config.model.n_params, c.config.train.tokens, c.config.seed) for c in cells}
    assert len(seen) == len(cells)
    assert [c.training_flops for c in cells] == sorted(c.training_flops for c in cells)
    for cell in cells:
        assert accounting.parameters(cell.shape).non_embedding == pytest.approx(cell.config.model.n_params, rel=0.02)
        assert cell.config.ladder is None


def test_rules_scale_settings_with_size():
    ladder = {
        "learning_rate": {"value": 0.01, "at_n_params": 3000, "exponent": -0.5, "least": 0.004},
        "batch_tokens": {"value": 3000, "at_n_params": 3000, "exponent": 1.0},
        "warmup_tokens": {"value": 10_000, "at_n_params": 3000, "exponent": 0.5},
        "workers": [{"n_params": 0, "n_workers": 1}, {"n_params": 30_000, "n_workers": 3, "zero_stage": 2}],
    }
    cells, _ = grid(make_config(families=["lmu"], tokens=[10_000_000], n_params=[3000, 30_000, 300_000], **ladder), 400)
    small, middle, large = (c.config for c in cells)
    assert [c.train.learning_rate for c in (small, middle, large)] == pytest.approx([0.01, 0.004, 0.004])
    assert [c.train.warmup_tokens for c in (small, middle, large)] == [10_000, 31_623, 100_000]
    assert (small.cluster.n_workers, middle.cluster.n_workers, middle.cluster.zero_stage) == (1, 3, 2)
    # whole rows of 256 tokens, regardless of the number of workers
    assert [c.train.batch_tokens for c in (small, middle, large)] == [12 * 256, 117 * 256, 1172 * 256]


def test_tokens_per_param_gives_budgets_proportional_to_size():
    cells, _ = grid(make_config(families=["lmu"], tokens=[1_000_000], tokens_per_param=[100, 1000]), 400)
    assert {(c.config.model.n_params, c.config.train.tokens) for c in cells} == {
        (3000, 300_000),
        (3000, 1_000_000),
        (3000, 3_000_000),
        (30_000, 1_000_000),
        (30_000, 3_000_000),
        (30_000, 30_000_000),
    }


def test_tuned_settings_are_scaled_to_other_sizes_by_the_rules():
    tuned = [
        {"family": "lmu", "n_params": 3000, "settings": {"train.learning_rate": 0.02, "train.beta2": 0.98}},
        {"family": "lmu", "n_params": 1_000_000, "settings": {"train.learning_rate": 0.5}},
    ]
    rule = {"value": 0.01, "exponent": -0.5}
    cells, _ = grid(make_config(families=["lmu", "lstm"], tokens=[1e6], learning_rate=rule, tuned=tuned), 400)
    rates = {(c.config.model.family, c.config.model.n_params): c.config.train.learning_rate for c in cells}
    assert rates["lmu", 3000] == pytest.approx(0.02)
    assert rates["lmu", 30_000] == pytest.approx(0.02 * 10**-0.5)
    assert rates["lstm", 3000] == pytest.approx(0.01 * (3000 / 1e6) ** -0.5)
    assert {c.config.train.beta2 for c in cells if c.config.model.family == "lmu"} == {0.98}
    no_warmup = [{"family": "lmu", "n_params": 3000, "settings": {"train.warmup_tokens": 0}}]
    cells, _ = grid(make_config(families=["lmu"], tuned=no_warmup, workers=[{"n_params": 0, "n_workers": 1}]), 400)
    assert {c.config.train.warmup_tokens for c in cells} == {0}
    assert {c.config.cluster.zero_stage for c in cells} == {1}


BY_TOKENS = {"value": 0.01, "token_exponent": -0.5, "at_tokens": 250_000}


def test_rate_depends_on_the_budget_and_wsd_cells_share_a_trunk():
    ladder = {"families": ["lmu"], "n_params": [3000], "tokens": [250_000, 1_000_000, 4_000_000], "learning_rate": BY_TOKENS}
    cosine = [cell.config.train for cell in grid(make_config(**ladder), 400)[0]]
    assert [train.peak_rate for train in cosine] == pytest.approx([0.01, 0.005, 0.0025])
    assert {train.earlier_tokens for train in cosine} == {()}
    wsd = [cell.config for cell in grid(with_settings(make_config(**ladder), {"train.schedule": "wsd"}), 400)[0]]
    assert [c.train.peak_rate for c in wsd] == [train.peak_rate for train in cosine]
    assert [c.train.earlier_tokens for c in wsd] == [(), (250_000,), (250_000, 1_000_000)]
    trunks = [trunk_settings(to_dict(c)["train"]) for c in wsd]
    assert trunks[0] == trunks[1] == trunks[2]
    other = with_settings(make_config(**ladder | {"tokens": [500_000, 1_000_000]}), {"train.schedule": "wsd"})
    assert trunk_settings(to_dict(grid(other, 400)[0][0].config)["train"]) != trunks[0]


def test_a_tuned_rate_holds_at_the_budget_of_its_search():
    tuned = {"family": "lmu", "n_params": 3000, "tokens": 500_000, "settings": {"train.learning_rate": 0.02}}
    ladder = {"families": ["lmu"], "n_params": [3000, 30_000], "tokens": [2_000_000]}
    rule = BY_TOKENS | {"exponent": -0.5}
    rates = [c.config.train.peak_rate for c in grid(make_config(**ladder, learning_rate=rule, tuned=[tuned]), 400)[0]]
    assert rates == pytest.approx([0.01, 0.01 * 10**-0.5])
    del tuned["tokens"]
    with pytest.raises(ConfigError, match=r"ladder\.tuned: the entry of lmu at N = 3,000 has a learning rate and no tokens"):
        grid(make_config(**ladder, learning_rate=rule, tuned=[tuned]), 400)
    assert grid(make_config(**ladder, tuned=[tuned]), 400)[0][0].config.train.peak_rate == 0.02


def test_recipe_of_each_family_yields_to_keys_that_are_set():
    tree = {"train": {"recipe": "family", "clip_norm": 0.5, "weight_decay": 0.0}, "ladder": {"tokens": 1e6, "n_params": 3000}}
    tree["ladder"] |= {"families": ["lmu", "linear_attention"], "tuned": []}
    tree["ladder"]["families"][1] = f"{Path(__file__).parents[2]}/examples/gated_linear_attention.py:GatedLinearAttention"
    tree["ladder"]["tuned"] = [{"family": "lmu", "n_params": 3000, "settings": {"train.beta2": 0.98}}]
    cells = {cell.shape.family: cell.config.train for cell in grid(parse(tree), 400)[0]}
    lmu, modern = cells["lmu"], cells["gated_linear_attention"]
    assert (lmu.beta1, lmu.beta2, lmu.weight_decay, lmu.clip_norm) == (0.9, 0.98, 0.0, 0.5)
    # the weight decay and clipping that are set, although the first is the default, and the betas of the recipe
    assert (modern.beta1, modern.beta2, modern.weight_decay, modern.clip_norm) == (0.9, 0.95, 0.0, 0.5)
    assert {(train.recipe, train.recipe_except) for train in cells.values()} == {(None, None)}
    one_for_all = parse(tree | {"train": {"recipe": tree["ladder"]["families"][1]}})
    assert {cell.config.train.weight_decay for cell in grid(one_for_all, 400)[0]} == {0.1}
    with pytest.raises(ConfigError, match=r"train\.recipe: unknown family 'gpt2'; .*, or family for the recipe of each family"):
        grid(parse(tree | {"train": {"recipe": "gpt2"}}), 400)


def test_recipe_of_a_single_run_and_of_a_search():
    [single], _ = grid(parse({"train": {"recipe": "family", "eps": 1e-6}, "model": {"family": "transformer"}}), 400)
    assert (single.config.train.beta2, single.config.train.eps) == (0.999, 1e-6)
    space = {"train.learning_rate": {"log": [1e-3, 1e-1]}}
    tune = {"families": ["lmu"], "n_params": [2000], "space": space}
    [searched], _ = grid(parse({"train": {"recipe": "family"}, "tune": tune}), 400)
    assert searched.config.train.recipe is None


def test_a_recipe_sets_the_optimizer_only():
    with pytest.raises(ConfigError, match="a recipe cannot set learning_rate; it may set beta1"):
        Recipe("a paper", {"learning_rate": 1.0})


# Where the paper of each recipe states the optimizer, and what it states.
KAPLAN = ("Kaplan et al. 2020, section 2.2 (arXiv 2001.08361)", (0.9, 0.999, 0.0, None, 1e-8))
LLAMA = ("Touvron et al. 2023, section 2.3 (arXiv 2302.13971)", (0.9, 0.95, 0.1, 1.0, None))
RECIPES = {
    **dict.fromkeys(("lmu", "lmu_attention", "transformer", "lstm"), KAPLAN),
    **dict.fromkeys(("llama", "lmu_modern", "hybrid"), LLAMA),
    "gated_deltanet": ("Yang et al. 2024, section 4 (arXiv 2412.06464)", LLAMA[1]),
    "mamba2": ("Gu and Dao 2023, appendix E.2.1 (arXiv 2312.00752)", LLAMA[1]),
}


def test_recipes_are_those_of_their_sources():
    keys = ("beta1", "beta2", "weight_decay", "clip_norm", "eps")
    found = {name: family.recipe for name, family in registry.built_in().items()}
    assert found.keys() == RECIPES.keys()
    table = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    for name, (source, values) in RECIPES.items():
        assert found[name].source.startswith(source), name
        assert tuple(map(found[name].settings.get, keys)) == values, name
        place = source.split(", ")[1].split(" (")[0]  # the section or appendix
        [row] = [line for line in table.splitlines() if line.startswith("|") and source.partition(",")[0] in line]
        assert place in row, name


def test_cells_above_max_cell_flops_are_left_out():
    all_cells, _ = grid(make_config(), 400)
    limit = all_cells[5].training_flops
    kept, left_out = grid(make_config(max_cell_flops=limit), 400)
    assert len(kept) == 6
    assert len(left_out) == len(all_cells) - 6


def test_number_of_workers_does_not_change_train_settings():
    """Otherwise the keys and losses of a study would depend on the cluster."""
    rule = {"batch_tokens": {"value": 2816}}
    trains = {
        n: [c.config.train for c in grid(make_config(workers=[{"n_params": 0, "n_workers": n}], **rule), 400)[0]]
        for n in (1, 2, 3)
    }
    assert trains[1] == trains[2] == trains[3]


def test_model_keys_are_set_only_for_families_that_have_them():
    config = with_settings(make_config(families=["lmu", "lstm"], n_params=[30_000]), {"model.theta_tokens": 64})
    cells = {cell.shape.family: cell for cell in grid(config, 400)[0]}
    assert cells["lmu"].shape.theta_tokens == 64
    assert cells["lstm"].config.model.options == {}
    for key, message in (("model.thetta_tokens", "did you mean model.theta_tokens"), ("model.order", "more than 0")):
        with pytest.raises(ConfigError, match=message):
            grid(with_settings(config, {key: -1}), 400)
    with pytest.raises(ConfigError, match=r"model\.order: unknown key of family lstm; it has no keys of its own"):
        grid(with_settings(make_config(families=["lstm"]), {"model.order": 3}), 400)
    with pytest.raises(ConfigError, match=r"unknown family 'gpt'; take one of lmu, .*, or path/to/file.py:CLASS"):
        grid(make_config(families=["gpt"]), 400)


@pytest.mark.parametrize(
    ("ladder", "message"),
    [
        ({"tokens": [40_000]}, r"ladder: lmu, N = 3,000, 40,000 tokens: train\.warmup_tokens .* must be less"),
        ({"n_params": [1]}, "ladder: lmu, N = 1, .* no lmu of 2 blocks has N = 1"),
        ({"workers": [{"n_params": 0, "n_workers": 9}]}, "must not be more than the 8 rows"),
        ({"tuned": [{"family": "lmu", "n_params": 1, "settings": {"train.lr": 1}}]}, "train.lr: unknown key"),
        ({"max_cell_flops": 1.0}, r"every cell exceeds ladder\.max_cell_flops=1: the cheapest one needs"),
    ],
)
def test_error_names_the_impossible_cell(ladder: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        grid(make_config(**ladder), 400)


def test_grid_without_ladder_is_the_search_or_the_single_run():
    [single], _ = grid(parse({"model": {"n_params": 5000}}), 400)
    assert single.config.model.n_params == 5000
    space = {"train.learning_rate": {"log": [1e-3, 1e-1]}}
    cells, _ = grid(parse({"tune": {"families": ["lmu", "lstm"], "n_params": [2000, 8000], "space": space}}), 400)
    assert [(c.config.model.family, c.config.model.n_params) for c in cells] == [
        ("lstm", 2000),
        ("lmu", 2000),
        ("lstm", 8000),
        ("lmu", 8000),
    ]


@pytest.mark.parametrize(
    ("ladder", "message"),
    [
        ({"families": ["GPT 2"]}, "ladder.families"),
        ({"tokens": []}, "give token budgets"),
        ({"learning_rate": {"value": 1, "token_exponent": -0.5}}, "token_exponent needs at_tokens"),
        ({"batch_tokens": {"value": 1, "token_exponent": -0.5}}, r"ladder\.batch_tokens\.token_exponent: unknown key"),
        ({"token": [1]}, "did you mean ladder.tokens"),
        ({"learning_rate": {"value": -1}}, r"ladder\.learning_rate"),
        ({"tuned": [{"family": "lmu", "n_params": 1, "settings": {"storage": "/x"}}]}, "storage cannot be tuned"),
        ({"tuned": [{"family": "lmu", "n_params": 1, "settings": {"train.learning_rate": "x"}}]}, "must be a number"),
    ],
)
def test_invalid_ladder_raises_an_error_with_the_key(ladder: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        make_config(**ladder)


OWN_FAMILY = """
from pydantic.dataclasses import dataclass
from torch import nn
from lmu_dist.models.family import Family

@dataclass(frozen=True)
class Options:
    expand: float = 2.0
    bias: bool = False
    speed: str = "fast"

class Mixer(nn.Module):
    def __init__(self, width, inner, bias):
        super().__init__()
        self.into, self.out = nn.Linear(width, inner, bias), nn.Linear(inner, width, bias)

    def forward(self, x):
        return self.out(self.into(x))

class {name}(Family):
    Options = Options

    def mixer(self, shape, options):
        return Mixer(shape.d_model, round(options.expand * shape.d_model), options.bias)
{more}
"""
WITH_A_WIDTH = """
    def widths(self, d_model, sequence_tokens, options):
        return super().widths(d_model, sequence_tokens, options) | {"inner": round(options.expand * d_model)}

    def mixer(self, shape, options):
        return Mixer(shape.d_model, shape.inner, shape.bias)
"""


def test_an_option_that_changes_the_size_and_is_no_width_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "expanded.py"
    file.write_text(OWN_FAMILY.format(name="Expanded", more=""))
    config = with_settings(
        make_config(families=[f"{file}:Expanded"], n_params=[30_000, 60_000], seeds=[0, 1]),
        {"model.family": f"{file}:Expanded"},
    )
    built = list[object]()
    family, of_class = registry.find(f"{file}:Expanded"), FamilyOfModels.meta_sublayers
    monkeypatch.setattr(type(family), "meta_sublayers", lambda *args: built.append(args[2:]) or of_class(*args))
    refused = r"family expanded: the model has [\d,]+ parameters and [\d,]+ were counted; options that change its size"
    for n_params in ([30_000, 60_000], 30_000):
        with pytest.raises(ConfigError, match=rf"N = 30,000, .*{refused}"):
            grid(with_settings(config, {"model.expand": 4.0, "ladder.n_params": n_params}), 400)
    for allowed in ({}, {"model.bias": True}, {"model.expand": 2.0, "model.speed": "slow"}):
        built.clear()
        assert len(grid(with_settings(config, allowed), 400)[0]) == 8
        # Built once under its options for each size, if the counts have others.
        assert len([given for given in built if given]) == (2 if "model.speed" in allowed else 0)
    with pytest.raises(ConfigError, match=refused):
        plan(with_settings(config, {"model.expand": 4.0}))
    with pytest.raises(ConfigError, match=f"^{refused}"):
        shape_of(with_settings(config, {"ladder": None, "model.expand": 2.5, "model.n_params": 30_000}), 400)


def test_an_option_among_the_widths_may_change_the_size(tmp_path: Path):
    file = tmp_path / "with_a_width.py"
    file.write_text(OWN_FAMILY.format(name="WithAWidth", more=WITH_A_WIDTH))
    config = with_settings(make_config(families=[f"{file}:WithAWidth"]), {"model.family": f"{file}:WithAWidth"})
    for expand in (2.0, 4.0):
        cells, _ = grid(with_settings(config, {"model.expand": expand}), 400)
        assert all(cell.shape.inner == round(expand * cell.shape.d_model) for cell in cells)
