"""Data sets of Hugging Face: a DataConfig in, shards of the data set and their documents out.

A data set is a name on the hub, a local folder of data files, or a folder that `save_to_disk` wrote. It is streamed. Only for
a slice of a split, such as train[:10%], the library downloads the whole split. Called by data/sources.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmu_dist.config import ConfigError, DataConfig, FailedError
from lmu_dist.data.documents import BadRecord, CorpusShard, Document, make_record
from lmu_dist.data.streams import is_full_disk

SHARD_ROWS = 20_000  # a data set that is not streamed is read in shards of about as many rows
SAVED = ("state.json", "dataset_dict.json")  # files of a folder that save_to_disk wrote


def list_dataset(data: DataConfig) -> list[CorpusShard]:
    """The shards of a data set, those of its validation split last. Raises ConfigError if it cannot be loaded."""
    _check_validation_split(data)
    path = dataset_path(data)
    stamp, n_bytes = dataset_stamp(path), sum(file.stat().st_size for file in _local_files(path))
    shards = []
    for split, belongs_to in ((data.dataset_split, None), (data.dataset_validation_split, "validation")):
        if split is not None:
            n_shards = _n_shards(_load(data, split))
            size = max(1, n_bytes // n_shards)  # 1 on the hub, where the sizes are not known
            shards += [CorpusShard((path,), size, stamp, shard=(i, n_shards), split=belongs_to) for i in range(n_shards)]
    return shards


def dataset_stamp(dataset: str) -> str:
    """A digest of the names, sizes and modification times of a local data set's files; "" for one on the hub."""
    states = [(str(path), (status := path.stat()).st_size, status.st_mtime_ns) for path in _local_files(dataset)]
    return hashlib.sha256(repr(states).encode()).hexdigest()[:16] if os.path.exists(dataset) else ""


def read_dataset(shard: CorpusShard, data: DataConfig) -> Iterator[Document | BadRecord]:
    """Yields the records of a shard. Raises FailedError if the hub cannot be reached, ConfigError if a file is damaged."""
    assert shard.shard is not None
    index, n_shards = shard.shard
    split = str(data.dataset_validation_split if shard.split else data.dataset_split)
    part = _load(data, split).shard(n_shards, index)
    number = 0
    rows = iter(part)
    while True:
        try:
            row = next(rows, None)
        except Exception as e:  # each reader of the library has its own exception types
            if isinstance(e, OSError) and is_full_disk(e):
                raise
            if isinstance(e, OSError) and not shard.stamp:  # the hub is unreachable: the command can be run again
                raise FailedError(f"reading shard {index} of {data.dataset} failed: {_one_line(e, 200)}") from e
            files = f"read them with data.source=files data.files=[{shard.paths[0]}]"
            raise ConfigError(
                f"data.dataset: cannot read {data.dataset!r} after row {number} of shard {index}, split {split!r}: "
                f"{_one_line(e, 200)}; repair its files, or {files if shard.stamp else 'take another revision'}"
            ) from e
        if row is None:
            return
        number += 1
        yield make_record(row, data.text_field, f"{data.dataset}/{index}:{number}", shard.split)


def _check_validation_split(data: DataConfig) -> None:
    """Raises ConfigError if a document could be in both `dataset_split` and `dataset_validation_split`."""
    if data.dataset_validation_split is None:
        return
    for one in map(_slice, data.dataset_split.split("+")):
        for other in map(_slice, data.dataset_validation_split.split("+")):
            if not one.is_disjoint(other):
                raise ConfigError(
                    f"data.dataset_validation_split: {data.dataset_validation_split} may have documents of data.dataset_split, "
                    f"{data.dataset_split}; give another split, or slices that do not overlap, such as {one.name}[5%:] and "
                    f"{one.name}[:5%]"
                )


@dataclass(frozen=True)
class _Slice:
    """A part of a split: from row `begin` to row `end`, in percent or in rows; a negative number counts from the end."""

    name: str
    begin: int
    end: int | None
    unit: str

    def is_disjoint(self, other: "_Slice") -> bool:
        """Whether the slices have no row in common, however many rows the split has."""
        if "all" not in (self.name, other.name) and self.name != other.name:
            return True

        def is_before(a: _Slice, b: _Slice) -> bool:
            return a.end is not None and (a.end < 0) == (b.begin < 0) and a.end <= b.begin

        return self.unit == other.unit and (is_before(self, other) or is_before(other, self))


def _slice(text: str) -> _Slice:
    """The slice that a part of a split's name says, such as train[:5%]; the whole split if it cannot be read."""
    match = re.fullmatch(r"([^\[]+)\[(-?[\d_]+)?(%?):(-?[\d_]+)?(%?)\].*", text.strip())
    if match is None:
        return _Slice(text.strip().partition("[")[0], 0, None, "")
    begin, end = int(match[2] or 0), int(match[4]) if match[4] else None
    unit = match[3] or match[5]
    if unit:  # the end of a split is at 100 %
        begin, end = (n + 100 if n is not None and n < 0 else n for n in (begin, end))
    return _Slice(match[1], begin or 0, end, unit)


def _load(data: DataConfig, split: str) -> Any:
    """Opens a split of the data set, streaming if that is possible. Raises ConfigError with the library's reason."""
    # The library takes seconds to import.
    from datasets import disable_progress_bars, load_dataset, load_from_disk, logging

    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)  # it logs what it raises, too
    path = dataset_path(data)
    try:
        if any(os.path.isfile(os.path.join(path, name)) for name in SAVED):
            return _saved_split(load_from_disk(path), split)
        return load_dataset(path, data.dataset_config, split=split, revision=data.dataset_revision, streaming="[" not in split)
    except Exception as e:  # the readers of the library have many exception types
        raise ConfigError(f"data.dataset: cannot load {data.dataset!r} split {split!r}: {_one_line(e, 300)}") from e


def _saved_split(saved: Any, split: str) -> Any:
    """A split, or a slice of it, of a data set that save_to_disk wrote."""
    from datasets import Dataset, ReadInstruction, concatenate_datasets

    splits = {str(saved.split or "train"): saved} if isinstance(saved, Dataset) else dict(saved)
    if split in splits:
        return splits[split]
    parts = ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    return concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _n_shards(dataset: Any) -> int:
    """Into how many shards a data set is divided: as it is stored if it is streamed, else by rows."""
    from datasets import Dataset

    return max(1, len(dataset) // SHARD_ROWS) if isinstance(dataset, Dataset) else dataset.num_shards


def dataset_path(data: DataConfig) -> str:
    """The name on the hub, or the absolute path of a local data set: the processes of a cluster have other working folders."""
    path = os.path.abspath(os.path.expanduser(str(data.dataset)))
    return path if os.path.exists(path) else str(data.dataset)


def _local_files(dataset: str) -> list[Path]:
    """The files of a local data set, without hidden ones and caches of the library; none for one on the hub."""
    root = Path(dataset)
    hidden = (".", "cache-")
    paths = [root] if root.is_file() else sorted(root.rglob("*"))
    return [p for p in paths if p.is_file() and not any(part.startswith(hidden) for part in p.relative_to(root).parts)]


def _one_line(error: Exception, length: int) -> str:
    """The message of an error and of the error that caused it, in one line."""
    cause = error.__cause__
    text = str(error) if cause is None else f"{error}: {cause}"
    return " ".join(text.split())[:length] or type(error).__name__
