"""Writes a task of lm-evaluation-harness from the held-out split of a corpus, and prints the loss that the harness must find.

    python examples/harness_task.py RUN TASK            # the documents of the split, each one by itself
    python examples/harness_task.py RUN TASK --rows     # the rows of the record's validation loss, as one text

RUN is a run as `lmu-dist status` prints it; TASK is a new folder. docs/trained-models.md explains both.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import lmu_dist
from lmu_dist.cli.common import run_folder
from lmu_dist.data.corpus import Corpus
from lmu_dist.data.manifest import read_manifest
from lmu_dist.train.export import TrainedModel

SPLIT = "validation"
YAML = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {documents}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: !function metrics.text
process_results: !function metrics.results
metric_list:
  - {{metric: nats_per_token, aggregation: !function metrics.nats, higher_is_better: false}}
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
  - {{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
metadata: {{version: 1.0}}
"""
METRICS = '''\
"""Metrics of the task: the harness finds the log likelihood of a text; its numbers of tokens and bytes are in the document."""


def text(doc):
    return doc["text"]


def results(doc, found):
    (log_likelihood,) = found
    weighted = (log_likelihood, doc["bytes"])
    return {"nats_per_token": (log_likelihood, doc["tokens"]), "bits_per_byte": weighted, "byte_perplexity": weighted}


def nats(items):
    return -sum(log_likelihood for log_likelihood, _ in items) / sum(tokens for _, tokens in items)
'''


def find_corpus(folder: Path, data_digest: str) -> Corpus:
    """The prepared corpus of a run, in the storage in which the run is."""
    for manifest in sorted((folder.parents[1] / "data").glob("*/manifest.json")):
        if (found := read_manifest(manifest.parent)).data_digest == data_digest:
            return Corpus(manifest.parent, found)
    raise SystemExit(f"no prepared corpus of this run in {folder.parents[1] / 'data'}: copy it there, or prepare it again")


def documents(tokens: np.ndarray, trained: TrainedModel) -> Iterator[str]:
    """The texts of a split, which the end-of-text token separates."""
    for ids in np.split(tokens, np.flatnonzero(tokens == trained.end_of_text_id) + 1):
        if text := trained.tokenizer.decode(ids[ids != trained.end_of_text_id].tolist(), skip_special_tokens=False):
            yield text


def write_task(folder: Path, trained: TrainedModel, texts: list[tuple[str, int]]) -> None:
    """Writes the task: texts with their numbers of tokens."""
    lines = [json.dumps({"text": text, "tokens": n, "bytes": len(text.encode())}) for text, n in texts]
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "metrics.py").write_text(METRICS)
    documents_path = json.dumps(str((folder / "documents.jsonl").absolute()))
    (folder / f"{folder.name}.yaml").write_text(YAML.format(name=folder.name, documents=documents_path))


def rows_as_text(tokens: np.ndarray, n: int, trained: TrainedModel) -> tuple[int, str]:
    """The first row from which on the rows, without their very first token, are a text with these tokens; and that text."""
    trained.tokenizer.encode_special_tokens = False  # the end-of-text token between documents is a token here
    end = (len(tokens) - 1) // n * n + 1
    for start in range(0, end - 1, n):
        ids = tokens[start + 1 : end].tolist()
        text = trained.tokenizer.decode(ids, skip_special_tokens=False)
        if trained.tokenizer.encode(text, add_special_tokens=False).ids == ids:
            return start, text
    raise SystemExit("the tokenizer does not give these rows back; leave --rows out")


def main() -> None:
    """Reads the split, writes the task, prints the loss and the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("task", type=Path)
    parser.add_argument("--rows", action="store_true")
    given = parser.parse_args()
    trained, folder = lmu_dist.load(given.run), Path(str(run_folder(given.run)))
    corpus, n = find_corpus(folder, trained.metadata["data_digest"]), trained.model.shape.sequence_tokens
    given.task.mkdir(parents=True)
    tokens = np.fromfile(corpus.folder / f"{SPLIT}.bin", corpus.manifest.dtype).astype(np.int64)
    arguments = f"pretrained=EXPORT,trust_remote_code=True,dtype=float32,max_length={n}"
    if given.rows:
        start, text = rows_as_text(tokens, n, trained)
        inputs, targets = (torch.from_numpy(tokens[start + i : len(tokens)]).unfold(0, n, n) for i in (0, 1))
        with torch.no_grad():
            rows = [trained.model(x[None], y[None]).mean() for x, y in zip(inputs, targets, strict=False)]
        loss, texts = float(torch.stack(rows).mean()), [(text, len(rows) * n)]
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": trained.tokenizer.id_to_token(trained.end_of_text_id),
        }
        (given.task / "tokenizer").mkdir()
        (given.task / "tokenizer" / "tokenizer.json").write_text(trained.tokenizer.to_str())
        (given.task / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
        arguments += f",prefix_token_id={tokens[start]},tokenizer={given.task / 'tokenizer'}"
        print(f"{len(rows)} of {(len(tokens) - 1) // n} rows of the {SPLIT} split")
    else:
        losses = [(text, trained.losses(text)) for text in documents(tokens, trained)]
        loss, texts = float(torch.cat([found for _, found in losses]).mean()), [(text, len(found)) for text, found in losses]
        print(f"{len(texts)} documents of the {SPLIT} split")
    write_task(given.task, trained, texts)
    print(f"nats_per_token of lmu-dist: {loss:.6f}")
    if (folder / "record.json").is_file():
        record = json.loads((folder / "record.json").read_text())
        rows = record["validation_rows"] or "all"
        print(f"validation loss of the record: {record['val_loss_nats']:.6f} nats per token, over {rows} rows")
    print(f"lm_eval --model hf --model_args {arguments} \\")
    print(f"  --include_path {given.task} --tasks {given.task.name} --batch_size 8")


if __name__ == "__main__":
    main()
