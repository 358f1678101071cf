"""The trainer's side of a push to a server: weights in files of bounded size, in a folder that both sides see.

Where that folder lies in memory (/dev/shm) the files are shared memory: written once by the trainer, read in place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
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
        Exception: what `take` raised.
    """
    walk, taken = iter(weights), None
    with ThreadPoolExecutor(max_workers=1) as pool:
        for number, names in enumerate(buckets(shapes, size)):
            file = folder / f"{prefix}-{number}.safetensors"
            try:
                write(file, {name: shapes[name] for name in names}, walk, bar)
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


def write(file: Path, shapes: Shapes, walk: Iterator[tuple[str, Tensor]], bar: tqdm) -> None:
    """Write the next weights of `walk` as a safetensors file, one at a time."""
    header, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + _bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("xb", buffering=0) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, (dtype, shape) in shapes.items():
            found, tensor = next(walk)
            if (found, DTYPES[tensor.dtype], list(tensor.shape)) != (name, dtype, shape):
                raise RuntimeError(
                    f"{found} came as {tensor.dtype} {list(tensor.shape)} where {name} was announced as {dtype} "
                    f"{shape}: the policy's parameters have changed since the first push."
                )
            _append(out, tensor, bar)


def _append(out, tensor: Tensor, bar: tqdm) -> None:
    data = memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    while data:
        written = out.write(data)  # Linux writes at most 2 GiB at once
        data = data[written:]
        bar.update(written)


def _take_once(take: Take, file: Path) -> None:
    try:
        take(file.name)
    finally:
        file.unlink(missing_ok=True)


def _await(taken: tuple[Future, Path] | None) -> None:
    if taken is not None:
        taken[0].result()


def _bytes(dtype: str, shape: list[int]) -> int:
    count = int(dtype.removeprefix("BF").lstrip("FI")) // 8
    for size in shape:
        count *= size
    return count
