"""Makes an English corpus from packages of Debian: packages.yaml in; one JSON Lines file per work, and corpus.json, out.

    python jobs/english/make_corpus.py OUT [--packages FOLDER]

OUT/train and OUT/validation get the works, OUT/corpus.json says what was read, dropped and held out. The package files are
downloaded to FOLDER (OUT/packages) unless they are there, and verified. The same package files give the same bytes. The steps:
read the pages of each package (text_readers.py), drop what pages repeat, cut and join to documents, drop documents that occur
again, hold out whole works, and drop training documents that are near duplicates of what is held out (near_duplicates.py).
corpus.yaml beside this file prepares the result.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import near_duplicates
import yaml
from package_files import CorpusError, extract, fetch
from text_readers import READERS, Decoder, Page, content_of, select

MANIFEST = Path(__file__).parent / "packages.yaml"


@dataclass(frozen=True)
class Document:
    """One document of the corpus: its text, and the package, kind and work that it is from."""

    text: str
    package: str
    kind: str
    work: str


@dataclass
class Counts:
    """What was dropped, by package or in all."""

    repeated_paragraphs: Counter[str] = field(default_factory=Counter)
    short_pages: Counter[str] = field(default_factory=Counter)
    repeated_entries: Counter[str] = field(default_factory=Counter)
    exact_duplicates: Counter[str] = field(default_factory=Counter)
    lines_not_utf8: Counter[str] = field(default_factory=Counter)


def main(arguments: list[str]) -> int:
    """Makes the corpus and prints a table of it; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make an English corpus from packages.")
    parser.add_argument("out", type=Path, help="folder for the corpus; its train/ and validation/ are made anew")
    parser.add_argument(
        "--packages", type=Path, help="folder with package files, or to download them to (default: OUT/packages)"
    )
    parser.add_argument("--manifest", type=Path, default=MANIFEST, help="list of the packages (default: packages.yaml)")
    options = parser.parse_args(arguments)
    try:
        facts = make_corpus(options.manifest, options.out, options.packages or options.out / "packages")
    except (CorpusError, OSError) as e:  # such as a manifest that does not exist
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(json.dumps(facts["splits"], indent=1))
    return 0


