"""Tests of jobs/english on made-up packages: readers, duplicates, whole works held out, the same bytes twice, and errors."""

import gzip
import hashlib
import json
import re
import struct
import subprocess
import zipfile
import zlib
from pathlib import Path

import make_corpus
import near_duplicates
import numpy as np
import pytest
import yaml
from text_readers import READERS, Decoder

SETTINGS = {
    "max_pages_of_a_paragraph": 3,
    "min_document_characters": 50,
    "document_characters": 1000,
    "held_out_share": 0.1,
    "max_held_out_share": 0.3,
}


def prose(seed: int, n_sentences: int = 6) -> str:
    """Sentences of made-up words, which no other seed has."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefghij"), 6)) for _ in range(12 * n_sentences)]
    return " ".join(" ".join(words[12 * i : 12 * i + 12]).capitalize() + "." for i in range(n_sentences))


def wheel(folder: Path, name: str, members: dict[str, bytes], **keys: object) -> dict[str, object]:
    """Writes a package as pip would download it, and returns its entry in packages.yaml."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    entry = {"package": name, "registry": "pypi", "version": "1.0", "sha256": digest, "licence": "MIT", "kind": "essays"}
    return entry | {"reader": "text", "files": ["*.txt"], "work": name, **keys}


def manifest_of(folder: Path, packages: list[dict[str, object]]) -> Path:
    (folder / "packages.yaml").write_text(yaml.safe_dump(SETTINGS | {"packages": packages}))
    return folder / "packages.yaml"


def pages(reader: str, files: dict[str, bytes], work: str = "w") -> list[tuple[str, list[str]]]:
    return [(page.work, page.paragraphs) for page in READERS[reader](files.items(), work, Decoder())]


