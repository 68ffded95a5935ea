# Copyright 2026 The mla-jax Authors
# SPDX-License-Identifier: Apache-2.0
"""Hugging Face checkpoint folders: safetensors to parameters and back.

Parameters bear the checkpoint's names, so the mapping is mechanical: a path of attributes is a name
with dots; kernels are `[in, out]` here and `[out, in]` there; the experts of a layer are one
stacked parameter here and one tensor each there.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}
_SCALE = "_scale_inv"  # suffix of an FP8 weight's block scales
_INDEX = "model.safetensors.index.json"
_LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}

Model = TypeVar("Model", bound=nnx.Module)


@dataclass(frozen=True)
class _Tensor:
    """A tensor in a file: its bytes are mapped when `read` is called, not before."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(_DTYPES[self.dtype]).itemsize

    def read(self) -> np.ndarray:
        if self.nbytes == 0:
            return np.zeros(self.shape, _DTYPES[self.dtype])
        return np.memmap(self.file, _DTYPES[self.dtype], "r", self.offset, self.shape)


def load(
    model: Model,
    folder: str | PathLike[str],
    *,
    ignore: Callable[[str], bool] = lambda name: False,
    tied: Set[str] = frozenset(),
    weight_block_size: tuple[int, int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Fills an abstract model from the *.safetensors of a folder.

    One parameter is read, converted and put on the device at a time, so host memory holds the model
    once (or, where it goes to another device, one parameter).

    Args:
        model: as `nnx.eval_shape` gives it; its dtypes are those wanted.
        folder: one model.safetensors, or shards with their index.
        ignore: says which tensors of the folder are left out.
        tied: names that may be present but are another parameter.
        weight_block_size: rows and columns that share a scale of an FP8 weight.
        progress: called with (bytes read, bytes to read) after each parameter.

    Raises:
        FileNotFoundError: the folder or a shard is missing.
        ValueError: a file is damaged, or tensors are missing, unexpected, mis-shaped or of an
            unknown dtype; one message names them all.
    """
    graphdef, state = nnx.split(model)
    parameters = nnx.to_flat_state(state)
    tensors = {n: t for n, t in _find_tensors(Path(folder)).items() if not ignore(n)}
    _check(parameters, tensors, tied, weight_block_size)

    def read(name: str) -> np.ndarray:
        value = tensors[name].read()
        if tensors[name].dtype == "F8_E4M3":
            assert weight_block_size is not None  # `_check` has refused
            value = _dequantise(value, tensors[name + _SCALE].read(), weight_block_size)
        return value

    total = sum(t.nbytes for t in tensors.values())
    done = 0
    filled = []
    for path, parameter in parameters:
        names = [name for name, _ in _sources(path, parameter.shape)]
        # A copy in memory of its own: a view of the file would change with it.
        value = np.empty(parameter.shape, parameter.dtype)
        if _is_stacked(path):
            for expert, name in enumerate(names):
                value[expert] = read(name).T
        else:
            tensor = read(names[0])
            value[...] = tensor.T if path[-1] == "kernel" else tensor
        filled.append((path, parameter.replace(jnp.asarray(value))))
        done += sum(
            tensors[n].nbytes for name in names for n in (name, name + _SCALE) if n in tensors
        )
        if progress is not None:
            progress(done, total)
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def save(model: nnx.Module, folder: str | PathLike[str], config: Mapping[str, Any]) -> None:
    """Writes config.json and one model.safetensors as Hugging Face names and shapes the tensors."""
    tensors: dict[str, jax.Array] = {}
    for path, parameter in nnx.to_flat_state(nnx.state(model)):
        value = parameter[...]
        names = [name for name, _ in _sources(path, value.shape)]
        if _is_stacked(path):
            tensors |= {name: value[expert].T for expert, name in enumerate(names)}
        else:
            tensors[names[0]] = value.T if path[-1] == "kernel" else value
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_json(folder: str | PathLike[str], name: str) -> dict[str, Any]:
    """Reads a JSON object from a file of a checkpoint folder.

    Raises:
        FileNotFoundError: the folder or the file is missing.
        ValueError: the file holds something else.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: got {str(folder)!r}, expected a checkpoint folder")
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"folder: {str(folder)!r} has no {name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got a JSON {type(content).__name__}, expected an object")
    return content


def _find_tensors(folder: Path) -> dict[str, _Tensor]:
    """Lists every tensor of the folder's shards."""
    if (folder / _INDEX).is_file():
        shards = set(read_json(folder, _INDEX).get("weight_map", {}).values())
        if any(not isinstance(name, str) or Path(name).name != name for name in shards):
            raise ValueError(f"{folder / _INDEX}: weight_map names files outside the folder")
        files = sorted(folder / name for name in shards)
        lost = [file.name for file in files if not file.is_file()]
        if lost:
            raise FileNotFoundError(f"folder: {str(folder)!r} lacks {', '.join(lost)} of its index")
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"folder: {str(folder)!r} has no *.safetensors")
    return {name: tensor for file in files for name, tensor in _tensors_of(file)}


