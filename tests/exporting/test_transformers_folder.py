"""A folder for transformers computes what the run computes, in a process that has none of this package."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from export_runs import SEQUENCE_TOKENS, make_tokenizer, write_run
from tokenizers import Tokenizer, processors

import lmu_dist
from lmu_dist.cli import main
from lmu_dist.config import ConfigError
from lmu_dist.exporting.model_card import describe_law
from lmu_dist.exporting.transformers_folder import export
from lmu_dist.models import registry
from lmu_dist.models.generate import Sampling, generate

HERE = Path(__file__).parent
OWN = f"{HERE.parents[1]}/examples/gated_linear_attention.py:GatedLinearAttention"
# The first one is examined closely: it has all parts that others have, but no learned positions.
# The hybrid has the mixer of lmu_modern with default keys, which so needs no folder of its own.
FAMILIES = {
    "lmu_modern": {"output_gate": True, "qk_norm": True},
    "hybrid": {"mixer": "lmu_modern"},
    **{name: {} for name in registry.names() if name not in ("lmu_modern", "hybrid")},
    OWN: {},
}
pytestmark = pytest.mark.filterwarnings("ignore")


def label(reference: str) -> str:
    return reference.rpartition(":")[2]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and an exported folder of every family."""
    folder = tmp_path_factory.mktemp("exported")
    for reference, options in FAMILIES.items():
        write_run(folder / "runs" / label(reference), reference, options)
        export(folder / "runs" / label(reference), folder / label(reference), reference if reference == OWN else None)
    return folder


