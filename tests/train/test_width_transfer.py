"""Learning rates that hold at every width (model.base_n_params): the coordinate check, and what it must not change."""

import math
from dataclasses import replace

import pytest
import torch

from lmu_dist.config import ConfigError, TrainConfig, parse, with_settings
from lmu_dist.models import registry
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.shape import Shape
from lmu_dist.planning.grid import grid, shape_of
from lmu_dist.planning.plan_notes import plan_notes
from lmu_dist.train.optimizer import parameter_groups

VOCAB, LENGTH, ROWS, RATE, STEPS = 64, 32, 4, 0.01, 8
WIDTHS = (64, 128, 256)
FAMILIES = [name for name, family in registry.built_in().items() if family.rates_transfer]
# With the default q' = 3 at this length the output of an LMU depends on three random numbers, p, more than on its width.
OPTIONS = {name: {"order": 32, "reduced_order": 16} for name in ("lmu", "lmu_attention", "lmu_modern")}


def shape_at(name: str, d_model: int, base: int | None = None) -> Shape:
    """A model of this width, with d_ff = 4 d_model and two blocks."""
    family = registry.find(name)
    widths = family.widths(d_model, LENGTH, family.Options(**OPTIONS.get(name, {})))
    assert widths is not None
    widths = widths | {"d_ff": 4 * d_model}
    return Shape(name, d_model, 2, LENGTH, VOCAB, widths, None if base is None else shape_at(name, base))


def tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))


