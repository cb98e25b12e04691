"""The end of preparing: the part files of all shards and their counts in; token streams, problems.jsonl and manifest.json out.

Called by data/prepare. The parts, which data/tokenize_shard wrote, are concatenated in the order of the shards.
"""

import hashlib
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from lmu_dist import storage
from lmu_dist.config import ConfigError, DataConfig, Folder
from lmu_dist.data import tokenizer as vocabulary
from lmu_dist.data.archives import NO_END
from lmu_dist.data.documents import counts_as_bad
from lmu_dist.data.encoder import token_dtype
from lmu_dist.data.manifest import FORMAT, MANIFEST, PROBLEMS, TOKENIZER, Manifest
from lmu_dist.data.progress import Progress
from lmu_dist.data.splits import SPLIT_RULE, SPLITS
from lmu_dist.data.tokenize_shard import part_path


def check_counts(data: DataConfig, n_files: int, n_archives: int, counts: list[dict[str, Any]], folder: Folder) -> None:
    """Raises ConfigError if the corpus cannot be used: too much of it could not be read, or a split that is needed is empty.

    Too much is a share of the documents, of the files (members of archives included), or of the archives, above
    `max_bad_share`: of an archive that is truncated nobody knows how many members are missing. Train and validation need a
    document.
    """
    reasons = sum((Counter(c["problems"]) for c in counts), Counter())
    bad = Counter({reason: n for reason, n in reasons.items() if counts_as_bad(reason, data)})
    bad_archives = Counter({NO_END: bad[NO_END]} if NO_END in bad else {})
    bad_files = Counter({reason: n for reason, n in bad.items() if reason.startswith("unreadable")}) - bad_archives
    bad_documents = bad - bad_files - bad_archives
    n_documents = sum(c[split]["documents"] for c in counts for split in SPLITS)

    def first(wanted: Counter[str]) -> str:
        listings = (part_path(folder, i, "problems") for i in range(len(counts)))
        lines = (json.loads(line) for listing in listings for line in listing.read_text(encoding="utf-8").splitlines())
        return "; ".join(islice((f"{row['place']} {row['problem']}" for row in lines if row["problem"] in wanted), 3))

    n_all_documents = n_documents + bad_documents.total()
    for kind, found, n_all, fix in (
        ("archives", bad_archives, n_archives, "repair the archives"),
        ("files", bad_files, n_files, "repair the files"),
        ("documents", bad_documents, n_all_documents, "repair the corpus, set data.text_field"),
    ):
        if found.total() > data.max_bad_share * n_all:
            raise ConfigError(
                f"{found.total()} of {n_all} {kind} cannot be read ({_listed(found)}), more than data.max_bad_share = "
                f"{data.max_bad_share}; first: {first(found)}; {fix}, or raise data.max_bad_share"
            )
    if not n_documents:
        why = f" ({_listed(reasons)}; first: {first(reasons)})" if reasons else ""
        raise ConfigError(f"the corpus has no text: there is no document in its {n_files} files{why}; give other files")
    for split in ("train", "validation"):
        if not sum(c[split]["documents"] for c in counts):
            raise ConfigError(f"none of the {n_documents} documents falls into the {split} split; give a larger corpus")


def merge_parts(
    data: DataConfig, counts: list[dict[str, Any]], folder: Folder, progress: Progress, shift: int, notes: tuple[str, ...]
) -> None:
    """Concatenates the parts to one token stream per split and writes problems.jsonl and, last, manifest.json.

    `shift` is that of splits.split_shift; `notes` are the tokenizer's.
    """
    tokenizer = vocabulary.load(folder / TOKENIZER, data.tokenizer.end_of_text)
    dtype = token_dtype(vocabulary.size(tokenizer))
    splits: dict[str, Any] = {}
    for done, split in enumerate(SPLITS):
        progress("joining the parts", done, len(SPLITS), split)
        paths = [part_path(folder, i, f"{split}.bin") for i in range(len(counts))]
        sums = {key: sum(c[split][key] for c in counts) for key in ("tokens", "bytes", "documents")}
        splits[split] = sums | {"sha256": _concatenate(paths, folder / f"{split}.bin")}
    _concatenate([part_path(folder, i, "problems") for i in range(len(counts))], folder / PROBLEMS)
    progress("joining the parts", len(SPLITS), len(SPLITS))
    content = {"tokenizer": vocabulary.digest(tokenizer), **{split: entry["sha256"] for split, entry in splits.items()}}
    manifest = Manifest(
        format=FORMAT,
        source=data.source if data.source == "python-stdlib" else " ".join(data.files) or str(data.dataset),
        split_rule=SPLIT_RULE
        + (f"; here the number is shifted by {shift}, so that there is a validation split" if shift else ""),
        vocab_tokens=vocabulary.size(tokenizer),
        end_of_text_id=vocabulary.end_of_text_id(tokenizer, data.tokenizer.end_of_text),
        dtype=dtype,
        tokenizer_digest=content["tokenizer"],
        splits=splits,
        problems=dict(sum((Counter(c["problems"]) for c in counts), Counter())),
        data_digest=hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest(),
        end_of_text=data.tokenizer.end_of_text or vocabulary.END_OF_TEXT,
        notes=notes,
    )
    storage.write_atomic(folder / MANIFEST, manifest.to_json())
    for split, entry in splits.items():
        if isinstance(folder, Path):
            storage.remember_intact(folder / f"{split}.bin", entry["sha256"])


def _listed(reasons: Counter[str]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())


def _concatenate(paths: list[Folder], to: Folder) -> str:
    """Concatenates files to one, written atomically. Returns its sha256."""
    sha = hashlib.sha256()
    with storage.open_atomic(to) as out:
        for path in paths:
            with path.open("rb") as part:
                while chunk := part.read(1 << 22):
                    sha.update(chunk)
                    out.write(chunk)
    return sha.hexdigest()
