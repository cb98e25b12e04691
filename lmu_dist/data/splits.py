"""The splits of a corpus: a document in; train, validation or test out.

Called by data/prepare and data/tokenize_shard for each document, and by data/merge, which writes the rule into the manifest.
"""

import hashlib

from lmu_dist.config import DataConfig
from lmu_dist.data.documents import CorpusShard, Document
from lmu_dist.data.sources import read

SPLITS = {"train": range(96), "validation": range(96, 99), "test": range(99, 100)}
SPLIT_RULE = (
    "sha256 of the document's UTF-8 without white space and with letter case folded, first 8 bytes as a number, modulo 100: "
    "0-95 train, 96-98 validation, 99 test; a document that the data set itself assigns to a split is in that one"
)
SMALL_CORPUS_BYTES = 1_000_000  # a corpus of less is read once more if needed, so that it has documents to validate on


def split_of(text: str, shift: int = 0) -> str:
    """The split of a document, which depends on its content only (SPLIT_RULE), with its number shifted by `shift`.

    Documents that differ only in white space or letter case are in the same split, so that none is both trained on and tested.
    """
    return _split_of_number(_split_number(text) + shift)


def split_of_document(document: Document, data: DataConfig, shift: int) -> str:
    """The split that is assigned to the document, else that of its text. A validation split that is given is the only one."""
    split = document.split or split_of(document.text, shift)
    return "train" if document.split is None and split == "validation" and _gives_validation(data) else split


def split_shift(data: DataConfig, shards: list[CorpusShard]) -> int:
    """How far the numbers of SPLIT_RULE are shifted: 0, but in a small corpus as far as every split needs to have a document.

    By chance, none of 60 documents falls into validation one time in six.
    """
    on_the_hub = any(shard.shard and not shard.stamp for shard in shards)  # of unknown size
    if on_the_hub or _gives_validation(data) or sum(shard.size_bytes for shard in shards) > SMALL_CORPUS_BYTES:
        return 0
    numbers = {_split_number(i.text) for shard in shards for i in read(shard, data) if isinstance(i, Document)}
    splits = [{_split_of_number(number + shift) for number in numbers} for shift in range(100)]
    if {"train", "validation"} <= splits[0]:
        return 0
    return max(range(100), key=lambda shift: (len(splits[shift] & {"train", "validation"}), len(splits[shift]), -shift))


def _gives_validation(data: DataConfig) -> bool:
    """Whether the configuration says which documents to validate on."""
    return bool(data.dataset_validation_split or data.validation_files)


def _split_number(text: str) -> int:
    normal_form = "".join(text.split()).casefold()
    return int.from_bytes(hashlib.sha256(normal_form.encode()).digest()[:8]) % 100


def _split_of_number(number: int) -> str:
    return next(name for name, numbers in SPLITS.items() if number % 100 in numbers)