def make_corpus(manifest: Path, out: Path, packages: Path) -> dict[str, Any]:
    """Writes the corpus to `out` and returns the content of corpus.json. Raises CorpusError."""
    settings = yaml.safe_load(manifest.read_text())
    files = [fetch(p["package"], p["registry"], p["version"], p["sha256"], packages) for p in settings["packages"]]
    counts, documents = Counts(), list[Document]()
    entries, texts = set[bytes](), set[bytes]()  # digests of what was read already
    for package, file in zip(settings["packages"], files, strict=True):
        print(f"reading {file.name}", file=sys.stderr)
        pages = _pages(package, extract(file, out / "extracted"), out / "extracted", counts)
        pages = _without_repeated_paragraphs(pages, package["package"], settings, counts)
        for document in _documents(pages, package, settings, entries, counts):
            key = _digest(document.text)
            if key in texts:
                counts.exact_duplicates[document.package] += 1
            else:
                texts.add(key)
                documents.append(document)
    shutil.rmtree(out / "extracted")
    print("comparing documents", file=sys.stderr)
    held_out = _held_out_works(documents, settings["held_out_share"], settings["max_held_out_share"])
    splits, overlap = _divide(documents, held_out)
    _write(splits, out)
    facts = _facts(settings, documents, splits, counts, overlap)
    (out / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def _pages(package: dict[str, Any], paths: list[Path], root: Path, counts: Counts) -> list[Page]:
    """The pages of a package's files. Raises CorpusError if it has none of them."""
    by_name = {str(path.relative_to(root)): path for path in paths}
    names = select(list(by_name), package["files"], package.get("without", []))
    if not names:
        raise CorpusError(f"{package['package']}: no file matches {package['files']}; correct `files` in packages.yaml")
    decoder = Decoder()
    pages = list(READERS[package["reader"]](((name, content_of(by_name[name])) for name in names), package["work"], decoder))
    counts.lines_not_utf8[package["package"]] += decoder.lines_not_utf8
    return pages


def _without_repeated_paragraphs(pages: list[Page], package: str, settings: dict[str, Any], counts: Counts) -> list[Page]:
    """The pages without paragraphs that many of them have, such as navigation and notes on the licence."""
    n_pages = Counter(paragraph for page in pages for paragraph in set(page.paragraphs) if not page.entry)
    repeated = {paragraph for paragraph, n in n_pages.items() if n > settings["max_pages_of_a_paragraph"]}
    counts.repeated_paragraphs[package] += sum(n_pages[paragraph] for paragraph in repeated)
    return [Page(page.work, [p for p in page.paragraphs if p not in repeated], page.entry) for page in pages]


def _documents(
    pages: list[Page], package: dict[str, Any], settings: dict[str, Any], entries: set[bytes], counts: Counts
) -> Iterator[Document]:
    """The documents of a package: long pages are cut between paragraphs, entries of a dictionary that follow each other joined.

    An entry that says the same as an earlier one of any dictionary is dropped: synonyms share their definition.
    """
    name, limit = package["package"], settings["document_characters"]
    parts, work, n_characters = list[str](), "", 0
    for page in pages:
        if page.entry:
            if (key := _digest(page.entry)) in entries:
                counts.repeated_entries[name] += 1
                continue
            entries.add(key)
        elif sum(map(len, page.paragraphs)) < settings["min_document_characters"]:
            counts.short_pages[name] += 1
            continue
        if parts and not (page.entry and page.work == work):
            yield Document("\n\n".join(parts), name, package["kind"], work)
            parts, n_characters = [], 0
        work = page.work
        for part in ["\n".join(page.paragraphs)] if page.entry else page.paragraphs:
            parts.append(part)
            n_characters += len(part)
            if n_characters >= limit:
                yield Document("\n\n".join(parts), name, package["kind"], work)
                parts, n_characters = [], 0
    if parts:
        yield Document("\n\n".join(parts), name, package["kind"], work)


def _digest(text: str) -> bytes:
    """The digest of a text without white space and letter case, as the splits of lmu-dist take it."""
    return hashlib.sha256("".join(text.split()).casefold().encode()).digest()


def _held_out_works(documents: list[Document], share: float, max_share: float) -> set[str]:
    """The works that are held out: of each kind of text, in the order of the sha256 of their names, until `share` of its bytes
    is reached. A work that would exceed `max_share` is passed over.
    """
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    for document in documents:
        sizes[document.kind][document.work] += len(document.text.encode())
    held_out = set[str]()
    for works in sizes.values():
        taken = 0
        for work in sorted(works, key=lambda name: hashlib.sha256(name.encode()).digest()):
            if taken < share * works.total() and taken + works[work] <= max_share * works.total():
                held_out.add(work)
                taken += works[work]
    return held_out


def _divide(documents: list[Document], held_out: set[str]) -> tuple[dict[str, list[Document]], dict[str, Any]]:
    """The documents of each split, and what they have in common. Training documents that are near duplicates are dropped."""
    shingles = near_duplicates.sketches([document.text for document in documents])
    pairs = near_duplicates.near_duplicates(shingles)
    in_validation = [document.work in held_out for document in documents]
    across = {a if in_validation[b] else b for a, b in pairs if in_validation[a] != in_validation[b]}
    kept = [i for i in range(len(documents)) if i not in across]
    train, validation = ([i for i in kept if in_validation[i] == wanted] for wanted in (False, True))
    overlap = {
        "documents_with_an_earlier_near_duplicate": len({b for _, b in pairs}),
        "dropped_from_train_as_near_duplicates_of_validation": Counter(documents[i].package for i in sorted(across)),
        "share_of_8_word_shingles_of_validation_in_train": round(
            near_duplicates.shared_part([shingles[i] for i in validation], [shingles[i] for i in train]), 5
        ),
    }
    return {"train": [documents[i] for i in train], "validation": [documents[i] for i in validation]}, overlap


def _write(splits: dict[str, list[Document]], out: Path) -> None:
    """Writes a file per split and work."""
    for split, documents in splits.items():
        shutil.rmtree(out / split, ignore_errors=True)
        (out / split).mkdir(parents=True)
        works: dict[str, list[Document]] = defaultdict(list)
        for document in documents:
            works[f"{document.kind}-{document.work}"].append(document)
        for work, members in works.items():
            rows = ({"text": d.text, "work": d.work, "package": d.package} for d in members)
            name = re.sub(r"[^\w.-]", "_", work)
            (out / split / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _facts(
    settings: dict[str, Any],
    documents: list[Document],
    splits: dict[str, list[Document]],
    counts: Counts,
    overlap: dict[str, Any],
) -> dict[str, Any]:
    """The content of corpus.json: the sizes by split, kind and package, the works that are held out, and what was dropped."""
    n_bytes: dict[str, Counter[str]] = {key: Counter() for key in ("kinds", "packages")}
    for document in (document for members in splits.values() for document in members):
        size = len(document.text.encode())
        n_bytes["kinds"][document.kind] += size
        n_bytes["packages"][document.package] += size
    facts: dict[str, Any] = {"splits": {}}
    for split, members in splits.items():
        digest = hashlib.sha256("".join(f"{d.work}\n{d.text}\0" for d in members).encode()).hexdigest()
        size = sum(len(d.text.encode()) for d in members)
        facts["splits"][split] = {
            "documents": len(members),
            "works": len({d.work for d in members}),
            "bytes": size,
            "sha256": digest,
        }
    held_out: Counter[str] = Counter()
    for document in splits["validation"]:
        held_out[document.work] += len(document.text.encode())
    dropped = {name: {k: n for k, n in sorted(getattr(counts, name).items()) if n} for name in counts.__dataclass_fields__}
    return facts | {"bytes_of": n_bytes, "held_out_works": held_out, "dropped": dropped, "overlap": overlap}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
