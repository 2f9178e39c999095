"""Every causal model type of the pinned transformers, really tried with a tiny configuration: the table in
docs/architectures.md. `python -m tests.ranks.architectures --write` makes it anew (the better part of an hour)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks.laid_out import CPU, LENGTH, MICRO_BATCHES, VIRTUAL_WORKERS, Stretch, Trained, fetch, layout_of
from tests.ranks.local_ranks import Endpoint, run_ranks
from tests.ranks.test_lost_ranks import Journey, Loss, held_after, members_of

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"
COLUMNS = ("trains", "kill", "pipeline", "tensor", "shard", "document mask")
YES = "yes"
RANKS = 3
PATIENCE_S = 240.0
SPREAD = (
    "llama", "gpt2", "opt", "bloom", "falcon", "mamba", "gemma2", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3",
    "phi3",
)  # fmt: skip
"""What every run of the tests tries."""

USUAL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 64, "d_model": 32,
    "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "ffn_dim": 64, "word_embed_proj_dim": 32,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "first_k_dense_replace": 1, "decoder_layers": 4, "decoder_ffn_dim": 64, "decoder_attention_heads": 4,
    "num_layers": 4, "num_heads": 4, "d_ff": 64, "d_kv": 8, "state_size": 8, "expand": 2, "conv_kernel": 4,
    "embedding_size": 32, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_d_conv": 4, "lru_width": 32, "attention_window_size": 16, "sliding_window": 16, "is_decoder": True,
    "dropout": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    "activation_dropout": 0.0, "layerdrop": 0.0, "decoder_layerdrop": 0.0, "pad_token_id": 0, "rotary_dim": 4,
    "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2, "n_shared_experts": 1, "n_inner": 64,
    "linear_head_dim": 8, "linear_num_heads": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_experts_intermediate_size": 32,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "num_kv_shared_layers": 0,
}  # fmt: skip
"""Small sizes, by the names that configurations have for them."""
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}  # fmt: skip
_SLIDING = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "head_dim": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
_SLIDING_LAYERS = {
    "head_dim": 16, "layer_types": ["indexed_attention", "sliding_attention"] * 2,
    "per_layer_config": {1: _SLIDING, 3: _SLIDING},
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_config": {"hidden_size_global": 32}, "decoder_config": {"hidden_size_global": 32},
        "encoder_hash_byte_group_vocab": 64,
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "dots3_note": {
        "text_config": _SLIDING_LAYERS,
        "vision_config": {"per_layer_config": None, "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _SLIDING_LAYERS,
    "falcon_h1": {"mamba_d_ssm": 64},
    "fuyu": {"text_config": {"model_type": "persimmon"}},
    "got_ocr2": {"text_config": {"model_type": "qwen2"}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "moss_transcribe_diarize": {"text_config": {"model_type": "qwen3"}},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [2, 4]},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What the smallest configuration of a type needs beside, or instead."""


def tiny(kind: str) -> dict[str, Any]:
    """`model.hf` of a small model of this type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return {"model_type": kind} | _sizes(CONFIG_MAPPING[kind], SPECIAL.get(kind, {}))


def _sizes(config_class: Any, special: dict[str, Any]) -> dict[str, Any]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    names = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    taken = {config_class.attribute_map.get(name, name): value for name, value in USUAL.items() if name in names}
    if "kv_lora_rank" in names and "num_key_value_heads" in names:
        taken["num_key_value_heads"] = USUAL["num_attention_heads"]
    taken |= special
    for name, inner in config_class.sub_configs.items():
        nested = special.get(name, {})
        if "model_type" in nested:
            inner = CONFIG_MAPPING[nested["model_type"]]
        if dataclasses.is_dataclass(inner):
            taken[name] = _sizes(inner, nested)
    return taken


def kinds() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


# ------------------------------------------------------------------------------------ trying, on every rank


def engine_of(kind: str, *, document_mask: bool = False, **strategy: Any) -> Any:
    """A worker's, as a job has it. Raises ValueError for what the job cannot have."""
    from orchestrator.job import Job
    from orchestrator.training import build
    from strategies.update.engine import StepEngine
    from strategies.update.warm_up import warm_up

    group = strategy.get("tensor", 1) * strategy.get("pipeline", 1)
    job = Job.model_validate({
        "name": "architectures", "model": {"hf": tiny(kind)},
        "data": {"source": "python-stdlib", "tokenizer": "bytes", "sequence_length": LENGTH, "packing": "pack",
                 "document_mask": document_mask},
        "train": {"steps": 4, "global_batch": VIRTUAL_WORKERS * MICRO_BATCHES, "seed": 1,
                  "optimizer": {"lr": 1e-2}, "schedule": {"name": "constant"}},
        "elastic": {"virtual_workers": VIRTUAL_WORKERS, "workers": {"min": group, "max": 2 * group}},
        "strategy": strategy,
    })  # fmt: skip
    state = build.build_state(job, tiny(kind).get("vocab_size", 96), CPU)
    engine = StepEngine(state, build.step_spec(job), fetch)
    warm_up(engine, keep=job.strategy.keeps_model_whole)
    return engine


