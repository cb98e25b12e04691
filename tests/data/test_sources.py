"""Tests of corpus readers: all file types give the same documents, and everything unreadable becomes a bad record."""

import bz2
import errno
import gzip
import io
import json
import lzma
import os
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd

from lmu_dist.config import ConfigError, DataConfig, FailedError
from lmu_dist.data.divide import split_shards
from lmu_dist.data.documents import BadRecord, Document, counts_as_bad
from lmu_dist.data.formats import reason_to_leave_out
from lmu_dist.data.readers import TEXT_DOCUMENT_BYTES
from lmu_dist.data.sources import list_shards, read

TEXTS = ["first document", "zweites Dokument: äöü", "third\nwith two lines"]
JSONL = "".join(json.dumps({"text": t, "meta": {}}) + "\n" for t in TEXTS).encode()


def items(*globs: str, **settings) -> list:
    data = DataConfig(source="files", files=globs, **settings)
    return [item for shard in list_shards(data) for item in read(shard, data)]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".tar"])
def test_every_format_gives_the_same_documents(tmp_path: Path, suffix: str):
    path = tmp_path / f"corpus{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "other": [1, 2, 3]}), path)
    elif suffix == ".tar":
        write_tar(path, {"2005-12.jsonl.zst": zstd.compress(JSONL)})
    else:
        compress = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstd.compress}[suffix]
        path.write_bytes(compress(JSONL))
    found = items(str(path))
    assert [item.text for item in found if isinstance(item, Document)] == TEXTS
    inside = "!2005-12.jsonl.zst" if suffix == ".tar" else ""
    assert [item.location for item in found] == [f"{path}{inside}:{i}" for i in (1, 2, 3)]


