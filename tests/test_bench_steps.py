# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of decode steps: their models, what they count, what they write."""

import dataclasses
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from mla_jax import DeepseekForCausalLM
from mla_jax.bench import generation, models, op, pictures, profile, report, runs, step, timing
from mla_jax.cli import main
from mla_jax.config import DeepseekConfig

CEILINGS = timing.Ceilings(read=1e12, product=1e15)
BF16 = jnp.dtype("bfloat16")
TINY = models.preset("deepseek-v2-lite", "cpu", 2)


def abstract(config):
    return nnx.eval_shape(lambda: DeepseekForCausalLM(config, param_dtype=BF16, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("name", "billions"), [("deepseek-v2-lite", 15.7), ("deepseek-v3", 671), ("kimi-k2", 1026)]
)
def test_presets_have_the_published_numbers_of_parameters(name, billions):
    config = models.preset(name, "gpu")
    layers = config.first_k_dense_replace + 1  # the layers after these are all alike
    some, more = (
        models.num_bytes(abstract(models.preset(name, "gpu", n))) for n in (layers, layers + 1)
    )
    total = some + (config.num_hidden_layers - layers) * (more - some)
    assert total / 2e9 == pytest.approx(billions, rel=2e-3)
    assert models.num_bytes(abstract(models.preset(name, "cpu"))) < 1e7
    assert models.preset(name, "cpu").d_cache == 576


def test_random_weights_have_the_variance_that_activations_keep():
    model = models.language_model(TINY, BF16)
    kernel = np.asarray(model.model.layers[1].mlp.experts.down_proj[...], np.float32)
    assert kernel.std() == pytest.approx(64**-0.5, rel=0.02)
    assert np.asarray(model.model.embed_tokens.embedding[...], np.float32).std() > 0.98
    assert (np.asarray(model.model.norm.scale[...], np.float32) == 1).all()
    leaves = [np.asarray(x, np.float32) for x in jax.tree.leaves(nnx.state(model)) if x.ndim > 1]
    assert len({leaf.tobytes() for leaf in leaves}) == len(leaves)  # no two alike


def test_the_cache_holds_what_a_prompt_would_leave():
    cache = models.filled_cache(num_layers=2, b=3, room=200, d_k=8, dtype=jnp.dtype("float32"))
    table = np.asarray(cache.block_table).copy()
    assert sorted(table.ravel()) == list(range(12))
    assert sorted(table.ravel()) != table.ravel().tolist()
    pages = np.asarray(cache.pages)
    assert pages.std() == pytest.approx(1, abs=0.03)
    assert not np.array_equal(pages[:12], pages[12:])  # each layer has its own
    for context, held in ((129, 3), (64, 1), (200, 4)):
        cache = models.at_context(cache, jnp.asarray(table), jnp.int32(context))
        np.testing.assert_array_equal(cache.block_table[:, :held], table[:, :held])
        assert (np.asarray(cache.block_table[:, held:]) == -1).all()
        assert (np.asarray(cache.seqlens) == context).all()
        assert int(cache.num_free_pages) == 12 - 3 * held
    np.testing.assert_array_equal(cache.pages, pages)


def test_bytes_that_a_step_needs():
    """A dense model needs all but the embedding; of experts as many as tokens hit."""
    config = dataclasses.replace(TINY, n_routed_experts=None, n_shared_experts=None)
    weights = models.num_bytes(abstract(config))
    cached = 4 * 100 * 2 * 576 * 2
    needed = generation._bytes_needed(config, weights, 4, 100, 2)
    assert needed == weights - 512 * 128 * 2 + cached
    weights = models.num_bytes(abstract(TINY))
    one = generation._bytes_needed(TINY, weights, 1, 1, 2)
    many = generation._bytes_needed(TINY, weights, 1000, 1, 2) - 999 * 2 * 576 * 2
    assert many - one == pytest.approx(10 * 3 * 128 * 64 * 2)  # 10 of the 16 experts of one layer


def test_floor_of_the_projections():
    """DeepSeek-V3, one token: each weight once; many tokens: the operations."""
    config = models.preset("deepseek-v3", "gpu", 1)
    layer = nnx.eval_shape(lambda: step.Stack(config, BF16, nnx.Rngs(0))).layers[0]
    kernels = sum(x.size for x in jax.tree.leaves(nnx.state(layer)) if x.ndim == 2)
    floor = step.projections_floor(config, 1, 2, CEILINGS)
    assert floor == pytest.approx(2 * kernels / 1e12, rel=3e-3)  # activations are little beside
    floor = step.projections_floor(config, 10**6, 2, timing.Ceilings(1e30, 1e15))
    assert floor == pytest.approx(2e6 * kernels / 1e15)


class Clock:
    """Each look takes as long as the steps run so far say."""

    now = 0.0

    def __call__(self):
        return self.now


def test_a_step_is_the_difference_of_two_runs_from_the_same_context():
    clock, seen = Clock(), []

    def compiled(params, state, limit):
        seen.append((int(limit), np.asarray(state.cache.seqlens).tolist()))
        clock.now += 5.0 + 0.25 * (int(limit) - 1)
        cache, _ = state.cache.reserve(jnp.full(2, limit - 1))
        return dataclasses.replace(state, cache=cache, num_tokens=state.num_tokens + limit)

    session = generation.Session(TINY, 2, 70, 4, BF16)
    loop = generation.Loop(compiled, None, session, 4, clock)
    assert [loop.measure() for _ in range(2)] == [0.25, 0.25]
    assert seen == [(5, [70, 70]), (9, [70, 70])] * 2
    assert timing.steps_that_fit(0.1, 16) == 2  # of 0.3 s
    assert timing.steps_that_fit(1e-9, 16) == 16
    assert timing.steps_that_fit(9.0, 16) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "gpt"}, "model: got 'gpt', expected one of"),
        ({"layers": 3}, "layers: got 3, expected 1 to 2, those of deepseek-v2-lite"),
        ({"batches": [0]}, r"batches: got \[0\]"),
        ({"rounds": 0}, "rounds: got 0"),
        ({"steps": 0}, "steps: got 0"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
        ({"implementations": ["fa3"]}, "implementation: got"),
    ],
)
def test_wrong_options_are_refused(options, message, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    for run in (generation.run, step.run):
        with pytest.raises(ValueError, match=message):
            run(**{"model": "deepseek-v2-lite", "ceilings": CEILINGS} | options)


def test_a_model_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(models, "memory_stats", lambda: {"bytes_limit": 10**6})
    with pytest.raises(ValueError, match=r"model: got 2 layers of 0 GB .* --layers takes fewer"):
        models.language_model(TINY, BF16)


def test_layers_share_pools_where_memory_is_short(monkeypatch):
    stats = {"bytes_limit": 1000, "bytes_in_use": 200}
    monkeypatch.setattr(models, "memory_stats", lambda: stats)
    assert [step._num_pools(61, size) for size in (1, 100, 399, 10**6)] == [61, 4, 1, 1]
    monkeypatch.setattr(models, "memory_stats", dict)
    assert step._num_pools(61, 10**12) == 61


@pytest.mark.parametrize("command", ["generate", "step"])
def test_command_line(command, tmp_path, monkeypatch, capsys):
    module = generation if command == "generate" else step
    monkeypatch.setattr(module, "measure_ceilings", lambda *_: CEILINGS)
    monkeypatch.setattr(op, "num_calls", lambda *_: 1)  # XLA compiles each
    context = ["--context", "70", "--profile", str(tmp_path / "trace")]
    context = context if command == "generate" else ["--contexts", "70"]
    options = ["bench", command, "--batches", "2", *context, "--rounds", "1", "--steps", "2"]
    options += ["--out", str(tmp_path), "--json"]
    options += ["--implementations", "xla", "--model", "kimi-k2", "--layers", "1"]
    assert main(options) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "results.json").read_text())
    assert printed | {"date": 0} == written | {"date": 0}
    assert written["command"] == command
    assert (written["model"], written["layers"]) == ("kimi-k2", 1)
    (row,) = written["rows"]
    assert (row["b"], row["context"], list(row["results"])) == (2, 70, ["xla"])
    assert len(written["profiles"]) == (command == "generate")


