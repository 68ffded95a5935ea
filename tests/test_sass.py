# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""The machine code of the CUDA library: tensor cores and bulk copies are used, weights come early.

Reads it with NVIDIA's cuobjdump, of the toolkit or of PyPI; no GPU is needed. That no kernel spills
is for the compiler to say: xla_ffi/CMakeLists.txt makes it an error.
"""

import itertools
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
    """Two tiles, two dtypes, and caches of 8 or 9 pieces of 64 channels; in a chain of 9.

    The op is a form of its own where it is batch-invariant.
    """
    names = " ".join(kernels)
    found = re.findall(r"decode_kernelINS_\d+(\w+?)TileI\d+(\w+?)EELi(\d)ELNS_4FormE(\d)", names)
    kinds = [("8", "0"), ("9", "0"), ("8", "1"), ("9", "1"), ("9", "2")]
    tiles = list(itertools.product(("Wide", "Narrow"), ("__half", "__nv_bfloat16")))
    assert set(found) == {(*tile, *kind) for tile in tiles for kind in kinds}
    assert len(re.findall(r"14combine_kernelI", names)) == 4
    for name, count in {"project": 4, "absorb": 2, "values": 2, "output": 4}.items():
        assert len(re.findall(rf"layer\d+{name}_kernel", names)) == count


# Loads of weights by a thread of each kernel of a layer.
WEIGHTS = {"project": 16, "absorb": 4, "values": 4, "output": 8}


def test_layers_ask_for_weights_before_the_next_kernel_may_start(kernels):
    """And so before they wait for the one before them. Compilers move loads past either."""
    for name, code in kernels.items():
        if (kind := re.search(r"layer\d+(\w+?)_kernel", name)) is None:
            continue
        order = "".join(re.findall(r"LDG\.E\.NA\S*\.128|PREEXIT|ACQBULK", code))
        load = re.findall(r"LDG\.E\.NA\S*?\.128", code)[0]
        wait = "" if kind[1] == "project" else "ACQBULK"  # the first starts when all else has ended
        assert load * WEIGHTS[kind[1]] + "PREEXIT" + wait in order, name


def test_tensor_cores_and_bulk_copies(kernels):
    for name, code in kernels.items():
        if "layer" in name:
            continue
        if "combine_kernel" in name:
            assert "LDGSTS" in code, name  # partial results come by asynchronous copies
            continue
        if "append_kernel" in name:
            for move in ("LDG.E.128", "STG.E.128"):  # latents, 16 bytes a thread
                assert len(re.findall(rf"\b{re.escape(move)}\b", code)) >= 2, (name, move)
            continue
        assert len(re.findall(r"\bHGMMA\b", code)) >= 16, name
        if "NarrowTile" in name:  # its output's products are of one warp
            assert len(re.findall(r"\bHMMA\.16816\b", code)) >= 8, name
            assert len(re.findall(r"\bLDSM\.16\.MT88\.4\b", code)) >= 4, name
        assert len(re.findall(r"\bUTMALDG\b", code)) >= 2, name
        assert "USETMAXREG" in code, name
