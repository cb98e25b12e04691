"""A run's folder as training leaves it, of any family, without training: random weights, a tokenizer, a record."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from lmu_dist.config import TokenizerConfig
from lmu_dist.data import tokenizer as vocabulary
from lmu_dist.data.manifest import TOKENIZER
from lmu_dist.models import registry, sizing
from lmu_dist.models.lm import LanguageModel
from lmu_dist.records import RunRecord
from lmu_dist.train.checkpoint import Meta, folder_name, write_manifest
from lmu_dist.train.weights import write_weights

TEXT = "def f(x):\n    return x + 1  # naïve\n\n\nclass A:\n    pass\n"
SEQUENCE_TOKENS = 32


def make_tokenizer() -> Tokenizer:
    return vocabulary.make(TokenizerConfig(vocab_tokens=300), lambda: iter([TEXT * 20]))[0]


def write_run(
    folder: Path,
    reference: str,
    options: dict[str, Any] | None = None,
    n_params: int = 20_000,
    tokenizer: Tokenizer | None = None,
) -> LanguageModel:
    """Writes the folder and returns its model, whose weights are larger than at the start so that logits differ much."""
    tokenizer, family = tokenizer or make_tokenizer(), registry.find(reference)
    given = registry.options_of(family, options or {})
    tokens = vocabulary.size(tokenizer)
    shape = sizing.shape_for(family, n_params, vocab_tokens=tokens, sequence_tokens=SEQUENCE_TOKENS, options=given)
    model = LanguageModel(shape, seed=1, options=given)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    config = {"model": {"family": reference, **(options or {})}, "data": {"source": "files", "files": ["/data/books/*.txt"]}}
    digest = vocabulary.digest(tokenizer)
    meta = Meta(10, "k" * 64, 1, 1, "d", digest, "c", config, shape.to_dict(), family.version_with(given))
    checkpoint = folder / folder_name(10, 1, "a1")
    checkpoint.mkdir(parents=True)
    write_weights(checkpoint, meta, model.state_dict())
    write_manifest(checkpoint, 0, 1)
    (folder / TOKENIZER).write_text(tokenizer.to_str())
    record = RunRecord(
        family.name, n_params, tokens=12_345, val_loss_nats=2.5, val_bits_per_byte=1.5, status="complete", key="k" * 64
    )
    (folder / "record.json").write_text(json.dumps(record.to_json()))
    return model.eval()
