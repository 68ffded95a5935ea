# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Measurements, for `mla-jax bench`: our implementations, and the peers found installed.

Imports go one way: report -> {step, generation} -> {op, models} -> {peers, runs} -> timing ->
cases. Only `peers` knows torch.
"""
