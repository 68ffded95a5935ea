# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""What README says, run."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_in_order(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    scope: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README.md block {number}", "exec"), scope)
    assert "runs: " in capsys.readouterr().out


def test_python_blocks_of_scaling_run_in_order():
    text = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
    scope: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/scaling.md", "exec"), scope)
    assert [len(new) for new in scope["tokens"]] == [4, 4]
    assert scope["out"].shape == (2, 1, 16, 512)


def test_first_block_is_two_commands():
    """The first installs and runs the main job, the second installs and runs the tests."""
    block = re.search(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert README.index("## Quick start") < block.start() == README.index("```")
    first, second = block[1].splitlines()
    assert first.endswith("mla-jax generate")
    assert second.endswith("pytest")


def test_links_to_files_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).parents[1] / target).exists(), target
