"""A trained model outside its run: safetensors, config.json and tokenizer.json in one folder, and back.

Nothing is unpickled on the way. Called by the commands export and generate.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor

from lmu_dist import storage
from lmu_dist.config import ConfigError, Folder
from lmu_dist.data import tokenizer as vocabulary
from lmu_dist.data.manifest import TOKENIZER
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.shape import Shape
from lmu_dist.train import checkpoint

CONFIG = "config.json"


@dataclass(frozen=True)
class Trained:
    """A model ready to use, in float32 on the CPU, with its tokenizer and what is known of its training."""

    model: LanguageModel
    tokenizer: Tokenizer
    facts: dict[str, Any]
    passed_over: tuple[str, ...]  # damaged checkpoints newer than the one taken


def open_trained(folder: Folder) -> Trained:
    """A model from an exported folder, or from the newest whole checkpoint of a run's. Raises ConfigError."""
    try:
        facts, weights, passed_over = _read_export(folder) if (folder / CONFIG).is_file() else _read_run(folder)
        model = LanguageModel(Shape(**facts["shape"]))
        model.load_state_dict({name: w.float() for name, w in weights.items()})
        expected = facts["tokenizer_digest"]
    except (ValueError, KeyError, TypeError, RuntimeError, OSError, SafetensorError) as e:
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(
            f"{folder} holds no model of lmu-dist, or a damaged one: {type(e).__name__} {e}".splitlines()[0]
        ) from e
    tokenizer = vocabulary.load(folder / TOKENIZER)
    if vocabulary.digest(tokenizer) != expected:
        raise ConfigError(f"{folder / TOKENIZER} is not the tokenizer this model was trained with; put that one back")
    return Trained(model.eval(), tokenizer, facts, tuple(passed_over))


def _read_export(folder: Folder) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    return json.loads((folder / CONFIG).read_text()), checkpoint.read_weights(folder), []


def _read_run(folder: Folder) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    path, meta, passed_over = checkpoint.newest_intact(folder)
    if path is None or meta is None:
        raise ConfigError("; ".join([*passed_over, f"no whole checkpoint in {folder}; train the run first"]))
    facts = {"shape": meta.shape, "step": meta.step, "key": meta.key, "tokenizer_digest": meta.tokenizer_digest}
    facts |= {"data_digest": meta.data_digest, "code_digest": meta.code_digest, "training": meta.config}
    return facts, checkpoint.read_weights(path), passed_over


def export(run_folder: Folder, to: Folder) -> tuple[str, ...]:
    """Writes a run's model to a new folder, reads it back and compares logits; returns which checkpoints were passed over.

    Raises ConfigError if the folder exists or the model read back computes anything else.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"{to} exists and is not an empty folder; name a new one")
    trained = open_trained(run_folder)
    storage.make_folder(to)
    storage.write_whole(to / checkpoint.WEIGHTS, safetensors.torch.save(trained.model.state_dict()))
    storage.write_whole(to / TOKENIZER, trained.tokenizer.to_str().encode())
    storage.write_whole(to / CONFIG, json.dumps(trained.facts | {"shape": asdict(trained.model.shape)}, indent=1).encode())
    shape = trained.model.shape
    tokens = torch.arange(min(shape.sequence_tokens, 64))[None] * 7919 % shape.vocab_tokens
    with torch.no_grad():
        if not torch.equal(open_trained(to).model.logits(tokens), trained.model.logits(tokens)):
            raise ConfigError(f"the model read back from {to} computes other logits; the disk is not to be trusted")
    return trained.passed_over