def try_columns(rank: int, address: Endpoint, kind: str, columns: tuple[str, ...]) -> dict[str, Any]:
    """What two steps give, by column, or why they cannot be had."""
    found = {}
    for column in columns:
        try:
            found[column] = _try(rank, address, kind, column)
        except ValueError as error:
            found[column] = f"no: {error}"
    return found


def _try(rank: int, address: Endpoint, kind: str, column: str) -> Any:
    alone, two = Stretch(layout_of(), 1), (0, 1)
    if column == "document mask":
        engine_of(kind, document_mask=True)
        return YES
    if column == "kill":
        return _lose_one(rank, address, engine_of(kind))
    given: dict[str, tuple[dict[str, Any], Stretch]] = {
        "trains": ({}, alone),
        "pipeline": ({"pipeline": 2}, Stretch(layout_of(1, 2), 1, two)),
        "tensor": ({"tensor": 2}, Stretch(layout_of(tensor=2), 1, two)),
        "shard": ({"shard": "parameters"}, Stretch(layout_of(2, shard="parameters"), 1, two)),
    }
    strategy, stretch = given[column]
    if rank not in members_of(stretch):
        return None
    journey = Journey(engine_of(kind, **strategy), address, column)
    from strategies.gradient.spec import first_pass
    from strategies.layout.statemap import whole

    state = journey.engine.state
    held = dict.fromkeys(members_of(stretch), whole(state.space.size, state.space.tensor))
    with first_pass(state.blueprint.model, LENGTH, strategy.get("tensor", 1)):
        journey.go(rank, stretch, held, 0)
    gradients = _gradient_norms(state) if rank == 0 else {}
    journey.go(rank, stretch, held_after(journey.engine, stretch), 1)
    return *_numbers(journey.seen), gradients


def _gradient_norms(state: Any) -> dict[str, float]:
    """Of every parameter's gradient in the first step, as far as it was clipped: of Adam's mean of gradients."""
    kind = "optimizer.exp_avg."
    return {name.removeprefix(kind): float(t.norm()) for name, t in state.named() if name.startswith(kind)}


def _lose_one(rank: int, address: Endpoint, engine: Any) -> Any:
    """A step of three replicas, one of which is killed in the next one, which the others finish."""
    from strategies.layout.statemap import whole

    first, again, rest = Stretch(layout_of(3), 1), Stretch(layout_of(3), 1), Stretch(layout_of(2), 1, (0, 2))
    space = engine.state.space
    journey = Journey(engine, address)
    journey.go(rank, first, dict.fromkeys(range(3), whole(space.size, space.tensor)), 0)
    journey.lose(rank, again, held_after(engine, first), Loss(1, "killed", check=2))
    journey.go(rank, rest, held_after(engine, again), 1)
    return _numbers(journey.seen)


def _numbers(seen: Trained) -> tuple[Any, ...]:
    return seen.losses, seen.norms, seen.digest


# ------------------------------------------------------------------------------------ the table


def row_of_all_yes(kind: str, columns: tuple[str, ...]) -> dict[str, str]:
    """Of one type that has all of these, by column: all in the same two ranks, which is quicker. Raises AssertionError
    where ranks fail."""
    found = run_ranks(2, try_columns, kind, columns, timeout_s=PATIENCE_S)[0]
    return {
        column: said if isinstance(said, str) else _judge(column, said, found["trains"])
        for column, said in found.items()
    }


def row_of(kind: str, columns: tuple[str, ...] = COLUMNS) -> dict[str, str]:
    """Of one type, by column: yes, or why not."""
    row: dict[str, str] = {}
    expected: Any = None
    for column in columns:
        if column != "trains" and row.get("trains", YES) != YES:
            row[column] = "-"
            continue
        try:
            found = _run(kind, column)
        except AssertionError as error:
            row[column] = f"no: {_reason(str(error))}"
            continue
        if isinstance(found, str):
            row[column] = found
            continue
        expected = found if column == "trains" else expected
        row[column] = _judge(column, found, expected)
    return row


