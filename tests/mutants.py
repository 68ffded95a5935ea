# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Deliberate mistakes in the code, and the tests that must catch them.

Run: python tests/mutants.py [NAME ...]

Each mistake is made in a copy of the package, the named tests are run on it until one fails, and
the one that caught it is printed. A mistake that survives is an error. Takes some minutes.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from mla_jax import ffi

ROOT = Path(__file__).parents[1]

# Run as sitecustomize: an editable install's finder would lead back to the unchanged sources.
_NO_EDITABLE_INSTALL = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
"""


class Mutant(NamedTuple):
    """A mistake: `old` stands once in `file` and becomes `new`; `tests` are pytest's arguments."""

    file: str
    old: str
    new: str
    tests: str


MUTANTS = {
    "softmax scale without mscale squared": Mutant(
        "rope.py", "_mscale(yarn.factor, yarn.mscale_all_dim) ** 2", "1.0", "test_module.py"
    ),
    "mscale once instead of squared": Mutant(
        "rope.py", "yarn.mscale_all_dim) ** 2", "yarn.mscale_all_dim)", "test_deepseek.py -k rope"
    ),
    "rope pairs halves instead of neighbours": Mutant(
        "rope.py",
        "x0, x1 = pairs[..., 0::2], pairs[..., 1::2]",
        "x0, x1 = jnp.split(pairs, 2, axis=-1)",
        "test_module.py",
    ),
    "rope frequencies not interpolated": Mutant(
        "rope.py", "inv_freq / yarn.factor * ramp", "inv_freq * ramp", "test_module.py"
    ),
    "causal off by one": Mutant(
        "xla.py", "jnp.arange(1, s_q + 1)", "jnp.arange(s_q)", "test_decode.py -k 'not grid'"
    ),
    "NaN past the length not cleared": Mutant(
        "xla.py",
        "jnp.where(self.holds(token)[:, :, None, None], cached, 0)",
        "cached",
        "test_decode.py -k 'not grid'",
    ),
    "page off by one": Mutant(
        "xla.py",
        "self._k_cache.at[ids].get",
        "self._k_cache.at[ids + 1].get",
        "test_decode.py -k 'not grid'",
    ),
    "negative page ids count from the end": Mutant(
        "xla.py",
        "jnp.where(table < 0, num_pages, table)",
        "table",
        "test_decode.py -k 'not grid'",
    ),
    "accumulator not rescaled": Mutant(
        "xla.py", "alpha[..., None] * acc + pv", "acc + pv", "test_decode.py -k 'not grid'"
    ),
    "head groups transposed": Mutant(
        "xla.py",
        "q.reshape(b, s_q, h_kv, group, d).transpose(0, 2, 1, 3, 4)",
        "q.reshape(b, s_q, group, h_kv, d).transpose(0, 3, 1, 2, 4)",
        "test_decode.py -k 'not grid'",
    ),
    "vmap lets ids of one pool into the next": Mutant(
        "batching.py", "jnp.where(valid, block_table + first, -1)", "block_table + first",
        "test_ffi.py",
    ),
    "vmap forgets which pool": Mutant(
        "batching.py", "jnp.where(valid, block_table + first, -1)",
        "jnp.where(valid, block_table, -1)",
        "test_ffi.py test_decode.py -k vmap",
    ),
    "gradient forgets the cotangent of lse": Mutant(
        "gradient.py", "products.sum(-1, keepdims=True) - d_lse", "products.sum(-1, keepdims=True)",
        "test_gradient.py",
    ),
    "gradient forgets that values are keys": Mutant(
        "gradient.py", "dk.at[..., :d_v].add", "dk.at[..., :d_v].subtract", "test_gradient.py"
    ),
    "last sequence of a shared page wins": Mutant(
        "gradient.py", "dk_cache.at[ids].add(dk", "dk_cache.at[ids].set(dk", "test_gradient.py"
    ),
    "unseen query's cotangents not cleared": Mutant(
        "gradient.py", "jnp.where(seen, to_rows(d_out, h_kv), 0)", "to_rows(d_out, h_kv)",
        "test_gradient.py",
    ),
    "NaN cotangents reach unused slots": Mutant(
        "gradient.py", "jnp.where(chunks.holds(token)[:, :, None, None], dk, 0)", "dk",
        "test_gradient.py",
    ),
    "a part that saw nothing counts": Mutant(
        "merge.py", "jnp.where(lse == jnp.inf, -jnp.inf, lse)", "lse", "test_merge.py"
    ),
    "gradient of a pool from one device's queries": Mutant(
        "partitioning.py", "_sum(dk_cache, queries)", "dk_cache", "test_sharding.py -k gradients"
    ),
    "gradient of queries from one device's tokens": Mutant(
        "partitioning.py", "_sum(dq, self.pages + self.slots)", "dq",
        "test_sharding.py -k gradients",
    ),
    "gradient of a query by tokens after it": Mutant(
        "partitioning.py", "cache_seqlens, rows, rows > 1,", "cache_seqlens, rows, False,",
        "test_sharding.py -k gradients",
    ),
    "slots of a page start at 0 on every device": Mutant(
        "partitioning.py", "+ first_slot * slots", "", "test_sharding.py -k 'not generation'"
    ),
    "pages of zeros counted on every device": Mutant(
        "partitioning.py", "jnp.where(outside, shard == 0,", "jnp.where(outside, True,",
        "test_sharding.py -k context_parallel",
    ),
    "ragged tile padded on the right": Mutant(
        "ragged.py", "(first + count - width)[:, None]", "first[:, None]", "test_ragged.py -k grid"
    ),
    "adapter writes one token on": Mutant(
        "adapters.py", "at[page, position % page_size",
        "at[page, (position + 1) % page_size",
        "test_ragged.py -k adapters",
    ),
    "library for a newer FFI registered": Mutant(
        "ffi.py", " or built[1] > runtime[1]", "", "test_ffi.py"
    ),
    "split index off by one": Mutant(
        "schedule.py", "dividing - before_seq, 0)", "dividing - before_seq - 1, 0)",
        "test_schedule.py",
    ),
    "refcount not decremented": Mutant(
        "cache.py",
        "refcounts = jnp.zeros_like(self.refcounts).at[page].add(1, mode=\"drop\")",
        "refcounts = jnp.zeros_like(self.refcounts).at[page].add(1, mode=\"drop\")\n"
        "        refcounts = jnp.maximum(self.refcounts, refcounts)",
        "test_cache.py",
    ),
    "shared page not copied before a write": Mutant(
        "cache.py",
        "copies = writes & (cache.refcounts[last] - left_before > 1)",
        "copies = writes & False",
        "test_cache.py",
    ),
    "copy-on-write in the first layer only": Mutant(
        "cache.py",
        "layer_start = jnp.arange(cache.num_layers, dtype=jnp.int32) * cache.num_pages",
        "layer_start = jnp.arange(1, dtype=jnp.int32) * cache.num_pages",
        "test_cache.py",
    ),
    "latents written one page on": Mutant(
        "append.py", "num_pages + page - first_row", "num_pages + page + 1 - first_row",
        "test_cache.py",
    ),
    "latents written one token on": Mutant(
        "append.py", "slot = position % pool", "slot = (position + 1) % pool", "test_cache.py"
    ),
    "a page id past the pool names a page of the next layer": Mutant(
        "append.py", " & (page < pool.num_pages)", "", "test_append.py -k wild"
    ),
    "latents kept without the norm's weight": Mutant(
        "append.py", "x * (factor * scale)", "x * factor", "test_append.py -k definition"
    ),
    "a device writes all slots as if they were its own": Mutant(
        "partitioning.py", "jnp.stack([layer[0], *first])",
        "jnp.stack([layer[0], *(0 * i for i in first)])",
        "test_append.py -k cut",
    ),
    "kernel called without its place for the result": Mutant(
        "ffi.py", "_APPEND, result, input_output_aliases={0: 0}", "_APPEND, result",
        "test_append.py -k in_place",
    ),
    "layer called without its place for the pages": Mutant(
        "ffi.py", "_LAYER, results, input_output_aliases={0: 0}", "_LAYER, results",
        "test_layer.py -k lowered",
    ),
    "layer called with weights cut among devices": Mutant(
        "layer.py", " or jax.device_count() != 1", "", "test_layer.py -k several_devices"
    ),
    "layer called whatever its projections have become": Mutant(
        "layer.py", "type(x) is nnx.Linear", "isinstance(x, nnx.Linear)", "test_layer.py -k lowered"
    ),
    "norm of the layer forgets the residual sum": Mutant(
        "module.py", "return out if norm is None else x + out, cache", "return out, cache",
        "test_layer.py -k own",
    ),
    "finished prompts keep their pages": Mutant(
        "generate.py", "cache=cache.release(finished)", "cache=cache", "test_generate.py"
    ),
    "top_p keeps one token too few": Mutant(
        "generate.py", "likelier = jnp.cumsum(p, axis=-1) - p", "likelier = jnp.cumsum(p, axis=-1)",
        "test_generate.py",
    ),
    "latent norm's eps from rms_norm_eps": Mutant(
        "module.py", "_LATENT_NORM_EPS = 1e-6", "_LATENT_NORM_EPS = 1e-5",
        "test_deepseek.py -k 'moonlight and attention'",
    ),
    "losing groups masked with 0": Mutant(
        "moe.py", "[0].sum(-1), -jnp.inf", "[0].sum(-1), 0.0", "test_deepseek.py -k 'quirks'"
    ),
    "correction bias in the weights": Mutant(
        "moe.py", "jnp.take_along_axis(scores, experts", "jnp.take_along_axis(choice, experts",
        "test_deepseek.py -k 'router'",
    ),
    "experts not chosen times 0": Mutant(
        "moe.py", "jnp.where(share > 0, hidden * share, 0)", "(hidden * share)",
        "test_deepseek.py -k 'few_tokens'",
    ),
    "every layer absorbs the first one's weights": Mutant(
        "deepseek.py", "absorbed=None if absorbed is None else absorbed[index]",
        "absorbed=None if absorbed is None else absorbed[0]", "test_deepseek.py -k absorbed",
    ),
    "a benchmark's runs grow from where the last ended": Mutant(
        "bench/generation.py", "jnp.int32(self.context))", "self.state.cache.seqlens[0])",
        "test_bench_steps.py -k 'difference'",
    ),
    "FP8 blocks counted along the wrong axis": Mutant(
        "checkpoint.py", "rows = np.arange(w.shape[0]) // block[0]",
        "rows = np.arange(w.shape[0]) % scale.shape[0]", "test_checkpoint.py -k fp8",
    ),
}  # fmt: skip


