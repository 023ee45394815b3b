"""A step on many nodes, on paper: bytes by hand, seconds, and efficiency."""

import pytest

from shardrec.launch import cli
from shardrec.pipeline.config import override
from shardrec.pipeline.plan import Machine, count_parameters
from shardrec.pipeline.recipes import tiny_cpu
from shardrec.pipeline.scaling import NODES, Cluster, scaled

WIDTH, BATCH, ITEMS = 64, 32 * 16, 10**6
OPTIONS = ["encoder.width=64", "loss=cce", "batches.batch_size=32"]
CLUSTER = Cluster(node_gbps=8.0, gpu_gbps=80.0, tflops=1.0, node_ranks=4)


def test_bytes_of_both_layouts_are_those_that_one_counts_by_hand() -> None:
    config = override(tiny_cpu("none", "none"), OPTIONS)
    steps = scaled(config, ITEMS, Machine(), CLUSTER)
    encoder = 2 * 4 * count_parameters(config.encoder)
    for index, nodes in enumerate(NODES):
        table, replicas = steps["one table"][index], steps["replicas"][index]
        others = 1 - 1 / nodes
        # Ids, vectors and their gradients enter a node for each of its ranks. States of the batches
        # of all nodes enter once or twice, as backward needs them, and their gradients once.
        looked_up = (8 + 2 * 4 * WIDTH) * BATCH * others
        states = (table.across - looked_up - encoder * others) / (4 * WIDTH * BATCH * nodes)
        assert states == pytest.approx(2 * others) or states == pytest.approx(3 * others)
        rows = 4 * 2 * others * 4 * WIDTH * ITEMS / 4
        assert replicas.across == pytest.approx(encoder * others + rows)
        assert replicas.inside == pytest.approx(
            steps["replicas"][0].inside - encoder * 3 / 4 + encoder * (1 - 1 / (4 * nodes))
        )
    assert steps["one table"][0] == steps["replicas"][0], "one node has one table"


def test_a_slower_network_costs_its_bytes() -> None:
    config = override(tiny_cpu("none", "none"), OPTIONS)
    fast, slow = (
        scaled(config, ITEMS, Machine(), Cluster(node_gbps=speed, node_ranks=4))["replicas"]
        for speed in (400.0, 200.0)
    )
    assert fast[0].seconds == slow[0].seconds
    for one, other in zip(fast[1:], slow[1:], strict=True):
        assert other.seconds - one.seconds == pytest.approx(one.across * 8 / 400e9)


def test_plan_prints_both_layouts_where_a_network_is_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["plan", "--num-items", "1_000_000", "--recipe", "tiny_cpu"]
    assert cli.main(words) == 0
    assert "efficiency" not in capsys.readouterr().out
    assert cli.main([*words, "--node-gbps", "400", "--node-ranks", "4"]) == 0
    said = capsys.readouterr().out
    assert "for nodes of 4 ranks" in said and said.count("efficiency") == 2
    assert said.count("\n128 ") == 2 and said.count("100%") >= 2
    assert cli.main([*words, "--node-gbps", "0"]) == 2
    assert "node_gbps must be above 0, got 0" in capsys.readouterr().err
