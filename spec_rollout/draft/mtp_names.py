"""What checkpoints call the tensors of their MTP heads, and how they hold the experts in them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

LAYER = "layers.0."
"""Of `MtpHead`: where its decoder layer is."""
QWENS = {"fc.": "fc.", "pre_fc_norm_": "pre_fc_norm_", "final_norm.": "norm.", LAYER: LAYER}
DEEPSEEKS = {
    "fc.": "eh_proj.",
    "pre_fc_norm_embedding.": "enorm.",
    "pre_fc_norm_hidden.": "hnorm.",
    "final_norm.": "shared_head.norm.",
    LAYER: "",
}
"""How their own names begin, by how those of `MtpHead` do. The last entry is the layer's, which takes the rest."""
COPIES = ("embed_tokens.weight", "shared_head.head.weight")
"""Of the policy's embedding and output head, which some lay beside the head. The policy's own serve."""
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SCALES = ("_scale", "_scale_inv", "_scale_2", ".scales", ".qweight", ".qzeros", "_packed")
EXPERT = re.compile(r"(.*\.experts\.)(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


class Names(NamedTuple):
    """Of a head's tensors on disk.

    `prefix`: of all of them. `starts`: theirs behind it, by `MtpHead`'s. `stacked`: experts lie in one tensor as in
    transformers' layers, [E, 2 I, H] and [E, H, I], rather than three matrices each.
    """

    prefix: str
    starts: dict[str, str]
    stacked: bool = False

    def own(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` of the disk under `MtpHead`'s names; a name that says nothing stays."""
        found = {self._own(name): tensor for name, tensor in tensors.items()}
        return found if self.stacked else merged(found)

    def on_disk(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        given = own if self.stacked else split(own)
        return {self._theirs(name): tensor for name, tensor in given.items()}

    def _own(self, name: str) -> str:
        rest = name.removeprefix(self.prefix)
        return next(
            (mine + rest.removeprefix(start) for mine, start in self.starts.items() if rest.startswith(start)), name
        )

    def _theirs(self, name: str) -> str:
        mine = next(mine for mine in self.starts if name.startswith(mine))
        return self.prefix + self.starts[mine] + name.removeprefix(mine)


QWEN = Names("mtp.", QWENS)
"""Of Qwen3-Next and Qwen3.5."""


def appended(layers: int) -> Names:
    """Of DeepSeek-V3 and GLM-4.5: behind the policy's `layers`, as one more."""
    return Names(f"model.layers.{layers}.", DEEPSEEKS)


def names_in(names: Iterable[str], layers: int) -> Names | None:
    """The kind of the head among a checkpoint's tensors `names`, for a policy of `layers` layers; None if none is."""
    names = set(names)
    found = appended(layers)
    if f"{found.prefix}eh_proj.weight" not in names:
        if not any(name.startswith(QWEN.prefix) for name in names):
            return None
        found = QWEN
    return found._replace(
        stacked=any(name.endswith(".experts.gate_up_proj") for name in names if name.startswith(found.prefix))
    )


def of_heads(name: str, names: Names, layers: int) -> bool:
    """Whether the tensor `name` belongs to an MTP layer, first or further, and is no copy of the policy's."""
    if names.prefix == QWEN.prefix:
        return name.startswith(QWEN.prefix)
    number = re.match(r"model\.layers\.(\d+)\.", name)
    return number is not None and int(number[1]) >= layers and not name.endswith(COPIES)


def of_further(name: str, names: Names) -> bool:
    """Whether the tensor `name` is of an MTP layer behind the first."""
    if names.prefix == QWEN.prefix:
        return re.match(r"mtp\.layers\.[1-9]", name) is not None
    return not name.startswith(names.prefix)


def refuse_quantized(tensors: dict[str, Tensor], source: object) -> None:
    """
    Raises:
        ValueError: some of `tensors` are not plain floats, or come with scales; `source` is named.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS or name.endswith(SCALES):
            raise ValueError(
                f"The MTP tensors in {source} are quantised ({name} is {str(tensor.dtype).removeprefix('torch.')}): "
                "only float32, bfloat16 and float16 are trained and run. Load the policy from a checkpoint that is "
                "not quantised."
            )


def merged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with the experts' matrices stacked as transformers' layers hold them; those with gaps stay apart."""
    found: dict[str, dict[str, dict[int, Tensor]]] = {}
    rest = {}
    for name, tensor in tensors.items():
        parts = EXPERT.fullmatch(name)
        if parts is None:
            rest[name] = tensor
        else:
            found.setdefault(parts[1], {}).setdefault(parts[3], {})[int(parts[2])] = tensor
    for base, kinds in found.items():
        numbers = [sorted(matrices) for matrices in kinds.values()]
        shapes = [{matrix.shape for matrix in matrices.values()} for matrices in kinds.values()]
        whole = len(kinds) == 3 and all(own == [*range(len(numbers[0]))] for own in numbers)
        if (
            not whole
            or any(len(own) > 1 for own in shapes)
            or kinds["gate_proj"][0].shape != kinds["up_proj"][0].shape
        ):
            rest |= {f"{base}{i}.{kind}.weight": m for kind, own in kinds.items() for i, m in own.items()}
            continue
        stacks = {kind: torch.stack([own[i] for i in numbers[0]]) for kind, own in kinds.items()}
        rest[f"{base}gate_up_proj"] = torch.cat([stacks["gate_proj"], stacks["up_proj"]], 1)
        rest[f"{base}down_proj"] = stacks["down_proj"]
    return rest


def split(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The other way round: three matrices per expert."""
    apart = {}
    for name, tensor in tensors.items():
        base, _, kind = name.rpartition(".")
        if not base.endswith(".experts") or kind not in ("gate_up_proj", "down_proj"):
            apart[name] = tensor
            continue
        halves = {"gate_proj": 0, "up_proj": 1} if kind == "gate_up_proj" else {kind: 0}
        for half, stack in zip(halves, tensor.chunk(len(halves), 1), strict=True):
            apart |= {f"{base}.{i}.{half}.weight": matrix.contiguous() for i, matrix in enumerate(stack)}
    return apart