def test_bad_records_have_a_reason_and_a_line_number(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "good"}\n{"text": \n{"body": "x"}\n{"text": 3}\n\n{"text": "\xff"}\n{"text": "  "}\n[1]\n'
        b'{"text": "\\ud800"}\n{"text": "last, without a newline"}'
    )
    found = items(str(path))
    assert [i.text for i in found if isinstance(i, Document)] == ["good", "last, without a newline"]
    assert [(i.reason, i.location.rsplit(":")[-1]) for i in found if isinstance(i, BadRecord)] == [
        ("broken JSON", "2"),
        ("no text field", "3"),
        ("no text field", "4"),
        ("empty line", "5"),
        ("not UTF-8", "6"),
        ("empty document", "7"),
        ("no text field", "8"),
        ("not UTF-8", "9"),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl.gz", gzip.compress(JSONL * 100, mtime=0)[:-20]),
        ("a.jsonl.zst", zstd.compress(JSONL * 100)[:-5]),
        ("a.jsonl.gz", b"not gzip"),
        ("a.jsonl.zst", b"not zstandard"),
        ("a.parquet", b"not parquet"),
        ("a.tar", b"not a tar"),
        ("a.tar", bytes(10240)),
    ],
)
def test_damaged_archive_is_one_bad_record_with_its_name(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    bad_records = [i for i in items(str(tmp_path / "*")) if isinstance(i, BadRecord)]
    assert len(bad_records) == 1
    assert bad_records[0].reason.startswith("unreadable")
    assert name in bad_records[0].location


def test_long_text_files_are_cut_at_line_ends_without_loss(tmp_path: Path):
    text = "".join(f"line {i} of a long text\n" for i in range(5000))
    (tmp_path / "long.txt").write_text(text)
    (tmp_path / "latin.txt").write_bytes("ü\n".encode("latin-1"))
    (tmp_path / "zero.txt").write_bytes(b"")
    found = items(str(tmp_path / "*.txt"))
    documents = [i for i in found if isinstance(i, Document)]
    assert "".join(d.text for d in documents) == text
    assert len(documents) > 5
    assert all(len(d.text) < TEXT_DOCUMENT_BYTES + 100 for d in documents)
    assert {(b.reason, Path(b.location.split(":")[0]).name) for b in found if isinstance(b, BadRecord)} == {
        ("not UTF-8", "latin.txt"),
        ("empty document", "zero.txt"),
    }


def test_text_field_can_be_configured(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    assert [i.text for i in items(str(tmp_path / "a.jsonl"), text_field="body")] == ["x"]


def test_names_that_are_not_utf8_can_be_reported(tmp_path: Path):
    (tmp_path / os.fsdecode(b"a\xff.jsonl")).write_text("broken")
    [record] = items(str(tmp_path / "*"))
    assert record == BadRecord("broken JSON", f"{tmp_path}/a\ufffd.jsonl:1")


def test_hugging_face_data_set_from_a_local_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "train.parquet")
    data = DataConfig(source="huggingface", dataset=str(tmp_path))
    [shard] = list_shards(data)
    assert [i.text for i in read(shard, data) if isinstance(i, Document)] == TEXTS
    with pytest.raises(ConfigError, match=r"data\.dataset: cannot load"):
        list_shards(DataConfig(source="huggingface", dataset=str(tmp_path / "none")))


def test_shards_do_not_depend_on_directory_order(tmp_path: Path):
    for name in "cab":
        (tmp_path / f"{name}.txt").write_text(name)
    data = DataConfig(source="files", files=(str(tmp_path / "*.txt"), str(tmp_path / "a*")))
    [shard] = list_shards(data)
    assert [Path(p).name for p in shard.paths] == ["a.txt", "b.txt", "c.txt"]
    (tmp_path / "x.pdf").touch()
    with pytest.raises(ConfigError, match="unknown file type"):
        list_shards(DataConfig(source="files", files=(str(tmp_path / "*"),)))


def test_tar_members_are_all_read_or_reported(tmp_path: Path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for text in ("one", "two", "three"):  # two members have the same name
            content = json.dumps({"text": text}).encode()
            info = tarfile.TarInfo("same.jsonl" if text != "three" else "other.jsonl")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert [i.text for i in items(str(path))] == ["one", "two", "three"]
    intact = path.read_bytes()
    for damaged in (intact[:2048], intact[:1024] + b"\xff" * 512 + intact[1536:]):  # cut between members; a damaged header
        path.write_bytes(damaged)
        assert [type(i) for i in items(str(path))][-1] is BadRecord


def test_text_without_line_ends_is_not_cut_inside_characters(tmp_path: Path):
    text = "x" + "äöü€𝄞" * 10_000
    (tmp_path / "a.txt").write_text(text)
    found = items(str(tmp_path / "a.txt"))
    assert len(found) > 3
    assert "".join(i.text for i in found) == text


def test_invalid_parquet_text_and_deep_json_are_bad_records(tmp_path: Path):
    column = pyarrow.array([b"good", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("[" * 200_000 + "\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "c.parquet")
    results = [i.reason if isinstance(i, BadRecord) else i.text for i in items(str(tmp_path / "*"))]
    assert results == ["good", "not UTF-8", "broken JSON", "no text field", "no text field"]


def damaged_parquet() -> bytes:
    """A parquet file whose first page is damaged, for which pyarrow raises a plain OSError."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": [f"some words and {i} " * 5 for i in range(40)]}), file)
    content = bytearray(file.getvalue())
    content[30 : len(content) // 3] = bytes(byte ^ 0x5A for byte in content[30 : len(content) // 3])
    return bytes(content)


def test_damaged_parquet_member_does_not_hide_the_members_after_it(tmp_path: Path):
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), table)
    path = tmp_path / "a.tar"
    write_tar(path, {f"{i}.parquet": damaged_parquet() if i == 1 else table.getvalue() for i in range(5)})
    data = DataConfig(source="files", files=(str(path),))
    [shard] = split_shards(list_shards(data), data)
    found = list(read(shard, data))
    assert [i.text for i in found if isinstance(i, Document)] == TEXTS * 4
    assert [i for i in found if isinstance(i, BadRecord)] == [BadRecord("unreadable: damaged (OSError)", f"{path}!1.parquet")]


def test_damaged_parquet_at_a_url_is_no_failure_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    memory = fsspec.filesystem("memory")
    memory.pipe("/damaged/a.parquet", damaged_parquet())
    assert items("memory://damaged/a.parquet") == [BadRecord("unreadable: damaged (OSError)", "memory:///damaged/a.parquet")]
    data = DataConfig(source="files", files=("memory://damaged/a.parquet",))
    [shard] = list_shards(data)

    def fail(*_: object) -> bytes:
        raise ConnectionResetError("connection lost")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read", fail)
    with pytest.raises(FailedError, match="connection lost"):
        list(read(shard, data))


def test_full_disk_of_temporary_files_is_no_bad_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_tar(tmp_path / "a.tar", {"a.parquet": damaged_parquet()})

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shutil.copyfileobj", fail)
    with pytest.raises(OSError, match="No space left"):
        items(str(tmp_path / "a.tar"))


def test_wide_encodings_do_not_hide_the_kind_of_a_file(tmp_path: Path):
    (tmp_path / "w.zst").write_bytes(zstd.compress(JSONL.decode().encode("utf-16")))
    write_tar(tmp_path / "a.tar", {"w.gz": gzip.compress(JSONL.decode().encode("utf-32"))})
    assert [i.text for i in items(str(tmp_path / "*"))] == TEXTS * 2


@pytest.mark.parametrize(
    ("split", "validation", "is_accepted"),
    [
        ("train", "train[:5%]", False),
        ("train[:50%]", "train[40%:60%]", False),
        ("train[:-10%]", "train[-10%:]", True),
        ("train[5%:]", "train[:5%]", True),
        ("train[:1000]", "train[1000:1100]", True),
        ("train[:1000]", "train[-100:]", False),  # of 1,050 rows, say
        ("train[:-100]", "train[-100:]", True),
        ("train[:90%]", "train[100:]", False),
        ("train+test", "validation", True),
        ("train+validation[1%:]", "validation", False),
        ("all", "validation", False),
    ],
)
def test_validation_split_has_no_document_of_the_split(split: str, validation: str, is_accepted: bool, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list([{"text": "x"}]))
    data = DataConfig(source="huggingface", dataset="a/b", dataset_split=split, dataset_validation_split=validation)
    if is_accepted:
        assert len(list_shards(data)) == 2
    else:
        with pytest.raises(ConfigError, match="give another split, or slices that do not overlap, such as"):
            list_shards(data)


def test_documents_of_validation_files_are_for_validation(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    write_tar(tmp_path / "v.tar", {f"{i}.txt": f"held out {i}".encode() for i in range(3)})
    data = DataConfig(source="files", files=(f"{tmp_path}/a.jsonl",), validation_files=(f"{tmp_path}/v.tar",))
    found = [item for shard in split_shards(list_shards(data), data) for item in read(shard, data)]
    assert [(i.text, i.split) for i in found] == [
        *((t, None) for t in TEXTS),
        *((f"held out {i}", "validation") for i in range(3)),
    ]
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    for held_out, message in (
        (
            f"{tmp_path}/link.jsonl",
            "^data.validation_files: .*link.jsonl is also one of data.files; take it out of one of the two",
        ),
        (f"{tmp_path}/none.jsonl", "^data.validation_files: no file matches"),
    ):
        with pytest.raises(ConfigError, match=message):
            list_shards(DataConfig(source="files", files=data.files, validation_files=(held_out,)))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.txt.gz"])
def test_byte_order_marks_are_removed_and_wide_encodings_are_decoded(tmp_path: Path, name: str, encoding: str):
    text = "erste Zeile: äöü€𝄞\nzweite Zeile\n"
    content = (json.dumps({"text": text}) + "\n") if "json" in name else text
    mark = "\ufeff" if encoding.endswith("-be") else ""
    raw = (mark + content).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert [i.text for i in items(str(tmp_path / name))] == [text]


def test_byte_order_marks_of_later_lines_and_files_are_removed(tmp_path: Path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + JSONL + mark + JSONL)
    (tmp_path / "b.txt").write_bytes(mark + b"one\n" + mark + b"two\n")
    (tmp_path / "c.txt").write_bytes(mark + b"three")
    assert [i.text for i in items(str(tmp_path / "a.jsonl"))] == TEXTS * 2
    assert "".join(i.text for i in items(str(tmp_path / "*.txt"))) == "one\ntwo\nthree"


def test_utf16_without_a_mark_never_becomes_nuls(tmp_path: Path):
    wide = "some text of more than one line\n" * 3
    (tmp_path / "a.txt").write_bytes(wide.encode("utf-16-le"))
    (tmp_path / "b.jsonl").write_bytes((json.dumps({"text": wide}) + "\n").encode("utf-16-le"))
    pyarrow.parquet.write_table(pyarrow.table({"text": [wide.encode("utf-16-le")]}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_bytes(b"a few lines\n" * 5 + b"\0")
    found = items(str(tmp_path / "*"))
    assert len(found) >= 4
    assert {i.reason for i in found if isinstance(i, BadRecord)} == {"NUL characters: UTF-16 or binary data"}
    assert not [i for i in found if isinstance(i, Document)]


def test_glob_without_a_match_is_named(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    with pytest.raises(ConfigError, match=r"no file matches '.*wiki/\*\.jsonl\.zst'"):
        items(str(tmp_path / "a.jsonl"), str(tmp_path / "wiki" / "*.jsonl.zst"))


def test_a_file_and_a_link_to_it_are_read_once(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    (tmp_path / "c.jsonl").hardlink_to(tmp_path / "a.jsonl")
    found = items(str(tmp_path / "*.jsonl"), str(tmp_path / "a*"), str(tmp_path))
    assert [i.text for i in found if isinstance(i, Document)] == TEXTS
    bad = [i for i in found if isinstance(i, BadRecord)]
    assert {(i.reason, Path(i.location).name) for i in bad} == {
        (f"left out: the same file as {tmp_path / 'a.jsonl'}", name) for name in ("b.jsonl", "c.jsonl")
    }
    assert not any(counts_as_bad(i.reason, DataConfig()) for i in bad)


def test_file_that_grows_while_it_is_read_is_an_error(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(JSONL)
    data = DataConfig(source="files", files=(str(path),))
    [shard] = list_shards(data)
    reading = read(shard, data)
    next(reading)
    with path.open("ab") as file:
        file.write(JSONL)
    with pytest.raises(FailedError, match=r"a\.jsonl on .* differs from the file that was listed") as error:
        list(reading)
    assert "same command" not in str(error.value)  # the command line adds it


COMPRESS = {".gz": gzip.compress, ".zst": zstd.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_all_compressed_streams_of_a_file_are_read(tmp_path: Path, suffix: str):
    compress = COMPRESS[suffix]
    for name in (f"a.jsonl{suffix}", f"A.JSONL{suffix.upper()}", f"b.ndjson{suffix}", f"c.json{suffix}", f"d{suffix}"):
        path = tmp_path / name
        path.write_bytes(compress(JSONL) + compress(b"") + compress(JSONL))
        assert [getattr(i, "text", i) for i in items(str(path))] == TEXTS * 2, name
        path.write_bytes(b"")
        assert [i.reason for i in items(str(path))] in (["empty file"], ["empty document"]), name
        path.write_bytes(compress(JSONL) + compress(JSONL)[:-6])
        assert items(str(path))[-1] == BadRecord("unreadable: truncated", str(path)), name
        path.write_bytes(compress(JSONL) + b"garbage after the first stream")
        assert items(str(path))[-1].reason.startswith("unreadable: damaged"), name
    (tmp_path / f"e.txt{suffix}").write_bytes(compress(b"first\n") + compress(b"second\n"))
    assert [i.text for i in items(str(tmp_path / f"e.txt{suffix}"))] == ["first\nsecond\n"]


def test_zstandard_with_a_long_window_is_read(tmp_path: Path):
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 28})
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(JSONL) + compressor.flush())
    assert [i.text for i in items(str(tmp_path / "a.jsonl.zst"))] == TEXTS


@pytest.mark.parametrize("suffix", [".tar", ".TAR", ".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2", ".zst"])
def test_everything_in_a_tar_is_read_or_counted(tmp_path: Path, suffix: str):
    table = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), table)
    first, second = tmp_path / "first", tmp_path / "second"
    long_name = "folder/" + "x" * 200 + ".jsonl"  # needs a PAX header
    write_tar(first, {"a.jsonl": JSONL, "._a.jsonl": b"\0\5\x16\7", "README.md": b"read me", "b.parquet": table.getvalue()})
    write_tar(second, {long_name: JSONL, "picture.jpg": b"\xff\xd8", "c.jsonl.gz": gzip.compress(JSONL)[:-9]})
    with tarfile.open(second, "a") as tar:
        for name, kind in zip("dshp", (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE), strict=True):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jsonl" if name in "sh" else ""
            tar.addfile(info)
    path = tmp_path / f"a{suffix}"
    both = first.read_bytes() + second.read_bytes()  # two archives, one after the other
    path.write_bytes(COMPRESS.get("." + suffix.rpartition(".")[2].replace("tgz", "gz"), bytes)(both))
    found = items(str(path))
    assert [i.text for i in found if isinstance(i, Document)] == TEXTS * 4  # all lines of the truncated member, too
    assert sorted((i.reason.partition(" (")[0], i.location.partition("!")[2]) for i in found if isinstance(i, BadRecord)) == [
        ("left out: AppleDouble", "._a.jsonl"),
        ("left out: a device or pipe", "p"),
        ("left out: a link", "s"),
        ("left out: documentation", "README.md"),
        ("left out: the same file as a.jsonl", "h"),
        ("unknown kind of file", "picture.jpg"),
        ("unreadable: truncated", "c.jsonl.gz"),
    ]
    path.write_bytes(COMPRESS.get("." + suffix.rpartition(".")[2].replace("tgz", "gz"), bytes)(both[:1536]))
    assert items(str(path))[-1].reason.startswith("unreadable"), "truncated"


def test_tar_without_readable_members_is_refused_before_it_is_read(tmp_path: Path):
    write_tar(tmp_path / "a.tar", {f"{i}.html": b"<p>" for i in range(30)})
    with pytest.raises(ConfigError, match=r"none of the 30 files in .*a\.tar has a known type, the first is 0\.html"):
        list_shards(DataConfig(source="files", files=(str(tmp_path / "a.tar"),)))


def test_headers_of_a_tar_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_tar(tmp_path / "a.tar", {f"{i}.txt": f"text {i}".encode() for i in range(500)})
    calls = []
    open_tar = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *args, **settings: calls.append(1) or open_tar(*args, **settings))
    data = DataConfig(source="files", files=(str(tmp_path / "a.tar"),))
    shards = list_shards(data)
    [part] = split_shards(shards, data)
    expected = [f"text {i}" for i in range(500)]
    assert [i.text for i in read(part, data)] == expected
    assert [i.text for shard in shards for i in read(shard, data)] == expected
    assert len(calls) == 1
    assert [(s.member, s.member_index) for s in shards[:2]] == [("0.txt", 0), ("1.txt", 1)]  # names of format 1's folders


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "a.tar"])
@pytest.mark.parametrize("separator", [None, "-"])
def test_parts_of_a_large_file_hold_its_documents_in_order(tmp_path: Path, name: str, separator: str | None, monkeypatch):
    monkeypatch.setattr("lmu_dist.data.divide.BLOCK_BYTES", 100_000)
    path = tmp_path / name
    texts = [f"document {i} äöü€𝄞 " * (i % 40) + ("\n" if i % 7 or 2000 < i < 2900 else "") for i in range(4000)]
    if name == "a.parquet":
        table = pyarrow.table({"text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=100, compression="none", use_dictionary=False)
    elif name == "a.jsonl":
        path.write_text("".join(json.dumps({"text": t}) + "\n" if i % 50 else "broken\n" for i, t in enumerate(texts)))
    else:
        path.write_text("".join(t + ("-\n" if i % 5 == 0 else "") for i, t in enumerate(texts)))
    if name == "a.tar":
        text = path.read_bytes()
        write_tar(
            path, {"0.jsonl": JSONL, "1.txt": text, "2.jsonl": JSONL, "3.txt.gz": gzip.compress(text), "4.jsonl": b"broken"}
        )
    data = DataConfig(source="files", files=(str(path),), document_separator=separator)
    shards = list_shards(data)
    parts = split_shards(shards, data)
    assert len(parts) > 5
    assert sum(part.size_bytes for part in parts) == sum(shard.size_bytes for shard in shards)
    assert [i for part in parts for i in read(part, data)] == [i for shard in shards for i in read(shard, data)]


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([*TEXTS, None]).dictionary_encode(),
        pyarrow.array([*TEXTS, None]).cast(pyarrow.string_view()),
        pyarrow.array([*TEXTS, None]).cast(pyarrow.large_string()),
        pyarrow.array([t.encode() for t in TEXTS] + [None]),
        pyarrow.array([t.split("\n") for t in TEXTS] + [None]),
        pyarrow.array([t.split("\n") for t in TEXTS] + [None], pyarrow.large_list(pyarrow.large_string())),
        pyarrow.array([t.split("\n") for t in TEXTS] + [None], pyarrow.list_view(pyarrow.string())),
        pyarrow.array([[*t.split("\n"), None] for t in TEXTS] + [None]),
        pyarrow.array([[[line] for line in t.split("\n")] for t in TEXTS] + [None]),
    ],
    ids=lambda column: str(column.type),
)
def test_parquet_text_of_every_type(tmp_path: Path, column: pyarrow.Array):
    pyarrow.parquet.write_table(pyarrow.table({"id": range(4), "text": column}), tmp_path / "a.parquet")
    nested = pyarrow.StructArray.from_arrays([column, pyarrow.array(range(4))], ["text", "n"])
    pyarrow.parquet.write_table(pyarrow.table({"meta": nested}), tmp_path / "b.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"meta": nested, "meta.text": ["x"] * 4}), tmp_path / "c.parquet")
    expected = [*TEXTS, "no text field"]
    assert [getattr(i, "text", "") or i.reason for i in items(str(tmp_path / "a.parquet"))] == expected
    assert [getattr(i, "text", "") or i.reason for i in items(str(tmp_path / "b.parquet"), text_field="meta.text")] == expected
    assert [i.reason for i in items(str(tmp_path / "b.parquet"), text_field="meta.n")] == ["no text field"] * 4


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "one"}, {"text": ["t", "wo"]},{"meta": 1}]',
        '[\n  {"text": "one"},\n  {\n    "text": ["t", "wo"]\n  },\n  {"meta": 1}\n]\n',
        '[{"text": "one"}][{"text": ["t", "wo"]}, {"meta": 1}]',
        '{"text": "one"}\n{"text": ["t", "wo"]}\n{"meta": 1}\n',
        '{\n"text": "one"\n}\n{"text": ["t", "wo"]}{"meta": 1}',
    ],
)
def test_json_files_hold_an_array_or_a_record_per_line(tmp_path: Path, content: str):
    (tmp_path / "a.JSON").write_text(content)
    found = items(str(tmp_path / "a.JSON"))
    assert [getattr(i, "text", "") or i.reason for i in found] == ["one", "t\nwo", "no text field"]
    if content.startswith("["):
        (tmp_path / "a.JSON").write_text(content.rstrip()[:-1])
        assert items(str(tmp_path / "a.JSON"))[-1].reason.startswith("unreadable: truncated")


def test_json_texts_may_be_bare_or_in_nested_lists(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps(["one", {"text": ["t", None, ["wo"]]}]))
    (tmp_path / "b.jsonl").write_text('"three"\n')
    assert [i.text for i in items(str(tmp_path / "*"))] == ["one", "t\nwo", "three"]


def test_separators_inside_lines_are_noted(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two\n")
    [note] = [i.reason for i in items(str(tmp_path / "a.txt")) if isinstance(i, BadRecord)]
    assert note.startswith("kept as text: <|endoftext|> inside lines; put it on lines of its own")


def test_long_json_array_is_read_in_pieces(tmp_path: Path):
    texts = [f"{i} " * (1 + i % 3000) for i in range(400)]
    (tmp_path / "a.json").write_text(json.dumps([{"meta": {"text": t}} for t in texts], indent=1))
    assert [i.text for i in items(str(tmp_path / "a.json"), text_field="meta.text")] == texts


def test_paths_are_folders_existing_names_or_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "x[1]" / "deeper"
    folder.mkdir(parents=True)
    for name in ("a.jsonl", "README.md", "LICENSE", "metadata.json", "a.jsonl.sha256", "notes.docx", ".hidden.jsonl"):
        (folder / name).write_bytes(JSONL)
    (folder / "up").symlink_to(tmp_path)  # a loop
    for path in (folder / "a.jsonl", folder, tmp_path, "~/x[1]/deeper/a.jsonl"):
        found = items(str(path))
        assert [i.text for i in found if isinstance(i, Document)] == TEXTS, path
    names = {Path(i.location).name for i in items(str(folder)) if isinstance(i, BadRecord)}
    assert names == {"README.md", "LICENSE", "metadata.json", "a.jsonl.sha256", "notes.docx"}
    with pytest.raises(ConfigError, match=r"notes\.docx has an unknown file type"):
        items(str(tmp_path / "x?1?" / "deeper" / "*"))
    with pytest.raises(ConfigError, match=r"README\.md has an unknown file type"):
        items(str(folder / "README.md"))
    assert [i.text for i in items(str(folder / "metadata.json"))] == TEXTS  # named exactly
    (folder / "notes.docx").unlink()
    assert [i.text for i in items(str(tmp_path / "x?1?" / "deeper" / "*")) if isinstance(i, Document)] == TEXTS
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="broken link"):
        items(str(tmp_path / "gone.txt"))


@pytest.mark.parametrize(
    ("names", "is_left_out"),
    [
        ("README README.md readme.txt README_de.txt LICENSE LICENSE-MIT CITATION.cff notes.rst COPYING", True),
        ("metadata.json dataset_infos.json a.metadata.json SHA256SUMS a.jsonl.md5 checksums.txt _SUCCESS ._a.txt", True),
        ("a.txt license.jsonl notice_2019.txt lorem_ipsum.txt united_state_law.json readme.jsonl.zst changes.txt", False),
    ],
)
def test_files_among_the_data_are_left_out_by_their_whole_name(names: str, is_left_out: bool):
    assert {name: bool(reason_to_leave_out(name)) for name in names.split()} == dict.fromkeys(names.split(), is_left_out)


def test_files_at_a_url(tmp_path: Path):
    for name in ("a.jsonl", "b.txt", "README.md"):
        (tmp_path / name).write_bytes(JSONL if name == "a.jsonl" else b"a text")
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "c.parquet")
    write_tar(tmp_path / "d.tar", {"1.jsonl": JSONL})
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/bucket", recursive=True)
    found = items("memory://bucket/**")
    assert [i.text for i in found if isinstance(i, Document)] == [*TEXTS, "a text", *TEXTS, *TEXTS]
    assert [i.location for i in found if isinstance(i, BadRecord)] == ["memory:///bucket/README.md"]
    data = DataConfig(source="files", files=("memory://bucket/a.jsonl",))
    [shard] = list_shards(data)
    memory.pipe("/bucket/a.jsonl", JSONL * 2)
    with pytest.raises(FailedError, match="differs from the file that was listed"):
        list(read(shard, data))
    memory.pipe("/bucket/a.jsonl.gz", gzip.compress(JSONL)[:-9])
    assert items("memory://bucket/a.jsonl.gz")[-1] == BadRecord("unreadable: truncated", "memory:///bucket/a.jsonl.gz")
    with pytest.raises(ConfigError, match="no file matches"):
        items("memory://bucket/none.jsonl")


def test_files_of_a_web_server(tmp_path: Path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(JSONL))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        try:
            for path in ("a.jsonl.gz", "a.jsonl.gz?download=true", "*.gz", ""):
                assert [i.text for i in items(f"{url}/{path}")] == TEXTS, path
            with pytest.raises(ConfigError, match=r"cannot list .*b\.jsonl: 404"):
                items(f"{url}/b.jsonl")
        finally:
            server.shutdown()
    with pytest.raises(FailedError, match=r"cannot list .*a\.jsonl\.gz: "):  # the server is down: no fault of the input
        items(f"{url}/a.jsonl.gz")


def test_separator_lines_of_text_files(tmp_path: Path):
    stories = [f"Story {i}.\n\n" + "A line of it.\n" * 2000 + "The end." for i in range(3)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(stories) + "\n<|endoftext|>\n")
    assert [i.text for i in items(str(tmp_path / "a.txt"), document_separator="<|endoftext|>")] == stories
    unseparated = items(str(tmp_path / "a.txt"))
    assert "".join(i.text for i in unseparated if isinstance(i, Document)) == (tmp_path / "a.txt").read_text()
    [note] = [i.reason for i in unseparated if isinstance(i, BadRecord)]
    assert note.startswith("kept as text: lines <|endoftext|>; set data.document_separator")
    assert not counts_as_bad(note, DataConfig())
    (tmp_path / "b.txt").write_text("one\ntwo\n\n\n \nthree\r\n\r\nfour")
    found = items(str(tmp_path / "b.txt"), document_separator="")
    assert [(i.text, i.location.rpartition(":")[2]) for i in found] == [("one\ntwo", "1"), ("three", "6"), ("four", "8")]


def test_empty_rows_are_bad_only_if_the_configuration_says_so(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n{"text": "  "}\n{"text": []}\n{"text": null}\n')
    found = items(str(tmp_path / "a.jsonl"))
    assert [counts_as_bad(i.reason, DataConfig(empty="drop")) for i in found] == [False] * 4 + [True]
    assert all(counts_as_bad(i.reason, DataConfig(empty="error")) for i in found)


@pytest.mark.parametrize("n_files", [1, 4])
def test_text_of_any_size_gives_documents_for_every_split(tmp_path: Path, n_files: int):
    text = "".join(f"line {i} of a text\n" for i in range(20_000))
    for i in range(n_files):
        (tmp_path / f"{i}.txt").write_text(text)
    found = items(str(tmp_path / "*.txt"))
    assert "".join(i.text for i in found) == text * n_files
    assert 300 < len(found) <= 450
    assert all(i.text.endswith("\n") for i in found)
    many = tmp_path / "many"
    many.mkdir()
    for i in range(300):  # files enough: each is a document
        (many / f"{i}.txt").write_text("some words\n" * 40)
    assert len(items(str(many))) == 300
    (tmp_path / "large.txt").write_text("x\n" * 3_500_000)
    assert list_shards(DataConfig(source="files", files=(str(tmp_path / "*.txt"),)))[0].document_bytes == 0


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("second", [{"text": "x", "url": "u"}, {"text": "x", "id": "a"}, None])
def test_damaged_hugging_face_json_is_one_line(tmp_path: Path, second: dict | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_jsonl(tmp_path / "d" / "a.jsonl", [{"text": t, "id": 1} for t in TEXTS])
    write_jsonl(tmp_path / "d" / "b.jsonl", [{"text": "y", "id": 2} if second is None else second] * 3)
    with (tmp_path / "d" / "b.jsonl").open("a") as file:
        file.write("" if second else '{"text": "z\n')
    data = DataConfig(source="huggingface", dataset=str(tmp_path / "d"))
    with pytest.raises(ConfigError, match=r"data\.dataset: cannot (read|load) .*") as error:
        _ = [item for shard in list_shards(data) for item in read(shard, data)]
    assert "\n" not in str(error.value)


def test_damaged_hugging_face_parquet_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "train.parquet").write_bytes(damaged_parquet())
    data = DataConfig(source="huggingface", dataset=str(tmp_path))
    with pytest.raises(ConfigError, match="repair its files"):
        _ = [item for shard in list_shards(data) for item in read(shard, data)]


def test_revision_of_a_hugging_face_data_set(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def load_dataset(name: str, *_, revision: str | None, streaming: bool, **__) -> datasets.IterableDataset:
        calls.append((name, revision, streaming))
        return datasets.Dataset.from_list([{"text": t} for t in TEXTS]).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = DataConfig(source="huggingface", dataset="some/corpus", dataset_revision="v1.0")
    assert [i.text for shard in list_shards(data) for i in read(shard, data)] == TEXTS
    assert set(calls) == {("some/corpus", "v1.0", True)}


def test_local_hugging_face_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "d" / "train.jsonl", [{"meta": {"text": f"{i}"}} for i in range(40)])
    write_jsonl(tmp_path / "d" / "validation.jsonl", [{"meta": {"text": f"v{i}"}} for i in range(5)])
    datasets.DatasetDict(
        train=datasets.Dataset.from_list([{"meta": {"text": f"{i}"}} for i in range(40)]),
        validation=datasets.Dataset.from_list([{"meta": {"text": f"v{i}"}} for i in range(5)]),
    ).save_to_disk("saved")
    for folder in ("d", "saved"):
        whole = DataConfig(source="huggingface", dataset=folder, text_field="meta.text", dataset_validation_split="validation")
        shards = list_shards(whole)
        found = [item for shard in shards for item in read(shard, whole)]
        assert [i.text for i in found if i.split is None] == [f"{i}" for i in range(40)]
        assert [i.text for i in found if i.split == "validation"] == [f"v{i}" for i in range(5)]
        part = DataConfig(source="huggingface", dataset=folder, text_field="meta.text", dataset_split="train[:10%]")
        assert [i.text for shard in list_shards(part) for i in read(shard, part)] == ["0", "1", "2", "3"]
        with pytest.raises(ConfigError, match="cannot load"):
            list_shards(DataConfig(source="huggingface", dataset=folder, dataset_split="none"))
    write_jsonl(tmp_path / "d" / "train.jsonl", [{"meta": {"text": f"{i}"}} for i in range(80)])
    before = DataConfig(source="huggingface", dataset="d")
    assert list_shards(before) != shards[:1]
    stamp = list_shards(before)[0].stamp
    write_jsonl(tmp_path / "d" / "more-train.jsonl", [{"meta": {"text": "new"}}])
    assert list_shards(before)[0].stamp != stamp  # another corpus
