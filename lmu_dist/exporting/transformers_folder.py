"""Writes the folder that transformers loads: a run's folder in; code, weights, configuration, tokenizer and model card out.

transformers is not needed to write it. The code is that of this package (flat_modules), so a folder computes what the run
does; that is checked before the command ends. Called by the command export.
"""

import importlib.util
import json
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import Tensor

from lmu_dist import __version__, storage
from lmu_dist.config import ConfigError, Folder
from lmu_dist.data import tokenizer as vocabulary
from lmu_dist.data.manifest import TOKENIZER
from lmu_dist.exporting.flat_modules import FlatModules, collect
from lmu_dist.exporting.model_card import describe_law, model_card
from lmu_dist.exporting.parts import Parts, parts_of
from lmu_dist.models import registry
from lmu_dist.models.family_checks import USER_MODULE
from lmu_dist.models.family_source import FAMILY_CODE
from lmu_dist.train.export import CONFIG, NETWORK_PREFIX, TRAINING, TrainedModel, check_new_folder, load_trained_model
from lmu_dist.train.weights import WEIGHTS

REMOTE = "lmu_dist.exporting.remote"
PLAIN_KERNELS = f"{REMOTE}.plain_kernels"
CLASSES = f"{REMOTE}.sublayer_classes"
# Modules in whose place an export has others: it compiles nothing, and needs no package for GPUs.
REPLACED = {
    "lmu_dist.models.kernels.compiled": PLAIN_KERNELS,
    "lmu_dist.models.kernels.gated_delta_rule": PLAIN_KERNELS,
    "lmu_dist.models.kernels.ssd": PLAIN_KERNELS,
    "lmu_dist.models.kernels.triton_kernels": PLAIN_KERNELS,
    "lmu_dist.models.mixers.gpu_kernels": PLAIN_KERNELS,
}
LOADER = ("torch", "transformers")  # packages that whoever loads a folder has, and numpy with them
HEADER = f"# Copied from {{module}} of lmu-dist {__version__} (Apache-2.0): the parts of it that this model needs."
LARGEST_ERROR = 1e-4  # of logits in float32, relative to the largest: more than rounding does, less than a wrong formula
RECORD, FITS = "record.json", "fits.json"  # of a run, of a report


def export(run_folder: Folder, to: Folder, family: str | None = None, report: Folder | None = None) -> tuple[str, ...]:
    """Exports a run's model to a new folder for transformers. Returns notes for the user.

    `report`: the folder of a report, whose law of the family the model card then states. Raises ConfigError if the folder is
    not empty, if the model's code cannot be copied, or if the copy computes other logits.
    """
    check_new_folder(to)
    trained = load_trained_model(run_folder, family)
    law = describe_law(_fits(report), trained.model.shape.family) if report else None
    parts = parts_of(trained.model, trained.options)
    code = _copied_code(trained, parts)
    error = _check(trained, parts, code)
    files = {name: text.encode() for name, text in code.files.items()}
    tokenizer = _without_template(trained.tokenizer)
    config = _config(trained, parts, tokenizer)
    files[CONFIG] = _json(config)
    files["generation_config.json"] = _json(_generation_config(trained))
    files[TOKENIZER] = tokenizer.to_str().encode()
    files["tokenizer_config.json"] = _json(_tokenizer_config(trained))
    files[WEIGHTS] = safetensors.torch.save(
        {NETWORK_PREFIX + name: weight for name, weight in trained.model.state_dict().items()}, {"format": "pt"}
    )
    for name in (RECORD, FAMILY_CODE):
        if (run_folder / name).is_file():
            files[name] = (run_folder / name).read_bytes()
    packages = tuple(package for package in code.packages if package not in (*LOADER, "numpy"))
    files["README.md"] = model_card(trained, json.loads(files.get(RECORD, b"{}")), packages, law).encode()
    storage.make_folder(to)
    for name, content in files.items():
        storage.write_atomic(to / name, content)
    notes = [f"the exported code computes the run's logits within {error:.1e}"]
    if packages:
        notes.append(f"its code imports {', '.join(packages)}: whoever loads {to} needs to install that too")
    return (*trained.skipped, *notes)


def _fits(report: Folder) -> dict[str, Any]:
    try:
        return json.loads((report / FITS).read_text())
    except (OSError, ValueError) as e:
        raise ConfigError(f"--report {report}: {FITS} cannot be read ({e}); give the folder that lmu-dist report wrote") from e


