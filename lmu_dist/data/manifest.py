"""Folder and manifest of a prepared corpus: a DataConfig in, the folder's path and its Manifest out. Does not import torch.

Manifests are written by data/prepare and read by data/corpus and by planning, which needs no tokens.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lmu_dist.config import ConfigError, DataConfig, Folder
from lmu_dist.data.sources import CorpusShard, list_shards
from lmu_dist.records import known_fields

FORMAT = 1  # version of the files that prepare writes; part of the corpus folder's name
TOKENIZER, MANIFEST, PROBLEMS = "tokenizer.json", "manifest.json", "problems.jsonl"


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json. `splits` maps a split to its numbers of tokens, bytes of text and documents, and its sha256.

    `problems` counts the bad records of the corpus by reason.
    """

    format: int
    source: str
    split_rule: str
    vocab_tokens: int
    end_of_text_id: int
    dtype: str
    tokenizer_digest: str
    splits: dict[str, dict[str, Any]]
    problems: dict[str, int]
    data_digest: str

    def bytes_per_token(self, split: str) -> float:
        """Mean bytes of text per token of a split."""
        return self.splits[split]["bytes"] / self.splits[split]["tokens"]


def corpus_folder(data: DataConfig, storage_folder: Folder, shards: list[CorpusShard] | None = None) -> Folder:
    """Folder of a prepared corpus, whether it exists or not. Its name is a digest of the config and of the corpus files.

    The digest covers the field names of DataConfig and CorpusShard: renaming a field would make a new corpus.
    """
    shards = list_shards(data) if shards is None else shards
    settings = asdict(replace(data, max_bad_share=0.0))
    names = [data.tokenizer.path, data.tokenizer.vocab_path, data.tokenizer.merges_path]
    digests = [hashlib.sha256(Path(n).read_bytes()).hexdigest() for n in names if n and Path(n).is_file()]
    content = [FORMAT, settings, digests, [asdict(s) for s in shards]]
    return storage_folder / "data" / hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def is_prepared(data: DataConfig, storage_folder: Folder) -> bool:
    """Whether the corpus is already prepared."""
    return (corpus_folder(data, storage_folder) / MANIFEST).exists()


def read_manifest(folder: Folder) -> Manifest:
    """Reads the manifest of a prepared corpus. Raises ConfigError if it is missing or damaged."""
    try:
        return Manifest(**known_fields(Manifest, json.loads((folder / MANIFEST).read_text())))
    except OSError as e:
        raise ConfigError(f"no prepared corpus in {folder}; run lmu-dist prepare first") from e
    except (ValueError, TypeError) as e:
        raise ConfigError(f"{folder / MANIFEST} is damaged; delete {folder} and prepare again") from e
