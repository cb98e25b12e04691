"""Folder and manifest of a prepared corpus: a DataConfig in, the folder's path and its Manifest out. Does not import torch.

Manifests are written by data/merge and read by data/corpus and by planning, which needs no tokens.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict  # pydantic reads that of typing only from Python 3.12 on

from lmu_dist import storage
from lmu_dist.config import ConfigError, DataConfig, FailedError, Folder, TokenizerConfig
from lmu_dist.data.documents import CorpusShard
from lmu_dist.data.hub import dataset_path
from lmu_dist.data.paths import is_url, list_files, local_path
from lmu_dist.data.sources import list_shards
from lmu_dist.data.tokenizer import END_OF_TEXT
from lmu_dist.records import known_fields

FORMAT = 2  # version of the files that prepare writes; part of the corpus folder's name
TOKENIZER, MANIFEST, PROBLEMS = "tokenizer.json", "manifest.json", "problems.jsonl"
CHECKSUM = "checksum"  # entry of manifest.json, absent in format 1: the digest of all others
FORMAT_1_KEYS = {  # a later key is part of a folder's name only if it is set, so that older folders keep their names
    DataConfig: "source files dataset dataset_config dataset_split text_field max_bad_share tokenizer",
    TokenizerConfig: "kind vocab_tokens path vocab_path merges_path",
}
_Count = Annotated[int, Field(ge=0)]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class SplitFacts(TypedDict):
    """Size and digest of the token stream of a split."""

    tokens: _Count
    bytes: _Count  # of text
    documents: _Count
    sha256: _Digest


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json. `splits` maps a split to its numbers of tokens, bytes of text and documents, and its sha256.

    `problems` counts the bad records of the corpus by reason. The file has one more entry, the digest of all others.
    """

    format: int
    source: str
    split_rule: str
    vocab_tokens: Annotated[int, Field(ge=1)]
    end_of_text_id: _Count
    dtype: Literal["<u2", "<u4"]
    tokenizer_digest: _Digest
    splits: dict[str, SplitFacts]
    problems: dict[str, int]
    data_digest: _Digest
    end_of_text: str = END_OF_TEXT
    notes: tuple[str, ...] = ()  # what preparing changed, in sentences for the user

    def n_rows(self, split: str, sequence_tokens: int) -> int:
        """Number of rows of a split."""
        return max(0, self.splits[split]["tokens"] - 1) // sequence_tokens

    def unique_tokens(self, split: str, sequence_tokens: int) -> int:
        """Number of tokens in the rows of a split: with more training tokens rows are repeated."""
        return self.n_rows(split, sequence_tokens) * sequence_tokens

    def bytes_per_token(self, split: str) -> float:
        """Mean bytes of text per token of a split."""
        return self.splits[split]["bytes"] / self.splits[split]["tokens"]

    def to_json(self) -> bytes:
        """The content of manifest.json."""
        content = asdict(self)
        return json.dumps(content | {CHECKSUM: _digest(content)}, indent=1).encode()


@dataclass(frozen=True)
class Location:
    """Where a corpus is or will be: its folder, whether it is prepared, and the shards to prepare it from.

    `shards` is None if the source was not listed. `note` says why, if the source is absent; else it is "". `local_files` is the
    digest of the local files in a list with URLs, see `_local_digest`.
    """

    folder: Folder
    prepared: bool
    shards: list[CorpusShard] | None
    note: str = ""
    local_files: str = ""


def locate(data: DataConfig, storage_folder: Folder) -> Location:
    """Finds the folder of a corpus. Lists local files: a changed file makes another corpus. Raises ConfigError if it cannot.

    A source on a network is listed only once; afterwards the prepared corpus is used as it is, unless local files in the same
    list have changed. If local files are gone, the corpus that was prepared from them is used.
    """
    local_files = ""
    try:
        if _is_on_network(data):
            local_files = _local_digest(data)
            if (known := _indexed_folder(data, storage_folder, is_local=False, local_files=local_files)) is not None:
                return Location(known, True, None)
        shards = list_shards(data)
    except (ConfigError, FailedError, OSError) as e:
        if (known := _indexed_folder(data, storage_folder, is_local=True)) is None:
            raise
        reason = " ".join(str(e).split())[:200]
        note = f"the source of the corpus cannot be read ({reason}); the tokens that were prepared from it are used: {known}"
        return Location(known, True, None, note)
    folder = corpus_folder(data, storage_folder, shards)
    return Location(folder, (folder / MANIFEST).exists(), shards, local_files=local_files)


def corpus_folder(data: DataConfig, storage_folder: Folder, shards: list[CorpusShard] | None = None) -> Folder:
    """Folder of a prepared corpus, whether it exists or not. Its name is a digest of the config and of the corpus files.

    A corpus that was prepared in format 1 from the same files is still used. Renaming a field of DataConfig or CorpusShard
    would make a new corpus.
    """
    shards = list_shards(data) if shards is None else shards
    content = [_settings(data), [d for d in _tokenizer_digests(data) if d], [shard.identity() for shard in shards]]
    of_format_1, folder = (storage_folder / "data" / _digest([number, *content])[:16] for number in (1, FORMAT))
    return of_format_1 if (of_format_1 / MANIFEST).exists() else folder


