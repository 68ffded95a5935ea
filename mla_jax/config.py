# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The architecture of a DeepSeek V2 or V3 model, as config.json describes it."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any

from mla_jax.rope import RopeConfig, YarnScaling

# Kimi-K2 is DeepSeek-V3 under its own name.
_V3_TYPES = ("deepseek_v3", "kimi_k2")
DTYPES = ("bfloat16", "float16", "float32")
_MODEL_TYPES = ("deepseek_v2", *_V3_TYPES)


@dataclass(frozen=True)
class DeepseekConfig:
    """Architecture of a DeepSeek V2 or V3 model, in the names of its config.json.

    `from_dict` reads a config.json; fields it does not mention keep the defaults below, which are
    Hugging Face's. `rope` gathers rope_theta, rope_scaling or rope_parameters, and rope_interleave.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope: RopeConfig = RopeConfig()
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 4096
    # Mixture of experts; no routed experts: every layer is dense.
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    moe_intermediate_size: int = 0
    num_experts_per_tok: int = 0
    first_k_dense_replace: int = 0
    n_group: int = 1
    topk_group: int = 1
    topk_method: str = "greedy"
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    # Of the checkpoint, not of the architecture.
    eos_token_id: int | tuple[int, ...] | None = None
    torch_dtype: str = "float32"
    weight_block_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
        sizes += ["num_attention_heads"]
        if self.n_routed_experts:
            sizes += ["n_routed_experts", "moe_intermediate_size", "num_experts_per_tok"]
            sizes += ["n_group", "topk_group"]
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected a positive int")
        _check_model_type(self.model_type)
        if self.torch_dtype not in DTYPES:
            raise ValueError(f"torch_dtype: got {self.torch_dtype!r}, expected one of {DTYPES}")
        if not self.n_routed_experts:
            return
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"n_group: got {self.n_group}, "
                f"expected a divisor of n_routed_experts {self.n_routed_experts}"
            )
        choices = self.n_routed_experts // self.n_group * self.topk_group
        if self.topk_group > self.n_group or self.num_experts_per_tok > choices:
            raise ValueError(
                f"num_experts_per_tok: got {self.num_experts_per_tok}, expected at most {choices}, "
                f"the experts of topk_group {self.topk_group} of {self.n_group} groups"
            )
        methods = ("noaux_tc",) if self.is_v3 else ("greedy", "group_limited_greedy")
        if self.topk_method not in methods:
            raise NotImplementedError(
                f"topk_method: got {self.topk_method!r}, expected one of {list(methods)} "
                f"for {self.model_type}"
            )

    @property
    def is_v3(self) -> bool:
        """Whether the router and RoPE follow DeepSeek-V3."""
        return self.model_type in _V3_TYPES

    @property
    def d_cache(self) -> int:
        """Channels cached per token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Says whether a layer has experts."""
        return bool(self.n_routed_experts) and layer >= self.first_k_dense_replace

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "DeepseekConfig":
        """Reads the contents of a config.json, old keys or new.

        Raises:
            ValueError: a key is missing or its value is wrong.
            NotImplementedError: the model has something this library does not.
        """
        model_type = config.get("model_type")
        _check_model_type(model_type)
        v3 = model_type in _V3_TYPES
        required = [n for n, f in cls.__dataclass_fields__.items() if f.default is MISSING]
        missing = [name for name in required if name not in config and name != "model_type"]
        if missing:
            raise ValueError(f"config.json: {', '.join(missing)} missing")
        for key, expected in {
            "hidden_act": "silu",
            "moe_layer_freq": 1,
            "scoring_func": "sigmoid" if v3 else "softmax",
        }.items():
            if config.get(key, expected) != expected:
                raise NotImplementedError(f"{key}: got {config[key]!r}, expected {expected!r}")
        quantization = config.get("quantization_config") or {}
        if quantization and quantization.get("quant_method") != "fp8":
            raise NotImplementedError(
                f"quant_method: got {quantization.get('quant_method')!r}, expected 'fp8'"
            )
        fields = {n: config[n] for n in cls.__dataclass_fields__ if config.get(n) is not None}
        fields |= {
            "model_type": model_type,
            "q_lora_rank": config.get("q_lora_rank"),
            "rope": _rope_from_dict(
                config, interleaved=config.get("rope_interleave", True) or not v3
            ),
            "topk_method": config.get("topk_method", "noaux_tc" if v3 else "greedy"),
            "torch_dtype": config.get("torch_dtype") or config.get("dtype") or "float32",
        }
        if isinstance(fields.get("eos_token_id"), list):
            fields["eos_token_id"] = tuple(fields["eos_token_id"])
        if quantization:
            fields["weight_block_size"] = tuple(quantization.get("weight_block_size", (128, 128)))
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Writes the contents of a config.json that `from_dict` and Hugging Face read."""
        out = {n: getattr(self, n) for n in self.__dataclass_fields__ if n != "rope"}
        del out["weight_block_size"]
        out["rope_theta"] = self.rope.theta
        yarn = self.rope.scaling
        out["rope_scaling"] = None if yarn is None else {"type": "yarn", **vars(yarn)}
        if self.is_v3:
            out["rope_interleave"] = self.rope.interleaved
        out["scoring_func"] = "sigmoid" if self.is_v3 else "softmax"
        out["hidden_act"] = "silu"
        out["num_key_value_heads"] = self.num_attention_heads
        out["architectures"] = [f"Deepseek{'V3' if self.is_v3 else 'V2'}ForCausalLM"]
        return out


def _check_model_type(model_type: Any) -> None:
    if model_type not in _MODEL_TYPES:
        why = ": its sparse indexer is not supported" if model_type == "deepseek_v32" else ""
        raise NotImplementedError(
            f"model_type: got {model_type!r}, expected one of {list(_MODEL_TYPES)}{why}"
        )


def _rope_from_dict(config: Mapping[str, Any], interleaved: bool) -> RopeConfig:
    """Reads old `rope_theta` and `rope_scaling {type}` or new `rope_parameters {rope_type}`."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return RopeConfig(float(theta), None, interleaved)
    if kind != "yarn":
        raise NotImplementedError(f"rope type: got {kind!r}, expected 'default' or 'yarn'")
    for key, expected in {"attention_factor": None, "truncate": True}.items():
        if rope.get(key, expected) != expected:
            raise NotImplementedError(f"{key}: got {rope[key]!r}, expected {expected!r}")
    fields = YarnScaling.__dataclass_fields__
    missing = [n for n, f in fields.items() if f.default is MISSING and n not in rope]
    if missing:
        raise ValueError(f"config.json: {', '.join(missing)} missing from the YaRN parameters")
    given = {name: rope[name] for name in fields if rope.get(name) is not None}
    return RopeConfig(float(theta), YarnScaling(**given), interleaved)