def test_tables_and_pictures_show_what_is_there(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    result = generation.Result(2.0, 1.9, 2.1, 500.0, 1.0)
    row = generation.Row(1, 64, 1.0, 10**9, None, {"ffi": result}, {"xla": "no"})
    found = generation.Report("m", 3, 10**9, "bfloat16", 5, 4, CEILINGS, 7.0, [row])
    report.print_generation(found, console)
    assert pictures.draw_generation(found, tmp_path / "new") is None
    noise = step.Result(None, None, None, None, None)
    rows = [step.Row(1, 64, 2, 10.0, {"ffi": step.Result(30, 1, 2, 5.0, 1.2), "xla": noise}, {})]
    found = step.Report("m", 3, 10**9, "bfloat16", 5, 4, CEILINGS, 7.0, rows)
    report.print_steps(found, console)
    assert pictures.draw_steps(found, tmp_path / "new") is None
    for name in ("generate", "step"):
        assert (tmp_path / "new" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    nothing = dataclasses.replace(found, rows=[step.Row(1, 64, 2, 10.0, {}, {"ffi": "no"})])
    assert pictures.draw_steps(nothing, tmp_path) == "no picture: nothing was measured"
    covered = dataclasses.replace(found, rows=[step.Row(1, 64, 2, 10.0, {"ffi": noise}, {})])
    assert pictures.draw_steps(covered, tmp_path) is None
    text = console.file.getvalue()
    for part in (
        "2.000 0.50 500",
        "not xla at b 1: no",
        "30 5.0 1.20",
        "noise",
        "2 of 3",
        "compiled in 7 s",
    ):
        assert part in text, part


def test_a_trace_is_summed_by_kernel():
    """Numbers that XLA gives to fusions are dropped; what the host does does not count."""
    meta = [("process_name", 1, 0, "/device:GPU:0"), ("process_name", 2, 0, "/host:CPU")]
    meta += [("thread_name", 1, 7, "Stream #7(Compute)"), ("thread_name", 2, 8, "python")]
    events = [
        {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}
        for kind, pid, tid, name in meta
    ]
    for name, pid, tid, us in (
        *(("gemm_fusion_dot_3", 1, 7, 5.0), ("gemm_fusion_dot.12", 1, 7, 2.0)),
        *(("decode<1, 2>", 1, 7, 8.0), ("cuGraphLaunch", 2, 8, 3.0), ("other", 2, 8, 9.0)),
    ):
        events.append({"ph": "X", "name": name, "pid": pid, "tid": tid, "dur": us})
    # A loop in a graph: its nodes do not say which.
    events[-3]["args"] = events[-1]["args"] = {"cuda_graph_node_id": "7"}
    kernels = [("decode<1, 2>", 1, 8.0), ("gemm_fusion_dot", 2, 7.0)]
    assert profile.summary(events) == profile.Profile(15.0, 8 / 15, kernels)
    assert profile.summary([]) == profile.Profile(0.0, 0.0, [])


class Program:
    """Like a lowered and a compiled program; says no when it is called."""

    def __init__(self, log, *job):
        self.log, self.job = log, job

    def compile(self):
        self.log.append(self.job)
        if self.job == (2, "first"):
            raise ValueError("too large")
        return self

    def __call__(self, *_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED")


def test_implementations_compile_in_turn_and_one_that_fails_does_not_stop_the_others():
    log = []
    programs = runs.compile_all(functools.partial(Program, log), (1, 2), ("first", "second"))
    assert sorted(log) == sorted(programs) == [(b, n) for b in (1, 2) for n in ("first", "second")]
    for b in (1, 2):
        assert [name for batch, name in log if batch == b] == ["first", "second"]
    assert str(programs[2, "first"]) == "too large"
    assert programs[2, "second"].job == (2, "second")


@pytest.mark.parametrize("module", [generation, step])
def test_a_row_without_memory_leaves_the_others(module, monkeypatch):
    def compiled(_, batches, names):
        return {(b, name): Program([], b, name) for b in batches for name in names}

    monkeypatch.setattr(module, "compile_all", compiled)
    monkeypatch.setattr(op, "num_calls", lambda *_: 1)
    found = module.run("deepseek-v2-lite", batches=(1, 2), layers=1, ceilings=CEILINGS)
    assert {row.b for row in found.rows} == {1, 2}
    for row in found.rows:
        assert row.results == {}
        assert row.reasons == dict.fromkeys(("ffi", "pallas", "xla"), "RESOURCE_EXHAUSTED")


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="CPUs have no rematerialization")
def test_a_large_pool_makes_xla_compute_nothing_twice():
    """Nothing is made: only compiled, for a pool of 35 GB."""
    config = models.preset("deepseek-v3", "gpu", 3)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: step.Stack(config, BF16, nnx.Rngs(0))))
    sizes = {"num_layers": 3, "b": 128, "room": 80000, "d_k": 576, "dtype": BF16}
    cache = jax.eval_shape(lambda: models.filled_cache(**sizes))
    x = jax.ShapeDtypeStruct((128, 1, config.hidden_size), BF16)
    arguments = (graphdef, params, x, cache, jnp.int32(0))
    lowered = step._jitted(128).lower(*arguments, implementation="xla")
    assert "remat" not in lowered.compile().as_text()


def test_presets_are_configs_that_are_read():
    for config in models.PRESETS.values():
        assert DeepseekConfig.from_dict(config.to_dict()) == config