def caught_by(mutant: Mutant) -> str | None:
    """Returns the test that fails on the mutant, or None if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(shutil.copytree(ROOT / "mla_jax", Path(folder, "mla_jax")))
        Path(folder, "sitecustomize.py").write_text(_NO_EDITABLE_INSTALL)
        for platform in ffi.PLATFORMS:
            with contextlib.suppress(ffi.LibraryError):
                shutil.copy(ffi.find_library(platform), package)
        source = package / mutant.file
        text = source.read_text()
        if text.count(mutant.old) != 1:
            raise SystemExit(f"{mutant.file}: {mutant.old!r} stands {text.count(mutant.old)} times")
        source.write_text(text.replace(mutant.old, mutant.new))
        command = f"{sys.executable} -m pytest -x -n 2 -p no:cacheprovider {mutant.tests}"
        run = subprocess.run(
            command,
            shell=True,
            cwd=ROOT / "tests",
            env=os.environ | {"PYTHONPATH": folder},
            capture_output=True,
            text=True,
        )
    if run.returncode == 0:
        return None
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
    return failed[0] if failed else f"exit code {run.returncode}:\n{run.stdout}{run.stderr}"


def main() -> int:
    """Makes the mistakes one by one."""
    names = sys.argv[1:] or list(MUTANTS)
    survivors = 0
    for name in names:
        test = caught_by(MUTANTS[name])
        survivors += test is None
        print(f"{name}: {test or 'SURVIVED'}", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
