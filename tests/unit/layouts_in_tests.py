"""A small model and the layouts of it, for tests of the controller."""

from __future__ import annotations

from orchestrator.models.costs import Block, ModelCosts
from orchestrator.planning.choose import LayoutChooser
from orchestrator.planning.work import StepSettings
from strategies.layout.statemap import Spans


def _block(name: str, parameters: int) -> Block:
    return Block(name, parameters, 0, 2 * parameters, 0, 100, 0)


MODEL = ModelCosts(
    blocks=(_block("embedding", 1000), *(_block(f"layer {index}", 10_000) for index in range(8)), _block("head", 1000)),
    tied=0,
    hidden_size=64,
    vocab_size=256,
    heads=8,
    key_value_heads=8,
    value_bytes=4,
)


def layouts(
    virtual_workers: int = 8, tensor: int = 1, pipeline: int = 1, shard: str = "none", max_workers: int = 1000
) -> LayoutChooser:
    return LayoutChooser(tensor, pipeline, shard, "1f1b", max_workers, StepSettings(virtual_workers, micro_batches=4))


def num_elements(spans: Spans) -> int:
    starts, stops = spans.bounds
    return int((stops - starts).sum())
