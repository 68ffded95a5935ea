# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Runs pytest for Bazel, which starts a Python file."""

import sys

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main(["-n0", "-p", "no:cacheprovider", *sys.argv[1:]]))
