"""Tables as people have them: one small table, written in every way, is read as the same rows; what cannot be read is said."""

import bz2
import gzip
import io
import json
import lzma
import sys
import zipfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as parquet
import pytest
from backports import zstd

from lmu_dist.config import ConfigError
from lmu_dist.scaling.read_table import RunTable, read_points, read_table

RUNS = [(20_000_000, 400_000_000, 4.61436), (150_000_000, 1_500_000_000, 3.125), (1_250_000_000, 160_000_000_000, 2.31211)]
CSV = "N,D,loss\n" + "".join(f"{n},{d},{loss}\n" for n, d, loss in RUNS)
OBJECTS = [{"N": n, "D": d, "loss": loss} for n, d, loss in RUNS]


def read(
    tmp_path: Path, content: str | bytes, name: str = "table.csv", columns: tuple = ("N", "D", "loss"), **options: Any
) -> RunTable:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_table(path, *columns, **options)


def triples(table: RunTable) -> list[tuple[float, float, float]]:
    rows = table.rows
    return list(zip(rows.n_params.tolist(), rows.tokens.tolist(), rows.loss.tolist(), strict=True))


def left_out(table: RunTable) -> dict[str, tuple[int, ...]]:
    return {out.reason: out.rows for out in table.left_out}


def spelt(separator: str, number: Any, header: str = "N,D,loss", loss: Any = str, end: str = "\n") -> str:
    """The table with sizes and losses spelt by functions."""
    lines = [header.replace(",", separator)]
    lines += [separator.join((number(n), number(d), loss(y))) for n, d, y in RUNS]
    return end.join(lines) + end


def comma(value: Any) -> str:
    return str(value).replace(".", ",")


def grouped(separator: str) -> Any:
    return lambda value: f"{value:,}".replace(",", separator)


def quoted(spell: Any) -> Any:
    return lambda value: f'"{spell(value)}"'


def suffixed(value: float) -> str:
    return f"{value / 1e9:g}B" if value >= 1e9 else f"{value / 1e6:g}M"


