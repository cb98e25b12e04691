"""The model card of an exported folder: a trained model and its record in; README.md, with the metadata the Hub reads, out.

It says what is known and names what is not: data, tokens, loss with its unit, size, how to load and to score, licences. Called
by transformers_folder.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lmu_dist import __version__
from lmu_dist.config import ConfigError
from lmu_dist.models.accounting import parameters
from lmu_dist.models.registry import family_of
from lmu_dist.records import RunRecord
from lmu_dist.train.export import TrainedModel

LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
ids = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))
```"""
SCORE = """```python
import torch

ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer("a text").input_ids]])  # a text follows the end of another one
with torch.no_grad():
    nats_per_token = model.eval()(ids, labels=ids).loss
```"""


def model_card(trained: TrainedModel, record: Mapping[str, Any], packages: Sequence[str], law: str | None = None) -> str:
    """The text of README.md. `record` is that of the run; empty: it has not ended. `packages`: what its code also imports.

    `law` is the sentence of `describe_law`.
    """
    shape, family = trained.model.shape, family_of(trained.model.shape)
    title = family.appearance().title
    needs = ", ".join(["torch", "transformers", "safetensors", *packages])
    rows = "\n".join(f"| {name} | {value} |" for name, value in [*_facts(trained, record), *([("law", law)] if law else [])])
    positions = (
        f"It has {shape.sequence_tokens:,} learned positions, and no longer text can be given to it."
        if family.learned_positions
        else f"It was trained on sequences of {shape.sequence_tokens:,} tokens; longer texts run, and were not validated."
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- {family.name}
- lmu-dist
---

# {title}, {_short(parameters(shape).non_embedding)} parameters

A language model trained by lmu-dist {__version__}, for studies of how losses scale. It continues text; it follows no
instructions.

| | |
|---|---|
{rows}

{positions}

## Load it

Needs {needs}. `FOLDER` is this folder. Its code runs on your machine: read it first, it is short.

{LOAD.format(prompt="import ")}

Everything runs in plain torch; the training used faster kernels, whose results are the same up to rounding. `generate` passes
on a state, so a token costs the same at every length unless a layer is attention. Prompts of a batch must have one length:
padding before a text is refused, padding after it is no target of the loss. With beams the texts are computed again for every
token. Texts end at `{trained.tokenizer.id_to_token(trained.end_of_text_id)}`.

## Score a text

{SCORE}

The loss is the mean of -ln(probability) over the tokens of the text, in nats. Divide it by ln 2 and by the text's bytes per
token for bits per byte. In training mode the loss comes without logits.

## Licences

The code in this folder is lmu-dist's, under Apache-2.0. Whether the weights may be passed on depends on the data they were
trained on: add the licence here before you publish this folder. config.json has the configuration of the run, with the paths of
its data.
"""


def describe_law(fits: Mapping[str, Any], family: str) -> str:
    """The law of a family in the fits.json of a report, or why there is none. Raises ConfigError if it has no such family."""
    fit = next((fit for fit in fits["fits"] if fit["family"] == family), None)
    if fit is None:
        raise ConfigError(f"the report of {fits['experiment']} has no fit of family {family}; leave --report out")
    where = f"of this family in experiment {fits['experiment']}, {fit['n_rows']} runs"
    if not fit["determined"]:
        return f"{where}: not determined, because {'; '.join(fit['certificate']['reasons'])}"
    level, intervals = f"{fit['level']:.0%}".replace("%", " %"), fit["intervals"]
    values = [
        f"{name} = {value:.4g}" + (f" ({intervals[name][0]:.4g} to {intervals[name][1]:.4g})" if intervals.get(name) else "")
        for name, value in fit["parameters"].items()
    ]
    return f"{where}: {fit['formula']}, L in nats per token; {', '.join(values)}; in brackets {level} intervals"


def _facts(trained: TrainedModel, record: Mapping[str, Any]) -> list[tuple[str, str]]:
    metadata, shape = trained.metadata, trained.model.shape
    training, counts = metadata.get("training", {}), parameters(shape)
    facts = [
        ("family", f"`{shape.family}`, version {metadata.get('family_version') or 'unknown'}"),
        ("N, parameters without embeddings", f"{counts.non_embedding:,}"),
        ("parameters in all", f"{counts.total:,}"),
        ("vocabulary", f"{shape.vocab_tokens:,} tokens, end of text `{trained.tokenizer.id_to_token(trained.end_of_text_id)}`"),
        ("length of the training sequences", f"{shape.sequence_tokens:,} tokens"),
        ("data", _data(training.get("data", {}))),
    ]
    if not record:
        facts.append(
            ("training", f"not ended when it was exported: step {metadata.get('step', 'unknown')}; no validation loss")
        )
        return [*facts, ("run", f"`{metadata.get('key', 'unknown')}`")]
    found = RunRecord.from_json(record)
    error = found.val_loss_standard_error_nats
    interval = "" if math.isnan(error) else f", standard error {error:.4f}"
    facts += [
        ("tokens trained on", f"{found.tokens:,}" + (f", {found.epochs:.2f} epochs" if found.repeats_data else "")),
        ("validation loss", f"{found.val_loss_nats:.4f} nats per token{interval}; {found.val_bits_per_byte:.4f} bits per byte"),
        ("validated on", f"{found.validation_rows or 'all'} rows of the held-out split"),
        ("how it ended", f"{found.status}, learning rate {found.phase}"),
        ("precision of the training", found.precision),
        ("run", f"`{found.key}`, the whole record is in record.json"),
    ]
    return facts


def _data(data: Mapping[str, Any]) -> str:
    """What the corpus was, without the folders of the machine it lay on."""
    match data.get("source"):
        case "files":
            return "files " + ", ".join(f"`{str(path).rpartition('/')[2]}`" for path in data.get("files", ()))
        case "huggingface":
            revision = data.get("dataset_revision")
            return f"`{data.get('dataset')}`, split {data.get('dataset_split')}" + (
                f", revision {revision}" if revision else ""
            )
        case "python-stdlib":
            return "source files of Python's standard library"
        case _:
            return "unknown"


def _short(count: int) -> str:
    """A count as people write it: 12.6M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
