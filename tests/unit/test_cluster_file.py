"""cluster.yaml is one that Ray's launcher takes."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import ray
import yaml

ROOT = Path(__file__).parents[2]


def test_cluster_yaml_passes_the_schema_of_the_cluster_launcher() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    jsonschema.validate(cluster, schema)
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    assert any("InstanceMarketOptions" in kind["node_config"] for kind in types.values()), "a spot node type"
