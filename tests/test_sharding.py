# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The op and whole generation over meshes: the results of one device, and what is exchanged."""

import functools
import importlib
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import collectives, kinds, mesh, on_gpu, put, suited
from reference import assert_close, attend, problem

import mla_jax
from mla_jax import (
    DeepseekConfig,
    DeepseekForCausalLM,
    PagePoolFullError,
    generate,
    pallas,
    shard,
)

generation = importlib.import_module("mla_jax.generate")

# --- The op under plain jit -----------------------------------------------------------------------


class Cut(NamedTuple):
    """How operands lie on a mesh of `x` and `y`, and what may then be exchanged."""

    q: tuple = ()
    pool: tuple = ()
    rows: tuple = ()
    exchanged: frozenset = frozenset()
    out: tuple = ()


MERGED = frozenset({"all-reduce"})
CUTS = {
    "heads": Cut(q=(None, None, "y"), out=(None, None, "y")),
    "sequences": Cut(q=("x",), rows=("x",), out=("x",)),
    "sequences and heads": Cut(q=("x", None, "y"), rows=("x",), out=("x", None, "y")),
    "pages": Cut(pool=("x",), exchanged=MERGED),
    "pages by two axes": Cut(pool=(("y", "x"),), exchanged=MERGED),
    "slots": Cut(pool=(None, "y"), exchanged=MERGED),
    "pages and slots": Cut(pool=("x", "y"), exchanged=MERGED),
    "slots and heads": Cut(
        q=(None, None, "y"), pool=(None, "x"), exchanged=MERGED, out=(None, None, "y")
    ),
    # Sequences on devices that hold other tokens: queries travel, the pool does not.
    "sequences and pages by one axis": Cut(
        q=("x",), pool=("x",), rows=("x",), exchanged=MERGED | {"all-gather"}
    ),
}


def sizes_for(cut):
    """Returns x = 2 and y = 4, or, where devices are too few, the first axis that is cut alone."""
    if jax.device_count() >= 8:
        return {"x": 2, "y": 4}
    return {"x": 2, "y": 1} if "x" in str(cut[:3]) else {"x": 1, "y": 2}


def laid_out(p, cut, kind):
    m = mesh(kind, **sizes_for(cut))
    q, k_cache, table, lengths = p.arrays()
    return (
        put(q, m, *cut.q),
        put(k_cache, m, *cut.pool),
        put(table, m, *cut.rows),
        put(lengths, m, *cut.rows),
    )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("cut", CUTS)
def test_jit_of_sharded_operands(op, implementation, cut, kind):
    """Sequences end in different pages; the pool is poisoned where no one may read."""
    p = problem([130, 70, 3, 0], h_q=8, s_q=2, num_pages=16, **suited(implementation))
    cut = CUTS[cut]
    arrays = laid_out(p, cut, kind)
    compiled = jax.jit(lambda *a: op(*a, 512, causal=True)).lower(*arrays).compile()
    got = compiled(*arrays)
    assert_close(got, attend(p, causal=True))
    exchanged = collectives(compiled.as_text())
    assert set(exchanged) == cut.exchanged
    # At most the queries and what is small, or the merged results: never the pool, nor what is
    # gathered from it.
    largest = max(p.q.size + p.block_table.size + len(p.q), 4 * 2 * 8 * 513)
    assert all(size <= largest for sizes in exchanged.values() for size in sizes)
    assert largest < p.k_cache.size
    if kind == AxisType.Auto and len(cut.exchanged) < 2:
        expected = NamedSharding(arrays[0].sharding.mesh, P(*cut.out))
        assert got[0].sharding.is_equivalent_to(expected, 4)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="pallas: it needs jax 0.11 or newer")
def test_pallas_has_no_effects():
    """JAX refuses them in what it hands to XLA's partitioner, whatever they are."""
    p = problem([300, 10])
    options = {"head_dim_v": 512, "softmax_scale": 0.1, "causal": False, "batch_invariant": False}
    run = functools.partial(pallas.decode, num_sms=132, **options)
    assert not jax.make_jaxpr(run)(*p.arrays()).effects


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_kv_heads_go_with_their_queries(op, kind):
    p = problem([33, 9], h_q=8, h_kv=4, page_size=16, dtype="float32")
    heads = (None, None, "y")
    for cut in (Cut(q=heads, pool=heads), Cut(q=heads), Cut(pool=heads)):
        run = jax.jit(lambda *a: op(*a, 512))
        arrays = laid_out(p, cut, kind)
        assert_close(run(*arrays), attend(p))
        exchanged = collectives(run.lower(*arrays).compile().as_text())
        assert max(sum(exchanged.values(), [0])) <= p.q.size


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_pool_cut_by_channels_is_refused(op, kind):
    arrays = laid_out(problem([3], dtype="float32"), Cut(pool=(None, None, None, "y")), kind)
    message = r"k_cache: got d_k cut over mesh axes \('y',\), expected pages, slots or heads"
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=message):
        jax.jit(lambda *a: op(*a, 512))(*arrays)


