# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The benchmark: what it counts, how it times, what it writes; no assertion on a real time."""

import dataclasses
import importlib.util
import io
import json
import random
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from rich.console import Console

from mla_jax import decode
from mla_jax.bench import cases, op, peers, pictures, report, timing
from mla_jax.bench.cases import Shape
from mla_jax.cli import main

CEILINGS = timing.Ceilings(read=1e12, product=1e15)
TINY = Shape(2, 2, 100, 4)
CPU = jax.default_backend() == "cpu"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """XLA compiles every call of a program: one and two are enough here."""
    monkeypatch.setitem(op._MAX_CALLS, "xla", 1)


def test_floor_is_that_of_performance_md():
    """Rows of the table that the project is held to, to the digits that it gives."""
    h100 = timing.Ceilings(read=3052e9, product=781e12)
    for b, s_q, s_k, h_q, expected in (
        (128, 1, 1024, 128, 61.2),
        (128, 1, 4096, 16, 199.5),
        (128, 2, 4096, 128, 374.0),
        (1, 1, 65536, 128, 24.8),
    ):
        shape = Shape(b, s_q, s_k, h_q)
        assert 1e6 * h100.floor(shape.moved_bytes(2), shape.flops()) == pytest.approx(
            expected, rel=1e-3, abs=0.06
        )
    assert len(set(cases.GPU_SHAPES)) == len(cases.GPU_SHAPES) == 35


def test_flops_of_causal_calls_count_what_each_query_sees():
    assert Shape(1, 3, 10, 1).flops() == (8 + 9 + 10) * 2 * (576 + 512)
    assert Shape(1, 1, 10, 7).flops() == 10 * 7 * 2 * (576 + 512)


def test_varied_lengths():
    lengths = Shape(4000, 2, 1000, 1, varlen=True).lengths()
    assert lengths.min() == 2  # clipped: 2.3% of the draws lie below
    assert lengths.mean() == pytest.approx(1000, rel=0.03)
    assert lengths.std() == pytest.approx(500, rel=0.05)
    assert (lengths == Shape(4000, 2, 1000, 1, varlen=True).lengths()).all()
    assert (Shape(3, 2, 1000, 1).lengths() == 1000).all()


@pytest.mark.parametrize("text", ["", "1,2,3", "1,1,64,x", "1,1,64,4,5", "0,1,64,4", "1,9,8,4"])
def test_wrong_shapes_are_refused(text):
    with pytest.raises(ValueError, match=r"shapes: got .*expected.*b,s_q,s_k,h_q"):
        cases.parse_shape(text)


def test_shapes_and_models_are_read():
    assert cases.parse_shape("128,2,4096,16") == Shape(128, 2, 4096, 16)
    for model, heads in (("deepseek-v2-lite", 16), ("deepseek-v3", 128), ("kimi-k2", 64)):
        for platform in ("cpu", "gpu"):
            shapes = cases.model_shapes(model, platform)
            assert {shape.h_q for shape in shapes} == {heads}
    with pytest.raises(ValueError, match="model: got 'gpt', expected one of"):
        cases.model_shapes("gpt", "cpu")


