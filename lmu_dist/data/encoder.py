"""Encoding with proof: documents and a corpus's tokenizer in; their token ids out, or a ConfigError if text would be lost.

Called by data/tokenize_shard; data/merge needs the type of a token.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from lmu_dist import storage
from lmu_dist.array_types import Integer
from lmu_dist.config import ConfigError, Folder
from lmu_dist.data import tokenizer as vocabulary
from lmu_dist.data.documents import Document


@dataclass(frozen=True)
class Encoder:
    """A corpus's tokenizer, and what has to be known of it to encode."""

    tokenizer: Tokenizer
    end: int  # id of the end-of-text token
    is_lossless: bool  # whether its kind cannot lose text; if it might, every document is decoded again
    dtype: str

    def encode(self, batch: Sequence[Document], check_bytes: int) -> list[Integer[np.ndarray, "tokens"]]:
        """The ids of each document, with the end-of-text token after them.

        The first `check_bytes` of text are decoded again, and all of it if the tokenizer may lose text. Raises ConfigError if a
        document does not come back, or contains the end-of-text token.
        """
        encodings = self.tokenizer.encode_batch_fast([document.text for document in batch], add_special_tokens=False)
        all_ids = [encoding.ids for encoding in encodings]
        n_checked = 0
        while n_checked < len(batch) and (check_bytes > 0 or not self.is_lossless):
            check_bytes -= len(batch[n_checked].text)
            n_checked += 1
        decoded = self.tokenizer.decode_batch(all_ids[:n_checked], skip_special_tokens=False)
        for document, text in zip(batch, decoded, strict=False):
            if not vocabulary.same_text(document.text, text):
                loss = vocabulary.describe_loss(self.tokenizer, document.text, text)
                raise ConfigError(
                    f"data.tokenizer does not give text back, so bits per byte would be false: {loss}, at {document.location}; "
                    "take a byte-level tokenizer, such as data.tokenizer.kind: bpe"
                )
        result = []
        for document, ids in zip(batch, all_ids, strict=True):
            array = np.asarray([*ids, self.end], self.dtype)
            if np.count_nonzero(array == self.end) != 1:
                raise ConfigError(
                    f"data.tokenizer: {document.location} contains the characters of the end-of-text token, and this tokenizer "
                    "cannot encode them as text; set data.tokenizer.end_of_text to another token, or take another tokenizer"
                )
            result.append(array)
        return result


def load_encoder(path: Folder, end_of_text: str | None, threads: int) -> Encoder:
    """The encoder of the tokenizer.json of a corpus, which encodes in `threads` threads. A file is loaded once per process."""
    return _load(path, storage.digest(path), end_of_text, threads)


@functools.lru_cache(maxsize=1)
def _load(path: Folder, _: str, end_of_text: str | None, threads: int) -> Encoder:
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    tokenizer = vocabulary.load(path, end_of_text)
    end, dtype = vocabulary.end_of_text_id(tokenizer, end_of_text), token_dtype(vocabulary.size(tokenizer))
    return Encoder(tokenizer, end, vocabulary.is_lossless(tokenizer), dtype)


def token_dtype(vocab_tokens: int) -> Literal["<u2", "<u4"]:
    """numpy dtype of a token on disk: little-endian unsigned, 2 or 4 bytes."""
    return "<u2" if vocab_tokens <= 2**16 else "<u4"