THREE_AXES = (
    {"data": 2, "tensor": 2, "context": 2}
    if jax.device_count() >= 8
    else {"data": 2, "tensor": 1, "context": 1}
)
SMALL = {"d_k": 24, "d_v": 16, "page_size": 8, "num_pages": 16, "dtype": "float32"}


def loss_of(run):
    def loss(*arrays):
        out, lse = run(*arrays, head_dim_v=16, causal=True)
        return jnp.sin(out).sum() + jnp.where(jnp.isinf(lse), 0, jnp.sin(lse)).sum()

    return loss


def assert_gradients(run, arrays, p):
    """Compiles the gradients of `loss_of(run)`, and compares them with those of one device."""
    expected = jax.jit(jax.grad(loss_of(mla_jax.flash_mla_with_kvcache), (0, 1)))(*p.arrays())
    compiled = jax.jit(jax.grad(loss_of(run), (0, 1))).lower(*arrays).compile()
    got = compiled(*arrays)
    for x, y in zip(got, expected, strict=True):
        assert np.abs(y).max() > 0.1
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    return got, collectives(compiled.as_text())


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    "cut", ["sequences and heads", "pages by two axes", "pages and slots", "slots and heads"]
)
def test_gradients_of_sharded_operands(cut, kind):
    """A pool that is cut is not exchanged for them, nor is its gradient, which lies as it does."""
    p = problem([40, 9, 3, 0], h_q=8, s_q=2, **SMALL)
    cut = CUTS[cut]
    arrays = laid_out(p, cut, kind)
    (dq, dk_cache), exchanged = assert_gradients(mla_jax.flash_mla_with_kvcache, arrays, p)
    assert set(exchanged) == {"all-reduce"}
    shards = arrays[1].size // arrays[1].addressable_shards[0].data.size
    largest = max(p.q.size, p.k_cache.size // shards)  # its parts add up over other axes
    assert all(size <= largest for size in exchanged["all-reduce"])
    assert dk_cache.sharding.is_equivalent_to(arrays[1].sharding, 4)
    assert dq.sharding.is_equivalent_to(arrays[0].sharding, 4)


def test_partly_manual_mesh(op, implementation):
    """Inside a shard_map over some axes, the names of the others decide."""
    p = problem([130, 70, 3, 0], h_q=8, s_q=2, num_pages=16, **suited(implementation))
    rows = P("data")
    run = functools.partial(op, head_dim_v=512, causal=True)

    def mapped(m):
        return jax.jit(
            jax.shard_map(
                run, mesh=m, in_specs=(rows, P(), rows, rows), out_specs=rows, axis_names={"data"}
            )
        )

    m = mesh(**THREE_AXES)
    q, k_cache, *rest = p.arrays()
    arrays = (put(q, m, "data", None, "tensor"), put(k_cache, m, None, "context"), *rest)
    compiled = mapped(m).lower(*arrays).compile()
    assert_close(compiled(*arrays), attend(p, causal=True))
    assert set(collectives(compiled.as_text())) <= {"all-reduce"}


def test_partly_manual_mesh_of_unknown_axes(op):
    m = mesh(data=2, rows=2)
    run = jax.shard_map(
        functools.partial(op, head_dim_v=512), mesh=m, in_specs=P("data"), out_specs=P("data"),
        axis_names={"data"},
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"leaves mesh axes \['rows'\] automatic, expected 'tens"):
        jax.jit(run)(*problem([130, 70], num_pages=16, dtype="float32").arrays())


# --- Inside shard_map -----------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("cut", "pool"), [("slots", P(None, "context")), ("pages", P("context"))])
def test_context_parallel_decode(op, implementation, cut, pool, causal):
    """Every way that the newest tokens may lie: in one device's slots or pages, or in several."""
    size = suited(implementation)["page_size"]
    borders = [size - 1, size, size + 1, size + 2, 2 * size - 1, 2 * size + 1]
    lengths = [0, 1, 2, 3, *borders, 6 * size + 4]
    p = problem(lengths, s_q=3, num_pages=40, **suited(implementation))
    table = p.block_table.copy()
    table[-1, 2:4] = [-1, 2**31 - 1]  # pages of zeros, counted once
    p = replace(p, block_table=table)
    m = mesh(context=min(4, max(2, jax.device_count())))
    op(*p.arrays(), 512)  # skips where the implementation cannot run
    run = functools.partial(
        mla_jax.context_parallel_decode,
        head_dim_v=512,
        causal=causal,
        cut=cut,
        implementation=implementation,
    )
    specs = {"in_specs": (P(), pool, P(), P()), "out_specs": P()}
    mapped = jax.jit(jax.shard_map(run, mesh=m, **specs))
    compiled = mapped.lower(*p.arrays()).compile()
    assert_close(compiled(*p.arrays()), attend(p, causal=causal))
    exchanged = collectives(compiled.as_text())
    assert set(exchanged) == {"all-reduce"}
    b, s_q, h_q, _ = p.q.shape
    assert sum(exchanged["all-reduce"]) == b * s_q * h_q * (1 + 1 + 512)  # largest, sum, outputs


@pytest.mark.parametrize("where", ["rows and heads", "slots", "partly manual"])
def test_gradients_inside_shard_map(where):
    """With JAX's check of what varies over which axes, which sums the gradients of the rest."""
    p = problem([40, 9, 3, 0], h_q=8, s_q=2, **SMALL)
    op, options = mla_jax.flash_mla_with_kvcache, {}
    if where == "slots":
        op, m = mla_jax.context_parallel_decode, mesh(context=2)
        specs = (P(), P(None, "context"), P(), P()), P()
    elif where == "rows and heads":
        m = mesh(x=2, y=2 if jax.device_count() >= 4 else 1)
        specs = (P("x", None, "y"), P(), P("x"), P("x")), (P("x", None, "y"), P("x", "y"))
    else:
        m, options = mesh(**THREE_AXES), {"axis_names": {"data"}}
        specs = (P("data"), P(), P("data"), P("data")), P("data")
    run = lambda *arrays, **kw: jax.shard_map(  # noqa: E731
        functools.partial(op, **kw), mesh=m, in_specs=specs[0], out_specs=specs[1], **options
    )(*arrays)
    _, exchanged = assert_gradients(run, p.arrays(), p)
    assert set(exchanged) == {"all-reduce"}


def test_context_parallel_decode_refuses():
    with pytest.raises(ValueError, match='cut: got "?\'heads\', expected "slots" or "pages"'):
        mla_jax.context_parallel_decode(*problem([3]).arrays(), 512, cut="heads")


# --- Whole models ---------------------------------------------------------------------------------

CONFIG = DeepseekConfig(
    model_type="deepseek_v3",
    vocab_size=200,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=8,
    q_lora_rank=12,
    kv_lora_rank=24,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    topk_method="noaux_tc",
    moe_intermediate_size=16,
    n_shared_experts=1,
    max_position_embeddings=512,
)
PROMPTS = [[5, 9, 3, 30, 2], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
OPTIONS = {"max_new_tokens": 20, "page_size": 8}


def make(m=None):
    model = DeepseekForCausalLM(CONFIG, rngs=nnx.Rngs(3))
    model.lm_head.kernel[...] *= 8  # sharp logits: tokens vary and do not hang on rounding
    if m is not None:
        shard(model, m)
    return model


@pytest.fixture(scope="module")
def expected():
    tokens = generate(make(), PROMPTS, **OPTIONS)
    assert min(len(set(t)) for t in tokens) > 3
    return tokens


# Mesh, and the collectives of a decode step of the two layers. All-reduces: one asks whether all
# shards are done; one each of attention output and feed-forward layer by `tensor`, two of attention
# by `context`. The most likely token takes two gathers of one candidate a device.
MESHES = [
    ({"data": 2, "tensor": 4}, {"all-reduce": 1 + 2 * 2, "all-gather": 2}),
    ({"data": 1, "context": 4}, {"all-reduce": 1 + 2 * 2}),
    ({"data": 2, "tensor": 2, "context": 2}, {"all-reduce": 1 + 4 * 2, "all-gather": 2}),
]
if jax.device_count() < 8:  # on GPUs XLA joins the two gathers, and asks no one where data is 1
    alone, gathers = (0, 1) if on_gpu() else (1, 2)
    MESHES = [
        ({"data": 2}, {"all-reduce": 1}),
        ({"data": 1, "tensor": 2}, {"all-reduce": alone + 2 * 2, "all-gather": gathers}),
        ({"data": 1, "context": 2}, {"all-reduce": alone + 2 * 2}),
    ]


@pytest.mark.parametrize(("sizes", "exchanged"), MESHES, ids=str)
def test_generation(expected, sizes, exchanged, monkeypatch):
    m = mesh(**sizes)
    model = make(m)
    texts = {}
    for name in ("_prefill", "_decode"):
        jitted = getattr(generation, name)

        def spy(*args, name=name, jitted=jitted, **kwargs):
            compiled = jitted.lower(*args, **kwargs).compile()
            texts[name] = compiled.as_text()
            return compiled(*args[1:])  # the first is static

        monkeypatch.setattr(generation, name, spy)
    assert generate(model, PROMPTS, mesh=m, num_pages=100, **OPTIONS) == expected

    slots = 8 // sizes.get("context", 1)
    page = slots * 32
    pool = 2 * 100 * page
    assert f"f32[{pool // page},{slots},1,32]" in texts["_decode"]
    for text in texts.values():
        assert all(size < pool for sizes in collectives(text).values() for size in sizes)
        assert f"= f32[{pool // page},{slots},1,32] copy" not in text
    assert kinds(texts["_decode"]) == exchanged


def test_sampling_does_not_depend_on_the_mesh():
    """Nor do rows that fill the shards, of which there are more than prompts."""
    m = mesh(data=4)
    options = {"temperature": 1.0, "top_k": 20, "seed": 3, **OPTIONS}
    assert generate(make(m), PROMPTS, mesh=m, **options) == generate(make(), PROMPTS, **options)


def test_a_pool_too_small_on_one_device():
    m = mesh(data=3)
    with pytest.raises(PagePoolFullError, match=r"prompts \[2\] stopped after \[0\] new tokens"):
        generate(make(m), PROMPTS, mesh=m, max_new_tokens=2, page_size=4, num_pages=2)


def test_what_the_metadata_say():
    model = make()
    specs = nnx.get_partition_spec(nnx.state(model))
    attention = specs["model"]["layers"][1]["self_attn"]
    for name, spec in [
        ("q_a_proj", P()),
        ("q_b_proj", P(None, "tensor")),
        ("kv_a_proj_with_mqa", P()),
        ("kv_b_proj", P(None, "tensor")),
        ("o_proj", P("tensor", None)),
    ]:
        assert attention[name]["kernel"].get_value() == spec, name
    experts = specs["model"]["layers"][1]["mlp"]["experts"]
    assert experts["gate_proj"].get_value() == P(None, None, "tensor")
    assert experts["down_proj"].get_value() == P(None, "tensor", None)
    assert specs["model"]["layers"][0]["mlp"]["down_proj"]["kernel"].get_value() == P(
        "tensor", None
    )
    shard(model, mesh(data=2, tensor=4))
    kernel = model.model.layers[0].self_attn.o_proj.kernel[...]
    assert kernel.sharding.spec[0] == "tensor"
    assert model.model.norm.scale[...].sharding.spec == P()


def test_shard_refuses_what_does_not_divide():
    message = r"model: got model.layers.0.mlp.down_proj.kernel of shape \[24, 16\], expected 24 to "
    with pytest.raises(ValueError, match=message + "be a multiple of the 5 devices of axis 'tens"):
        shard(make(), mesh(tensor=5))


@pytest.mark.parametrize(
    ("sizes", "kind", "options", "message"),
    [
        ({"tensor": 2}, AxisType.Auto, {}, "mesh: got Mesh.*, expected an axis 'data'"),
        ({"data": 2}, AxisType.Explicit, {}, "mesh: got Mesh.* automatic axes only"),
        ({"data": 1, "context": 8}, AxisType.Auto, {"page_size": 12}, "page_size: got 12, expec"),
    ],
    ids=str,
)
def test_generate_refuses(sizes, kind, options, message):
    with pytest.raises(ValueError, match=message):
        generate(make(), PROMPTS, mesh=mesh(kind, **sizes), **(OPTIONS | options))
