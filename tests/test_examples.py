# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The examples, run as a user runs them; each checks its own result."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def _run(name, *arguments):
    command = [sys.executable, EXAMPLES / name, *arguments]
    # flax_model.py trains: optimised code pays there, unlike in most tests.
    drop = {"XLA_FLAGS"} if name == "flax_model.py" else set()
    environment = {key: value for key, value in os.environ.items() if key not in drop}
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout


def test_every_example_is_run_here():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == {"decode_loop.py", "flax_model.py", "op.py", "train_tiny.py"}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("op.py", "executables compiled: 1"),
        ("flax_model.py", "% of the tokens copied"),
        ("decode_loop.py", "without sharing"),
    ],
)
def test_example(name, line):
    assert line in _run(name)


def test_train_tiny_writes_a_checkpoint(tmp_path):
    """A few steps on a few sentences; the packaged model took the same script much longer."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("The quick brown fox jumps over the lazy dog. " * 1500)
    options = ["--steps", "5", "--batch", "2", "--seq-len", "64", "--seed", "1"]
    out = _run("train_tiny.py", "--corpus", corpus, "--output", tmp_path / "out", *options)
    assert "held-out loss as stored" in out
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json", "loss.png"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    packaged = Path(__file__).parents[1] / "mla_jax" / "tiny" / "config.json"
    assert config == json.loads(packaged.read_text())