def _copied_code(trained: TrainedModel, parts: Parts) -> FlatModules:
    """The code of a folder, of the network and of the classes that transformers looks for."""
    source = registry.source_of(registry.family_of(trained.model.shape))
    texts = {CLASSES: _class_table(parts.classes)} | ({USER_MODULE: source.text} if source else {})
    roots = {f"{REMOTE}.modeling_lmu_dist": (), f"{REMOTE}.configuration_lmu_dist": ()}
    own = {"lmu_dist"} | {cls.__module__.partition(".")[0] for cls in parts.classes.values()} - {"torch"}
    code = collect(roots, REPLACED, texts, HEADER, own)
    modeling, configuration = "modeling_lmu_dist.py", "configuration_lmu_dist.py"
    # transformers finds files by such lines only, not by "from . import NAME", and only from this file on.
    others = sorted(name.removesuffix(".py") for name in code.files if name != modeling)
    listed = [f"from .{name} import __name__ as _" for name in others]
    lines = ["# transformers copies the files that these lines name.", *listed]
    files = code.files | {modeling: code.files[modeling] + "\n\n" + "\n".join(lines) + "\n"}
    # In a process, transformers keeps one model class for the name of a folder and the text of its configuration's module. So
    # the text must differ where other code does: or the second of two folders x/model and y/model gets the first one's code.
    digest = sha256("".join(f"{name}\n{text}" for name, text in sorted(files.items())).encode()).hexdigest()
    files[configuration] += f"\nCODE_DIGEST = {digest!r}  # of all files here: transformers must not take others for them\n"
    return FlatModules(files, code.packages)


def _class_table(classes: Mapping[str, type]) -> str:
    """The text of remote/sublayer_classes for a model."""
    imports = [f"from {cls.__module__} import {cls.__name__} as Class{i}" for i, cls in enumerate(classes.values())]
    entries = [f"    {name!r}: Class{i}," for i, name in enumerate(classes)]
    docstring = '"""The classes of the model\'s sublayers, by the names that config.json has of them."""'
    return "\n".join([docstring, "", *imports, "", "SUBLAYER_CLASSES = {", *entries, "}", ""])


def _check(trained: TrainedModel, parts: Parts, code: FlatModules) -> float:
    """The largest difference between the logits of the copied code and the run's. Raises ConfigError if it is no rounding."""
    shape = trained.model.shape
    tokens = torch.arange(min(shape.sequence_tokens, 64))[None] * 7919 % shape.vocab_tokens
    with TemporaryDirectory() as folder, torch.no_grad():
        for name, text in code.files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        try:
            network = _import(Path(folder), "stored_network").build(
                json.loads(json.dumps(parts.network)), shape.vocab_tokens, shape.d_model
            )
            network.load_state_dict(trained.model.state_dict())
            logits = _logits(network.eval(), tokens)
        except Exception as e:
            reason = f"{type(e).__name__}: {e}".splitlines()[0]
            raise ConfigError(
                f"the code of family {shape.family} does not run by itself: {reason}; if the family is yours, its mixer may "
                "only use what its file defines or imports (docs/trained-models.md)"
            ) from e
        expected = trained.model.logits(tokens)
    error = max(float((other - expected).abs().max()) for other in logits)
    if not error <= LARGEST_ERROR * max(1.0, float(expected.abs().max())):
        raise ConfigError(f"the exported code computes other logits than the run, by {error:.1e}; please report this")
    return error


def _logits(network: Any, tokens: Tensor) -> list[Tensor]:
    """Logits of whole texts, and the same as a text and one token after it, as text is generated."""
    if tokens.shape[1] < 2:
        return [network.logits(tokens)]
    before, state = network.advance(tokens[:, :-1])
    return [network.logits(tokens), torch.cat([before, network.advance(tokens[:, -1:], state)[0]], 1)]


def _import(folder: Path, module: str) -> ModuleType:
    """A module of a folder, which stands for a package while it is imported."""
    package = f"lmu_dist_exported_{folder.name}"
    spec = importlib.util.spec_from_file_location(package, folder / "none.py", submodule_search_locations=[str(folder)])
    assert spec is not None
    sys.modules[package] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(f"{package}.{module}")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]


def _config(trained: TrainedModel, parts: Parts, tokenizer: Tokenizer) -> dict[str, Any]:
    shape, end = trained.model.shape, trained.end_of_text_id
    stored = trained.metadata | {"shape": shape.to_dict(), "tokenizer_digest": vocabulary.digest(tokenizer)}
    return {
        "model_type": "lmu_dist",
        "architectures": ["LMUDistForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_lmu_dist.LMUDistConfig",
            "AutoModelForCausalLM": "modeling_lmu_dist.LMUDistForCausalLM",
        },
        "dtype": "float32",
        "vocab_size": shape.vocab_tokens,
        "hidden_size": shape.d_model,
        "num_hidden_layers": len(parts.network["sublayers"]),
        "max_position_embeddings": shape.sequence_tokens,
        "tie_word_embeddings": True,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "network": parts.network,
        TRAINING: stored,
    }


def _generation_config(trained: TrainedModel) -> dict[str, Any]:
    end = trained.end_of_text_id
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "do_sample": False}


def _tokenizer_config(trained: TrainedModel) -> dict[str, Any]:
    end = trained.tokenizer.id_to_token(trained.end_of_text_id)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "padding_side": "right",
        "model_max_length": trained.model.shape.sequence_tokens,
        "clean_up_tokenization_spaces": False,
        # As in training: the characters of the end-of-text token inside a text are text.
        "split_special_tokens": True,
    }


def _without_template(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without tokens that it would put around a text, which the model has not seen."""
    if tokenizer.num_special_tokens_to_add(is_pair=False) == 0:
        return tokenizer
    parts = json.loads(tokenizer.to_str()) | {"post_processor": None}
    return Tokenizer.from_str(json.dumps(parts))


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()
