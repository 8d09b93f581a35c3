"""Tensor names: ours, and those of the Hugging Face layout of DeepSeek-V2/V3. The only place that knows both.

Two of our tensors are several of theirs: ``gate_up`` is ``gate_proj`` above ``up_proj``, and the experts' stacks hold
one matrix per expert. An MTP module k is layer ``num_hidden_layers + k`` there, with copies of the embedding and head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lightning_dsv3.config import DeepSeekV3Config


@dataclass(frozen=True)
class Entry:
    """One tensor of ours.

    Attributes:
        name: Our name.
        parts: Names there, as rows to put above one another, per expert where ``stacked``.
        stacked: The tensor has a leading expert dimension with one item of ``parts`` per expert.
    """

    name: str
    parts: tuple[tuple[str, ...], ...]
    stacked: bool = False

    def part_shapes(self, shape: Sequence[int]) -> dict[str, list[int]]:
        """Return the shape of each part, given that of our tensor."""
        rows, *columns = shape[1:] if self.stacked else shape
        return {name: [rows // len(part), *columns] for part in self.parts for name in part}


def layout(config: DeepSeekV3Config) -> Iterator[Entry]:
    """Yield the entries of a model in the order of its layers."""
    yield _one("embedding.weight", "model.embed_tokens.weight")
    for layer in range(config.num_hidden_layers):
        yield from _block(
            config, f"blocks.{layer}", f"model.layers.{layer}", dense=layer < config.first_k_dense_replace
        )
    yield _one("norm.weight", "model.norm.weight")
    if not config.tie_word_embeddings:
        yield _one("head.weight", "lm_head.weight")
    for depth in range(config.num_nextn_predict_layers):
        ours, theirs = f"mtp.{depth}", f"model.layers.{config.num_hidden_layers + depth}"
        yield _one(f"{ours}.embedding_norm.weight", f"{theirs}.enorm.weight")
        yield _one(f"{ours}.hidden_norm.weight", f"{theirs}.hnorm.weight")
        yield _one(f"{ours}.projection.weight", f"{theirs}.eh_proj.weight")
        yield from _block(config, f"{ours}.block", theirs, dense=False)
        yield _one(f"{ours}.norm.weight", f"{theirs}.shared_head.norm.weight")


def mtp_copies(config: DeepSeekV3Config) -> dict[str, str]:
    """Return the tensors that an MTP layer repeats there: name of the copy to our name."""
    head = "embedding.weight" if config.tie_word_embeddings else "head.weight"
    copies = {}
    for depth in range(config.num_nextn_predict_layers):
        theirs = f"model.layers.{config.num_hidden_layers + depth}"
        copies[f"{theirs}.embed_tokens.weight"] = "embedding.weight"
        copies[f"{theirs}.shared_head.head.weight"] = head
    return copies


def _one(ours: str, theirs: str) -> Entry:
    return Entry(ours, ((theirs,),))


def _block(config: DeepSeekV3Config, ours: str, theirs: str, *, dense: bool) -> Iterator[Entry]:
    attention = {"kv_down": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "kv_up": "kv_b_proj", "output": "o_proj"}
    if config.q_lora_rank is None:
        attention["q"] = "q_proj"
    else:
        attention |= {"q.down": "q_a_proj", "q.norm": "q_a_layernorm", "q.up": "q_b_proj"}
    yield _one(f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight")
    for our_part, their_part in attention.items():
        yield _one(f"{ours}.attention.{our_part}.weight", f"{theirs}.self_attn.{their_part}.weight")
    yield _one(f"{ours}.feed_forward_norm.weight", f"{theirs}.post_attention_layernorm.weight")
    if dense:
        yield from _feed_forward(f"{ours}.feed_forward", f"{theirs}.mlp")
        return
    yield _one(f"{ours}.feed_forward.router.weight", f"{theirs}.mlp.gate.weight")
    if config.has_routing_bias:
        yield _one(f"{ours}.feed_forward.router.bias", f"{theirs}.mlp.gate.e_score_correction_bias")
    experts = [f"{theirs}.mlp.experts.{e}" for e in range(config.n_routed_experts)]
    gate_up = tuple((f"{expert}.gate_proj.weight", f"{expert}.up_proj.weight") for expert in experts)
    yield Entry(f"{ours}.feed_forward.experts.gate_up", gate_up, stacked=True)
    down = tuple((f"{expert}.down_proj.weight",) for expert in experts)
    yield Entry(f"{ours}.feed_forward.experts.down", down, stacked=True)
    if config.n_shared_experts:
        yield from _feed_forward(f"{ours}.feed_forward.shared", f"{theirs}.mlp.shared_experts")


def _feed_forward(ours: str, theirs: str) -> Iterator[Entry]:
    yield Entry(f"{ours}.gate_up.weight", ((f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight"),))
    yield _one(f"{ours}.down.weight", f"{theirs}.down_proj.weight")
