# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The machine code of the CUDA library: tensor cores and bulk copies are used.

Reads it with NVIDIA's cuobjdump, of the toolkit or of PyPI; no GPU is needed. That no kernel spills
is for the compiler to say: xla_ffi/CMakeLists.txt makes it an error.
"""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from mla_jax import ffi

WHEELS = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin")
CUOBJDUMP = shutil.which("cuobjdump", path=f"{WHEELS}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture(scope="module")
def kernels():
    """Returns the instructions of each kernel, by its name."""
    if (reason := ffi._library_reason("cuda")) is not None:
        pytest.skip(f"ffi: {reason}")
    if CUOBJDUMP is None:
        pytest.skip("cuobjdump is not installed")
    # It calls nvdisasm, which lies beside it.
    path = f"{Path(CUOBJDUMP).parent}{os.pathsep}{os.environ['PATH']}"
    text = subprocess.run(
        [CUOBJDUMP, "--dump-sass", ffi.find_library("cuda")],
        env=os.environ | {"PATH": path},
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert set(re.findall(r"arch = (\w+)", text)) == {"sm_90a"}
    names = re.split(r"Function : (\S+)", text)[1:]
    return dict(zip(names[::2], names[1::2], strict=True))


def test_every_template_is_there(kernels):
    """Two dtypes, and caches of 8 or 9 pieces of 64 channels."""
    found = re.findall(r"decode_kernelI(\d+\w+?)Li(\d)E", " ".join(kernels))
    assert set(found) == {(t, n) for t in ("6__half", "13__nv_bfloat16") for n in "89"}


def test_tensor_cores_and_bulk_copies(kernels):
    for name, code in kernels.items():
        if "combine_kernel" in name:
            assert "LDGSTS" in code, name  # partial results come by asynchronous copies
            continue
        if "append_kernel" in name:
            for move in ("LDG.E.128", "STG.E.128"):  # latents, 16 bytes a thread
                assert len(re.findall(rf"\b{re.escape(move)}\b", code)) >= 2, (name, move)
            continue
        assert len(re.findall(r"\bHGMMA\b", code)) >= 16, name
        assert len(re.findall(r"\bUTMALDG\b", code)) >= 2, name
        assert "USETMAXREG" in code, name