TEXTS = {
    "plain": CSV,
    "Windows line ends": CSV.replace("\n", "\r\n"),
    "old Mac line ends": CSV.replace("\n", "\r"),
    "no line end at the end": CSV.rstrip("\n"),
    "semicolons": spelt(";", str),
    "tabs": spelt("\t", str),
    "bars": spelt("|", str),
    "spaces": spelt("   ", str),
    "decimal commas, semicolons": spelt(";", str, loss=comma),
    "decimal commas, tabs": spelt("\t", str, loss=comma),
    "decimal commas, quoted": spelt(",", str, loss=quoted(comma)),
    "thousands with commas": spelt(",", quoted(grouped(","))),
    "thousands with commas, tabs": spelt("\t", grouped(",")),
    "thousands with points, decimal commas": spelt(";", grouped("."), loss=comma),
    "thousands with points and decimals": spelt(";", lambda v: grouped(".")(v) + ",0", loss=comma),
    "thousands with points, decimal points": spelt(";", grouped(".")),
    "thousands with spaces": spelt(",", grouped(" ")),
    "thousands with narrow spaces": spelt(";", grouped("\u202f"), loss=comma),
    "thousands with hard spaces": spelt(";", grouped("\u00a0"), loss=comma),
    "thousands with apostrophes": spelt(",", grouped("'")),
    "thousands with typographic apostrophes": spelt(",", grouped("\u2019")),
    "thousands with underscores": spelt(",", grouped("_")),
    "suffixes": spelt(",", suffixed),
    "suffixes in lower case": spelt(",", lambda v: suffixed(v).lower()),
    "suffixes after a space": spelt(",", lambda v: f"{v / 1e6:g} M"),
    "suffixes with decimal commas": spelt(";", lambda v: comma(f"{v / 1e9}B"), loss=comma),
    "suffixes in words": spelt(",", lambda v: f"{v / 1e6:g} million"),
    "suffixes and units": spelt(",", lambda v: f"{v / 1e9:g}B tokens", loss=lambda v: f"{v} nats"),
    "exponents": spelt(",", lambda v: f"{v:.6e}"),
    "exponents in capitals": spelt(",", lambda v: f"{v:.6E}"),
    "exponents as powers": spelt(",", lambda v: f"{v / 1e6:g}x10^6"),
    "exponents in superscript": spelt(",", lambda v: f"{v / 1e6:g} \u00d7 10\u2076"),
    "all quoted": spelt(",", quoted(str), header='"N","D","loss"', loss=quoted(str)),
    "Excel's separator line": "sep=;\n" + spelt(";", str, loss=comma),
    "a comment": "# exported 2026-01-01\n" + CSV,
    "comments with commas, and one between rows": "# a, b, c\n#\n"
    + CSV.replace("150000000,", "# again, with, care\n150000000,"),
    "a header in a comment": "# " + CSV,
    "a comment that repeats the header": "# N,D,loss\n" + CSV,
    "a header without bars at the ends": "N | D | loss\n---|---|---\n" + "".join(f"{n} | {d} | {y}\n" for n, d, y in RUNS),
    "a title": "Results of spring\n\n" + CSV,
    "a title with commas": "Results, of spring, by us,,\nthe lab\n" + CSV,
    "a title in a spreadsheet": "Results;;\n;;\n" + spelt(";", str, loss=comma),
    "blank lines and lines of separators": CSV.replace("150000000,", "\n,,\n   \n150000000,"),
    "an empty last column": CSV.replace("\n", ",\n"),
    "an index without a name": "".join(f"{'' if i < 0 else i},{line}\n" for i, line in enumerate(CSV.split(), -1)),
    "an index that the header leaves out": "N,D,loss\n" + "".join(f"run{i},{n},{d},{y}\n" for i, (n, d, y) in enumerate(RUNS)),
    "a printed data frame": "   N   D   loss\n" + "".join(f"{i}  {n}  {d}  {y}\n" for i, (n, d, y) in enumerate(RUNS)),
    "Markdown": "| N | D | loss |\n|---|---:|:---:|\n" + "".join(f"| {n} | {d} | {y} |\n" for n, d, y in RUNS),
    "two other columns of one name": spelt(",", str, header="N,D,loss,note,note", loss=lambda y: f"{y},x,y"),
    "an unused column of words": spelt(",", str, header="N,D,loss,note", loss=lambda y: f"{y},diverged"),
    "an unused last column with commas": spelt(",", str, header="N,D,loss,note", loss=lambda y: f"{y},a note, with commas"),
    "an unused column with a lone quotation mark": spelt(",", str, header="N,D,loss,note", loss=lambda y: f'{y},"5 inches'),
    "an unused column with lines": spelt(",", str, header="N,D,loss,note", loss=lambda y: f'{y},"two\nlines"'),
    "an unused column that is short": CSV.replace("loss\n", "loss,note\n"),
    "spaces around": spelt(" , ", str),
    "a header in quotation marks with spaces": CSV.replace("N,D,loss", '" N ", "D","loss "'),
    "units below the header": CSV.replace("loss\n", "loss\nparams,tokens,nats\n"),
    "scales below the header": spelt(",", lambda v: f"{v / 1e6:g}", header="N,D,loss\n(M),millions,nats"),
    "a byte order mark": "\ufeff" + CSV,
    "a total below": CSV + "Total,161900000000,\n",
    "a mean below": spelt(",", str, header="N,D,loss,run", loss=lambda y: f"{y},a") + "4e8,5e10,3.3,mean\n",
    "comments after numbers": spelt(",", str, loss=lambda y: f"{y} # a good one"),
    "texts as Excel keeps them": spelt(",", lambda v: f'="{v}"'),
    "names of runs that begin with #": "run,N,D,loss\n" + "".join(f"#{n},{n},{d},{y}\n" for n, d, y in RUNS),
    "a footnote with commas": CSV + "Source: the lab, 2026, in nats, as measured\n",
    "the header again": CSV + CSV.splitlines()[0] + "\n",
}


