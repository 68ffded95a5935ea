# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The command line, run in this process."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoints
import jax
import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer

import mla_jax
from mla_jax import pallas
from mla_jax.cli import TINY, main

# The first that can run here, and why those before it cannot.
_SHAPES = [jax.ShapeDtypeStruct((1, n, 1, 576), "bfloat16") for n in (1, 64)]
_FOUND = mla_jax.explain(*_SHAPES, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), 512)
IMPLEMENTATION, NOT = _FOUND.implementation, _FOUND.reasons
_INPUTS = {"q": _SHAPES[0], "k_cache": _SHAPES[1], "block_table": jnp.zeros((1, 1), jnp.int32)}
_INPUTS |= {"head_dim_v": 512, "platform": "cuda"}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint with a tokenizer, smaller and faster than the embedded one."""
    folder = checkpoints.unpack("v3_fp8", tmp_path)
    characters = {chr(32 + i): i for i in range(96)}
    model = {"type": "BPE", "vocab": characters, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    return folder


def test_embedded_model_continues_the_default_prompt_in_english(capsys):
    assert main(["generate", "--max-new-tokens", "40", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["prompts"] == ["ROMEO.\n"]
    assert report["num_tokens"] == len(report["tokens"][0]) == 40
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    assert tokenizer.decode(report["tokens"][0]) == report["texts"][0]
    # Frequent words of the language, more than chance would give in some 100 letters.
    words = report["texts"][0].lower().replace(".", " ").replace(",", " ").split()
    frequent = set("the and i to of a you my in is not that it me for with his this but he".split())
    assert len(frequent & set(words)) >= 3, report["texts"]
    assert report["implementation"] == IMPLEMENTATION
    assert report["tokens_per_second"] > 0
    width = 4 if jax.default_backend() == "cpu" else 2  # bytes of float32, bfloat16
    assert report["cache_bytes_per_token"] == 4 * 576 * width  # 4 layers
    assert report["mha_bytes_per_token"] == 4 * 8 * (32 + 64 + 32) * width


def test_embedded_model_is_small():
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 10_000_000


def test_text_output_is_the_prompt_its_continuation_and_a_summary(folder, capsys):
    options = ["generate", "--model", str(folder), "--max-new-tokens", "12", "--temperature", "0"]
    options += ["--dtype", "float32"]  # the nearest two tokens may change places in bfloat16
    assert main([*options, "--prompt", "To be", "--json"]) == 0
    text = json.loads(capsys.readouterr().out)["texts"][0]
    assert main([*options, "--prompt", "To be"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("To be" + text + "\n\n12 tokens, ")
    assert re.search(rf"implementation (ffi|xla) on {jax.devices()[0].device_kind}", out)
    assert "bytes a token; multi-head attention would take" in out

    (folder / "prompt.txt").write_text("To be")
    assert main([*options, "--prompt-file", str(folder / "prompt.txt")]) == 0
    assert capsys.readouterr().out.startswith("To be" + text + "\n\n12 tokens, ")

    assert main([*options, "--prompt", "To be", "--prompt", "A"]) == 0
    assert capsys.readouterr().out.startswith("To be" + text + "\n---\nA")


def test_options_reach_generation(folder, capsys):
    def tokens(*options):
        arguments = ["generate", "--model", str(folder), "--prompt", "To be", "--json"]
        arguments += ["--max-new-tokens", "8", "--dtype", "float32"]
        assert main([*arguments, *options]) == 0
        return json.loads(capsys.readouterr().out)["tokens"]

    hot = ("--temperature", "5", "--top-p", "1")
    assert tokens(*hot, "--seed", "1") == tokens(*hot, "--seed", "1") != tokens(*hot, "--seed", "2")
    greedy = tokens("--temperature", "0")
    assert tokens(*hot, "--top-k", "1") == greedy
    assert tokens("--temperature", "5", "--top-p", "1e-6") == greedy
    paged = ("--page-size", "4", "--prefill-chunk", "2", "--implementation", "xla")
    assert tokens("--temperature", "0", *paged) == greedy


def test_beginning_of_sequence_token(folder, capsys):
    """Added where tokenizer_config.json asks for it, as Hugging Face does."""
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"add_bos_token": True, "bos_token": {"content": "~"}})
    )
    options = ["generate", "--model", str(folder), "--max-new-tokens", "9", "--temperature", "0"]
    main([*options, "--prompt", "ab", "--json"])
    added = json.loads(capsys.readouterr().out)["tokens"]
    main([*options, "--prompt", "~ab", "--json"])  # it is there already
    assert json.loads(capsys.readouterr().out)["tokens"] == added
    (folder / "tokenizer_config.json").unlink()
    main([*options, "--prompt", "~ab", "--json"])
    assert json.loads(capsys.readouterr().out)["tokens"] == added


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"mla-jax {mla_jax.__version__}" in out
    for package in ("jax", "jaxlib", "flax", "numpy"):
        assert f"{package} {importlib.metadata.version(package)}" in out
    assert f"runs: {IMPLEMENTATION}" in out
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["implementation"] == IMPLEMENTATION
    assert info["not"] == NOT
    assert info["devices"]


def test_an_install_of_python_alone(tmp_path):
    """What no compiler took part in takes `pallas` on a Hopper GPU by itself; `info` says why."""
    without = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(mla_jax.__file__).parent, tmp_path / "mla_jax", ignore=without)
    code = """