@pytest.fixture(scope="module")
def loaded(exported: Path) -> dict[str, Any]:
    """What another process finds in all of them."""
    pytest.importorskip("transformers", reason="it is in the dev extra")
    environment = {"HF_HOME": str(exported / "hub"), "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, HERE / "load_folders.py", *(exported / label(reference) for reference in FAMILIES)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {Path(folder).name: found for folder, found in json.loads(done.stdout[done.stdout.index('{"') :]).items()}


@pytest.mark.parametrize("reference", FAMILIES, ids=label)
def test_logits_and_generated_tokens_are_those_of_the_run(reference: str, exported: Path, loaded: dict[str, Any]):
    found = loaded[label(reference)]
    trained = lmu_dist.load(exported / "runs" / label(reference), reference if reference == OWN else None)
    tokens = (torch.arange(SEQUENCE_TOKENS) * 7919 % trained.model.shape.vocab_tokens)[None]
    with torch.no_grad():
        expected = trained.model.logits(tokens)
    assert (torch.tensor(found["logits"]) - expected).abs().max() < 1e-5
    assert found["prompt"] == [trained.tokenizer.encode("def f(x):", add_special_tokens=False).ids]
    greedy = [int(token) for token in islice(generate(trained.model, found["prompt"], Sampling(temperature=0)), 12)]
    assert max(found["branches"]) < 1e-5  # several calls go on from one state
    assert found["generated"] == [[found["prompt"][0] + greedy]] * 2
    assert found["parameters"] == sum(p.numel() for p in trained.model.parameters())
    assert found["end"] == trained.end_of_text_id
    assert found["copied"]


def test_padding_losses_precision_and_a_second_save(loaded: dict[str, Any]):
    found = loaded["lmu_modern"]
    expected, padded, in_training = found["losses"]
    assert padded == pytest.approx(expected, rel=1e-5)
    assert in_training == pytest.approx(expected, rel=1e-5)
    assert found["no logits in training"]
    assert "padding comes before a text" in found["errors"][0]
    assert "prompts of one length only" in found["errors"][1]
    assert "one text is ids[None]" in found["errors"][2]
    assert "labels must have the shape of input_ids" in found["errors"][3]
    assert found["saved again"]
    assert found["bf16"][0] == "torch.bfloat16"
    assert found["bf16"][1] < 0.03
    assert found["beams"]
    assert found["new weights"] == pytest.approx(1, rel=0.05)  # embeddings of variance 1 / width, as training starts
    tokenizer = make_tokenizer()
    assert found["special"] == tokenizer.encode("a<|endoftext|>b").ids  # the characters, not the token
    assert found["decoded"] == "a , b  .\n"


@pytest.mark.parametrize("reference", FAMILIES, ids=label)
def test_the_code_needs_no_other_package_and_is_that_of_this_one(reference: str, exported: Path):
    files = sorted((exported / label(reference)).glob("*.py"))
    imports = {
        line.split()[1].partition(".")[0]
        for file in files
        for line in file.read_text().splitlines()
        if line.startswith(("import ", "from "))
    }
    assert imports - set(sys.stdlib_module_names) <= {"", "torch", "numpy", "transformers"}
    network = (exported / label(reference) / "network.py").read_text()
    original = (Path(lmu_dist.__file__).parent / "models" / "network.py").read_text()
    assert original[original.index("class Network") : original.index("\n\ndef _advance")] in network


def test_the_card_says_what_is_known(exported: Path):
    card = (exported / "lmu" / "README.md").read_text()
    for fact in ("| tokens trained on | 12,345 |", "2.5000 nats per token", "files `*.txt`", "Apache-2.0", "version 1"):
        assert fact in card
    assert "/data/books" not in card
    fit = {"family": "lmu", "n_rows": 12, "determined": True, "formula": "L = E + A/N^alpha", "level": 0.9}
    fit |= {"parameters": {"E": 1.25, "A": 40.0}, "intervals": {"E": [1.0, 1.5]}}
    unfit = fit | {"family": "lstm", "determined": False, "certificate": {"reasons": ["too few sizes"]}}
    fits = {"experiment": "study", "fits": [fit, unfit]}
    assert "L = E + A/N^alpha, L in nats per token; E = 1.25 (1 to 1.5), A = 40;" in describe_law(fits, "lmu")
    assert describe_law(fits, "lstm").endswith("12 runs: not determined, because too few sizes")
    with pytest.raises(ConfigError, match="no fit of family llama"):
        describe_law(fits, "llama")


def test_an_exported_folder_is_loaded_as_a_run_is(exported: Path):
    run, folder = (lmu_dist.load(exported / name) for name in ("runs/lmu", "lmu"))
    text = "class A:\n" * 20
    assert torch.equal(run.losses(text), folder.losses(text))


def test_losses_of_a_long_text_are_those_of_full_windows(exported: Path):
    trained, n = lmu_dist.load(exported / "runs" / "lmu"), SEQUENCE_TOKENS
    text = "def f(x):\n    return x\n" * 9
    ids = [trained.end_of_text_id, *trained.tokenizer.encode(text).ids]
    losses = trained.losses(text)
    assert len(losses) == len(ids) - 1 > 2 * n
    for position in (1, n, n + 1, 2 * n, len(ids) - 1):
        window = (position - 1) // n
        start = window * n if (window + 1) * n < len(ids) else len(ids) - 1 - n
        logits = trained.model.logits(torch.tensor([ids[start:position]]))[0, -1]
        assert float(losses[position - 1]) == pytest.approx(-float(logits.log_softmax(0)[ids[position]]), abs=1e-4)
    assert len(trained.losses("")) == 0


def test_tokens_that_a_tokenizer_puts_around_a_text_are_left_out(tmp_path: Path):
    tokenizer = make_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    write_run(tmp_path / "run", "lstm", tokenizer=tokenizer)
    export(tmp_path / "run", tmp_path / "out")
    exported = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert exported.encode("ab").ids == tokenizer.encode("ab", add_special_tokens=False).ids != tokenizer.encode("ab").ids
    assert lmu_dist.load(tmp_path / "out").model.shape.family == "lstm"


OWN_FAMILY = """
from torch import nn
from lmu_dist.models.family import Family
from lmu_dist.models.mixers.feed_forward import FeedForward

class Mixer(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.layer = FeedForward(shape.d_model, 8)
    def forward(self, x):
        return self.layer(x)

class Own(Family):
    name = "own_by_shape"
    def mixer(self, shape, options):
        return Mixer(shape)
"""


def test_a_family_that_cannot_be_copied_is_one_clear_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (tmp_path / "own.py").write_text(OWN_FAMILY)
    own = f"{tmp_path / 'own.py'}:Own"
    write_run(tmp_path / "run", own)
    arguments = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--format", "transformers", "--family", own]
    assert main(arguments) == 2
    message = " ".join(capfd.readouterr().err.split())
    assert "the sublayer Mixer cannot be built" in message
    assert "its argument shape is of type Shape; build it in the family's file" in message
    assert not (tmp_path / "out").exists()


def test_bad_input_is_refused_before_anything_is_written(exported: Path, capfd: pytest.CaptureFixture[str]):
    run = str(exported / "runs" / "lstm")
    assert main(["export", run, str(exported / "lmu"), "--format", "transformers"]) == 2
    assert "is not an empty folder" in capfd.readouterr().err
    assert main(["export", run, str(exported / "new"), "--format", "transformers", "--report", str(exported)]) == 2
    assert "fits.json cannot be read" in capfd.readouterr().err
    assert main(["export", run, str(exported / "new"), "--report", str(exported)]) == 2
    assert "only --format transformers writes" in capfd.readouterr().err
    assert main(["export", run, str(exported / "new"), "--format", "onnx"]) == 2
    assert "transformers" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="a family in a user's own file"):
        export(exported / "runs" / label(OWN), exported / "new")
    assert not (exported / "new").exists()
