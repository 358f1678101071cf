"""The trainer's side of a push to a server: weights in files of bounded size, in a folder that both sides see.

Where that folder lies in memory (/dev/shm) the files are shared memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from spec_rollout.backends.vllm.intake import Shapes

BUCKET = 256 * 2**20
"""Bytes of a file, unless a single weight has more; at most two are there at a time."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}
"""Their names in safetensors."""
SIZES = {name: dtype.itemsize for dtype, name in DTYPES.items()}

Named = Iterable[tuple[str, Tensor]]
Take = Callable[[str], None]
"""Has the server take a file of the folder."""


def shapes_of(weights: Named) -> Shapes:
    """What `weights` are, read by walking through them once."""
    return {name: [DTYPES[tensor.dtype], list(tensor.shape)] for name, tensor in weights}


def hand_over(weights: Named, shapes: Shapes, folder: Path, prefix: str, take: Take, bar: tqdm, size: int = BUCKET):
    """Write `weights`, which are as `shapes` says and in its order, to files in `folder`, and have the server take
    each while the next one is written.

    Raises:
        RuntimeError: a weight is not what it was said to be.
        OSError: a file cannot be written, such as where the folder is full.
        Exception: what `take` raised.
    """
    walk, taken = iter(weights), None
    with ThreadPoolExecutor(max_workers=1) as pool:
        for number, names in enumerate(buckets(shapes, size)):
            file = folder / f"{prefix}-{number}.safetensors"
            try:
                _write(_next(walk, {name: shapes[name] for name in names}, bar), file)
            finally:
                _await(taken)
            taken = pool.submit(_take_once, take, file), file
        _await(taken)


def buckets(shapes: Shapes, size: int) -> Iterator[list[str]]:
    """Names of weights that lie together in a file of at most `size` bytes, in their order."""
    names: list[str] = []
    filled = 0
    for name, (dtype, shape) in shapes.items():
        more = _bytes(dtype, shape)
        if names and filled + more > size:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += more
    if names:
        yield names


def total_bytes(shapes: Shapes) -> int:
    return sum(_bytes(dtype, shape) for dtype, shape in shapes.values())


def _next(walk: Iterator[tuple[str, Tensor]], shapes: Shapes, bar: tqdm) -> dict[str, Tensor]:
    """Copies on the host of the next weights of `walk`, which are as `shapes` says: one in pieces is whole only until
    the next one is asked for."""
    bucket = {}
    for name, (dtype, shape) in shapes.items():
        found, tensor = next(walk)
        if (found, DTYPES[tensor.dtype], list(tensor.shape)) != (name, dtype, shape):
            raise RuntimeError(
                f"{found} came as {tensor.dtype} {list(tensor.shape)} where {name} was announced as {dtype} "
                f"{shape}: the policy's parameters have changed since the first push."
            )
        bucket[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        bar.update(bucket[name].nbytes)
    return bucket


def _write(weights: dict[str, Tensor], file: Path) -> None:
    try:
        save_file(weights, file)
    except SafetensorError as error:  # no OSError, whatever it was
        size = sum(weight.nbytes for weight in weights.values()) / 2**20
        raise OSError(
            f"Weights cannot be written to {file} ({error}): a push wants room there for two files like this one of "
            f"{size:.0f} MiB. Make room, such as by docker's --shm-size where that is /dev/shm, or start the server "
            "with --weights DIR, an empty folder on a larger file system."
        ) from error


def _take_once(take: Take, file: Path) -> None:
    try:
        take(file.name)
    finally:
        file.unlink(missing_ok=True)


def _await(taken: tuple[Future, Path] | None) -> None:
    if taken is not None:
        taken[0].result()


def _bytes(dtype: str, shape: list[int]) -> int:
    return SIZES[dtype] * math.prod(shape)
