"""Families by name: built in, of an installed package, in a user's own file; their options; errors that say what to do."""

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from lmu_dist.config import ConfigError
from lmu_dist.models import accounting, registry
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.sizing import shape_for

EXAMPLE = Path(__file__).parents[2] / "examples" / "gated_linear_attention.py"
HEAD = "import torch\nfrom torch import nn\nfrom lmu_dist.models.family import Family\n"


def written(folder: Path, body: str, name: str = "own.py") -> str:
    (folder / name).write_text(HEAD + body)
    return f"{folder / name}:Own"


def test_the_built_in_families_are_files(tmp_path: Path):
    paper = ("lmu", "lmu_attention", "transformer", "lstm")
    assert registry.names() == (*paper, "llama", "gated_deltanet", "mamba2", "lmu_modern", "hybrid")
    folder = Path(registry.built_in_families.__file__).parent
    assert {path.stem for path in folder.glob("[!_]*.py")} == set(registry.names())


@pytest.mark.parametrize("n_params", [1000, 30_000, 10**6, 10**9])
def test_a_family_that_only_builds_its_mixer_meets_every_size(n_params: int):
    family = registry.find(f"{EXAMPLE}:GatedLinearAttention")
    shape = shape_for(family, n_params, vocab_tokens=97, sequence_tokens=32)
    assert accounting.parameters(shape).non_embedding == pytest.approx(n_params, rel=0.02)
    assert accounting.flops(shape).matmul > 2 * 0.8 * n_params
    if n_params <= 30_000:
        model = LanguageModel(shape)
        assert accounting.parameters(shape).total == sum(p.numel() for p in model.parameters())


def test_the_example_is_causal_and_continues_a_text():
    shape = shape_for(registry.find(f"{EXAMPLE}:GatedLinearAttention"), 8000, vocab_tokens=97, sequence_tokens=32)
    model, tokens = LanguageModel(shape).double(), torch.randint(97, (2, 32))
    with torch.no_grad():
        whole = model.logits(tokens)
        changed = model.logits(torch.cat([tokens[:, :20], tokens[:, 20:].flip(1)], 1))
        assert torch.equal(whole[:, :20].argmax(-1), changed[:, :20].argmax(-1))
        state, parts = None, []
        for chunk in tokens.split([1, 5, 20, 6], 1):
            logits, state = model.advance(chunk, state)
            parts.append(logits)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-10


def test_a_mixer_without_advance_continues_a_text_by_computing_it_again(tmp_path: Path):
    body = """
class Mean(nn.Module):
    def forward(self, x):
        return x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]

class Own(Family):
    def mixer(self, shape, options):
        return Mean()
"""
    shape = shape_for(registry.find(written(tmp_path, body)), 3000, vocab_tokens=97, sequence_tokens=16)
    assert shape.family == "own"
    model, tokens = LanguageModel(shape).double(), torch.randint(97, (1, 12))
    with torch.no_grad():
        first, state = model.advance(tokens[:, :7])
        second, _ = model.advance(tokens[:, 7:], state)
        assert (torch.cat([first, second], 1) - model.logits(tokens)).abs().max() < 1e-12


def test_options_of_a_users_family_are_checked(tmp_path: Path):
    body = """
from pydantic.dataclasses import dataclass
from lmu_dist.config.types import STRICT, Count

@dataclass(frozen=True, config=STRICT)
class Options:
    n_taps: Count = 3

class Own(Family):
    name = "taps"
    Options = Options
    def widths(self, d_model, sequence_tokens, options):
        return {"d_ff": 1, "n_taps": options.n_taps}
    def mixer(self, shape, options):
        hidden = shape.n_taps * shape.d_model
        return nn.Sequential(nn.Linear(shape.d_model, hidden), nn.Linear(hidden, shape.d_model))
"""
    family = registry.find(written(tmp_path, body))
    options = registry.options_of(family, {"n_taps": 5})
    assert shape_for(family, 9000, vocab_tokens=9, sequence_tokens=8, options=options).n_taps == 5
    for values, message in (
        ({"n_taps": 0}, r"model\.n_taps: must be more than 0, not 0"),
        ({"taps": 1}, r"did you mean model\.n_taps"),
    ):
        with pytest.raises(ConfigError, match=message):
            registry.options_of(family, values)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("class Own:\n    pass\n", "is not a class derived from"),
        ("class Own(Family):\n    pass\n", "does not define mixer"),
        ("class Other(Family):\n    pass\n", "is not a class derived from"),
        ("class Own(Family):\n", "cannot be run, line 4: IndentationError"),
        ("1 / 0\n", "cannot be run: ZeroDivisionError"),
        ("class Own(Family):\n    name = 'lmu'\n    def mixer(self, shape, options): ...\n", "the name 'lmu' is taken"),
        ("class Own(Family):\n    name = 'A b'\n    def mixer(self, shape, options): ...\n", "its name 'A b' must be"),
        ("class Own(Family):\n    colour = 'red'\n    def mixer(self, shape, options): ...\n", "must be of the form #rrggbb"),
    ],
)
def test_a_file_that_is_no_family_is_one_clear_error(tmp_path: Path, body: str, message: str):
    with pytest.raises(ConfigError, match=message):
        registry.find(written(tmp_path, body))


def test_a_mixer_that_cannot_be_counted_names_what_to_define(tmp_path: Path):
    body = (
        "class Own(Family):\n    def mixer(self, shape, options):\n        return nn.Linear(shape.d_model + 1, shape.d_model)\n"
    )
    shape = shape_for(registry.find(written(tmp_path, body)), 3000, vocab_tokens=9, sequence_tokens=8)
    with pytest.raises(ConfigError, match=r"family own: its FLOPs could not be counted .*define matmul_flops\(\)"):
        accounting.flops(shape)


