"""What is refused before a cluster is joined or started."""

import pytest

from lmu_dist.config import ConfigError, parse
from lmu_dist.launch.cluster import check_before


def test_workers_on_a_node_each_need_as_many_nodes():
    apart = {"n_workers": 2, "placement": "STRICT_SPREAD"}
    with pytest.raises(ConfigError, match="a node for each of 2 workers, and 1 of the 1 nodes could hold one"):
        check_before([parse({"cluster": apart})])
    check_before([parse({"cluster": apart | {"placement": "SPREAD"}})])


def test_a_cluster_that_is_not_there_is_named_at_once():
    with pytest.raises(ConfigError, match=r"cannot join a Ray cluster at 127\.0\.0\.1:9"):
        check_before([parse({"cluster": {"address": "127.0.0.1:9"}})])
