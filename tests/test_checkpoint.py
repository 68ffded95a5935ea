# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Loading and saving checkpoint folders, and every way a folder can be wrong."""

import json
import os
import subprocess
import sys

import checkpoints
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.flax import load_file, save_file

from mla_jax import DeepseekConfig, DeepseekForCausalLM, RopeConfig, YarnScaling
from mla_jax.checkpoint import read_json

load = DeepseekForCausalLM.from_pretrained


def _parameters(model):
    return {
        ".".join(map(str, path)): np.asarray(value[...])
        for path, value in nnx.to_flat_state(nnx.state(model))
    }


def _edit(folder, change, name="model.safetensors"):
    """Rewrites a folder's tensors; `change` edits the dict in place."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


def _edit_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


@pytest.fixture
def v2lite(tmp_path):
    return checkpoints.unpack("v2lite", tmp_path)


def test_tensors_land_where_their_names_say(v2lite):
    """Each parameter, bit for bit: kernels transposed, experts stacked, the rest as it is."""
    loaded = _parameters(load(v2lite))
    with safe_open(v2lite / "model.safetensors", framework="numpy") as stored:
        names = set(stored.keys())
        for path, value in loaded.items():
            if ".experts." in path:
                before, after = path.split(".experts.")
                name = f"{before}.experts.%d.{after}.weight"
                for expert in range(len(value)):
                    np.testing.assert_array_equal(value[expert].T, stored.get_tensor(name % expert))
                    names.remove(name % expert)
            else:
                name, leaf = path.rsplit(".", 1)
                name += ".bias" if leaf == "bias" else ".weight"
                tensor = stored.get_tensor(name)
                np.testing.assert_array_equal(value, tensor.T if leaf == "kernel" else tensor)
                names.remove(name)
    assert not names


@pytest.mark.parametrize("name", ["v3_fp8", "v3_yarn_sharded", "v2_grouped", "v3_quirks"])
def test_save_and_load_again(name, tmp_path):
    model = load(checkpoints.unpack(name, tmp_path), param_dtype=jnp.bfloat16)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    before, after = _parameters(model), _parameters(again)
    assert before.keys() == after.keys()
    for path, value in before.items():
        assert value.dtype == after[path].dtype
        np.testing.assert_array_equal(value, after[path])
    config = vars(model.config) | {"weight_block_size": None, "torch_dtype": "bfloat16"}
    assert vars(again.config) == config


def test_dtypes(v2lite, tmp_path):
    v3 = checkpoints.unpack("v3_norope_moonlight", tmp_path)
    for folder, asked, stored in ((v2lite, None, "bfloat16"), (v3, jnp.float16, "float16")):
        model = load(folder, param_dtype=asked)
        assert model.dtype == stored
        for path, value in _parameters(model).items():
            wide = path.endswith("e_score_correction_bias")
            assert value.dtype == ("float32" if wide else stored), path
    model = load(v2lite, param_dtype=jnp.float32, dtype=jnp.bfloat16)
    assert model.dtype == "bfloat16"
    assert model.lm_head.kernel.dtype == "float32"


def test_fp8_blocks_with_ragged_edges(tmp_path):
    folder = checkpoints.unpack("v3_fp8", tmp_path)
    assert load(folder).lm_head.kernel.dtype == "bfloat16"
    loaded = load(folder, param_dtype=jnp.float32).model.layers[0].self_attn.kv_a_proj_with_mqa
    # 48 x 48 in blocks of 32: the last ones are 16 wide. Read here with no help of the library.
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])

    def tensor(name, dtype):
        entry = header[name]
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        return np.frombuffer(data[start:end], dtype).reshape(entry["shape"]).astype(np.float64)

    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    w, scale = tensor(name, ml_dtypes.float8_e4m3fn), tensor(name + "_scale_inv", np.float32)
    assert w.shape[0] % 32
    for i, j in np.ndindex(w.shape):
        w[i, j] *= scale[i // 32, j // 32]
    np.testing.assert_allclose(loaded.kernel[...], w.T, rtol=1e-6)


def test_progress_reaches_the_total(v2lite):
    calls = []
    load(v2lite, progress=lambda done, total: calls.append((done, total)))
    done, total = zip(*calls, strict=True)
    assert list(done) == sorted(done)
    assert (
        done[-1]
        == total[0]
        == sum(v.nbytes for v in load_file(v2lite / "model.safetensors").values())
    )


def test_memory_holds_the_model_once(tmp_path):
    """Peak memory of loading 300 MB of float32 as bfloat16 stays near the 150 MB of the result."""
    config = DeepseekConfig(
        model_type="deepseek_v3",
        vocab_size=40_000,
        hidden_size=256,
        intermediate_size=8_000,
        num_hidden_layers=10,
        num_attention_heads=4,
    )
    model = DeepseekForCausalLM(config, rngs=nnx.Rngs(0))
    model.save_pretrained(tmp_path)
    size = sum(value.nbytes for value in _parameters(model).values())
    assert size > 300e6
    del model
    code = """
