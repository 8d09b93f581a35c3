"""What the speed of decoding rests on, each alone; ``generate.py`` runs it as its parts, beside the whole.

crossover      from how many queries on is expanded attention quicker than absorbed?
experts        what does one token cost, with more and more experts to choose from?
mtp_dropped    does a model that was trained with MTP modules decode as one without?
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_dsv3.config import DeepSeekV3Config
from lightning_dsv3.inference import LatentCache, extend
from lightning_dsv3.layers.mla import MultiHeadLatentAttention
from lightning_dsv3.layers.moe import MixtureOfExperts
from lightning_dsv3.model import DeepSeekV3
from lightning_dsv3.ops.latent_attention import Segment, absorbed_is_cheaper

# Head widths whose crossover is measured; what is not here is the model's.
HEADS: dict[str, dict[str, int]] = {
    "DeepSeek-V3's widths, 16 heads": {
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    },
    "the benchmark's": {},
    "tiny preset's": {
        "num_attention_heads": 4, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
    },
}  # fmt: skip
QUERIES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
SHORTEST_CONTEXT = 512
EXPERTS = (16, 64, 256)
# Far more than a processor's cache holds.
BUFFER_BYTES = 1 << 29

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


def timed(run: Callable[[], Result]) -> tuple[float, Result]:
    """Return the seconds of a run, and its result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def in_turn(runs: Mapping[Key, Callable[[], object]], repeats: int, *, warm_up: bool = True) -> dict[Key, list[float]]:
    """Alternate runs, after one uncounted one of each, and return the seconds of each."""
    if warm_up:
        for run in runs.values():
            run()
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    for _ in range(repeats):
        for key, run in runs.items():
            seconds[key].append(timed(run)[0])
    return seconds


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median of the ratios pair by pair; the longer list's rest has no pair."""
    return statistics.median(a / b for a, b in zip(above, below, strict=False))