def train(model: LanguageModel) -> list[float]:
    """Losses of STEPS steps of Adam on one batch, with the rates that the engine takes."""
    groups = parameter_groups(model, TrainConfig())
    adam = torch.optim.Adam([{"params": group.parameters, "lr": RATE * group.rate_factor} for group in groups])
    inputs, targets, losses = tokens()[:, :-1], tokens()[:, 1:], list[float]()
    for _ in range(STEPS):
        loss = model(inputs, targets).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def outputs(model: LanguageModel) -> list[torch.Tensor]:
    """Output of every sublayer, and the logits."""
    found = list[torch.Tensor]()

    def keep(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
        found.append(output)

    hooks = [sublayer.register_forward_hook(keep) for sublayer in model.sublayers]
    found.append(model.logits(tokens()[:, :-1]))
    for hook in hooks:
        hook.remove()
    return found


def slopes(name: str, base: int | None) -> torch.Tensor:
    """Exponent of the width in the root mean square change of every output of `outputs`, averaged over two seeds."""
    changes = torch.zeros(len(WIDTHS), 0)
    for seed in (0, 1):
        of_seed = list[list[float]]()
        for d_model in WIDTHS:
            model = LanguageModel(shape_at(name, d_model, base), seed)
            before = outputs(model)
            train(model)
            of_seed.append([(a - b).square().mean().sqrt().item() for a, b in zip(outputs(model), before, strict=True)])
        changes = torch.tensor(of_seed).log() / 2 + (changes if changes.numel() else 0)
    x = torch.tensor([math.log(d_model) for d_model in WIDTHS])
    x = x - x.mean()
    return x @ changes / x.square().sum()


@pytest.mark.parametrize("name", FAMILIES)
def test_coordinate_check(name: str):
    """A few steps at one rate change what sublayers and head compute by as much at every width, and else by more the wider.

    The logits of the random embedding fall as width^-0.5, so small widths have a slope below that of the limit, 0.
    """
    with_base, without = slopes(name, WIDTHS[0]), slopes(name, None)
    assert with_base.abs().max() < 0.3, with_base
    assert with_base.abs().mean() < 0.2, with_base
    assert without[:-1].mean() > 0.4, without  # of the sublayers
    assert without[-1] > 0.1, without  # of the logits


@pytest.mark.parametrize(("parameter", "width"), [("p", "reduced_order"), ("reading", "order")])
def test_coordinate_check_of_the_lmus_own_parameters(parameter: str, width: str):
    """What steps of p alone, or of the projections alone, change in the LMU's output as q' or q grows; d_model is fixed.

    The loss is that of one token, so that all gradients agree with its memory: this is the alignment that muP assumes.
    """
    sizes = (8, 32)
    x = torch.randn(1, LENGTH, 1, generator=torch.Generator().manual_seed(1)).repeat(1, 1, 32)

    def log_change(size: int, has_base: bool, seed: int) -> float:
        shape = shape_at("lmu", 32)
        base = shape.with_widths(**{width: sizes[0]}) if has_base else None
        model = LanguageModel(replace(shape.with_widths(**{width: size}), base=base), seed)
        mixer = model.sublayers[1]
        own, before = getattr(mixer, parameter), mixer(x)[:, -1].detach()
        [factor] = {g.rate_factor for g in parameter_groups(model, TrainConfig()) for p in g.parameters if p is own}
        adam = torch.optim.Adam([own], RATE / 10 * factor)  # so that changes are about linear
        for _ in range(STEPS):
            adam.zero_grad()
            mixer(x)[:, -1].mean().backward()
            adam.step()
        return (mixer(x)[:, -1] - before).square().mean().sqrt().log().item()

    logs = torch.tensor([math.log(size) for size in sizes]) - math.log(sizes[0])
    logs -= logs.mean()
    for has_base in (True, False):
        changes = torch.tensor([[log_change(size, has_base, seed) for size in sizes] for seed in range(6)])
        slope = float(logs @ changes.mean(0) / logs.square().sum())
        assert abs(slope) < 0.4 if has_base else slope > 0.6, (has_base, slope)


@pytest.mark.parametrize("name", FAMILIES)
def test_at_its_base_a_model_is_the_ordinary_one(name: str):
    ordinary, own_base = LanguageModel(shape_at(name, 48), 3), LanguageModel(shape_at(name, 48, 48), 3)
    for (key, expected), (other_key, got) in zip(ordinary.state_dict().items(), own_base.state_dict().items(), strict=True):
        assert key == other_key
        assert torch.equal(got, expected), key
    assert train(own_base) == train(ordinary)


@pytest.mark.parametrize("name", FAMILIES)
def test_text_is_generated_by_the_model_that_was_trained(name: str):
    """Logits of chunks equal those of the whole text. A stored shape restores the model, also its base."""
    shape = shape_at(name, 48, 24)
    assert Shape.from_dict(shape.to_dict()) == shape
    model = LanguageModel(Shape.from_dict(shape.to_dict()), 3).double()
    text = tokens()[:, :20]
    with torch.no_grad():
        first, state = model.advance(text[:, :13])
        second, state = model.advance(text[:, 13:19], state)
        third, _ = model.advance(text[:, 19:], state)
        expected = model.logits(text)
        assert not torch.allclose(LanguageModel(replace(shape, base=None), 3).double().logits(text), expected, atol=0.1)
    assert torch.allclose(torch.cat([first, second, third], 1), expected, rtol=1e-8, atol=1e-8)


def test_rates_follow_the_fan_in_of_every_parameter():
    """The rules of docs/recipes.md. What weight decay takes off a weight in a step does not depend on the width."""
    base = shape_at("lmu", 32).with_widths(order=10, reduced_order=3)
    shape = replace(shape_at("lmu", 64).with_widths(order=30, reduced_order=6), base=base)
    model = LanguageModel(shape)
    groups = parameter_groups(model, TrainConfig(weight_decay=0.1, embedding_rate=0.5, vector_rate=4.0))
    settings = {id(p): (group.rate_factor, group.weight_decay) for group in groups for p in group.parameters}
    got = {name: settings[id(p)] for name, p in model.named_parameters()}
    third = 1 / 3
    assert got["embedding.weight"] == (0.5, 0.1)
    assert got["sublayers.0.up.weight"] == (0.5, 0.2)
    assert got["sublayers.0.out.weight"] == (0.5, 0.2)
    assert got["sublayers.1.reading"] == (pytest.approx(third), pytest.approx(0.3))  # over q
    assert got["sublayers.1.p"] == (2.0, 0.0)  # over q'
    assert {got[name] for name in got if "norm" in name or name.endswith("bias")} == {(4.0, 0.0)}


def test_a_grid_takes_over_the_rate_of_the_base():
    ladder = {"families": ["transformer", "lmu"], "n_params": [3000, 30_000], "tokens": [1_000_000]}
    config = parse({"train": {"warmup_tokens": 50_000}, "model": {"base_n_params": 3000}, "ladder": ladder})
    cells, _ = grid(config, 400)
    for cell in cells:
        alone = with_settings(cell.config, {"model.base_n_params": None})
        assert shape_of(alone, 400) == replace(cell.shape, base=None)
        base = shape_of(with_settings(alone, {"model.n_params": 3000}), 400)
        # A cell that is its own base is the cell of a search there, and has its key.
        assert cell.shape.base == (None if cell.config.model.n_params == 3000 else base)
        assert ("base" in cell.shape.to_dict()) == (cell.shape.base is not None)
    notes = [note for note in plan_notes(config, cells, None) if "model.base_n_params" in note]
    assert len(notes) == 2
    assert all("takes over the rate of N = 3,000" in note for note in notes)
    with pytest.raises(ConfigError, match=r"ladder: lstm, .* model\.base_n_params=3000: learning rates of family lstm"):
        grid(with_settings(config, {"ladder.families": ["lstm"]}), 400)