@pytest.mark.parametrize(
    "settings", [("max", "max", "max"), ("last", "max", "max"), ("last", "last", "max"), ("std", "last", "max")]
)
def test_a_setting_that_is_a_word_of_summaries_drops_no_run(tmp_path: Path, settings: tuple[str, ...]):
    lines = [f"{n},{d},{y},{word}\n" for (n, d, y), word in zip(RUNS, settings, strict=True)]
    assert len(read(tmp_path, "N,D,loss,pooling\n" + "".join(lines)).rows) == 3
    first = [f"{word},{n},{d},{y}\n" for (n, d, y), word in zip(RUNS, settings, strict=True)]
    lost = 1 if settings[0] != "max" and settings[1] == "last" else 0  # in the first column a single max may be a summary
    assert len(read(tmp_path, "pooling,N,D,loss\n" + "".join(first)).rows) == 3 - lost


def test_a_summary_has_a_row_for_each_word(tmp_path: Path):
    words = ("count", "mean", "std", "min", "25%", "50%", "75%", "max")
    table = read(
        tmp_path,
        "run,N,D,loss\n"
        + "".join(f"{i},{n},{d},{y}\n" for i, (n, d, y) in enumerate(RUNS))
        + "".join(f"{w},1e8,1e9,3\n" for w in words),
    )
    assert left_out(table) == {"a total or mean below the table": tuple(range(4, 12))}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_every_way_of_writing_a_table_gives_the_same_rows(tmp_path: Path, text: str):
    table = read(tmp_path, text)
    assert triples(table) == [tuple(map(float, run)) for run in RUNS]
    assert table.numbers == ((2, 3, 4) if "(M)" in text or "params,tokens" in text else (1, 2, 3))


def columns_of(objects: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in objects] for key in objects[0]}


JSONS = {
    "objects": OBJECTS,
    "columns": columns_of(OBJECTS),
    "pandas, orient columns": {k: {str(i): v for i, v in enumerate(col)} for k, col in columns_of(OBJECTS).items()},
    "pandas, orient index": {f"run{i}": row for i, row in enumerate(OBJECTS)},
    "pandas, orient split": {"columns": ["N", "D", "loss"], "index": [0, 1, 2], "data": [list(run) for run in RUNS]},
    "pandas, orient table": {"schema": {"fields": [{"name": "N"}], "pandas_version": "1.4.0"}, "data": OBJECTS},
    "rows below a header": [["N", "D", "loss"], *map(list, RUNS)],
    "objects below a key": {"created": "2026-01-01", "runs": OBJECTS},
    "texts": [{k: f"{v:,}" for k, v in row.items()} for row in OBJECTS],
}


@pytest.mark.parametrize("data", JSONS.values(), ids=JSONS.keys())
def test_json_tables(tmp_path: Path, data: Any):
    expected = [tuple(map(float, run)) for run in RUNS]
    assert triples(read(tmp_path, json.dumps(data), "table.json")) == expected
    assert triples(read(tmp_path, json.dumps(data, indent=2), "table.txt")) == expected


def test_json_lines_with_missing_and_nested_values(tmp_path: Path):
    lines = [{"params": {"N": n}, "metrics": {"D": d, "val/loss": loss}} for n, d, loss in RUNS]
    lines += [
        {"params": {"N": 1e8}, "metrics": {"D": 1e9}},
        {"params": {"N": 1e8}, "metrics": {"D": 1e9, "val/loss": float("nan")}},
    ]
    table = read(tmp_path, "\n".join(map(json.dumps, lines)), "runs.jsonl", ("params.N", "metrics.D", "metrics.val/loss"))
    assert triples(table) == [tuple(map(float, run)) for run in RUNS]
    assert left_out(table) == {"metrics.val/loss is missing or not finite": (4, 5)}