def bandwidth(num_bytes: int | None = None) -> tuple[float, float]:
    """Measure a copy, read and written bytes together, and a sum, which only reads: bytes per second, best of four."""
    source = torch.ones((num_bytes or BUFFER_BYTES) // 4)
    target = torch.empty_like(source)
    copy = min(timed(lambda: target.copy_(source))[0] for _ in range(5))
    read = min(timed(source.sum)[0] for _ in range(5))
    return 2 * source.numel() * 4 / copy, source.numel() * 4 / read


def num_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def measure_crossover(model: Mapping[str, Any], contexts: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Print and return where the forms of attention cross, for widths of heads and contexts."""
    print(f"\n{'attention to a cache':<34}{'context':>8}{'expanded is quicker from':>27}{'counted':>9}{'lost':>7}")
    rows = []
    for name, widths in HEADS.items():
        for context in sorted({max(c, SHORTEST_CONTEXT) for c in contexts}):
            row = {"heads": name, "context": context, **crossover(dict(model) | widths, context, repeats)}
            rows.append(row)
            print(
                f"{name:<34}{context:>8}{row['measured'] or 'never':>27}{row['counted'] or 'never':>9}"
                f"{row['largest_loss']:>7.0%}",
                flush=True,
            )
    return rows


def crossover(values: Mapping[str, Any], context: int, repeats: int) -> dict[str, Any]:
    """Time both forms for more and more queries of one text.

    Returns:
        ``measured``, the number of queries from which on the expanded form is quicker, of those that were tried;
        ``counted``, from which on the package takes it, by its rule; ``largest_loss``, what
        following that rule costs at the most, over the quicker form; and the points themselves.
    """
    config = DeepSeekV3Config(**values)
    layer = MultiHeadLatentAttention(config).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=config.initializer_range)
    cache = LatentCache(config, 1, num_layers=1)

    def attend(x_BSD: Tensor, absorbed: bool) -> None:
        extension = cache.prepare(x_BSD.shape[1])
        with mock.patch("lightning_dsv3.layers.mla.absorbed_is_cheaper", return_value=absorbed):
            layer(x_BSD, extension.positions, extension.layer(0))
        if not cache.lengths[0]:
            extension.commit()

    attend(torch.randn(1, context, config.hidden_size), False)
    points = []
    for queries in QUERIES:
        x_BSD = torch.randn(1, queries, config.hidden_size)
        seconds = in_turn({form: lambda x=x_BSD, f=form: attend(x, f) for form in (True, False)}, repeats)
        absorbed, expanded = statistics.median(seconds[True]), statistics.median(seconds[False])
        by_rule = absorbed if counted_cheaper(config, context, queries) else expanded
        points.append({
            "queries": queries, "absorbed_seconds": absorbed, "expanded_seconds": expanded,
            "loss": by_rule / min(absorbed, expanded) - 1,
        })  # fmt: skip
    quicker = [point["expanded_seconds"] < point["absorbed_seconds"] for point in points]
    measured = next((point["queries"] for i, point in enumerate(points) if all(quicker[i:])), None)
    counted = next((queries for queries in range(1, 4096) if not counted_cheaper(config, context, queries)), None)
    return {
        "measured": measured, "counted": counted, "largest_loss": max(point["loss"] for point in points),
        "points": points,
    }  # fmt: skip


def counted_cheaper(config: DeepSeekV3Config, context: int, queries: int) -> bool:
    """Ask the package's rule whether the absorbed form is the cheaper one."""
    segment = Segment(torch.empty(1, context + queries, 1, device="meta"), 0, 1, 0, None)
    return absorbed_is_cheaper(
        [segment], queries, latent_dim=config.kv_lora_rank, rope_dim=config.qk_rope_head_dim,
        nope_dim=config.qk_nope_head_dim, v_head_dim=config.v_head_dim,
    )  # fmt: skip


def measure_experts(model: Mapping[str, Any], repeats: int) -> list[dict[str, Any]]:
    """Print and return what one token costs a layer with more and more experts, beside a pass over all of them."""
    print(f"\n{'one token, experts':<20}{'chosen, us':>12}{'all, us':>12}{'MB chosen':>12}{'GB/s':>8}{'MB all':>10}")
    rows = []
    for experts in EXPERTS:
        row = {"experts": experts} | one_token(dict(model) | {"n_routed_experts": experts}, repeats)
        rows.append(row)
        print(
            f"{experts:<20}{row['chosen_seconds'] * 1e6:>12,.0f}{row['all_seconds'] * 1e6:>12,.0f}"
            f"{row['chosen_bytes'] / 1e6:>12.1f}{row['chosen_bytes'] / row['chosen_seconds'] / 1e9:>8.1f}"
            f"{row['all_bytes'] / 1e6:>10.1f}",
            flush=True,
        )
    return rows


def one_token(values: Mapping[str, Any], repeats: int) -> dict[str, Any]:
    """Time a layer without its shared experts, as it is and as a pass over all its experts.

    There are as many layers as have ``max(EXPERTS)`` experts together, used in turn with a new token each time: the
    weights are not in the processor's cache, however few experts a layer has.
    """
    config = DeepSeekV3Config(**dict(values) | {"n_shared_experts": 0})
    layers = [MixtureOfExperts(config).eval() for _ in range(max(EXPERTS) // config.n_routed_experts)]
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=config.initializer_range)
    state = {"next": 0}

    def next_layer() -> tuple[MixtureOfExperts, Tensor]:
        state["next"] += 1
        return layers[state["next"] % len(layers)], torch.randn(1, 1, config.hidden_size)

    def chosen() -> Tensor:
        layer, x_BSD = next_layer()
        return layer(x_BSD)[0]

    def over_all() -> Tensor:
        layer, x_BSD = next_layer()
        return dense_pass(layer, x_BSD)

    layer, x_BSD = next_layer()
    torch.testing.assert_close(layer(x_BSD)[0], dense_pass(layer, x_BSD), rtol=1e-4, atol=1e-5)
    seconds = in_turn({"chosen": chosen, "all": over_all}, max(repeats, 2 * len(layers)))
    expert = num_bytes(layer.experts.gate_up[0]) + num_bytes(layer.experts.down[0])
    return {
        "chosen_seconds": statistics.median(seconds["chosen"]), "all_seconds": statistics.median(seconds["all"]),
        "chosen_bytes": config.num_experts_per_tok * expert, "all_bytes": config.n_routed_experts * expert,
    }  # fmt: skip


def dense_pass(layer: MixtureOfExperts, x_BSD: Tensor) -> Tensor:
    """Compute all experts of a layer for one token, and weigh those that were not chosen with 0."""
    routing = layer.router(x_BSD.flatten(0, 1))
    gate_E = torch.zeros(layer.experts.num_experts).scatter_(0, routing.expert_TK[0], routing.gate_TK[0])
    gate_EF, up_EF = torch.mv(layer.experts.gate_up.flatten(0, 1), x_BSD.flatten()).view(len(gate_E), -1).chunk(2, -1)
    h_EF = nn.functional.silu(gate_EF) * up_EF * gate_E.unsqueeze(-1)
    return torch.bmm(layer.experts.down, h_EF.unsqueeze(-1)).sum(dim=0).view_as(x_BSD)


def measure_mtp_dropped(model: Mapping[str, Any], repeats: int, context: int = 128) -> dict[str, Any]:
    """Print and return what a step touches, and takes, in models of the same weights with and without MTP modules."""
    torch.manual_seed(0)
    models = {
        "with": DeepSeekV3(DeepSeekV3Config(**dict(model) | {"num_nextn_predict_layers": 1})).eval(),
        "without": DeepSeekV3(DeepSeekV3Config(**dict(model) | {"num_nextn_predict_layers": 0})).eval(),
    }
    main = {key: value for key, value in models["with"].state_dict().items() if not key.startswith("mtp.")}
    models["without"].load_state_dict(main)
    ids = torch.randint(0, models["with"].config.vocab_size, (1, context))
    steps, touched = {}, {}
    for name, one in models.items():
        cache = LatentCache(one.config, 1)
        extend(one, cache, ids)
        steps[name] = lambda one=one, cache=cache: one_step(one, cache, ids[:, :1])
        with TouchedParameters(one) as seen:
            logits = steps[name]()
        touched[name] = seen
        if name == "with":
            first = logits
    if not torch.equal(first, logits) or touched["with"].names != touched["without"].names:
        raise RuntimeError("a model with MTP modules does not decode as one without them")
    seconds = in_turn(steps, max(repeats, 15))
    count = {name: sum(p.numel() for p in one.parameters()) for name, one in models.items()}
    result = {
        "parameters": count, "touched_parameters": {name: seen.num_parameters for name, seen in touched.items()},
        "touched_tensors": len(touched["with"].names),
        "step_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratio": median_ratio(seconds["with"], seconds["without"]),
    }  # fmt: skip
    print(
        f"\ntrained with MTP: {count['with'] / 1e6:.0f}M parameters, a step touches the same "
        f"{len(touched['with'].names)} tensors as without ({count['without'] / 1e6:.0f}M); its time over that of the "
        f"model without: {result['ratio']:.3f}",
        flush=True,
    )
    return result


def one_step(model: DeepSeekV3, cache: LatentCache, ids: Tensor) -> Tensor:
    """Return the logits of a step, which the cache then forgets."""
    before = list(cache.lengths)
    logits = model.head(extend(model, cache, ids).hidden)
    cache.truncate(before)
    return logits


class TouchedParameters(TorchDispatchMode):
    """Sees which of a model's parameters operators are given; of experts and embeddings, the whole stack counts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters()}
        self._sizes = {name: p.numel() for name, p in model.named_parameters()}
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                name = self._names.get(leaf.untyped_storage().data_ptr())
                if name is not None:
                    self.names.add(name)
        return func(*args, **(kwargs or {}))

    @property
    def num_parameters(self) -> int:
        """Return how many values the tensors have that were touched."""
        return sum(self._sizes[name] for name in self.names)
