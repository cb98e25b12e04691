"""Workers with a share of a GPU: what is refused, how many fit, and that Ray places four of a quarter on one GPU.

The GPU of these tests is only a number that Ray is told.
"""

from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util import placement_group, remove_placement_group

from lmu_dist.config import Config, ConfigError, parse, with_settings
from lmu_dist.launch import cluster as clusters
from lmu_dist.planning.cost import plan

GB = 1e9


def with_share(share: float, **cluster: Any) -> Config:
    return parse({"cluster": {"gpus_per_worker": share, "n_workers": 1, **cluster}})


@pytest.mark.parametrize(
    ("share", "nodes", "n_fitting"),
    [
        (0.25, [{"CPU": 8, "GPU": 1}], 4),
        (0.25, [{"CPU": 3, "GPU": 1}, {"CPU": 8, "GPU": 2}, {"CPU": 8}], 11),
        (0.1, [{"CPU": 99, "GPU": 1}], 10),  # 1 // 0.1 is 9
        (0.3, [{"CPU": 99, "GPU": 4}], 12),  # a worker is on one GPU
        (0.6, [{"CPU": 99, "GPU": 4}], 4),
        (1, [{"CPU": 99, "GPU": 4}], 4),
    ],
)
def test_as_many_workers_fit_as_shares_are_on_single_gpus(share: float, nodes: list[dict[str, float]], n_fitting: int):
    assert clusters._capacity(with_share(share), nodes) == n_fitting


def test_workers_of_one_run_never_share_a_gpu(tmp_path: Path):
    refused = r"cluster.gpus_per_worker=0.25 would put several of the 2 workers of a run on one GPU.*n_workers=1"
    with pytest.raises(ConfigError, match=refused):
        with_share(0.25, n_workers=2)
    with_share(0.25, n_workers=2, placement="STRICT_SPREAD")  # a node for each worker
    with_share(0.6, n_workers=2)  # one GPU holds one of them
    ladder = {"families": ["lmu"], "n_params": [3000, 9000], "tokens": [10**6]}
    tree = {"storage": str(tmp_path), "cluster": {"gpus_per_worker": 0.25}, "train": {"warmup_tokens": 0}, "ladder": ladder}
    tree["ladder"] |= {"workers": [{"n_params": 0, "n_workers": 1}, {"n_params": 9000, "n_workers": 2}]}
    with pytest.raises(ConfigError, match=rf"^ladder: lmu, N = 9,000, 1,000,000 tokens: {refused}"):
        plan(parse(tree))
    tree["ladder"] |= {"workers": [{"n_params": 0, "n_workers": 1}]}
    assert [cell.n_workers for cell in plan(parse(tree)).cells] == [1, 1]


def test_a_share_has_its_share_of_the_memory():
    config = with_settings(with_share(1), {"model.n_params": 10_000_000, "model.family": "transformer"})
    [needed, *_] = plan(config).cells[0].memory_bytes

    def smallest_stage(share: float, gpu_bytes: float) -> int | None:
        settings = {"cluster.gpus_per_worker": share, "plan.worker_memory_bytes": gpu_bytes}
        return plan(with_settings(config, settings)).cells[0].smallest_stage

    assert smallest_stage(1, 2 * needed) == smallest_stage(0.25, 4.1 * needed) == smallest_stage(0, needed) == 0
    assert smallest_stage(0.25, 3.9 * needed) is None


@pytest.mark.parametrize("share", [-0.1, 0.001, 1.5])
def test_impossible_shares_are_refused(share: float):
    with pytest.raises(ConfigError, match=r"^cluster(\.gpus_per_worker)?: .*(at least|at most|0.01 to 1)"):
        with_share(share)


def test_a_cluster_without_gpus_is_named():
    with pytest.raises(ConfigError, match=r"^cluster.gpus_per_worker=0.25, but Ray has no GPU on its 1 nodes; set .*=0"):
        clusters._check_fits(with_share(0.25), [{"CPU": 4}])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("local_ray")
def test_ray_places_four_groups_of_workers_on_a_gpu():
    config = with_share(0.25)
    with clusters.cluster([config]):
        assert clusters.capacity(config) == 4
        # As Ray Train does for every group of workers.
        groups = [placement_group([clusters._worker_resources(config)], strategy="PACK") for _ in range(5)]
        try:
            ready, waiting = ray.wait([group.ready() for group in groups], num_returns=4, timeout=60)
            assert len(ready) == 4
            assert ray.wait(waiting, timeout=1)[0] == []
            remove_placement_group(groups[0])  # the first group ends, the fifth starts
            assert ray.wait(waiting, timeout=60)[0] == waiting
        finally:
            for group in groups:
                remove_placement_group(group)
