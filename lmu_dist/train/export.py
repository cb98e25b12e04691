"""Export and loading of trained models: one folder with safetensors, config.json and tokenizer.json.

Nothing is unpickled. Called by the commands export and generate, by exporting/transformers_folder, and by lmu_dist.load.
"""

import json
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor

from lmu_dist import storage
from lmu_dist.array_types import Float
from lmu_dist.config import ConfigError, Folder
from lmu_dist.data import tokenizer as vocabulary
from lmu_dist.data.manifest import TOKENIZER
from lmu_dist.models import registry
from lmu_dist.models.family import Family
from lmu_dist.models.family_source import FAMILY_CODE
from lmu_dist.models.lm import LanguageModel
from lmu_dist.models.shape import Shape
from lmu_dist.train.kept_weights import newest_model
from lmu_dist.train.weights import WEIGHTS, read_weights

CONFIG = "config.json"
# In a folder for transformers (exporting/transformers_folder): the key of config.json with the metadata, the start of the
# weights' names.
TRAINING, NETWORK_PREFIX = "lmu_dist", "network."


@dataclass(frozen=True)
class TrainedModel:
    """A trained model in float32 on the CPU, with its tokenizer and the metadata of its training (config.json)."""

    model: LanguageModel
    tokenizer: Tokenizer
    end_of_text_id: int
    metadata: dict[str, Any]
    skipped: tuple[str, ...]  # one message per damaged checkpoint newer than the loaded one
    options: Any = None  # of the family

    @torch.no_grad()
    def losses(self, text: str) -> Float[Tensor, "T"]:
        """The loss of every token of a text in nats: -ln of its probability after the end of another text and all before it.

        A text longer than the training sequences, of n tokens, is cut into windows as lm-evaluation-harness cuts it: each
        token is scored once, from at most n tokens before it, and the last window is a full one.
        """
        ids = [self.end_of_text_id, *self.tokenizer.encode(text, add_special_tokens=False).ids]
        tokens, n = torch.tensor([ids]), self.model.shape.sequence_tokens
        parts = list[Tensor]()
        for scored in range(1, len(ids), n):
            end = min(scored + n, len(ids))
            start = max(0, end - 1 - n)
            losses = self.model(tokens[:, start : end - 1], tokens[:, start + 1 : end])[0]
            parts.append(losses[scored - end :])
        return torch.cat(parts) if parts else torch.zeros(0)


def load_trained_model(folder: Folder, family: str | None = None) -> TrainedModel:
    """Loads a model from an exported folder, or from the newest intact checkpoint of a run's folder. Raises ConfigError.

    `family`: path/to/file.py:CLASS of a user's own family. Code is run only if the user names it, never because a folder does.
    """
    try:
        metadata, weights, skipped = _read_export(folder) if (folder / CONFIG).is_file() else _read_run(folder)
        shape = Shape.from_dict(metadata["shape"])
        found = _find_family(folder, shape, family)
        stored = metadata.get("training", {}).get("model", {})
        given = {k: v for k, v in stored.items() if k in registry.option_names(found) and v is not None}
        options = registry.options_of(found, given)
        model, own_version = LanguageModel(shape, options=options), found.version_with(options)
        version = metadata.get("family_version") or own_version
        if version != own_version:
            skipped = [
                *skipped,
                f"trained with version {version} of {found.name}, and this is {own_version}: check its outputs",
            ]
        model.load_state_dict({name: w.float() for name, w in weights.items()})
        expected = metadata["tokenizer_digest"]
    except (ValueError, KeyError, TypeError, RuntimeError, OSError, SafetensorError) as e:
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(f"{folder} holds no lmu-dist model, or a damaged one: {type(e).__name__} {e}".splitlines()[0]) from e
    end_of_text = metadata.get("training", {}).get("data", {}).get("tokenizer", {}).get("end_of_text")
    tokenizer = vocabulary.load(folder / TOKENIZER, end_of_text)
    if vocabulary.digest(tokenizer) != expected:
        raise ConfigError(f"{folder / TOKENIZER} is not the tokenizer this model was trained with; restore the original file")
    end = vocabulary.end_of_text_id(tokenizer, end_of_text)
    return TrainedModel(model.eval(), tokenizer, end, metadata, tuple(skipped), options)


def _find_family(folder: Folder, shape: Shape, reference: str | None) -> Family:
    if reference is None and shape.family not in registry.names():
        raise ConfigError(
            f"{folder} was trained with {shape.family}, a family in a user's own file; give --family path/to/file.py:CLASS. "
            f"A copy of the code is in {folder / FAMILY_CODE}: read it before you run it"
        )
    family = registry.find(reference or shape.family)
    if family.name != shape.family:
        raise ConfigError(
            f"{folder} was trained with {shape.family}, and --family names {family.name}; give the file of that one"
        )
    return family


def _read_export(folder: Folder) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    metadata, weights = json.loads((folder / CONFIG).read_text()), read_weights(folder)
    if "auto_map" in metadata:  # for transformers
        metadata = metadata[TRAINING]
        weights = {name.removeprefix(NETWORK_PREFIX): weight for name, weight in weights.items()}
    return metadata, weights, []


def _read_run(folder: Folder) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    path, meta, skipped = newest_model(folder)
    if path is None or meta is None:
        raise ConfigError("; ".join([*skipped, f"no complete checkpoint in {folder}; train the run first"]))
    metadata = {"shape": meta.shape, "step": meta.step, "key": meta.key, "tokenizer_digest": meta.tokenizer_digest}
    metadata |= {"data_digest": meta.data_digest, "code_digest": meta.code_digest, "training": meta.config}
    metadata |= {"family_version": meta.family_version}
    return metadata, read_weights(path), skipped


def check_new_folder(to: Folder) -> None:
    """Raises ConfigError if a folder to export to exists and is not empty."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"{to} exists and is not an empty folder; give the name of a new folder")


def export(run_folder: Folder, to: Folder, family: str | None = None) -> tuple[str, ...]:
    """Exports a run's model to a new folder, loads it again and compares logits. Returns messages about skipped checkpoints.

    Raises ConfigError if the folder is not empty, or if the loaded model computes other logits.
    """
    check_new_folder(to)
    trained = load_trained_model(run_folder, family)
    storage.make_folder(to)
    storage.write_atomic(to / WEIGHTS, safetensors.torch.save(trained.model.state_dict()))
    storage.write_atomic(to / TOKENIZER, trained.tokenizer.to_str().encode())
    storage.write_atomic(
        to / CONFIG, json.dumps(trained.metadata | {"shape": trained.model.shape.to_dict()}, indent=1).encode()
    )
    if (run_folder / FAMILY_CODE).is_file():
        storage.write_atomic(to / FAMILY_CODE, (run_folder / FAMILY_CODE).read_bytes())
    shape = trained.model.shape
    tokens = torch.arange(min(shape.sequence_tokens, 64))[None] * 7919 % shape.vocab_tokens
    with torch.no_grad():
        if not torch.equal(load_trained_model(to, family).model.logits(tokens), trained.model.logits(tokens)):
            raise ConfigError(f"the model exported to {to} computes other logits than the run's; check the disk, export again")
    return trained.skipped
