"""Tests of corpus readers: all file types give the same documents, and everything unreadable becomes a bad record."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd

from lmu_dist.config import ConfigError, DataConfig
from lmu_dist.data.sources import TEXT_DOCUMENT_BYTES, BadRecord, Document, list_shards, read

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
        ("a.jsonl.gz", gzip.compress(JSONL * 100)[:-20]),
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
