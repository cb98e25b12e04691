"""Tables in JSON: a text in, named columns out. Called by scaling/table_file.

Understood are a list of objects, an object of columns (as pandas writes it in its orients columns, index, split, records and
table), an object with one list of objects, a list of rows below a header, JSON lines, and MLflow's answer to a search of runs.
Nested objects become columns such as metrics.val/loss.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmu_dist.config import ConfigError
from lmu_dist.scaling.table_text import RawTable


def columns_from_json(text: str, name: str, wanted: Sequence[str]) -> RawTable:
    """Returns the columns of a JSON text. Raises ConfigError if it is damaged or holds no table."""
    records = list(_records(_parsed(text, name), name, wanted))
    if not records:
        raise ConfigError(f"{name} has no rows")
    for number, record in enumerate(records, 1):
        if not isinstance(record, Mapping):
            raise ConfigError(f'{name}: row {number} is {json.dumps(record)[:40]}, not an object such as {{"N": 1e8, ...}}')
    flat = [dict(_flattened(record)) for record in records]
    names = tuple(dict.fromkeys(key for record in flat for key in record))
    return RawTable(names, tuple([record.get(key) for record in flat] for key in names))


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        whole = e
    except RecursionError as e:
        raise ConfigError(f"{name} is nested too deeply for a table") from e
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    try:
        json.loads(lines[0][1])
    except json.JSONDecodeError:  # not JSON lines
        raise ConfigError(f"{name}: invalid JSON in line {whole.lineno}: {whole.msg}") from whole
    records = list[Any]()
    for number, line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as e:
            raise ConfigError(f"{name}: invalid JSON in line {number}: {e.msg}; correct or delete the line") from e
    return records


def _records(data: Any, name: str, wanted: Sequence[str]) -> Iterator[Any]:
    """The rows of a table, whichever way it is written."""
    if isinstance(data, list):
        if len(data) > 1 and all(isinstance(row, list) for row in data):
            yield from (dict(zip(map(str, data[0]), row, strict=False)) for row in data[1:])
        else:
            yield from data
    elif isinstance(runs := data.get("runs"), list) and all("info" in run for run in runs if isinstance(run, Mapping)):
        yield from map(_mlflow_run, runs)
    elif isinstance(data.get("columns"), list) and isinstance(data.get("data"), list):
        yield from (dict(zip(map(str, data["columns"]), row, strict=False)) for row in data["data"])
    elif len(tables := [v for v in data.values() if isinstance(v, list) and v and all(isinstance(r, Mapping) for r in v)]) == 1:
        yield from tables[0]
    elif lists := {key: v for key, v in data.items() if isinstance(v, list)}:
        if len(lengths := {len(v) for v in lists.values()}) > 1:
            raise ConfigError(f"{name}: its columns have different numbers of rows ({', '.join(map(str, sorted(lengths)))})")
        yield from (dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True))
    elif data and all(isinstance(v, Mapping) for v in data.values()):
        yield from _from_object_of_objects(data, wanted)
    else:
        yield data  # one row


def _from_object_of_objects(data: Mapping[str, Mapping[str, Any]], wanted: Sequence[str]) -> Iterator[Any]:
    """Rows by name, or columns whose cells have the names of rows: columns if the wanted names are outside."""
    if any(name in data for name in wanted):
        rows = dict.fromkeys(key for column in data.values() for key in column)
        yield from ({name: column.get(row) for name, column in data.items()} for row in rows)
    else:
        yield from ({"name": name, **row} for name, row in data.items())


def _mlflow_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run of MLflow's REST interface, with the columns that MLflow's own tables have."""
    row, data = dict(run.get("info", {})), run.get("data", {})
    for kind in ("metrics", "params", "tags"):
        values = data.get(kind, {})
        pairs = values.items() if isinstance(values, Mapping) else ((v.get("key"), v.get("value")) for v in values)
        row.update({f"{kind}.{key}": value for key, value in pairs})
    return row


def _flattened(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
