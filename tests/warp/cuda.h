// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// Stands for CUDA's header of this name: see cuda_runtime.h.

#pragma once

struct CUtensorMap;
