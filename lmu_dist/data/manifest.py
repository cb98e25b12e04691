"""What a prepared corpus holds and where it lies: a DataConfig in, a folder and its Manifest out. Knows no torch.

Written by data/prepare, read by corpus, and by planning, which has no use for the tokens.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lmu_dist.config import ConfigError, DataConfig, Folder
from lmu_dist.data.sources import Unit, list_units

FORMAT = 1  # of what prepare writes; part of every key
TOKENIZER, MANIFEST, PROBLEMS = "tokenizer.json", "manifest.json", "problems.jsonl"


@dataclass(frozen=True)
class Manifest:
    """What a prepared corpus holds. `splits` maps a name to its tokens, bytes of text, documents and sha256."""

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
        """Bytes of text behind one token of a split, on average."""
        return self.splits[split]["bytes"] / self.splits[split]["tokens"]


def locate(data: DataConfig, storage: Folder, units: list[Unit] | None = None) -> Folder:
    """Where a corpus is (to be) prepared: a folder named by the digest of the config and of the files it names."""
    units = list_units(data) if units is None else units
    settings = asdict(replace(data, max_bad_share=0.0))
    names = [data.tokenizer.path, data.tokenizer.vocab_path, data.tokenizer.merges_path]
    digests = [hashlib.sha256(Path(n).read_bytes()).hexdigest() for n in names if n and Path(n).is_file()]
    content = [FORMAT, settings, digests, [asdict(u) for u in units]]
    return storage / "data" / hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def is_prepared(data: DataConfig, storage: Folder) -> bool:
    """Whether `prepare` has nothing left to do."""
    return (locate(data, storage) / MANIFEST).exists()


def read_manifest(folder: Folder) -> Manifest:
    """The manifest of a prepared corpus. Raises ConfigError."""
    try:
        return Manifest(**json.loads((folder / MANIFEST).read_text()))
    except OSError as e:
        raise ConfigError(f"no prepared corpus in {folder}; run lmu-dist prepare first") from e
    except (ValueError, TypeError) as e:
        raise ConfigError(f"{folder / MANIFEST} is damaged; delete {folder} and prepare again") from e