import sys, psutil, jax.numpy as jnp, threading, time
from mla_jax import DeepseekForCausalLM
jnp.zeros(3).block_until_ready()
process, peak, stop = psutil.Process(), 0, False
def anonymous():  # pages of mapped files can be dropped at any time, and do not count
    memory = process.memory_info()
    return memory.rss - memory.shared
def watch():
    global peak
    while not stop:
        peak = max(peak, anonymous())
        time.sleep(0.002)
start = anonymous()
thread = threading.Thread(target=watch)
thread.start()
model = DeepseekForCausalLM.from_pretrained(sys.argv[1], param_dtype=jnp.bfloat16)
stop = True
thread.join()
print(peak - start)
"""
    command = [sys.executable, "-c", code, tmp_path]
    on_cpu = os.environ | {"JAX_PLATFORMS": "cpu"}  # a GPU's driver takes host memory of its own
    out = subprocess.run(command, env=on_cpu, check=True, capture_output=True, text=True)
    assert int(out.stdout) < 1.5 * size / 2


def test_every_wrong_tensor_is_named_in_one_error(v2lite):
    def change(tensors):
        del tensors["model.layers.1.self_attn.kv_b_proj.weight"]
        del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
        tensors["model.layers.0.extra.weight"] = jnp.zeros(3)
        tensors["model.layers.x.weight"] = jnp.zeros(3)
        tensors["model.norm.weight"] = jnp.zeros(7)

    _edit(v2lite, change)
    with pytest.raises(ValueError, match="5 tensors do not fit the model") as error:
        load(v2lite)
    hidden = json.loads((v2lite / "config.json").read_text())["hidden_size"]
    assert set(str(error.value).splitlines()[1:]) == {
        "missing: model.layers.1.self_attn.kv_b_proj.weight",
        "missing: model.layers.1.mlp.experts.2.up_proj.weight",
        "unexpected: model.layers.0.extra.weight",
        "unexpected: model.layers.x.weight",
        f"mis-shaped: model.norm.weight: got [7], expected [{hidden}]",
    }


def test_prediction_layers_and_tied_head_are_left_out(tmp_path):
    sharded = checkpoints.unpack("v3_yarn_sharded", tmp_path)
    index = read_json(sharded, "model.safetensors.index.json")["weight_map"]
    layers = read_json(sharded, "config.json")["num_hidden_layers"]
    assert any(name.startswith(f"model.layers.{layers}.") for name in index)
    assert len(load(sharded).model.layers) == layers

    tied = checkpoints.unpack("v3_quirks", tmp_path)
    model = load(tied)
    assert not hasattr(model, "lm_head")
    embedding = model.model.embed_tokens.embedding[...]
    _edit(tied, lambda tensors: tensors.update({"lm_head.weight": embedding}))
    load(tied)  # some tools write it all the same


def test_folders_and_files_that_are_wrong(v2lite, tmp_path):
    with pytest.raises(FileNotFoundError, match="folder: got '.*absent', expected a checkpoint"):
        load(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load(tmp_path)

    weights = v2lite / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-5], whole[:100], b"", b"\xff" * 64):
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file"):
            load(v2lite)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no \*\.safetensors"):
        load(v2lite)
    index = v2lite / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "lost.safetensors", "b": "gone.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"lacks gone\.safetensors, lost\.safetensors"):
        load(v2lite)
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="weight_map names files outside the folder"):
        load(v2lite)
    for text, message in (("{", "not JSON"), ("[1]", "got a JSON list, expected an object")):
        (v2lite / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load(v2lite)


def test_dtypes_that_are_wrong(tmp_path):
    folder = checkpoints.unpack("v2lite", tmp_path)
    _edit(folder, lambda tensors: tensors.update({"model.norm.weight": jnp.zeros(3, jnp.int32)}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight: got dtype I32, expected one of"):
        load(folder)
    folder = checkpoints.unpack("v3_fp8", tmp_path)
    _edit_config(folder, quantization_config=...)
    with pytest.raises(ValueError, match=r"FP8 without weight_block_size in config\.json: model"):
        load(folder)


def _config(name, **changes):
    config = read_json(checkpoints.DATA / name, "config.json") | changes
    return DeepseekConfig.from_dict({k: v for k, v in config.items() if v is not ...})


def test_old_and_new_keys_read_alike():
    old = _config("v3_yarn_sharded")
    scaling = read_json(checkpoints.DATA / "v3_yarn_sharded", "config.json")["rope_scaling"]
    parameters = {"rope_theta": 10000, "rope_type": "yarn", **scaling}
    del parameters["type"]
    new = _config(
        "v3_yarn_sharded",
        rope_theta=...,
        rope_scaling=...,
        torch_dtype=...,
        rope_parameters=parameters,
        dtype=old.torch_dtype,
    )
    assert new == old
    assert old.rope == RopeConfig(
        10000.0,
        YarnScaling(
            scaling["factor"],
            scaling["original_max_position_embeddings"],
            mscale=scaling["mscale"],
            mscale_all_dim=scaling["mscale_all_dim"],
        ),
        interleaved=True,
    )


def test_rope_interleave_is_of_v3_alone():
    assert not _config("v3_quirks").rope.interleaved
    assert _config("v2lite", rope_interleave=False).rope.interleaved


def test_kimi_is_v3():
    assert _config("v3_quirks", model_type="kimi_k2").is_v3


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("v32_dsa", {}, NotImplementedError, "'deepseek_v32', .*sparse indexer is not supported"),
        ("v2lite", {"model_type": "llama"}, NotImplementedError, "model_type: got 'llama'"),
        ("v2lite", {"model_type": ...}, NotImplementedError, "model_type: got None"),
        ("v2lite", {"torch_dtype": "int4"}, ValueError, "torch_dtype: got 'int4', expected one of"),
        ("v2lite", {"hidden_size": ...}, ValueError, r"config\.json: hidden_size missing"),
        ("v2lite", {"hidden_size": "64"}, ValueError, "hidden_size: got '64', expected a positive"),
        ("v2lite", {"num_hidden_layers": 0}, ValueError, "num_hidden_layers: got 0"),
        ("v2lite", {"hidden_act": "gelu"}, NotImplementedError, "hidden_act: got 'gelu'"),
        ("v2lite", {"moe_layer_freq": 2}, NotImplementedError, "moe_layer_freq: got 2, expected 1"),
        ("v2lite", {"scoring_func": "sigmoid"}, NotImplementedError, "scoring_func: got 'sigmoid'"),
        ("v2lite", {"topk_method": "noaux_tc"}, NotImplementedError, "topk_method: got 'noaux_tc'"),
        ("v3_quirks", {"topk_method": "greedy"}, NotImplementedError, "topk_method: got 'greedy'"),
        ("v3_quirks", {"n_group": 3}, ValueError, "n_group: got 3, expected a divisor of"),
        ("v3_quirks", {"topk_group": 9}, ValueError, "topk_group 9 of 2 groups"),
        ("v3_quirks", {"num_experts_per_tok": 5}, ValueError, "num_experts_per_tok: got 5, .* 4"),
        ("v2lite", {"moe_intermediate_size": 0}, ValueError, "moe_intermediate_size: got 0"),
        (
            "v3_fp8",
            {"quantization_config": {"quant_method": "awq"}},
            NotImplementedError,
            "quant_method: got 'awq', expected 'fp8'",
        ),
        (
            "v2lite",
            {"rope_scaling": {"type": "linear", "factor": 2}},
            NotImplementedError,
            "rope type: got 'linear'",
        ),
        (
            "v2lite",
            {"rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}},
            NotImplementedError,
            "truncate: got False, expected True",
        ),
        (
            "v2lite",
            {"rope_scaling": {"type": "yarn", "factor": 2}},
            ValueError,
            "original_max_position_embeddings missing from the YaRN parameters",
        ),
    ],
)
def test_config_refusals(name, changes, error, message):
    with pytest.raises(error, match=message):
        _config(name, **changes)
