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
from lmu_dist.data.documents import NO_FIELD, NOT_UTF8, NULS, counts_as_bad
from lmu_dist.data.encoder import token_dtype
from lmu_dist.data.manifest import FORMAT, MANIFEST, PROBLEMS, TOKENIZER, Manifest
from lmu_dist.data.progress import Progress
from lmu_dist.data.splits import SPLIT_RULE, SPLITS
from lmu_dist.data.tokenize_shard import part_path


class DamagedPartsError(Exception):
    """Some parts are not as they were written. `indices` are those of their shards."""

    def __init__(self, indices: set[int]) -> None:
        super().__init__(indices)
        self.indices = indices


def check_counts(data: DataConfig, n_files: int, n_archives: int, counts: list[dict[str, Any]], folder: Folder) -> None:
    """Raises ConfigError if the corpus cannot be used: too much of it could not be read, or a split that is needed is empty.

    Too much is a share of the documents, of the files (members of archives included), or of the archives, above
    `max_bad_share`: of an archive that is truncated nobody knows how many members are missing. Train and validation need a
    document. Raises DamagedPartsError if the list of bad records of a part is damaged.
    """
    reasons = sum((Counter(c["problems"]) for c in counts), Counter())
    bad = Counter({reason: n for reason, n in reasons.items() if counts_as_bad(reason, data)})
    bad_archives = Counter({NO_END: bad[NO_END]} if NO_END in bad else {})
    bad_files = Counter({reason: n for reason, n in bad.items() if reason.startswith("unreadable")}) - bad_archives
    bad_documents = bad - bad_files - bad_archives
    n_documents = sum(c[split]["documents"] for c in counts for split in SPLITS)

    def first(wanted: Counter[str]) -> str:
        listings = (_listing(folder, i, c) for i, c in enumerate(counts) if wanted.keys() & c["problems"].keys())
        lines = (json.loads(line) for listing in listings for line in listing.decode().splitlines())
        rows = islice((row for row in lines if row["problem"] in wanted), 3)
        return "; ".join(
            f"{row['place']} {row['problem']}" + (f" ({row['detail']})" if "detail" in row else "") for row in rows
        )

    n_all_documents = n_documents + bad_documents.total()
    for kind, found, n_all, fix in (
        ("archives", bad_archives, n_archives, "repair the archives"),
        ("files", bad_files, n_files, "repair the files"),
        ("documents", bad_documents, n_all_documents, _fix(bad_documents)),
    ):
        if found.total() > data.max_bad_share * n_all:
            raise ConfigError(
                f"{found.total()} of {n_all} {kind} cannot be read ({_listed(found)}), more than data.max_bad_share = "
                f"{data.max_bad_share}; first: {first(found)}; {fix}, or raise data.max_bad_share"
            )
    if sum(c["unseparated"] for c in counts) and not sum(c["separated"] for c in counts):
        raise ConfigError(
            f"data.document_separator: no line of the text files is {data.document_separator!r}; correct it (it must be a line "
            "of its own, and lines must end in LF or CRLF), or take it out"
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

    `shift` is that of splits.split_shift; `notes` are the tokenizer's. Raises DamagedPartsError.
    """
    tokenizer = vocabulary.load(folder / TOKENIZER, data.tokenizer.end_of_text)
    dtype = token_dtype(vocabulary.size(tokenizer))
    splits: dict[str, Any] = {}
    for done, split in enumerate(SPLITS):
        progress("joining the parts", done, len(SPLITS), split)
        sums = {key: sum(c[split][key] for c in counts) for key in ("tokens", "bytes", "documents")}
        splits[split] = sums | {"sha256": _concatenate(counts, folder, f"{split}.bin", folder / f"{split}.bin")}
    _concatenate(counts, folder, "problems", folder / PROBLEMS)
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


def _fix(bad_documents: Counter[str]) -> str:
    """What to do about the most frequent kind of bad documents."""
    most = max(bad_documents, key=bad_documents.__getitem__, default="")
    if most in (NOT_UTF8, NULS):
        return f"convert the files to UTF-8, such as by iconv -f {'LATIN1' if most == NOT_UTF8 else 'UTF-16LE'} -t UTF-8"
    return "set data.text_field to the field that holds the text" if most == NO_FIELD else "repair the corpus"


def _listing(folder: Folder, index: int, counts: dict[str, Any]) -> bytes:
    """The list of bad records of a part, verified."""
    try:
        content = part_path(folder, index, "problems").read_bytes()
    except FileNotFoundError:
        raise DamagedPartsError({index}) from None
    if hashlib.sha256(content).hexdigest() != counts["sha256"]["problems"]:
        raise DamagedPartsError({index})
    return content


def _concatenate(counts: list[dict[str, Any]], folder: Folder, name: str, to: Folder) -> str:
    """Concatenates the files of this name of all parts to one, written atomically, and verifies them. Returns its sha256."""
    sha, damaged = hashlib.sha256(), set[int]()
    with storage.open_atomic(to) as out:
        for i, facts in enumerate(counts):
            part_sha = hashlib.sha256()
            try:
                with part_path(folder, i, name).open("rb") as part:
                    while chunk := part.read(1 << 22):
                        part_sha.update(chunk)
                        sha.update(chunk)
                        out.write(chunk)
            except FileNotFoundError:
                damaged.add(i)
            if part_sha.hexdigest() != facts["sha256"][name]:
                damaged.add(i)
        if damaged:
            raise DamagedPartsError(damaged)
    return sha.hexdigest()
