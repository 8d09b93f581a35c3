"""The model's configuration: Hugging Face's field names, checked before anything is built.

A field that Hugging Face's DeepSeek-V2/V3 configuration has carries the same name and meaning, so ``config.json`` of a
released model is read by :meth:`DeepSeekV3Config.from_hf` and written by :meth:`DeepSeekV3Config.to_hf`. The few
fields of our own (``group_score``, ``mtp_*``) name choices on which the report and the released code differ or are
silent.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning_dsv3.config.errors import ConfigError, did_you_mean

_CHOICES = {
    "topk_method": ("noaux_tc", "group_limited_greedy", "greedy"),
    "scoring_func": ("sigmoid", "softmax"),
    "group_score": ("top2", "topk_over_m"),
    "mtp_input_state": ("final_norm", "pre_norm"),
    "mtp_chain_state": ("post_norm", "pre_norm"),
    "mtp_loss_normalizer": ("main", "own"),
}
_YARN_REQUIRED = {"type", "factor", "original_max_position_embeddings"}
_YARN_OPTIONAL = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": None, "mscale_all_dim": None}

# Looks alike, computes something else. Names that only such a model's config.json has, and what they mean.
_FOREIGN_TYPES = {
    "deepseek_v32": "DeepSeek-V3.2 has a sparse-attention indexer",
    "deepseek_v4": "DeepSeek-V4 is another architecture",
}
_FOREIGN_KEYS = {"index_topk": "deepseek_v32", "index_head_dim": "deepseek_v32", "index_n_heads": "deepseek_v32"}
# transformers' name for the MTP depth; config.json files of DeepSeek use the first.
_HF_ALIASES = {"num_mtp_layers": "num_nextn_predict_layers", "num_experts": "n_routed_experts",
               "num_local_experts": "n_routed_experts"}  # fmt: skip


class ParameterCount(NamedTuple):
    """Numbers of parameters, as the report counts them.

    Attributes:
        total: Every persistent tensor of the main model, the routing biases included, MTP modules left out.
        mtp: The MTP modules' own tensors; the embedding and head that they share are not counted again.
        activated: What one token touches in the main model, embedding and head included.
        activated_without_embedding: The same without the input embedding, of which a token reads one row.
    """

    total: int
    mtp: int
    activated: int
    activated_without_embedding: int


@dataclass(frozen=True)
class DeepSeekV3Config:
    """Shape of a DeepSeek-V3-style model. The defaults are DeepSeek-V3 as released (671B).

    Attributes:
        vocab_size: Number of token ids V.
        hidden_size: Width d of the residual stream.
        intermediate_size: Width of the feed-forward network in the first dense layers.
        moe_intermediate_size: Width F of one expert; the shared experts are one network ``n_shared_experts`` times as
            wide.
        num_hidden_layers: Transformer blocks L of the main model, MTP modules not counted.
        first_k_dense_replace: The first so many blocks have a dense feed-forward network and no experts.
        num_attention_heads: Heads n_h. MLA has as many key and value heads.
        q_lora_rank: Width d_c' of the compressed query; None for a full query projection (V2-Lite).
        kv_lora_rank: Width d_c of the compressed key and value, which inference caches.
        qk_nope_head_dim: Query and key width per head without rotary position.
        qk_rope_head_dim: Width of the decoupled rotary key d_h^R, even; one key is shared by all heads.
        v_head_dim: Value width per head; may differ from the query and key width.
        n_routed_experts: Routed experts N_r of a layer.
        n_shared_experts: Shared experts N_s of a layer, 0 for none.
        num_experts_per_tok: Routed experts K_r that a token activates.
        n_group: Groups of experts for node-limited routing; 1 for no limit.
        topk_group: Groups M that a token may use.
        topk_method: ``noaux_tc`` chooses by affinity plus routing bias; ``group_limited_greedy`` (V2) by affinity
            under the group limit; ``greedy`` (V2-Lite) by affinity alone. Only ``noaux_tc`` gives the routers a bias.
        group_score: Score of a group under ``noaux_tc``: ``top2``, the sum of its two highest biased affinities as in
            DeepSeek's code, or ``topk_over_m``, of its K_r/M highest as the report prints (section 2.1.2). Same for V3.
        scoring_func: Affinity of token and expert: ``sigmoid`` (V3) or ``softmax`` (V2).
        norm_topk_prob: Divide the chosen affinities by their sum.
        routed_scaling_factor: Factor on the routed experts' output.
        num_nextn_predict_layers: MTP modules D; 0 for none.
        mtp_input_state: Main-model state that the first MTP module reads: after the ``final_norm`` (released weights as
            Hugging Face and Megatron-Core run them) or ``pre_norm``. The report does not say.
        mtp_chain_state: State that MTP module k hands to module k + 1: ``post_norm`` (after its own norm) or
            ``pre_norm``.
        mtp_loss_normalizer: ``main`` divides an MTP loss by the number of the main loss's targets (1/T of eq. 24);
            ``own`` by the number of its own targets, which is k less per sequence.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: None, or YaRN: ``{type: yarn, factor, original_max_position_embeddings, beta_fast, beta_slow,
            mscale, mscale_all_dim}``.
        max_position_embeddings: Longest sequence that the model is meant for.
        rms_norm_eps: Epsilon of the norms on the residual stream (the norms of MLA's latents keep 1e-6, as in HF).
        initializer_range: Standard deviation of the initial weights (0.006 in the report).
        tie_word_embeddings: The output head is the embedding.

    Raises:
        ConfigError: Impossible values; one message with every problem: key, value and fix.

    Example:
        >>> config = DeepSeekV3Config.from_preset("671b")
        >>> config.num_parameters().total
        671026419200
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    num_attention_heads: int = 128
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    topk_method: str = "noaux_tc"
    group_score: str = "top2"
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    num_nextn_predict_layers: int = 1
    mtp_input_state: str = "final_norm"
    mtp_chain_state: str = "post_norm"
    mtp_loss_normalizer: str = "main"
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = field(default=None)
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise ConfigError("model configuration cannot work:\n  " + "\n  ".join(problems))

    @property
    def qk_head_dim(self) -> int:
        """Query and key width per head: the part without and the part with rotary position."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def has_routing_bias(self) -> bool:
        """Whether routers carry the bias b of auxiliary-loss-free balancing."""
        return self.topk_method == "noaux_tc"

    @property
    def num_moe_layers(self) -> int:
        """Main-model blocks with experts."""
        return self.num_hidden_layers - self.first_k_dense_replace

    def num_parameters(self) -> ParameterCount:
        """Count parameters without building anything. See :class:`ParameterCount`."""
        d, heads = self.hidden_size, self.num_attention_heads
        if self.q_lora_rank is None:
            query = d * heads * self.qk_head_dim
        else:
            query = d * self.q_lora_rank + self.q_lora_rank + self.q_lora_rank * heads * self.qk_head_dim
        key_value = (
            d * (self.kv_lora_rank + self.qk_rope_head_dim)
            + self.kv_lora_rank
            + self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        )
        around_ffn = query + key_value + heads * self.v_head_dim * d + 2 * d  # attention and the block's two norms
        expert = 3 * d * self.moe_intermediate_size
        gate = self.n_routed_experts * d
        bias = self.n_routed_experts if self.has_routing_bias else 0
        moe = around_ffn + gate + bias + (self.n_routed_experts + self.n_shared_experts) * expert
        moe_activated = around_ffn + gate + bias + (self.num_experts_per_tok + self.n_shared_experts) * expert
        dense = around_ffn + 3 * d * self.intermediate_size
        embedding = self.vocab_size * d
        head = 0 if self.tie_word_embeddings else embedding
        shared = d + self.first_k_dense_replace * dense  # final norm and dense layers
        activated = embedding + head + shared + self.num_moe_layers * moe_activated
        return ParameterCount(
            total=embedding + head + shared + self.num_moe_layers * moe,
            mtp=self.num_nextn_predict_layers * (moe + 2 * d * d + 3 * d),
            activated=activated,
            activated_without_embedding=activated - (0 if self.tie_word_embeddings else embedding),
        )

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> DeepSeekV3Config:
        """Read the preset ``configs/model/<name>.yaml``.

        Args:
            name: tiny, 1b, 3b, 16b, 16b_v2, 236b, 236b_v2 or 671b.
            **overrides: Fields to change.

        Raises:
            ConfigError: Unknown preset or field, or impossible values.
        """
        from lightning_dsv3.config.presets import read_preset  # presets need YAML; the dataclass does not

        return cls.from_dict({**read_preset("model", name), **overrides})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeepSeekV3Config:
        """Build from plain values, as :meth:`to_dict` writes them; unknown fields are errors."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"model.{key}={values[key]!r}: there is no such field; {did_you_mean(key, known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for checkpoints and YAML."""
        return dataclasses.asdict(self)

    @classmethod
    def from_hf(cls, hf_config: Any) -> DeepSeekV3Config:
        """Read a Hugging Face configuration of DeepSeek-V2, V3 or a model that reuses their architecture.

        Args:
            hf_config: A ``transformers`` configuration object or the dict of a ``config.json``. transformers 5's
                ``rope_parameters`` and the older ``rope_theta`` with ``rope_scaling`` are both understood.

        Raises:
            ConfigError: Another architecture (V3.2 and V4 are refused by name), or an option that we do not compute.
        """
        values = dict(hf_config) if isinstance(hf_config, Mapping) else hf_config.to_dict()
        _refuse_foreign(values)
        is_v2 = values.get("model_type") == "deepseek_v2"
        for alias, name in _HF_ALIASES.items():
            if alias in values:
                values.setdefault(name, values[alias])
        values.update(_rope_from_hf(values))
        # Hugging Face's classes leave out what their architecture fixes.
        for key, default in {
            "topk_method": "greedy" if is_v2 else "noaux_tc",
            "scoring_func": "softmax" if is_v2 else "sigmoid",
            "norm_topk_prob": not is_v2,
            "num_nextn_predict_layers": 0 if is_v2 else 1,
        }.items():
            if values.get(key) is None:
                values[key] = default
        for key in ("n_group", "topk_group"):
            if values.get(key) is None:
                values[key] = 1
        if values.get("n_shared_experts") is None:
            values["n_shared_experts"] = 0
        names = {f.name for f in dataclasses.fields(cls)}
        missing = sorted(n for n in names if n not in values and not n.startswith(("mtp_", "group_score")))
        if missing:
            raise ConfigError(f"Hugging Face configuration lacks {', '.join(missing)}; is it a DeepSeek model?")
        return cls(**{key: value for key, value in values.items() if key in names})

    def to_hf(self) -> dict[str, Any]:
        """Return ``config.json`` of the Hugging Face layout (older ``rope_theta``/``rope_scaling`` pair).

        Raises:
            ConfigError: A router that neither DeepseekV2ForCausalLM nor DeepseekV3ForCausalLM computes.
        """
        is_v3 = self.scoring_func == "sigmoid" and self.topk_method == "noaux_tc"
        is_v2 = self.scoring_func == "softmax" and not self.has_routing_bias and not self.norm_topk_prob
        if not (is_v2 or is_v3):
            raise ConfigError(
                f"no Hugging Face class computes scoring_func={self.scoring_func!r} with "
                f"topk_method={self.topk_method!r} and norm_topk_prob={self.norm_topk_prob}; use sigmoid and noaux_tc, "
                "or softmax with greedy or group_limited_greedy and norm_topk_prob=false"
            )
        values = self.to_dict()
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in ("group_score", "mtp_input_state", "mtp_chain_state", "mtp_loss_normalizer"):
            if values[name] == defaults[name]:
                del values[name]  # our own fields are written only where they say something
        version = "3" if is_v3 else "2"
        return values | {
            "architectures": [f"DeepseekV{version}ForCausalLM"],
            "model_type": f"deepseek_v{version}",
            "num_key_value_heads": self.num_attention_heads,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "moe_layer_freq": 1,
            "rope_interleave": True,
        }


def _problems(config: DeepSeekV3Config) -> list[str]:
    """Return every problem as ``key=value: why; fix``."""
    problems: list[str] = []

    def check(holds: bool, key: str, why: str) -> None:
        if not holds:
            problems.append(f"model.{key}={getattr(config, key)!r}: {why}")

    positive = ["vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
                "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
                "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group",
                "max_position_embeddings"]  # fmt: skip
    if config.q_lora_rank is not None:
        positive.append("q_lora_rank")
    for key in [*positive, "first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"]:
        least = 1 if key in positive else 0
        value = getattr(config, key)
        whole = isinstance(value, int) and not isinstance(value, bool)
        check(whole and value >= least, key, f"must be a whole number of {least} or more")
    for key, choices in _CHOICES.items():
        value = str(getattr(config, key))
        check(value in choices, key, f"is not one of {', '.join(choices)}; {did_you_mean(value, choices)}")
    for key in ("rope_theta", "rms_norm_eps", "routed_scaling_factor", "initializer_range"):
        value = getattr(config, key)
        check(isinstance(value, (int, float)) and math.isfinite(value) and value > 0, key, "must be a positive number")
    if problems:
        return problems  # relations between fields make sense only once each field does

    check(config.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "must be even, as rotary dimensions turn in pairs")
    check(
        config.first_k_dense_replace <= config.num_hidden_layers,
        "first_k_dense_replace",
        f"is more than num_hidden_layers={config.num_hidden_layers}; lower it",
    )
    if config.topk_method == "greedy":
        check(
            config.num_experts_per_tok <= config.n_routed_experts,
            "num_experts_per_tok",
            f"is more than n_routed_experts={config.n_routed_experts}; lower it",
        )
    else:
        problems += _group_problems(config)
    problems += _rope_problems(config.rope_scaling)
    return problems


def _group_problems(config: DeepSeekV3Config) -> list[str]:
    experts, groups, limit = config.n_routed_experts, config.n_group, config.topk_group
    k = config.num_experts_per_tok
    if experts % groups:
        divisors = [g for g in range(1, experts + 1) if experts % g == 0]
        near = min(divisors, key=lambda g: abs(g - groups))
        return [f"model.n_group={groups}: n_routed_experts={experts} is not divisible by it; use n_group={near}"]
    if limit > groups:
        return [f"model.topk_group={limit}: there are only n_group={groups} groups; use at most {groups}"]
    size = experts // groups
    if k > limit * size:
        need = math.ceil(k / size)
        fix = f"use topk_group={need}" if need <= groups else f"use num_experts_per_tok={limit * size}"
        return [
            f"model.topk_group={limit}: {limit} groups of {size} experts hold fewer than num_experts_per_tok={k}; {fix}"
        ]
    if config.group_score == "topk_over_m" and (k % limit or k // limit > size):
        return [
            f"model.group_score='topk_over_m': num_experts_per_tok={k} over topk_group={limit} must be a whole number "
            f"of at most {size} experts; use group_score=top2"
        ]
    return []


def _rope_problems(scaling: Mapping[str, Any] | None) -> list[str]:
    if scaling is None:
        return []
    kind = scaling.get("type")
    if kind != "yarn":
        return [f"model.rope_scaling.type={kind!r}: only 'yarn' is computed; use yarn, or rope_scaling=null"]
    allowed = _YARN_REQUIRED | set(_YARN_OPTIONAL)
    problems = [
        f"model.rope_scaling.{key}={scaling[key]!r}: there is no such field; {did_you_mean(key, allowed)}"
        for key in scaling
        if key not in allowed
    ]
    problems += [f"model.rope_scaling.{key} is missing; give a number" for key in sorted(_YARN_REQUIRED - set(scaling))]
    for key, value in scaling.items():
        if key != "type" and key in allowed and value is not None and not (_is_number(value) and value > 0):
            problems.append(f"model.rope_scaling.{key}={value!r}: must be a positive number")
    return problems


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _refuse_foreign(values: Mapping[str, Any]) -> None:
    """Stop at architectures and options that share DeepSeek-V3's names but compute something else."""
    model_type = values.get("model_type")
    for key, foreign_type in _FOREIGN_KEYS.items():
        if values.get(key) is not None:
            model_type = foreign_type
    if model_type in _FOREIGN_TYPES:
        raise ConfigError(
            f"model_type={model_type!r}: {_FOREIGN_TYPES[model_type]}, which this package does not compute"
        )
    heads = values.get("num_attention_heads")
    for key, ours in {
        "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "moe_layer_freq": 1,
        "rope_interleave": True, "mlp_bias": False, "num_key_value_heads": heads, "mtp_hidden_states_first": False,
    }.items():  # fmt: skip
        value = values.get(key)
        if value is not None and value != ours:
            raise ConfigError(f"{key}={value!r}: this package computes {key}={ours!r} only")


def _rope_from_hf(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return rope_theta and rope_scaling from either way in which Hugging Face writes them."""
    parameters = dict(values.get("rope_parameters") or {})
    scaling = dict(values.get("rope_scaling") or parameters)
    theta = parameters.get("rope_theta", values.get("rope_theta", scaling.get("rope_theta")))
    kind = scaling.pop("rope_type", None) or scaling.get("type") or "default"
    for key in ("rope_theta", "type", "partial_rotary_factor"):
        scaling.pop(key, None)
    rope: dict[str, Any] = {"rope_theta": 10000.0 if theta is None else float(theta), "rope_scaling": None}
    if kind != "default":
        rope["rope_scaling"] = {"type": kind} | {k: v for k, v in scaling.items() if v is not None}
    return rope