def test_runs_of_mlflows_rest_interface(tmp_path: Path):
    runs = [
        {
            "info": {"run_id": f"{i}", "status": "FINISHED"},
            "data": {
                "metrics": [{"key": "val/loss", "value": y, "step": 1}, {"key": "tokens", "value": d}],
                "params": [{"key": "N", "value": str(n)}],
            },
        }
        for i, (n, d, y) in enumerate(RUNS)
    ]
    runs.append({"info": {"run_id": "3", "status": "RUNNING"}, "data": {"params": [{"key": "N", "value": "5"}]}})
    columns = ("params.N", "metrics.tokens", "metrics.val/loss")
    table = read(tmp_path, json.dumps({"runs": runs}), "runs.json", columns)
    assert triples(table) == [tuple(map(float, run)) for run in RUNS]
    assert left_out(table) == {"metrics.val/loss is missing or not finite": (4,)}
    with pytest.raises(ConfigError, match=r"no column 'val/loss'; did you mean --loss metrics.val/loss\?"):
        read(tmp_path, json.dumps({"runs": runs}), "runs.json", ("params.N", "metrics.tokens", "val/loss"))


def as_bytes(write: Any, table: pa.Table) -> bytes:
    sink = io.BytesIO()
    write(table, sink)
    return sink.getvalue()


COLUMNS = {
    "numbers": columns_of(OBJECTS),
    "texts": {k: list(map(str, v)) for k, v in columns_of(OBJECTS).items()},
    "decimals": {k: [Decimal(str(v)) for v in column] for k, column in columns_of(OBJECTS).items()},
}


@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS.keys())
@pytest.mark.parametrize("write", [parquet.write_table, feather.write_feather], ids=["Parquet", "Feather"])
def test_parquet_and_feather(tmp_path: Path, columns: dict, write: Any):
    assert triples(read(tmp_path, as_bytes(write, pa.table(columns)))) == [tuple(map(float, run)) for run in RUNS]


def test_parquet_with_nested_and_missing_values(tmp_path: Path):
    table = pa.table(
        {"N": [n for n, _, _ in RUNS] + [None], "m": [{"D": d, "loss": y} for _, d, y in RUNS] + [{"D": 1, "loss": 1.0}]}
    )
    found = read(tmp_path, as_bytes(parquet.write_table, table), columns=("N", "m.D", "m.loss"))
    assert (triples(found), left_out(found)) == ([tuple(map(float, run)) for run in RUNS], {"N is missing": (4,)})


def zipped(content: bytes, names: tuple[str, ...] = ("table.csv",)) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for name in names:
            archive.writestr(name, content)
    return sink.getvalue()


ENCODINGS = {
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16 without a mark": lambda text: text.encode("utf-16-le"),
    "UTF-32": lambda text: text.encode("utf-32"),
    "UTF-8 with a mark": lambda text: text.encode("utf-8-sig"),
    "gzip": lambda text: gzip.compress(text.encode()),
    "bz2": lambda text: bz2.compress(text.encode()),
    "xz": lambda text: lzma.compress(text.encode()),
    "zstd": lambda text: zstd.compress(text.encode()),
    "zip": lambda text: zipped(text.encode()),
}


@pytest.mark.parametrize("encode", ENCODINGS.values(), ids=ENCODINGS.keys())
@pytest.mark.parametrize("text", [CSV, spelt("\t", str, loss=comma), json.dumps(OBJECTS)], ids=["csv", "tsv", "json"])
def test_encodings_and_compressions_are_recognised_by_content(tmp_path: Path, encode: Any, text: str):
    assert triples(read(tmp_path, encode(text), "table.any")) == [tuple(map(float, run)) for run in RUNS]


def test_a_line_break_in_the_name_of_a_column(tmp_path: Path):
    assert len(read(tmp_path, CSV.replace("loss", '"loss\n(nats)"'), columns=("N", "D", "loss (nats)")).rows) == 3


def test_names_in_windows_1252(tmp_path: Path):
    content = spelt(";", str, header="Größe;D;loss").encode("cp1252")
    assert len(read(tmp_path, content, columns=("Größe", "D", "loss")).rows) == 3


def test_standard_input(monkeypatch: pytest.MonkeyPatch):
    for content in (CSV.encode(), gzip.compress(CSV.encode()), json.dumps(OBJECTS).encode()):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert triples(read_table(Path("-"), "N", "D", "loss")) == [tuple(map(float, run)) for run in RUNS]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(ConfigError, match="the table on standard input is empty"):
        read_table(Path("-"), "N", "D", "loss")


