"""The targets of the check, judged on what was measured. Called by check.py at the end, and only for a GPU."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
MATMUL_SHARE, SPEED_SHARE, LONGEST, MEMORY_DEVIATION = 0.45, 0.5, 16384, 0.1


def judge(parts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows with target, measured value, and result: pass, miss, or not measured."""
    return [*_matmul_share(_rows(parts, "steps")), *_speed(_rows(parts, "steps")), *_overtaking(parts), *_memory(parts)]


def _rows(parts: Mapping[str, Any], part: str, table: str | None = None) -> Sequence[Row]:
    return parts.get(part, {"tables": {}})["tables"].get(table or part, [])


def _judged(target: str, measured: float | None, met: bool, shown: str) -> dict[str, Any]:
    if measured is None:
        return {"target": target, "measured": "-", "result": "not measured", "value": None}
    return {"target": target, "measured": shown, "result": "pass" if met else "miss", "value": measured}


def _find(rows: Sequence[Row], key: str, **conditions: Any) -> float | None:
    found = [row.get(key) for row in rows if all(row.get(name) == value for name, value in conditions.items())]
    return found[0] if found else None


def _matmul_share(steps: Sequence[Row]) -> Iterator[dict[str, Any]]:
    share = _find(steps, "counted_share_of_matmul_peak", family="transformer", n_params=100_000_000)
    target = f"transformer step at N = 1e8: at least {MATMUL_SHARE:.0%} of the measured bf16 matmul peak (counted FLOPs)"
    yield _judged(target, share, (share or 0) >= MATMUL_SHARE, f"{share or 0:.1%}")


def _speed(steps: Sequence[Row]) -> Iterator[dict[str, Any]]:
    for n_params in (1_000_000, 10_000_000):
        share = _find(steps, "speed_against_transformer", family="lmu", n_params=n_params)
        target = f"LMU step at N = {n_params:.0e}: at least {SPEED_SHARE} of the transformer's tokens/s"
        yield _judged(target, share, (share or 0) >= SPEED_SHARE, f"{share or 0:.2f}")


def _overtaking(parts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for row in _rows(parts, "mixers", "LMU against attention"):
        tokens, complete = row["overtakes_tokens"], row["to_n"] >= LONGEST
        target = f"fused LMU mixer faster than flash attention from some n <= {LONGEST:,} on, d = {row['d']:,}"
        shown = f"from n = {tokens:,.0f} on" if tokens else f"{row['speed_ratio']:.2f} of its speed at n = {row['to_n']:,}"
        measured = tokens or row["speed_ratio"] if tokens or complete else None
        yield _judged(target, measured, tokens is not None and tokens <= LONGEST, shown)


def _memory(parts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for part in ("steps", "engine"):
        ratios = [row["memory_over_plan"] for row in _rows(parts, part) if row.get("memory_over_plan") is not None]
        worst = max(ratios, key=lambda ratio: abs(ratio - 1), default=None)
        n_within = sum(abs(ratio - 1) <= MEMORY_DEVIATION for ratio in ratios)
        shown = f"{n_within} of {len(ratios)} within; the farthest is {worst or 0:.2f} of plan"
        target = f"peak memory within {MEMORY_DEVIATION:.0%} of plan, part {part}"
        yield _judged(target, worst, n_within == len(ratios), shown)