def rows_of(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def test_corpus_has_each_document_once_and_holds_out_whole_works(tmp_path: Path):
    texts = {f"work{i}/{j}.txt": prose(100 * i + j) for i in range(8) for j in range(4)}
    by_work = r":^(\w+)/"
    packages = [
        wheel(
            tmp_path / "p",
            "books",
            {path: f"Made by hand, all rights given.\n\n{t}".encode() for path, t in texts.items()},
            work=by_work,
        ),
        # The same text in other lines and letter case, a new one, and one that is too short.
        wheel(
            tmp_path / "p",
            "copies",
            {
                "a.txt": texts["work1/0.txt"].upper().replace(" ", "\n").encode(),
                "b.txt": prose(9000).encode(),
                "c.txt": b"Short but a whole sentence.",
            },
        ),
    ]
    manifest = manifest_of(tmp_path, packages)
    first, second = (make_corpus.make_corpus(manifest, tmp_path / name, tmp_path / "p") for name in ("a", "b"))
    train, validation = rows_of(tmp_path / "a" / "train"), rows_of(tmp_path / "a" / "validation")
    assert sorted(row["text"] for row in train + validation) == sorted([*texts.values(), prose(9000)])
    works = [{row["work"] for row in rows} for rows in (train, validation)]
    assert not works[0] & works[1]
    assert len(works[1]) == 1  # of nine works of one size, or a fourth of it, the first that is as large as a tenth of all
    assert first["dropped"]["exact_duplicates"] == {"copies": 1}
    assert first["dropped"]["repeated_paragraphs"] == {"books": 32}
    assert first["dropped"]["short_pages"] == {"copies": 1}
    assert first == second
    files = [{p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.json*")} for n in ("a", "b")]
    assert files[0] == files[1]
    assert len(files[0]) == 10


def test_near_duplicates_of_held_out_documents_are_no_training_documents(tmp_path: Path):
    held_out = next(f"work{i}" for i in sorted(range(8), key=lambda i: hashlib.sha256(f"work{i}".encode()).digest()))
    members = {f"work{i}/{j}.txt": prose(100 * i + j, 20) for i in range(8) for j in range(2)}
    copy = members[f"{held_out}/0.txt"].replace(".", "!", 3).rpartition(". ")[0] + ". " + prose(5, 2)
    other = next(work for work in (f"work{i}" for i in range(8)) if work != held_out)
    members |= {f"{other}/copy.txt": copy}
    package = wheel(tmp_path / "p", "books", {p: t.encode() for p, t in members.items()}, work=r":^(\w+)/")
    facts = make_corpus.make_corpus(manifest_of(tmp_path, [package]), tmp_path / "a", tmp_path / "p")
    assert list(facts["held_out_works"]) == [held_out]
    assert facts["overlap"]["documents_with_an_earlier_near_duplicate"] == 1
    assert facts["overlap"]["dropped_from_train_as_near_duplicates_of_validation"] == {"books": 1}
    assert facts["overlap"]["share_of_8_word_shingles_of_validation_in_train"] == 0
    texts = {row["text"] for row in rows_of(tmp_path / "a" / "train")}
    assert texts == {text for path, text in members.items() if not path.startswith(held_out)} - {copy}


def test_near_duplicates_are_found_by_what_they_share():
    first, second = prose(1, 40).split(), prose(2, 40).split()
    texts = [" ".join(words) for words in (first, second, first[:480] + second, first[:100] + second[100:], first[:90])]
    found = near_duplicates.near_duplicates(near_duplicates.sketches(texts))
    # The third text has all of both, the fourth 80 % of the second, and the last is a part of the first and the fourth.
    assert found == [(0, 2), (0, 4), (1, 2), (1, 3), (2, 3), (2, 4), (3, 4)]
    everything, half = near_duplicates.sketches([" ".join(first), " ".join(first[:243])])
    assert near_duplicates.shared_part([everything], [half]) == pytest.approx(0.5, abs=0.15)
    assert near_duplicates.near_duplicates(near_duplicates.sketches(["a few words", "a few words"])) == []


def test_html_gives_prose_and_its_headings():
    page = """<html><head><title>t</title></head><body><div class="navheader"><div>Next page of the manual is here.</div></div>
    <h1>Part</h1><h2>Un<b>used</b></h2><h2>Title</h2><p>A sentence of <code>words</code>
    and &amp; more.<pre>code that ends as a sentence does.</pre><p>no sentence<p>x = f(1, 2, 3) + [4, 5, 6] * {7: 8, 9: 10}.
    <ul><li>An item that is a sentence.</ul><table><tr><td>A cell of a table, left out.</table></body>"""
    expected = ["Unused", "Title", "A sentence of words and & more.", "An item that is a sentence."]
    assert pages("html", {"doc/a.html": page.encode()}) == [("w", expected)]


def test_dictionaries_are_read_by_their_index():
    entries = [
        "Cat \\Cat\\, n.\n   [OE. cat.] A small\n   {animal}, and t[imac]d c[=a]t.\n   [1913 Webster]\n",
        "Dog\n   Another animal\n   that barks.\n",
    ]
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(n: int) -> str:
        return (digits[n // 64] if n >= 64 else "") + digits[n % 64]

    first, second = map(len, entries)
    lines = ["00-database-info\tA\tB", *(f"{word}\tA\t{number(first)}" for word in ("cat", "small cat"))]
    index = "\n".join([*lines, f"dog\t{number(first)}\t{number(second)}"])
    found = pages("dictd", {"d.index": index.encode(), "d.dict.dz": "".join(entries).encode()})
    assert found == [("w", ["Cat, n. [OE. cat.] A small animal, and tid cat."]), ("w", ["Dog Another animal that barks."])]


def test_novels_are_read_from_a_database_of_r():
    lines = ["TITLE OF THE NOVEL", "", "CHAPTER 1", "", "It was a", "dark night.", "", "CHAPTER 2", "", "The end came."]

    def serialized(sexp_type: int, strings: list[str]) -> bytes:
        content = b"X\n" + struct.pack(">iiii", 3, 0, 0, 5) + b"UTF-8" + struct.pack(">ii", sexp_type, len(strings))
        content += b"".join(struct.pack(">ii", 0x40009, len(s)) + s.encode() for s in strings)
        return struct.pack(">i", len(content)) + zlib.compress(content)

    database = serialized(13, []) + serialized(16, lines)
    found = pages("rdata", {"Rdata.rdb": database}, "novel-")
    assert [work for work, _ in found] == ["novel-0"] * 3
    assert [text for _, text in found][1:] == [["CHAPTER 1", "It was a dark night."], ["CHAPTER 2", "The end came."]]


def test_bibles_are_read_by_chapters():
    book = (
        '<div osisID="Gen" type="book"/><title>Genesis</title><chapter n="1" osisID="Gen.1"/><w lemma="x">In</w> the beginning '
        'God created. <note>A note.</note><div sID="g" type="x-p"/> A second paragraph of it. <chapter n="2" osisID="Gen.2"/>'
        "And so on, as it went."
    )
    block = zlib.compress(book.encode())
    empty = zlib.compress(b"")
    files = {"ot.bzz": b"..." + block, "ot.bzs": struct.pack("<III", 3, len(block), 0), "nt.bzz": empty}
    files |= {"nt.bzs": struct.pack("<III", 0, len(empty), 0)}
    first = ["In the beginning God created.", "A second paragraph of it."]
    assert pages("sword", files, "bible-") == [("bible-Gen", first), ("bible-Gen", ["And so on, as it went."])]


def test_scenarios_and_manuals_are_read():
    scenario = (
        b'name= _ "Short"\nmessage= _ "He said: ""I am not\nof <i>this</i> land,"" and left."\nfile="What is not shown."\n'
    )
    assert pages("wml", {"a.cfg": scenario}) == [("w", ['He said: "I am not of this land," and left.'])]
    manual = b"Title\n=====\n\n.. note:: Left out.\n\n* See :ref:`the last part <last>` and ``code`` of it,\n  **always**.\n"
    assert pages("rst", {"x/part/a.rst": manual}, "man-:x/([^/]+)/") == [
        ("man-part", ["See the last part and code of it, always."])
    ]


def test_lines_that_are_not_utf8_are_decoded_and_counted():
    decoder = Decoder()
    assert decoder.text("é\n".encode() + b"\xe9\r\nplain") == "é\né\r\nplain"
    assert decoder.lines_not_utf8 == 1


def test_debian_packages_are_extracted(tmp_path: Path):
    (tmp_path / "d" / "DEBIAN").mkdir(parents=True)
    (tmp_path / "d" / "DEBIAN" / "control").write_text(
        "Package: b\nVersion: 1:2\nArchitecture: all\nMaintainer: m <m@x>\nDescription: d\n"
    )
    for i in range(12):
        (tmp_path / "d" / f"w{i}.txt.gz").write_bytes(gzip.compress(prose(i).encode()))
    file = tmp_path / "b_1%3a2_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(tmp_path / "d"), str(file)], check=True, capture_output=True)
    entry = wheel(tmp_path / "p", "b", {}) | {
        "registry": "debian",
        "version": "1:2",
        "files": ["*.txt.gz"],
        "work": ":^(w.*).txt",
    }
    manifest = manifest_of(tmp_path, [entry | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}])
    make_corpus.make_corpus(manifest, tmp_path / "a", tmp_path)
    assert len(rows_of(tmp_path / "a" / "train") + rows_of(tmp_path / "a" / "validation")) == 12


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"version": "9"},
            "books 9 cannot be had from PyPI: ERROR: No matching distribution; put its file into .*/p from an arch",
        ),
        (
            {"version": "9", "registry": "debian"},
            r"books 9 cannot be had from Debian 12 \(run apt-get update first\): ERROR: No",
        ),
        (
            {"sha256": "0" * 64},
            "books-1.0-py3-none-any.whl has the sha256 [0-9a-f]{64}, packages.yaml wants 0{64} for books 1.0",
        ),
        ({"files": ["*.html"]}, r"books: no file matches \['\*.html'\]; correct `files` in packages.yaml"),
    ],
)
def test_package_that_cannot_be_had_is_one_clear_error(
    keys: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    manifest = manifest_of(tmp_path, [wheel(tmp_path / "p", "books", {"a.txt": prose(1).encode()}) | keys])
    answer = subprocess.CompletedProcess([], 1, "", "WARNING: old client\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    arguments = [str(tmp_path / "a"), "--packages", str(tmp_path / "p"), "--manifest", str(manifest)]
    assert make_corpus.main(arguments) == 1
    assert re.match(f"error: .*{message}", capsys.readouterr().err.splitlines()[-1])


def test_missing_manifest_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert make_corpus.main([str(tmp_path / "a"), "--manifest", str(tmp_path / "none.yaml")]) == 1
    assert re.fullmatch(r"error: .*No such file or directory: '.*none\.yaml'\n", capsys.readouterr().err)