def test_columns_by_number(tmp_path: Path):
    expected = [tuple(map(float, run)) for run in RUNS]
    assert triples(read(tmp_path, CSV, columns=("1", "2", "3"))) == expected
    assert triples(read(tmp_path, CSV.partition("\n")[2], columns=("1", "2", "3"))) == expected
    assert triples(read(tmp_path, CSV.replace("N,D,", "N,N,"), columns=("1", "2", "loss"))) == expected
    with pytest.raises(ConfigError, match=r"two columns have the same name 'N'; rename one, or give its number: --n 1 or 2"):
        read(tmp_path, CSV.replace("N,D,", "N,N,"), columns=("N", "2", "loss"))


def test_words_and_missing_cells_are_left_out_and_counted(tmp_path: Path):
    words = ["diverged", "OOM", "-", "", "NA", "n/a", "nan", "null", "?", "failed", "Inf", "running", "#N/A", "\u2014"]
    table = read(
        tmp_path, CSV + "".join(f"30000000,1e9,{word}\n" for word in words) + ",1e9,3\n1e8,-,3\n1e8,OOM,3\n4e7,5e8,4\n"
    )
    assert table.numbers == (1, 2, 3, 21)
    assert left_out(table) == {
        "loss is missing or not finite": (6, 7, 8, 9, 10, 11, 12, 14, 16, 17),
        "loss is not a number ('diverged', 'OOM', 'failed', ...)": (4, 5, 13, 15),
        "N is missing": (18,),
        "D is missing": (19,),
        "D is not a number ('OOM')": (20,),
    }


def test_short_rows_are_left_out(tmp_path: Path):
    assert left_out(read(tmp_path, CSV + "40000000,8000\n")) == {"loss is missing or not finite": (4,)}


def test_a_column_decides_its_decimal_mark_as_a_whole(tmp_path: Path):
    def sizes(*spelt_sizes: str, losses: tuple[str, ...] = ("3.5", "3.4"), **options: Any) -> list[float]:
        lines = "".join(f"{n};1e9;{loss}\n" for n, loss in zip(spelt_sizes, losses, strict=True))
        return read(tmp_path, "N;D;loss\n" + lines, **options).rows.n_params.tolist()

    assert sizes("1.234", "1.5") == [1.234, 1.5]
    assert sizes("1.234", "1.234.567") == [1234, 1234567]
    assert sizes("1,234", "1,234,567") == [1234, 1234567]
    assert sizes("1,234M", "1,5M") == [1_234_000, 1_500_000]
    assert sizes("1.234", "5.678", losses=("3,5", "3,4")) == [1234, 5678]  # the other column has decimal commas
    assert sizes("1,234", "5,678", losses=("3.512", "3.401")) == [1234, 5678]  # a loss is too small for thousands
    assert sizes("1,234", "5,678", losses=("3,512", "3,401")) == [1.234, 5.678]
    assert sizes("1.234", "5.678", losses=("3", "4"), decimal=".") == [1.234, 5.678]
    assert sizes("1.234", "5.678", losses=("3", "4"), decimal=",") == [1234, 5678]
    with pytest.raises(ConfigError, match=r"column 'N' \(--n\): '1.234' can be 1.234 or 1,234.*say it by --decimal"):
        sizes("1.234", "5.678", losses=("3", "4"))
    with pytest.raises(ConfigError, match=r"column 'N' \(--n\) has both '1.25' and '1,75'"):
        sizes("1.25", "1,75")


def test_scales_in_names_of_columns(tmp_path: Path):
    text = spelt(",", lambda v: f"{v / 1e9:.12g}", header="N (B),D [billions],loss (nats)")
    table = read(tmp_path, text, columns=("N (B)", "D [billions]", "loss (nats)"))
    assert triples(table) == [tuple(map(float, run)) for run in RUNS]
    assert table.notes[0].startswith("column 'N (B)': in units of 1,000,000,000, as its name says")
    full = read(tmp_path, CSV.replace("N,D", "N (M),D"), columns=("N (M)", "D", "loss"))  # written in full all the same
    assert triples(full) == [tuple(map(float, run)) for run in RUNS]
    assert full.notes[0].startswith("column 'N (M)': as written, not in units of 1,000,000 as its name says")
    assert full.notes[0].endswith("rename the column")