def remember_folder(data: DataConfig, storage_folder: Folder, location: Location) -> None:
    """Writes where the corpus of a configuration is, so that it is found without listing its source."""
    entry = {"folder": location.folder.name, "tokenizer_files": _tokenizer_digests(data)}
    entry |= {"local_files": location.local_files} if location.local_files else {}
    path = _index_path(data, storage_folder, is_local=not _is_on_network(data))
    if _read_index(path) != entry:
        storage.make_folder(path.parent)
        storage.write_atomic(path, json.dumps(entry).encode())


def is_prepared(data: DataConfig, storage_folder: Folder) -> bool:
    """Whether the corpus is already prepared."""
    return locate(data, storage_folder).prepared


def read_manifest(folder: Folder) -> Manifest:
    """Reads the manifest of a prepared corpus. Raises ConfigError if it is missing or damaged."""
    damaged = ConfigError(f"{folder / MANIFEST} is damaged; delete {folder} and prepare again")
    try:
        stored = json.loads((folder / MANIFEST).read_text())
        checksum = stored.pop(CHECKSUM, None)
        manifest = TypeAdapter(Manifest).validate_json(json.dumps(known_fields(Manifest, stored)), strict=True)
    except OSError as e:
        raise ConfigError(f"no prepared corpus in {folder}; run lmu-dist prepare first") from e
    except (ValueError, TypeError, AttributeError) as e:  # pydantic's errors are ValueErrors
        raise damaged from e
    complete = {"train", "validation", "test"} <= manifest.splits.keys() and manifest.end_of_text_id < manifest.vocab_tokens
    if not complete or checksum not in (None, _digest(stored)):
        raise damaged
    return manifest


def _indexed_folder(data: DataConfig, storage_folder: Folder, is_local: bool, local_files: str | None = None) -> Folder | None:
    """The prepared corpus of a configuration according to the index.

    None if there is none, or if a tokenizer file changed, or if `local_files` is given and is not the digest of then.
    """
    entry = _read_index(_index_path(data, storage_folder, is_local))
    if entry is None or local_files not in (None, entry.get("local_files", "")):
        return None
    digests = zip(_tokenizer_digests(data), entry["tokenizer_files"], strict=False)
    folder = storage_folder / "data" / entry["folder"]
    return folder if all(now in (None, then) for now, then in digests) and (folder / MANIFEST).exists() else None


def _index_path(data: DataConfig, storage_folder: Folder, is_local: bool) -> Folder:
    """Path of a configuration's entry in the index. `is_local`: data.dataset, if there is one, is a local path."""
    files, held_out = (
        tuple(f if is_url(f) else os.path.abspath(local_path(f)) for f in listed)
        for listed in (data.files, data.validation_files)
    )
    dataset = os.path.abspath(os.path.expanduser(data.dataset)) if data.dataset and is_local else data.dataset
    absolute = replace(data, files=files, validation_files=held_out, dataset=dataset)
    return storage_folder / "data" / "index" / f"{_digest(_settings(absolute))}.json"


def _read_index(path: Folder) -> dict[str, Any] | None:
    try:
        entry = json.loads(path.read_text())
        return entry if isinstance(entry["folder"], str) and isinstance(entry["tokenizer_files"], list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # an index that is absent or damaged is made again


def _is_on_network(data: DataConfig) -> bool:
    if data.source == "huggingface":  # a name on the hub is no path: a local folder that is gone was listed here
        return not os.path.exists(dataset_path(data)) and not str(data.dataset).startswith(("/", "~", "."))
    return data.source == "files" and any(map(is_url, (*data.files, *data.validation_files)))


def _local_digest(data: DataConfig) -> str:
    """A digest of the local files that are listed together with URLs, their sizes and times; "" if there are none."""
    if not (local := [entry for entry in (*data.files, *data.validation_files) if not is_url(entry)]):
        return ""
    files, _ = list_files(local)
    return _digest([[file.path, file.stamp] for file in files])


def _tokenizer_digests(data: DataConfig) -> list[str | None]:
    """The sha256 of each tokenizer file that the configuration names; None for a file that does not exist."""
    names = [data.tokenizer.path, data.tokenizer.vocab_path, data.tokenizer.merges_path]
    return [hashlib.sha256(Path(n).read_bytes()).hexdigest() if Path(n).is_file() else None for n in names if n]


def _settings(section: DataConfig | TokenizerConfig) -> dict[str, Any]:
    """The keys that are part of a folder's name: those of format 1, and later ones that differ from their default."""
    of_format_1, result = FORMAT_1_KEYS[type(section)].split(), dict[str, Any]()
    for field in fields(section):
        value = getattr(section, field.name)
        if field.name == "max_bad_share":
            value = 0.0  # it decides whether preparing fails, not what it writes
        if field.name in of_format_1 or value != field.default:
            result[field.name] = _settings(value) if isinstance(value, TokenizerConfig) else value
    return result


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