def _tensors_of(file: Path) -> Iterator[tuple[str, _Tensor]]:
    try:
        with safe_open(file, framework="numpy") as shard:
            # The format (huggingface.co/docs/safetensors): 8 bytes with the header's length, the
            # header, then the tensors without gaps. safe_open has checked all of it.
            with file.open("rb") as f:
                offset = 8 + int.from_bytes(f.read(8), "little")
            for name in shard.offset_keys():
                view = shard.get_slice(name)
                tensor = _Tensor(file, offset, view.get_dtype(), tuple(view.get_shape()))
                if tensor.dtype not in _DTYPES:
                    raise ValueError(
                        f"{file}: {name}: got dtype {tensor.dtype}, expected one of {list(_DTYPES)}"
                    )
                offset += tensor.nbytes
                yield name, tensor
    except SafetensorError as error:
        raise ValueError(f"{file}: not a safetensors file: {error}") from None


def _is_stacked(path: tuple[Any, ...]) -> bool:
    return path[-2] == "experts"


def _sources(
    path: tuple[Any, ...], shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Lists the checkpoint's tensors, with their shapes, that make up one parameter."""
    if _is_stacked(path):
        prefix = ".".join(map(str, path[:-1]))
        for expert in range(shape[0]):
            yield f"{prefix}.{expert}.{path[-1]}.weight", (shape[2], shape[1])
    else:
        name = ".".join(map(str, (*path[:-1], _LEAF_NAMES.get(path[-1], path[-1]))))
        yield name, shape[::-1] if path[-1] == "kernel" else shape


def _check(
    parameters: Any,
    tensors: Mapping[str, _Tensor],
    tied: Set[str],
    block: tuple[int, int] | None,
) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for path, parameter in parameters:
        expected |= dict(_sources(path, parameter.shape))
    for name in list(expected):
        if name in tensors and tensors[name].dtype == "F8_E4M3" and block is not None:
            expected[name + _SCALE] = tuple(
                -(-size // b) for size, b in zip(expected[name], block, strict=False)
            )
    problems = [f"missing: {name}" for name in expected if name not in tensors]
    problems += [f"unexpected: {name}" for name in tensors if name not in {*expected, *tied}]
    for name, shape in expected.items():
        if name not in tensors:
            continue
        if tensors[name].shape != shape:
            got = list(tensors[name].shape)
            problems.append(f"mis-shaped: {name}: got {got}, expected {list(shape)}")
        if tensors[name].dtype == "F8_E4M3" and block is None:
            problems.append(f"FP8 without weight_block_size in config.json: {name}")
    if problems:
        raise ValueError(f"{len(problems)} tensors do not fit the model:\n" + "\n".join(problems))


def _dequantise(w: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Multiplies each `block` of an FP8 weight by its scale; blocks at the edges may be smaller."""
    rows = np.arange(w.shape[0]) // block[0]
    columns = np.arange(w.shape[1]) // block[1]
    return w.astype(np.float32) * scale.astype(np.float32)[rows[:, None], columns]
