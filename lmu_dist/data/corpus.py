"""Access to a prepared corpus: a folder with a token stream per split, tokenizer.json, problems.jsonl and manifest.json.

Written by data/merge. Opened by data/prepare; launch takes its rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from lmu_dist import storage
from lmu_dist.config import ConfigError, Folder
from lmu_dist.data import tokenizer as vocabulary
from lmu_dist.data.manifest import TOKENIZER, Manifest, read_manifest

if TYPE_CHECKING:  # imports torch, which processes that tokenize do not need: it takes seconds and 200 MB
    from lmu_dist.data.batches import TokenDataset

SLOW_BYTES = 1 << 28  # reading a longer token stream takes a second or more


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus on disk."""

    folder: Folder
    manifest: Manifest
    notes: tuple[str, ...] = ()  # sentences for the user

    def rows(self, split: str, sequence_tokens: int) -> "TokenDataset":
        """The rows of a split; downloads the stream first if it is at a URI. Raises ConfigError as `check_rows` does."""
        from lmu_dist.data.batches import TokenDataset

        self.check_rows(split, sequence_tokens)
        stream = storage.cached_path(self.folder / f"{split}.bin", self.manifest.splits[split]["sha256"])
        return TokenDataset(stream, self.manifest.dtype, sequence_tokens)

    def n_rows(self, split: str, sequence_tokens: int) -> int:
        """Number of rows of a split."""
        return self.manifest.n_rows(split, sequence_tokens)

    def check_rows(self, split: str, sequence_tokens: int) -> None:
        """Raises ConfigError if a split is too short for one row of `sequence_tokens` tokens."""
        if (tokens := self.manifest.splits[split]["tokens"]) <= sequence_tokens:
            raise ConfigError(
                f"the {split} split has {tokens} tokens, too few for one row of {sequence_tokens}; give more text, or a "
                "smaller train.sequence_tokens"
            )

    def tokenizer(self) -> Tokenizer:
        """The corpus's tokenizer. Raises ConfigError if its digest differs from the manifest's."""
        tokenizer = vocabulary.load(self.folder / TOKENIZER, self.manifest.end_of_text)
        if vocabulary.digest(tokenizer) != self.manifest.tokenizer_digest:
            raise ConfigError(
                f"{self.folder / 'tokenizer.json'} is not the tokenizer this corpus was prepared with; restore it, or "
                f"delete {self.folder} and prepare again"
            )
        return tokenizer


def open_corpus(folder: Folder, progress: Callable[..., None] = lambda *_: None) -> Corpus:
    """Opens a prepared corpus and checks every token stream against the manifest. Raises ConfigError.

    A stream in a local folder is read once per machine, and again only if the file has changed (storage.is_intact). Of a stream
    at a URI the size is checked here, the content when a worker downloads it.
    """
    manifest = read_manifest(folder)
    for i, (split, facts) in enumerate(manifest.splits.items()):
        path = folder / f"{split}.bin"
        expected = facts["tokens"] * np.dtype(manifest.dtype).itemsize
        if not path.is_file() or path.stat().st_size != expected:
            raise ConfigError(f"{path} is missing or not {expected} bytes long; delete {folder} and prepare again")
        if not storage.is_remote(path):
            if expected > SLOW_BYTES:
                progress("verifying the corpus", i, len(manifest.splits), split)
            storage.cached_path(path, facts["sha256"])
    return Corpus(folder, manifest)