@pytest.mark.parametrize(
    ("names", "n", "d", "read_n", "read_d"),
    [
        (("N (M)", "tokens (K)"), "10", "20000000", 1e7, 2e10),  # D/N is 2,000, and 2 as written
        (("N", "tokens (K)"), "1000000", "20000000", 1e6, 2e7),  # written in full: D/N is 20, and 20,000 in thousands
        (("N", "tokens (M)"), "7e9", "15000000", 7e9, 1.5e13),
        (("N (M)", "tokens (M)"), "100000000", "2000000000", 1e8, 2e9),  # no model has 1e14 parameters
        (("N", "tokens (K)"), "1e9", "20000000K", 1e9, 2e10),  # a suffix counts, and the unit not once more
        (("N (B)", "tokens"), "1.5", "3e10", 1.5e9, 3e10),
    ],
)
def test_large_numbers_are_in_the_unit_of_their_column_if_that_is_plausible(
    tmp_path: Path, names: tuple[str, str], n: str, d: str, read_n: float, read_d: float
):
    table = read(tmp_path, f"{','.join(names)},loss\n{n},{d},3.5\n{n},{d},3.4\n", columns=(*names, "loss"))
    assert (table.rows.n_params[0], table.rows.tokens[0]) == (read_n, read_d)
    assert sum("units of" in note and "rename the column" in note for note in table.notes) == sum("(" in name for name in names)


def test_only_the_last_row_of_a_run_is_used(tmp_path: Path):
    lines = [
        "run,N,D,loss",
        *("a,1e6,1e8,4", "a,1e6,3e8,3", "a,1e6,2e8,3.5"),
        *("b,2e6,1e8,4", "b,2e6,2e8,"),  # the last step was not evaluated
        *("c,3e6,1e8,4", "c,3e6,2e8,nan"),  # diverged
        ",4e6,1e8,3",
    ]
    table = read(tmp_path, "\n".join(lines), run="run")
    assert table.numbers == (2, 4)
    assert table.rows.run == ("a", "b")
    assert left_out(table) == {
        "loss is missing or not finite": (5, 7),
        "the run (run) has no finite loss at its end": (6,),
        "run is missing": (8,),
        "not the last row of its run (run)": (1, 3),
    }
    with pytest.raises(ConfigError, match="run 'a' has two sizes: 1e6 in row 1 and 5e6 in row 9"):
        read(tmp_path, "\n".join([*lines, "a,5e6,1e8,3"]), run="run")


def test_unique_tokens_are_read_and_checked(tmp_path: Path):
    text = "N,D,U,loss\n1e6,4e8,100M,4\n2e6,4e8,0.2B,3\n3e6,4e8,,3\n"
    table = read(tmp_path, text, unique_tokens="U")
    assert table.rows.unique_tokens is not None
    assert table.rows.unique_tokens.tolist() == [1e8, 2e8]
    assert left_out(table) == {"U is missing": (3,)}
    with pytest.raises(ConfigError, match=r"row 2, column 'U': '0'; it must be positive .* --where 'U>0'"):
        read(tmp_path, text.replace("0.2B", "0"), unique_tokens="U")


def test_conditions_read_numbers_as_the_columns_do(tmp_path: Path):
    text = "N;D;loss;vocab;done\n20M;1e9;4,5;32k;yes\n0,15B;1e9;3,5;128k;no\n"
    assert read(tmp_path, text, where=("N>=100M",)).numbers == (2,)
    assert read(tmp_path, text, where=("loss>4",)).numbers == (1,)
    assert read(tmp_path, text, where=("vocab=32k",)).numbers == (1,)
    assert read(tmp_path, text, where=("done=no",)).numbers == (2,)
    objects = [row | {"done": row["N"] > 1e8} for row in OBJECTS]
    assert read(tmp_path, json.dumps(objects), where=("done=true",)).numbers == (2, 3)