def test_references_that_lead_nowhere(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot read .*No such file"):
        registry.find(f"{tmp_path}/none.py:Own")
    with pytest.raises(ConfigError, match=r"unknown family 'lmu_atention'; did you mean lmu_attention"):
        registry.find("lmu_atention")
    body = "class Own(Family):\n    def mixer(self, shape, options):\n        return nn.Identity()\n"
    registry.find(written(tmp_path, body))
    with pytest.raises(ConfigError, match="have the same name own; set another `name`"):
        registry.find(written(tmp_path, body, "other.py"))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        ("x.mean(1, keepdim=True).expand_as(x)", "at a position depends on a later input; it must be causal"),
        ("x[..., :3]", r"Wrong returns \(2, 8, 3\) for an input of \(2, 8, 8\); keep the shape"),
        ("None", "Wrong returns NoneType"),
    ],
)
def test_a_mixer_that_sees_later_tokens_or_changes_the_shape_is_refused(tmp_path: Path, forward: str, message: str):
    """A family that sees the future would win every comparison."""
    body = f"""
class Wrong(nn.Module):
    def forward(self, x):
        return {forward}

class Own(Family):
    def mixer(self, shape, options):
        return Wrong()
"""
    with pytest.raises(ConfigError, match=message):
        registry.find(written(tmp_path, body))


def test_a_builder_that_returns_no_module_is_refused(tmp_path: Path):
    body = "class Own(Family):\n    def mixer(self, shape, options):\n        return None\n"
    with pytest.raises(ConfigError, match=r"mixer\(\) returned NoneType, not a torch.nn.Module"):
        registry.find(written(tmp_path, body))


def test_a_file_that_needs_another_file_is_refused(tmp_path: Path):
    """Only its own text reaches the workers, and makes its version."""
    (tmp_path / "helper_of_mine.py").write_text("WIDTH = 3\n")
    body = "import helper_of_mine\nclass Own(Family):\n    def mixer(self, shape, options):\n        return nn.Identity()\n"
    with pytest.raises(ConfigError, match="imports helper_of_mine, a file next to it"):
        registry.find(written(tmp_path, body))
    (tmp_path / "imports.py").write_text("from lmu_dist.models.families.lstm import LSTM\n")
    with pytest.raises(ConfigError, match="the class is imported, not defined in this file"):
        registry.find(f"{tmp_path}/imports.py:LSTM")
    assert registry.find("lstm").version == 1


def test_a_family_derived_from_a_built_in_one_changes_with_it_and_looks_like_itself(tmp_path: Path, monkeypatch):
    body = "from lmu_dist.models.families.lmu import LMU\nclass Own(LMU):\n    pass\n"
    family = registry.find(written(tmp_path, body))
    assert str(family.version).endswith("+lmu:1")
    assert (family.appearance().title, family.appearance().colour) == ("own", "")
    monkeypatch.setattr(registry, "_user_families", {})
    monkeypatch.setattr(type(registry.find("lmu")), "version", 2)
    assert str(registry.find(written(tmp_path, body)).version).endswith("+lmu:2")


def test_options_that_are_numbers_are_counted(tmp_path: Path):
    body = """
from pydantic.dataclasses import dataclass

@dataclass(frozen=True)
class Options:
    hidden: int = 4

class Own(Family):
    Options = Options
    def mixer(self, shape, options):
        return nn.Sequential(nn.Linear(shape.d_model, options.hidden), nn.Linear(options.hidden, shape.d_model))
"""
    family = registry.find(written(tmp_path, body))
    options = registry.options_of(family, {"hidden": 200})
    shape = shape_for(family, 50_000, vocab_tokens=97, sequence_tokens=16, options=options)
    model = LanguageModel(shape, options=options)
    assert accounting.parameters(shape).total == sum(p.numel() for p in model.parameters())
    assert accounting.parameters(shape).non_embedding == pytest.approx(50_000, rel=0.02)


@pytest.mark.parametrize("widths", ["d_model & (d_model - 1) == 0", "d_model % 512 == 0"])
def test_few_possible_widths_are_found(tmp_path: Path, widths: str):
    body = f"""
class Own(Family):
    def widths(self, d_model, sequence_tokens, options):
        return {{"d_ff": d_model}} if {widths} else None
    def mixer(self, shape, options):
        return nn.Sequential(*(nn.Linear(shape.d_model, shape.d_model) for _ in range(4)))
"""
    family = registry.find(written(tmp_path, body))
    for n_params in (30_000_000, 10**9):
        shape = shape_for(family, n_params, vocab_tokens=97, sequence_tokens=16)
        assert accounting.parameters(shape).non_embedding == pytest.approx(n_params, rel=0.02)


def test_families_of_installed_packages_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "installed_family.py").write_text(
        HEAD + "class Installed(Family):\n    version = 3\n    def mixer(self, shape, options):\n        return nn.Identity()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("installed", "installed_family:Installed", registry.ENTRY_POINTS)
    monkeypatch.setattr(
        registry, "_installed", lambda: {"installed": point, "broken": EntryPoint("broken", "no_module:X", "g")}
    )
    assert registry.names()[-1] == "installed"
    assert registry.find("installed").version == 3
    with pytest.raises(ConfigError, match="broken: no_module:X of an installed package cannot be loaded: ModuleNotFoundError"):
        registry.find("broken")
    registry._load_installed.cache_clear()