import mla_jax
from mla_jax.cli import main
from reference import assert_close, attend, problem

main(["info", "--json"])
p = problem([100, 0, 37], h_q=16)
assert_close(mla_jax.flash_mla_with_kvcache(*p.arrays(), 512), attend(p))
"""
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parent}"}
    command = [sys.executable, "-P", "-c", code]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    info = json.loads(run.stdout)
    on_hopper = jax.default_backend() == "gpu" and pallas.unsupported_reason(**_INPUTS) is None
    assert info["implementation"] == ("pallas" if on_hopper else "xla")
    assert "is not installed: pip found no" in info["not"]["ffi"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("sing",), "invalid choice: 'sing'"),
        (("generate", "--lyrics"), "unrecognized arguments: --lyrics"),
        (("generate", "--max-new-tokens", "many"), "invalid int value: 'many'"),
        (("generate", "--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
        (("generate", "--prompt", "a", "--prompt-file", "b"), "not allowed with argument"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert error.startswith("mla-jax")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "absent"), "'absent' has no tokenizer.json"),
        (("--prompt-file", "absent.txt"), "No such file or directory: 'absent.txt'"),
        (("--max-new-tokens", "0"), "max_new_tokens: got 0, expected a positive int"),
        (("--temperature", "-1"), "temperature: got -1.0"),
        (("--top-p", "2"), "top_p: got 2.0"),
        (("--page-size", "0"), "page_size: got 0"),
        (("--implementation", "cuda"), "implementation: got 'cuda', expected None, one of"),
        (("--prompt", ""), "--prompt: got an empty text"),
        (("--max-new-tokens", "1000000"), "max_position_embeddings"),
    ],
)
def test_errors_are_one_line_and_exit_with_2(folder, options, message, capsys):
    model = () if "--model" in options else ("--model", str(folder))
    assert main(["generate", *model, *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mla-jax: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_broken_files_are_one_line_too_and_traceback_shows_more(folder, capsys):
    (folder / "tokenizer.json").write_text("{}")
    assert main(["generate", "--model", str(folder)]) == 2
    assert "tokenizer.json: not a tokenizer" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not a tokenizer"):
        main(["generate", "--model", str(folder), "--traceback"])
    shutil.copy(TINY / "tokenizer.json", folder)
    (folder / "config.json").write_text('{"model_type": "deepseek_v32"}')
    assert main(["generate", "--model", str(folder)]) == 2
    assert "sparse indexer is not supported" in capsys.readouterr().err