def test_rows_whose_state_says_that_they_have_not_ended_are_named(tmp_path: Path):
    text = "status,N,D,loss\nFINISHED,1e6,1e8,4\nRUNNING,2e6,1e8,3.5\nRUNNING,3e6,,\n"
    note = "1 of the rows in use: status is 'RUNNING' (row 2); --where status=FINISHED excludes them"
    assert read(tmp_path, text).notes == (note,)
    assert read(tmp_path, text, where=("status=FINISHED",)).notes == ()


def test_points_need_no_loss(tmp_path: Path):
    (tmp_path / "points.csv").write_text("N;D;U\n1,5B;30B;1B\n7B;;1B\n")
    points = read_points(tmp_path / "points.csv", "N", "D", unique_tokens="U")
    assert (points.n_params.tolist(), points.tokens.tolist(), points.numbers) == ([1.5e9], [3e10], (1,))
    assert points.unique_tokens is not None
    assert points.unique_tokens.tolist() == [1e9]
    assert [(out.reason, out.rows) for out in points.left_out] == [("D is missing", (2,))]
    assert read_points(tmp_path / "points.csv", "N", "D").unique_tokens is None
    (tmp_path / "points.csv").write_text("N,D\n1,\n")
    with pytest.raises(ConfigError, match=r"no row of 1 can be used \(1: D is missing\); check the columns 'N', 'D'"):
        read_points(tmp_path / "points.csv", "N", "D")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CSV.replace("loss", "val_loss"), "no column 'loss'; did you mean --loss val_loss\\? Its columns are: N, D, val_loss"),
        (CSV.replace("N,", "n,"), "no column 'N'; did you mean --n n\\?"),
        (CSV.replace("4.61436", "-4.61436"), "row 1, column 'loss': '-4.61436'; it must be positive .* --where 'loss>0'"),
        (spelt(",", str, loss=comma), "row 1 has 4 cells, the header 3; correct the row. A number with commas needs quotation"),
        (spelt(",", grouped(",")), "row 1 has 7 cells, the header 3"),
        (CSV.partition("\n")[2], "no column 'N'; its columns are: 1, 2, 3. Name one of them by --n"),
        (spelt(",", str, loss=lambda y: "lmu"), "row 1, column 'loss': 'lmu' is not a number, as 3 of 3 cells .* N, D"),
        (spelt(",", str, loss=lambda y: "12%"), "'12%' is not a number"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0\0\0\0", "is not a CSV text file"),
        (zipped(b"", ("xl/workbook.xml", "a")), "is a spreadsheet; save it as CSV"),
        (zipped(b"", ("a", "b")), "is an archive of 2 files"),
        (gzip.compress(CSV.encode(), mtime=0)[:-20], "compressed with gzip, is unreadable: truncated"),
        (b"PAR1 and nothing of the kind", "is a Parquet or Feather file that cannot be read"),
        ('{"N": 1, "D": 2, "loss": 3}\n{"N": 1, "D"', "invalid JSON in line 2"),
        ("[1, 2", "invalid JSON in line 1"),
        ("[]", "has no rows"),
        ("[1, 2]", 'row 1 is 1, not an object such as {"N"'),
        ('{"N": [1, 2], "D": [1], "loss": [1, 2]}', "different numbers of rows"),
        (b" \n", "is empty"),
        (b"\x93NUMPY\x01\x00v\x00{'descr'", "is not a CSV text file"),
        ("<html><p>not found</p></html>", "no column 'N'"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path, content: str | bytes, message: str):
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path, content)
    assert "\n" not in str(error.value)


def test_a_missing_file_has_a_suggestion(tmp_path: Path):
    (tmp_path / "runs.csv").write_text(CSV)
    with pytest.raises(ConfigError, match=r"run\.csv does not exist; did you mean .*runs\.csv\?"):
        read_table(tmp_path / "run.csv", "N", "D", "loss")