def test_no_two_calls_are_alike_and_the_pools_outgrow_a_cache():
    data = cases.draw(Shape(2, 1, 130, 4, varlen=True), 6, jnp.dtype("float32"))
    assert len({np.asarray(q).tobytes() for q in data.queries}) == 6
    assert len({np.asarray(pool).tobytes() for pool in data.pools}) == 6
    for i in range(6):
        _, pool, table, lengths = map(np.asarray, data.call(i))
        used = table[table >= 0]
        assert sorted(used) == list(range(len(pool)))  # each page is of one sequence
        assert ((table >= 0).sum(1) == -(-lengths // 64)).all()
    drawn = np.concatenate([np.asarray(pool).ravel() for pool in data.pools])
    assert drawn.std() == pytest.approx(1, abs=0.01)
    assert abs(drawn.mean()) < 0.01
    for shape in cases.GPU_SHAPES:
        pools = cases.num_pools(shape, 2)
        assert pools == 32 or pools * shape.cache_bytes(2) >= 150_000_000


def test_reference_is_the_oracle_of_the_tests():
    shape = Shape(3, 2, 150, 4, varlen=True)
    arrays = cases.draw(shape, 1, jnp.dtype("bfloat16")).call(0)
    expected, _ = reference.attend(reference.Problem(*map(np.asarray, arrays)), causal=True)
    rows = np.array([0, 2])
    np.testing.assert_allclose(cases.reference(*arrays, rows), expected[rows], 1e-9, 1e-12)
    arrays = cases.draw(Shape(1, 1, 70, 4), 1, jnp.dtype("float32")).call(0)
    expected, _ = reference.attend(reference.Problem(*map(np.asarray, arrays)))
    np.testing.assert_allclose(cases.reference(*arrays, np.array([0])), expected, 1e-9, 1e-12)


def test_relative_error_is_the_worst_sequences():
    expected = np.ones((4, 1, 2, 512))
    got = expected.copy()
    got[2] *= 1.01
    assert cases.relative_error(got, expected) == pytest.approx(0.01)
    got[0, 0, 0, 0] = np.nan
    assert cases.relative_error(got, expected) == np.inf


def test_some_sequences_hold_the_extremes():
    assert list(cases.some_sequences(np.array([5, 9, 1, 7]))) == [0, 1, 3]
    assert list(cases.some_sequences(np.array([5]))) == [0]


class Device:
    """A clock of a host that waits, when asked for the time, for a device that works in order."""

    host = done = 0.0

    def __init__(self):
        self.given = []  # the lengths of each program

    def __call__(self):
        self.host = max(self.host, self.done)
        return self.host

    def program(self, launch, work):
        def run(fields, lengths):
            self.host += launch
            self.done = max(self.host, self.done) + work
            self.given.append(lengths)
            return lengths + 1, []

        return run


def test_a_call_holds_no_cost_of_a_launch():
    data = cases.draw(TINY, 2, jnp.dtype("float32"))
    for launch in (0.0, 0.5, 1.75):  # as long as the device is busy meanwhile
        device = Device()
        program = device.program(launch, 2.0)
        variant = timing.JaxVariant(program, data, 8, clock=device)
        assert variant.measure() == 0.25
        assert device.done == 2 * launch + 6.0
        # The second of two waits for what the first gives.
        assert [int((x - data.lengths)[0]) for x in device.given] == [0, 0, 1]


@dataclasses.dataclass
class Fake:
    """A variant that gives times from a list."""

    name: str
    times: list[float]
    log: list[str]
    calls: int = 1

    def first_result(self):
        return np.zeros(1)

    def measure(self):
        self.log.append(self.name)
        return self.times[self.log.count(self.name) - 1]


def test_variants_take_turns_in_changing_order_and_medians_count():
    log, pauses, ticks = [], [], []
    variants = {
        "a": Fake("a", [1e9, 1, 2, 3, 4, 100], log),  # the first round does not count
        "b": Fake("b", [0, -1, -1, -1, 5, 5], log),
        "c": Fake("c", [7] * 6, log),
    }
    times = timing.interleave(variants, 5, sleep=pauses.append, tick=lambda: ticks.append(1))
    assert times["a"] == timing.Times(3, 2, 4)
    assert times["b"] is None  # noise
    assert times["c"].median == 7
    rounds = [tuple(log[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1
    assert len(pauses) == 18
    assert len(ticks) == 6


@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize("repeats", [1, 3])
def test_a_program_makes_all_its_calls_and_shares_none(repeats, chained):
    """Counted in the compiled program: nothing is merged, left out or taken out of the loop."""
    data = cases.draw(TINY, 2, jnp.dtype("float32"))
    seen = []

    def function(q, pool, table, lengths):
        jax.debug.callback(lambda q, x: seen.append((float(q), x.tolist())), q[0, 0, 0, 0], lengths)
        return q[..., :512], jnp.zeros((2, 4, 2))

    program = timing.looped(function, 2, repeats, chained)
    variant = timing.JaxVariant(program, data, 2 * repeats)
    expected = np.asarray(data.queries[0])[..., :512]
    np.testing.assert_array_equal(variant.first_result(), expected)
    jax.effects_barrier()
    firsts = [float(q[0, 0, 0, 0]) for q in data.queries]
    assert sorted(q for q, _ in seen) == sorted(firsts * repeats)
    variant.measure()
    jax.effects_barrier()
    assert len(seen) == 4 * variant.calls
    assert all(lengths == [100, 100] for _, lengths in seen)  # the chain changes no length


@pytest.mark.parametrize(("platform", "least", "speed"), [("gpu", 1e-5, 3e12), ("cpu", 1e-4, 3e9)])
def test_repeats_make_a_program_long_enough(monkeypatch, platform, least, speed):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    for shape in cases.GPU_SHAPES:
        calls = op.num_calls(shape, 2)
        once = calls * (least + shape.cache_bytes(2) / speed)
        repeats = op.num_repeats("ffi", shape, calls, 2)
        assert repeats == 1 or 0.6 < repeats * once / timing.PROGRAM < 1.4


def _run(shapes=(TINY,), **options):
    return op.run(shapes, **{"rounds": 1, "ceilings": CEILINGS, "dtype": "float32"} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": ()}, "shapes: got none, expected at least one"),
        ({"dtype": "int8"}, r"dtype: got 'int8', expected one of \['bfloat16'"),
        ({"rounds": 0}, "rounds: got 0, expected at least 1"),
        ({"implementations": ["cudnn"]}, r"implementations: got \['cudnn'\], expected some of"),
        ({"implementations": []}, r"implementations: got \[\], expected some of"),
        ({"compare": ["xla", "xla"]}, r"compare: got \['xla', 'xla'\], expected two of"),
        ({"compare": ["xla", "ffi"], "implementations": ["xla"]}, r"two of \['xla'\]"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        _run(**options)


def test_a_right_implementation_passes():
    [row] = _run(implementations=["xla"]).rows
    assert row.results["xla"].correct


def test_batch_invariant_calls_have_a_name_of_their_own(monkeypatch):
    asked = []

    def call(*arrays, **options):
        asked.append((options["implementation"], options["batch_invariant"]))
        return decode.flash_mla_with_kvcache(*arrays, **options)

    def clocked(variants, *_, **__):
        seconds = {"xla-invariant": 1.0, "xla": 2.0}
        return {name: timing.Times(*[seconds[name]] * 3) for name in variants}

    monkeypatch.setattr(op, "flash_mla_with_kvcache", call)
    monkeypatch.setattr(op, "interleave", clocked)
    names = ["xla-invariant", "xla"]
    found = _run(implementations=names, compare=names)
    assert found.ours == ("xla", "xla-invariant")
    assert found.rows[0].speedup(*names) == 2
    assert set(asked) == {("xla", False), ("xla", True)}


@pytest.mark.parametrize("mistake", ["scale", "causal", "lost", "nan"])
def test_a_wrong_implementation_is_caught(mistake, monkeypatch):
    right = op._op

    def wrong(name, shape):
        call = right(name, shape)

        def changed(q, pool, table, lengths):
            if mistake == "lost":
                lengths = lengths - 1
            if mistake == "scale":
                q = q * 1.1
            out, lse = call(q, pool, table, lengths, causal=shape.causal and mistake != "causal")
            return (out.at[0, 0, 0, 0].set(jnp.nan) if mistake == "nan" else out), lse

        changed.keywords = call.keywords
        return changed

    monkeypatch.setattr(op, "_op", wrong)
    found = _run(implementations=["xla"])
    result = found.rows[0].results["xla"]
    assert not result.correct
    assert result.error > op.BOUNDS["float32"]
    console = Console(file=io.StringIO(), width=200)
    report.print_report(found, console)
    assert "WRONG" in console.file.getvalue()
    json.dumps(report.to_json(found), allow_nan=False)


def test_one_that_fails_says_why_and_the_others_run(monkeypatch):
    right = op.variant

    def fail(name, *rest):
        if name == "ffi":
            raise RuntimeError("out of\nmemory")
        return right(name, *rest)

    monkeypatch.setattr(op, "_reason", lambda name, *_: "absent" if name in op.PEERS else None)
    monkeypatch.setattr(op, "variant", fail)
    [row] = _run().rows
    assert set(row.results) == {"xla"}
    assert row.reasons["ffi"] == "failed: RuntimeError: out of memory"
    assert row.reasons["fa3"] == "absent"


def _result(us, correct=True):
    return op.Result(us, us, us, 0.5, 1e-3, correct, 8)


def _report(*results, compare=None):
    rows = [
        op.Row(Shape(1, 1, 64 * (i + 1), 4), 64, 100, 1000, 1.0, found, {"xla": "absent"})
        for i, found in enumerate(results)
    ]
    return op.Report("bfloat16", 3, CEILINGS, op.variant_names(), compare, rows)


def test_ratios_are_to_the_better_peer_that_is_right():
    found = _report(
        {"ffi": _result(10.0), "flashmla": _result(20.0), "fa3": _result(15.0)},
        {"ffi": _result(10.0), "flashmla": _result(60.0), "fa3": _result(1.0, correct=False)},
        {"ffi": _result(10.0, correct=False), "flashmla": _result(20.0)},
        {"ffi": _result(None), "flashmla": _result(20.0)},
        compare=("flashmla", "fa3"),
    )
    columns = report.ratios(found)
    assert columns == {
        "ffi over better peer": [1.5, 6.0, None, None],
        "flashmla over fa3": [0.75, None, None, None],
    }
    assert report.geometric_mean(columns["ffi over better peer"]) == pytest.approx(3.0)
    assert report.geometric_mean([None]) is None


def test_pictures(tmp_path):
    peer = _report({"ffi": _result(10.0), "fa3": _result(15.0)}, {"ffi": _result(None)})
    assert pictures.draw_op(peer, tmp_path) is None
    for name in ("roofline", "speedup"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "needs a peer, or --compare" in pictures.draw_op(
        _report({"ffi": _result(1.0)}), tmp_path
    )


def test_without_matplotlib_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    found = _report({"ffi": _result(10.0)})
    assert "pip install 'mla-jax[bench]'" in pictures.draw_op(found, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_package_does_not_load_torch():
    code = "import sys, mla_jax.cli, mla_jax.bench.peers; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_a_peer_is_timed_in_the_runs_that_ours_are():
    """One run, then two: of a card that slows down while it works the third counts, for all."""
    clock, replays = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, end):  # in milliseconds, with what a launch takes
            return 1e3 * (end.at - self.at + 5)

    def replay():
        replays.append(clock[0])
        clock[0] += len(replays)

    variant = object.__new__(peers.PeerVariant)
    variant.calls, variant._repeats = 8, 2
    variant._graph = SimpleNamespace(replay=replay)
    variant._torch = SimpleNamespace(cuda=SimpleNamespace(Event=Event, synchronize=lambda: None))
    assert variant.measure() == pytest.approx((3 + 4 + 5 + 6 - (1 + 2)) / 8)
    assert len(replays) == 6


@pytest.mark.skipif(not CPU, reason="says what peers want of a GPU")
def test_why_a_peer_cannot_run(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install fa3-fwd" in peers.unsupported_reason("fa3", "bfloat16")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    assert "NVIDIA GPUs" in peers.unsupported_reason("fa3", "bfloat16")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "float32" in peers.unsupported_reason("fa3", "float32")
    assert peers.unsupported_reason("fa3", "bfloat16") is None


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(op, "measure_ceilings", lambda *_: CEILINGS)
    monkeypatch.setattr(op, "peer_reason", lambda *_: "absent")  # where it is not, too
    options = ["bench", "op", "--shapes", "1,1,70,4", "2,2,100,4", "--rounds", "1", "--varlen"]
    options += ["--implementations", "xla", "fa3", "--out", str(tmp_path / "new")]
    assert main([*options, "--compare", "xla", "fa3", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads((tmp_path / "new" / "results.json").read_text())
    assert printed | {"date": 0} == written | {"date": 0}
    assert set(written) == {
        *("schema", "command", "date", "device", "versions", "dtype", "rounds", "ceilings"),
        *("rows", "ratios", "geometric_means"),
    }
    assert written["ceilings"] == {
        "read_bytes_per_second": 1e12,
        "product_flops_per_second": 1e15,
    }
    assert [row["shape"]["s_k"] for row in written["rows"]] == [70, 100]
    row = written["rows"][1]
    assert row["shape"] == {
        "b": 2,
        "s_q": 2,
        "s_k": 100,
        "h_q": 4,
        "varlen": True,
        "causal": True,
    }
    shape = Shape(2, 2, 100, 4, varlen=True)
    assert row["tokens"] == shape.lengths().sum()
    assert row["bytes"] == shape.moved_bytes(2)
    assert row["flops"] == shape.flops()
    assert row["floor_us"] == pytest.approx(row["bytes"] / 1e6)
    fields = {field.name for field in dataclasses.fields(op.Result)}
    assert set(row["results"]["xla"]) == fields
    assert row["results"]["xla"]["correct"]
    assert 0 < row["results"]["xla"]["error"] < 4e-3
    assert row["reasons"] == {"fa3": "absent"}

    assert main(options) == 0
    out = capsys.readouterr().out
    assert "ceilings of this run: read 1000 GB/s" in out
    assert "100 varlen" in out
    assert "\nnot fa3: absent" in out


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="other tests keep the GPU busy")
def test_the_ceilings_are_measured():
    found = timing.measure_ceilings(jnp.dtype("float32"), "cpu")
    # An abacus and a machine of the far future: what is tested is the units.
    assert 1e7 < found.read < 1e15
    assert 1e7 < found.product < 1e18


@pytest.mark.parametrize("work", [2e-4, 3e-3, 0.2])
def test_a_clock_that_is_off_by_a_tenth_of_a_millisecond_changes_no_ceiling(work):
    device, rng = Device(), random.Random(0)
    program = device.program(2e-5, work)

    def clock():
        device.host = device() + rng.uniform(0, 1e-4)
        return device.host

    found = timing._programs_a_second(lambda: program(None, 0), clock)
    assert found * work == pytest.approx(1, abs=0.005)


def test_a_device_that_took_no_longer_for_more_is_refused():
    with pytest.raises(RuntimeError, match="too busy to be measured"):
        timing._programs_a_second(lambda: None, lambda: 0.0)


def test_wrong_arguments_of_the_command_line(capsys):
    assert main(["bench", "op", "--shapes", "1,2"]) == 2
    assert "shapes: got '1,2', expected four integers" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "op", "--shapes", "1,1,64,4", "--model", "kimi-k2"])
    assert "not allowed with argument" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench"])
    assert "the following arguments are required: MODE" in capsys.readouterr().err


def test_all_of_ours_are_measured_by_default():
    assert op.variant_names() == (*decode._IMPLEMENTATIONS, *peers.PEERS)
    assert op.variant_names(["fa3", "xla"]) == ("xla", "fa3")
    assert op.variant_names(["fa3", "ffi-invariant", "ffi"]) == ("ffi", "ffi-invariant", "fa3")
