"""The latent cache: what a model says with it is what it says of the whole text at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import tiny_model

from lightning_dsv3.inference import LatentCache, extend, reads
from lightning_dsv3.inference.cache import extend_rows
from lightning_dsv3.layers import mla
from lightning_dsv3.ops import latent_attention
from lightning_dsv3.parallel import checkpoint_blocks, compile_model

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.707,
}
MODELS = {
    "plain": {},
    "yarn": {"rope_scaling": YARN},
    "no_q_rank": {"q_lora_rank": None},
    "wide_value": {"v_head_dim": 24},
}


@pytest.fixture(scope="module", params=MODELS, ids=str)
def model(request):
    return tiny_model(**MODELS[request.param])


def tokens(seed, *shape):
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def plain_logits(model, text):
    with torch.no_grad():
        return model(torch.tensor([text])).logits[0]


class Texts:
    """A cache beside the plain texts that it should hold."""

    def __init__(self, model, batch_size):
        self.model = model
        self.cache = LatentCache(model.config, batch_size)
        self.texts = [[] for _ in range(batch_size)]

    def extend(self, ids, num_tokens):
        output = extend(self.model, self.cache, ids, num_tokens)
        for row, new in enumerate(num_tokens):
            self.texts[row] = self.texts[row] + ids[row, :new].tolist()
            if new:
                expected = plain_logits(self.model, self.texts[row])[-new:]
                torch.testing.assert_close(self.model.head(output.hidden[row, :new]), expected, atol=1e-5, rtol=1e-5)
        assert self.cache.lengths == [len(text) for text in self.texts]


@pytest.fixture(params=["absorbed", "expanded", "absorbed, fused", "expanded, fused", "as chosen"])
def form(request, monkeypatch):
    form, _, fused = request.param.partition(", ")
    if form != "as chosen":
        monkeypatch.setattr(mla, "absorbed_is_cheaper", lambda *_, **__: form == "absorbed")
        monkeypatch.setattr(latent_attention, "_FUSED_QUERIES", 1 if fused else 10**9)
        # Every row of another length by itself.
        monkeypatch.setattr(reads, "_LITTLE", 0)
        monkeypatch.setattr(reads, "_MOST_PADDING", 0)


@pytest.mark.usefixtures("form")
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_sequence_of_passes_forks_and_truncations_equals_the_plain_forward(model, data):
    rows = data.draw(st.integers(1, 3), "rows")
    live = [Texts(model, rows)]
    for step in range(data.draw(st.integers(2, 6), "steps")):
        at = live[data.draw(st.integers(0, len(live) - 1), "which cache")]
        size = at.cache.batch_size
        action = data.draw(st.sampled_from(["extend", "extend", "fork", "select", "truncate"]), "action")
        if action == "extend":
            width = data.draw(st.integers(1, 12), "width")
            ragged = st.lists(st.integers(0, width), min_size=size, max_size=size).filter(any)
            counts = st.one_of(st.just([width] * size), ragged)
            at.extend(tokens(step, size, width), data.draw(counts, "counts"))
        elif action in ("fork", "select"):
            chosen = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4), "rows of it")
            new = Texts(model, len(chosen))
            new.texts = [list(at.texts[row]) for row in chosen]
            if action == "fork":
                starts = [at.cache._starts[row] for row in chosen]
                lengths = [
                    data.draw(st.integers(start, len(text)), "length")
                    for start, text in zip(starts, new.texts, strict=True)
                ]
                new.texts = [text[:length] for text, length in zip(new.texts, lengths, strict=True)]
                new.cache = at.cache.fork(chosen, lengths)
            else:
                new.cache = at.cache.select(chosen)
            live.append(new)
        else:
            least = [max(s, h) for s, h in zip(at.cache._starts, at.cache._held, strict=True)]
            lengths = [
                data.draw(st.integers(low, len(text)), "kept") for low, text in zip(least, at.texts, strict=True)
            ]
            at.cache.truncate(lengths)
            at.texts = [text[:length] for text, length in zip(at.texts, lengths, strict=True)]
    for number, texts in enumerate(live):
        texts.extend(tokens(100 + number, texts.cache.batch_size, 2), [2] * texts.cache.batch_size)


def test_the_first_tokens_are_computed_as_in_training(model):
    ids = tokens(0, 2, 9)
    with torch.no_grad():
        expected = model(ids).hidden
    assert torch.equal(extend(model, LatentCache(model.config, 2), ids).hidden, expected)


def test_growing_copies_nothing():
    model = tiny_model()
    cache = LatentCache(model.config, 1)
    places = []
    for step in range(400):
        extend(model, cache, tokens(step, 1, 1))
        here = [chunk.latent.data_ptr() for chunk in cache._chunks]
        assert here[: len(places)] == places
        places = here
    assert len(places) <= 6


def test_a_token_takes_latent_and_rotary_key_in_each_layer():
    model = tiny_model()
    config = model.config
    cache = LatentCache(config, 3)
    extend(model, cache, tokens(0, 3, 640))
    per_token = config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * 4
    assert cache.num_bytes == 3 * 640 * per_token


def test_a_fork_takes_memory_for_its_own_tokens_only():
    model = tiny_model()
    cache = LatentCache(model.config, 1)
    extend(model, cache, tokens(0, 1, 640))
    branches = cache.fork([0] * 4)
    assert branches.num_bytes == 0
    extend(model, branches, tokens(1, 4, 3))
    assert branches.num_bytes == cache.num_bytes * 4 * 3 / 640


def test_branches_that_stand_together_are_read_in_one_product():
    model = tiny_model()
    cache = LatentCache(model.config, 3)
    extend(model, cache, tokens(0, 3, 8))
    latent = torch.zeros(6, 2, model.config.kv_lora_rank + model.config.qk_rope_head_dim)

    def segments(rows):
        return cache.fork(rows).prepare(2).append(0, latent[: len(rows)])

    assert [s.branches for s in segments([0, 0, 1, 1, 2, 2])] == [2, 1]
    assert [s.branches for s in segments([0, 0, 0, 2])] == [3, 1, 1]


def test_queries_in_slices_are_the_same(monkeypatch):
    model = tiny_model()
    ids = tokens(0, 2, 30)
    whole = LatentCache(model.config, 2)
    extend(model, whole, ids[:, :10])
    expected = extend(model, whole.fork([0, 1]), ids[:, 10:]).hidden
    monkeypatch.setattr(latent_attention, "_MOST_SCORES", 700)
    torch.testing.assert_close(extend(model, whole.fork([0, 1]), ids[:, 10:]).hidden, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("counts", [[40, 38, 3, 2, 9], [5, 5, 5]])
def test_rows_of_any_lengths_behind_any_prefixes_are_those_of_each_text(counts):
    model = tiny_model()
    prefixes = [tokens(n, 9 + n).tolist() for n in range(2)]
    news = [tokens(10 + n, count).tolist() for n, count in enumerate(counts)]
    cache = LatentCache(model.config, 2)
    first = extend_rows(model, cache, prefixes)
    of = [0 if row < 3 else 1 for row in range(len(news))]
    hidden = [*first.split([9, 10]), *extend_rows(model, cache.fork(of), news).split(counts)]
    texts = [*prefixes, *(prefixes[at] + new for at, new in zip(of, news, strict=True))]
    for states, text in zip(hidden, texts, strict=True):
        expected = plain_logits(model, text)[-len(states) :]
        torch.testing.assert_close(model.head(states), expected, atol=1e-5, rtol=1e-5)


def test_rows_of_like_length_are_read_together():
    model = tiny_model()
    config = model.config
    cache = LatentCache(config, 1)
    extend(model, cache, tokens(0, 1, 500))
    news = [300, 290, 30, 20]
    with torch.no_grad():
        extension = cache.fork([0] * 4).prepare(300, news)
        latent = torch.zeros(1, sum(news), config.kv_lora_rank + config.qk_rope_head_dim)
        segments = extension.append(0, latent)
    found = [(s.rows.start, s.rows.stop, s.branches, s.num_queries, s.is_causal) for s in segments]
    assert found == [(0, 2, 2, 300, False), (2, 4, 2, 30, False), (0, 2, 1, 300, True), (2, 4, 1, 30, True)]


def test_bfloat16_stays_near_float32():
    model = tiny_model()
    ids = tokens(0, 2, 40)
    with torch.no_grad():
        expected = model(ids).logits
    half = tiny_model().to(torch.bfloat16)
    cache = LatentCache(half.config, 2)
    parts = [extend(half, cache, part).hidden for part in ids.split(10, dim=1)]
    assert cache._chunks[0].latent.dtype == torch.bfloat16
    with torch.no_grad():
        logits = half.head(torch.cat(parts, dim=1)).float()
    assert (logits - expected).norm() / expected.norm() < 0.05


def test_a_pass_that_fails_leaves_the_cache_as_it_was(monkeypatch):
    model = tiny_model()
    texts = Texts(model, 2)
    texts.extend(tokens(0, 2, 5), [5, 3])
    with monkeypatch.context() as patch:

        def fail(*_):
            raise RuntimeError("out of memory")

        patch.setattr(model.blocks[1].feed_forward, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            extend(model, texts.cache, tokens(1, 2, 70))
    texts.extend(tokens(2, 2, 4), [4, 4])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m, c: extend(m, c, tokens(0, 2, 200)), r"row 0 would have 205 tokens.*max_position_embeddings=200"),
        (lambda m, c: extend(m, c, tokens(0, 3, 2)), r"input_ids: shape \[3, 2\].*2 rows"),
        (lambda m, c: extend(m, c, tokens(0, 2, 2), [3, 1]), r"num_tokens\[0\]=3"),
        (lambda m, c: extend(m, c, tokens(0, 2, 2), [1]), r"num_tokens: has 1 values"),
        (lambda m, c: extend(m, c, tokens(0, 2, 2), [0, 0]), r"num_tokens: no row has a new token"),
        (
            lambda m, c: extend(tiny_model(kv_lora_rank=8), c, tokens(0, 2, 2)),
            r"another configuration \(kv_lora_rank=16",
        ),
        (lambda m, c: c.truncate([6, 0]), r"truncate: row 0 cannot have 6 tokens; it has 5"),
        (lambda m, c: c.fork([1], [6]), r"fork: row 1 cannot have 6 tokens"),
        (lambda m, c: c.fork([0]).truncate([4]), r"first 5 are another cache's"),
        (lambda m, c: (c.fork([0], [3]), c.truncate([2, 5])), r"lengths\[0\]=2: forks.*first 3"),
    ],
)
def test_what_cannot_be_is_one_clear_error(act, message):
    model = tiny_model(max_position_embeddings=200)
    cache = LatentCache(model.config, 2)
    extend(model, cache, tokens(0, 2, 5))
    with pytest.raises(ValueError, match=message):
        act(model, cache)


@pytest.mark.parametrize("part", ["model", "blocks"])
def test_a_compiled_model_and_one_that_recomputes_are_run_as_they_are(part):
    plain, model = tiny_model(), tiny_model()
    compile_model(checkpoint_blocks(model), part, backend="eager")
    ids = tokens(0, 2, 9)
    caches = [LatentCache(plain.config, 2) for _ in range(2)]
    for some in ids.split(4, dim=1):
        assert torch.equal(extend(model, caches[0], some).hidden, extend(plain, caches[1], some).hidden)


def test_padding_is_not_computed():
    model = tiny_model()
    seen = []
    model.blocks[1].feed_forward.register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    cache = LatentCache(model.config, 3)
    extend(model, cache, tokens(0, 3, 9), [9, 2, 0])
    extend(model, cache, tokens(0, 3, 4), [1, 4, 4])
    extend(model, cache, tokens(0, 3, 4))
    assert [shape[:2] for shape in seen] == [(1, 11), (1, 9), (3, 4)]


class TestExperts:
    def test_few_tokens_touch_the_experts_they_use_alone(self):
        model = tiny_model(n_routed_experts=16, num_experts_per_tok=2)
        layer = model.blocks[-1].feed_forward
        x = torch.randn(1, 1, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected, routing = layer(x)
            idle = [e for e in range(16) if e not in routing.expert_TK.tolist()[0]]
            layer.experts.gate_up[idle] = float("nan")
            layer.experts.down[idle] = float("nan")
            assert torch.equal(layer(x)[0], expected)
