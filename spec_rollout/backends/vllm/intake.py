"""How a server's workers take weights: files of an agreed folder, announced and checked before any is loaded."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spec_rollout.backends.vllm.engine import MTP
from spec_rollout.backends.vllm.repairs import repack_tied_heads, repair_experts, repair_sampling
from spec_rollout.draft.mtp import MtpHead
from spec_rollout.draft.mtp_checkpoint import find_tensors

FOLDER = "SPEC_ROLLOUT_WEIGHTS"
"""Names, in a server's environment, the folder that weights are read from."""
MARK = "mark"
"""A file in it by whose content both sides know that they see the same one."""
NAME = re.compile(r"[a-z]+-[0-9]+-[0-9]+\.safetensors")
INTERRUPTED = -1
"""Version of a policy of which only a part has arrived."""
FINISHED = -1
"""In place of the tokens of a request that has drawn all of its."""

Shapes = dict[str, list]
"""A weight's dtype, as safetensors names it, and its shape, by its name in a checkpoint."""


class Intake:
    """Methods of a server's workers, one push: `live_begin`, `live_take` for each file, `live_finish`.

    Arguments are strings, since a server passes nothing else. Each answers a list: empty, or with one reason why it
    refused and changed nothing.
    """

    model_runner: Any
    """Of the worker that vLLM mixes this into."""
    _known: dict[str, Shapes] | None = None
    _open: dict[str, Shapes] | None = None
    """What has been announced and not come yet."""

    def live_folder(self) -> list[str]:
        """Where weights are read from, and the content of the mark there; empty if the server was not started by
        `spec-rollout serve`."""
        folder = os.environ.get(FOLDER)
        return [] if folder is None else [folder, Path(folder, MARK).read_text()]

    def live_begin(self, mark: str, announced: str, version: str, held: str) -> list[str]:
        """Get ready for a push.

        Args:
            mark: content of the file `MARK` in the folder.
            announced: json, `Shapes` of the policy and perhaps of the draft, under these names.
            version: number of the push, above what the worker holds.
            held: json, the versions of policy and draft that the trainer pushed last, or found.
        """
        refused = self._refusal(mark, json.loads(announced), int(version), json.loads(held))
        if refused:
            return [refused]
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if self._open is not None:
            self._finalize()  # what an interrupted push left would count as part of this one
        self._open = json.loads(announced)
        self._draft_parts: dict[str, Tensor] = {}
        self.live_policy = INTERRUPTED
        repair_experts(self.model_runner.get_model())
        with torch.inference_mode(), self._config():
            initialize_layerwise_reload(self.model_runner.get_model())
        return []

    def live_take(self, part: str, name: str) -> list[str]:
        """Take the file `name` of the folder, weights of the policy or of the draft."""
        if self._open is None or part not in self._open:
            return [f"No push of a {part} has begun."]
        file = Path(os.environ[FOLDER], name)
        if not NAME.fullmatch(name) or file.is_symlink() or not file.is_file():
            return [f"{name} is no file of weights in {os.environ[FOLDER]}."]
        open_ = self._open[part]
        found = shapes_in(file)
        strange = next((weight for weight, shape in found.items() if open_.get(weight) != shape), None)
        if strange:
            return [f"{name} holds {strange} as {found[strange]}, announced was {open_.get(strange)}."]
        if part == "draft":
            self._draft_parts.update(_read(file))
        else:
            with torch.inference_mode(), self._config():
                self.model_runner.get_model().load_weights(_read(file))
        for weight in found:
            del open_[weight]
        return []

    def live_finish(self, version: str) -> list[str]:
        """All files have been taken: policy and draft now have `version`."""
        if self._open is None:
            return ["No push has begun."]
        missing = sorted(name for names in self._open.values() for name in names)
        if missing:
            return [f"{len(missing)} announced weights have not come, among them {missing[0]}."]
        self._finalize()
        if "draft" in self._open:
            self.live_load(None, self._draft_parts, version)  # type: ignore[attr-defined]
        self._open, self._draft_parts = None, {}
        self.live_policy = int(version)
        self.live_forget()  # type: ignore[attr-defined]
        return []

    def _refusal(self, mark: str, announced: dict[str, Shapes], version: int, held: list[int]) -> str | None:
        folder = os.environ.get(FOLDER)
        if folder is None:
            return "This server has no folder to read weights from: start it with `spec-rollout serve`."
        if Path(folder, MARK).read_text() != mark:
            return f"The trainer's {folder} is not the server's."
        mine = self.live_versions()  # type: ignore[attr-defined]
        if mine not in ([0, 0], held) and mine[0] != INTERRUPTED:
            return (
                f"It holds versions {mine}, not {held}, which this trainer knows: another one pushes to it. Give each "
                "trainer a server of its own (--port)."
            )
        if version <= max(mine):
            return f"Version {version} is not above those that it holds, {mine}."
        if self._known is None:
            self._known = known_shapes(self.model_runner)
        for part, shapes in announced.items():
            if part not in self._known:
                return f"It was started without a {part}."
            refused = difference(shapes, self._known[part])
            if refused:
                return f"The {part} is not the one that it was started with: {refused}."
        return None

    def _finalize(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        runner = self.model_runner
        repair_sampling(runner.device)
        with torch.inference_mode(), self._config():
            finalize_layerwise_reload(runner.get_model(), runner.model_config)
            runner.reset_lora_state()
            repack_tied_heads(runner.get_model())

    def _config(self) -> Any:
        from vllm.config import set_current_vllm_config

        return set_current_vllm_config(self.model_runner.vllm_config)


def known_shapes(runner: Any) -> dict[str, Shapes]:
    """What the policy that the server was started with is made of, and the draft if there is one. The policy's dtypes
    are left open: vLLM casts."""
    model = _empty(runner.model_config.hf_config)
    known = {"policy": _shapes(model.named_parameters())}
    if runner.speculative_config is not None:
        speculative = runner.speculative_config
        own = speculative.method == MTP
        known["draft"] = (
            _of_mtp(model, speculative.model) if own else shapes_in(Path(speculative.model, "model.safetensors"))
        )
    return known


def shapes_in(file: Path) -> Shapes:
    """What a safetensors file says that it holds."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        slices = ((name, opened.get_slice(name)) for name in opened.keys())  # noqa: SIM118  (not a dictionary)
        return {name: [part.get_dtype(), list(part.get_shape())] for name, part in slices}


def _shapes(weights: Iterable[tuple[str, Tensor]]) -> Shapes:
    return {name: ["", list(weight.shape)] for name, weight in weights}


def _of_mtp(model: nn.Module, policy: str) -> Shapes:
    """What an MTP head for `model` is made of, which was read from the folder `policy`."""
    head = MtpHead.of(model, find_tensors(policy, model), policy, check=True)
    return _shapes(head.apart().items())


def _empty(config: Any) -> nn.Module:
    """transformers' model of that configuration, without its memory."""
    import transformers

    named = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        return named(config) if named else transformers.AutoModelForCausalLM.from_config(config)


def difference(announced: Shapes, known: Shapes) -> str | None:
    """How what a trainer announces differs from what is known; None if it does not."""
    for name, (_, shape) in announced.items():
        if name not in known:
            return f"it has no {name}"
        if shape != known[name][1]:
            return f"{name} has the shape {known[name][1]}, not {shape}"
    missing = sorted(known.keys() - announced.keys())
    return f"{missing[0]} is missing" if missing else None


def _read(file: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118  (not a dictionary)
            yield name, opened.get_tensor(name)
