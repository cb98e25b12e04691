"""Near duplicates among documents: texts in; pairs of documents that share much of their wording, and shared shingles, out.

The method is Broder's (On the resemblance and containment of documents, SEQUENCES 1997): a document is its set of shingles,
here of 8 words in a row; of these every 8th is kept, those whose hash is 0 modulo 8, so that two documents keep the same ones.
Two documents are near duplicates if the smaller one has at least half of its kept shingles, and at least 3, in the other.
Called by make_corpus.py.
"""

import hashlib
import re
from collections.abc import Sequence

import numpy as np

SHINGLE_WORDS, KEPT_OF = 8, 8
MIN_CONTAINMENT, MIN_SHARED = 0.5, 3
COMMON = 20  # shingles of more documents than this are phrases, such as those of licences, and make no pair
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, 2^64 over the golden ratio: mixes the bits of a hash


def sketches(texts: Sequence[str]) -> list[np.ndarray]:
    """The kept shingles of each text as sorted, unique uint64. They depend on the text alone."""
    hashes: dict[str, int] = {}
    result = list[np.ndarray]()
    for text in texts:
        words = re.findall(r"\w+", text.casefold())
        for word in set(words) - hashes.keys():
            hashes[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        codes = np.array([hashes[word] for word in words], np.uint64)
        n = len(codes) - SHINGLE_WORDS + 1
        if n <= 0:
            result.append(np.empty(0, np.uint64))
            continue
        shingles = np.zeros(n, np.uint64)
        for i in range(SHINGLE_WORDS):
            shingles = shingles * FACTOR + codes[i : i + n]
        shingles = (shingles ^ (shingles >> np.uint64(29))) * FACTOR
        result.append(np.unique(shingles[shingles >> np.uint64(32) & np.uint64(KEPT_OF - 1) == 0]))
    return result


def near_duplicates(shingles: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """The pairs (earlier, later) of documents that are near duplicates, sorted."""
    documents = np.repeat(np.arange(len(shingles)), [len(s) for s in shingles])
    values = np.concatenate([*shingles, np.empty(0, np.uint64)])
    order = np.lexsort((documents, values))
    values, documents = values[order], documents[order]
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]]) if len(values) else np.empty(0, int)
    sizes = np.diff(np.r_[starts, len(values)])
    pairs = list[np.ndarray]()
    for size in range(2, COMMON + 1):
        groups = documents[starts[sizes == size][:, None] + np.arange(size)]
        pairs += [groups[:, i] * len(shingles) + groups[:, j] for i in range(size) for j in range(i + 1, size)]
    codes, n_shared = np.unique(np.concatenate([*pairs, np.empty(0, int)]), return_counts=True)
    firsts, seconds = np.divmod(codes, max(1, len(shingles)))
    lengths = np.array([len(s) for s in shingles] or [0])
    smaller = np.minimum(lengths[firsts], lengths[seconds])
    found = (n_shared >= MIN_SHARED) & (n_shared >= MIN_CONTAINMENT * smaller)
    return list(zip(firsts[found].tolist(), seconds[found].tolist(), strict=True))


def shared_part(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    """The share of the kept shingles of `some` that `others` have as well, whatever their number of documents."""
    first, second = (np.unique(np.concatenate([*part, np.empty(0, np.uint64)])) for part in (some, others))
    return float(np.isin(first, second).mean()) if len(first) else 0.0
