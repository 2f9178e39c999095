"""Small language models of several families, and one of a user's own, for tests of cutting and splitting them."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

LAYERS = 4
VOCABULARY = 70
BYTES = 258
"""The vocabulary of the tokenizer `bytes`, and one, so that two ranks can share it."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 4},
    "gemma": {"head_dim": 8},
    "gpt_neox": {},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4},
}
"""Families of models, with what their smallest configuration needs beside the usual."""
DO_MORE: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 8},
    "granite": {"embedding_multiplier": 12.0},
    "cohere": {"logit_scale": 0.5},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "mamba": {"state_size": 8},
    "bloom": {"n_head": 4, "n_layer": LAYERS},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
"""Those whose forward does more than call its modules one after another: caps logits, scales embeddings or logits; and
those that do not say where they can be cut."""


def family(name: str, **changes: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    usual = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "tie_word_embeddings": False,
        "use_cache": False, "pad_token_id": None, "eos_token_id": None, "bos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(5)
    config = AutoConfig.for_model(name, **{**usual, **(FAMILIES | DO_MORE).get(name, {}), **changes})
    model: nn.Module = AutoModelForCausalLM.from_config(config).float().train()
    return model


class OwnLayer(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = hidden + self.down(self.dropout(torch.tanh(self.up(hidden))))
        return output


class Own(nn.Module):
    """A user's own network: where it can be cut, and how it is split, are two attributes."""

    pp_plan = ("embedding", "blocks", "norm", "head")
    tp_plan = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise", "head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, dropout: float = 0.0, vocabulary: int = VOCABULARY, layers: int = LAYERS) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 16)
        self.blocks = nn.ModuleList(OwnLayer(dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, vocabulary)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        output: torch.Tensor = self.head(self.norm(hidden))
        return output


def own(dropout: float = 0.0, vocabulary: int = VOCABULARY, layers: int = LAYERS) -> nn.Module:
    torch.manual_seed(5)
    return Own(dropout, vocabulary, layers).train()


class NoisyLayer(OwnLayer):
    """Draws, and gives more than hidden states, as layers of some transformers do."""

    def forward(self, hidden: torch.Tensor) -> Any:
        noise = torch.rand_like(hidden) if self.training else torch.ones_like(hidden)
        return super().forward(hidden) * noise, None


class Noisy(Own):
    """Says nothing of its order, and has no dropout, but draws random numbers."""

    pp_plan = ()  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(NoisyLayer() for _ in range(LAYERS))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden, _ = block(hidden)
        output: torch.Tensor = self.head(self.norm(hidden))
        return output


class Remembering(Own):
    """What each layer gives is used again at the end, in three ways."""

    pp_plan = ()  # type: ignore[assignment]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        kept = []
        for block in self.blocks:
            kept.append(hidden)
            hidden = block(hidden)
        for each in kept:
            hidden = hidden + 0.1 * each + torch.tanh(each) * torch.sigmoid(each)
        output: torch.Tensor = self.head(self.norm(hidden))
        return output


class Leisurely(Own):
    """Waits in every forward pass: a run takes its time without taking anybody's processor."""

    def __init__(self, seconds: float) -> None:
        super().__init__(vocabulary=BYTES)
        self.seconds = seconds

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return super().forward(input_ids)


def leisurely(seconds: float) -> nn.Module:
    torch.manual_seed(5)
    return Leisurely(seconds).train()
