"""Spot-like churn: every few seconds a node is lost or must leave, and the autoscaler brings others. The short form of
it, one node that is lost and one that drains, is in test_autoscaler."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.fake_cloud import FakeCloud, node_type
from tests.cluster.test_autoscaler import LEISURELY, Run, assert_same

LONG_S = float(os.environ.get("ORCHESTRATOR_CHURN_SECONDS", "300"))


@pytest.fixture
def cloud() -> Iterator[FakeCloud]:
    cloud = FakeCloud({"spot": node_type(3)})
    try:
        cloud.start()
        yield cloud
    finally:
        cloud.remove()


@pytest.mark.nightly
@pytest.mark.parametrize(("seconds", "every_s"), [(24.0, 12.0), (LONG_S, 20.0)])
def test_churn_changes_no_bit(cloud: FakeCloud, tmp_path: Path, cache: Path, seconds: float, every_s: float) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    dice = random.Random(seed)
    run = Run(cloud, tmp_path, cache, "churn")
    losses = notices = 0
    # Here nodes come and go all the time, and newcomers shall be seen to join: not after minutes, as they would.
    pace = "elastic.scaling={settle_s: 1, flap_window_s: 15}"
    with run.going(*LEISURELY, "elastic.workers={min: 1, max: 3}", pace) as driver:
        run.until_size(3, driver)
        began, events = time.monotonic(), 0
        while time.monotonic() - began < seconds:
            time.sleep(max(0.0, began + events * every_s - time.monotonic()))
            events += 1
            assert driver.poll() is None, driver.communicate()[0]
            members = {member["node"] for member in run.events("generation")[-1]["workers"]} & set(cloud.raylets())
            if len(members) < 2:
                continue  # The last one is left: with it the state would be lost, and the steps since a checkpoint.
            node = dice.choice(sorted(members))
            if dice.random() < 0.5:
                cloud.lose(node)
                losses += 1
            else:
                done = cloud.orchestrator("drain", node, "--deadline", "2m", "--reason", "spot")
                assert done.returncode == 0, done.stderr
                notices += 1
        run.stop()
        run.finish(driver, code=3)
    result = assert_same(run, tmp_path, cache, *LEISURELY)
    report = cloud.orchestrator("report", str(run.path)).stdout
    print(f"{losses} nodes lost, {notices} drained, {len(run.sizes())} generations of {run.sizes()} workers")
    print(report)
    kinds = [recovery["kind"] for recovery in result["recoveries"]]
    assert kinds.count("drain") >= notices - 1, "one may have been lost or stopped before it left"
    assert losses + notices >= seconds / every_s / 3
    assert all(recovery["source"] == "peers" for recovery in result["recoveries"])
    assert result["goodput_ratio"] > 0.3, "0.9 where nothing else runs"
