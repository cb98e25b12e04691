"""What a grid of thousands of cells computes once for each size, not once for each cell."""

from typing import Any

import pytest

from lmu_dist.config import ConfigError, parse
from lmu_dist.planning import grid as module
from lmu_dist.planning.grid import grid


def test_widths_are_searched_once_for_each_family_and_size(monkeypatch: pytest.MonkeyPatch):
    searched, original = list[tuple[str, int]](), module.shape_for

    def shape_for(family: Any, n_params: int, **settings: Any) -> Any:
        searched.append((family.name, n_params))
        return original(family, n_params, **settings)

    monkeypatch.setattr(module, "shape_for", shape_for)
    module._shape.cache_clear()
    ladder = {"families": ["lmu", "lstm"], "n_params": [3000, 9000], "tokens": [10**6, 2 * 10**6], "seeds": [0, 1, 2]}
    cells, _ = grid(parse({"train": {"warmup_tokens": 50_000}, "ladder": ladder}), 400)
    assert len(cells) == 24
    assert sorted(searched) == [("lmu", 3000), ("lmu", 9000), ("lstm", 3000), ("lstm", 9000)]
    for _ in range(2):  # an error is not remembered as a success
        with pytest.raises(ConfigError, match="no lmu of 2 blocks has N = 2 "):
            grid(parse({"train": {"warmup_tokens": 50_000}, "ladder": ladder | {"n_params": [2]}}), 400)