def _run(kind: str, column: str) -> Any:
    ranks = {"kill": RANKS, "trains": 1, "document mask": 1}.get(column, 2)
    lost = {1} if column == "kill" else set()
    return run_ranks(ranks, try_columns, kind, (column,), timeout_s=PATIENCE_S, lost=lost)[0][column]


def _judge(column: str, found: Any, expected: Any) -> str:
    losses, norms, digest = found[:3]
    if column == "tensor":
        # Of the second step the loss only: a first step of Adam goes as far for a gradient of nearly 0 as for any.
        first = (losses[0], norms[0]) == pytest.approx((expected[0][0], expected[1][0]), rel=5e-5)
        second = losses[1] == pytest.approx(expected[0][1], rel=1e-4)
        said = f"other numbers than whole: losses {losses} and {expected[0]}, norms {norms} and {expected[1]}"
        if not first or not second:
            return f"no: {said}"
        others = _other_gradients(found[3], expected[3])
        return f"no: other gradients than whole: {', '.join(others[:5])}" if others else YES
    if not all(map(_is_number, losses)):
        return "no: the loss is not finite"
    return YES if (losses, norms, digest) == expected[:3] else "no: other bits than alone"


def _other_gradients(found: dict[str, float], expected: dict[str, float]) -> list[str]:
    """The parameters whose gradients have another norm, beyond what rounding makes of it."""
    rounding = 1e-5 * sum(norm**2 for norm in expected.values()) ** 0.5
    return [
        f"{name} {found.get(name)} and {norm}"
        for name, norm in expected.items()
        if found.get(name) != pytest.approx(norm, rel=1e-3, abs=rounding)
    ]


def _is_number(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def _reason(text: str) -> str:
    """The last line of a traceback says it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else "?"


HEAD = """# Model types

What each causal language model type of transformers {version} can be trained in here, tried with a tiny
configuration of each: `trains` (alone), `kill` (one of three workers is killed in the second step), `pipeline` 2,
`tensor` 2 and `shard: parameters` over two workers, and `document mask`. **yes** means: with the same bits as alone;
for `tensor`, with the loss and the gradient's norm of the first step to within 5e-5, and that of each parameter's
gradient to within 1e-3. A **no** is what a job file that
wants it is told, before or when the run starts; these answers are below the table, which is made by
`python -m tests.ranks.architectures --write`. A nightly test tries all of it again, and every run of the tests
{spread} types.

"""

_NAME = re.compile(r"(the model )?\bx?[A-Z]\w*(ForCausalLM|ForConditionalGeneration|LMHeadModel|LMHead|Decoder)\b")


def as_markdown(rows: dict[str, dict[str, str]]) -> str:
    """The document."""
    import transformers

    text = HEAD.format(version=transformers.__version__, spread=len(SPREAD))
    text += "| type | " + " | ".join(COLUMNS) + " |\n" + "|---" * (1 + len(COLUMNS)) + "|\n"
    reasons: dict[str, list[str]] = {}
    for kind, row in rows.items():
        cells = []
        for column in COLUMNS:
            said = row[column]
            if said.startswith("no: "):
                said = _NAME.sub("the model", said)
                numbered = list(reasons).index(said) + 1 if said in reasons else len(reasons) + 1
                reasons.setdefault(said, []).append(f"{kind} ({column})")
                cells.append(f"no [{numbered}]")
            else:
                cells.append(said)
        text += f"| {kind} | " + " | ".join(cells) + " |\n"
    totals = [sum(row[column] == YES for row in rows.values()) for column in COLUMNS]
    text += f"| **{len(rows)} types** | " + " | ".join(map(str, totals)) + " |\n\n"
    for number, said in enumerate(reasons, 1):
        text += f"{number}. {said.removeprefix('no: ')}\n"
    return text


def read_table() -> dict[str, dict[str, str]]:
    """The rows of the document: yes, no or -."""
    rows = {}
    text = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 1 + len(COLUMNS) and cells[1].split()[0] in (YES, "no", "-"):
            rows[cells[0]] = dict(zip(COLUMNS, (cell.split()[0] for cell in cells[1:]), strict=True))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--kept", type=Path, help="JSON of rows that are known, which is added to")
    asked = parser.parse_args()
    known = json.loads(asked.kept.read_text(encoding="utf-8")) if asked.kept and asked.kept.exists() else {}
    for kind in asked.kinds or kinds():
        if kind not in known:
            known[kind] = row_of(kind)
            print(kind, json.dumps(known[kind]), flush=True)
            if asked.kept:
                asked.kept.write_text(json.dumps(known, indent=1), encoding="utf-8")
    if asked.write:
        DOCUMENT.write_text(as_markdown(dict(sorted(known.items()))), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
