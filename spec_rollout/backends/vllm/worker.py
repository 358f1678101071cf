"""What vLLM's worker learns from us: to take both models' weights while it runs, and to say what it holds.

vLLM puts this class among the bases of its worker (`worker_extension_cls`), in the trainer's process or in a server's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spec_rollout.backends.vllm.coupled import Coupled
from spec_rollout.backends.vllm.intake import FINISHED, Intake
from spec_rollout.backends.vllm.lazy_head import LazyHead
from spec_rollout.backends.vllm.repairs import repack_tied_heads, repair_experts, repair_sampling

EXTENSION = "spec_rollout.backends.vllm.worker.LiveWeights"

Weights = Iterable[tuple[str, Tensor]]
"""Checkpoint names and tensors."""
LATEST = 2**14
"""Requests that ended last, of which vLLM's other process may not have heard when a push begins."""


class LiveWeights(Intake):
    """Methods for vLLM's `collective_rpc`."""

    def live_load(self, policy: Weights | None, draft: Weights | None, version: str | int) -> None:
        """Take the weights of the policy, of the draft or of both; what was taken now has `version`.

        Raises:
            RuntimeError: the draft brings an output head while it shares the policy's.
        """
        repair_sampling(self.model_runner.device)
        if policy is not None:
            repair_experts(self.model_runner.get_model())
            self.model_runner.reload_weights(weights_iterator=iter(policy))
            repack_tied_heads(self.model_runner.get_model())
            self.live_policy = int(version)
        if draft is not None:
            self._load_draft(dict(draft))
            self.live_draft = int(version)

    def live_verify(self, verification: str | None) -> str:
        """Let the head rest while nothing is guessed, and judge guesses by `verification` from now on: 'coupled',
        'rejection', or None for the first where this runner was tested with it. Returns what is in force.

        Raises:
            ValueError: 'coupled' on a runner that it was not tested with.
        """
        if not hasattr(self, "live_head") and LazyHead.fits(self.model_runner):
            self.live_head = LazyHead(self.model_runner)
            self.live_head.install()
        coupled = getattr(self, "live_coupled", None)
        if verification == "rejection":
            if coupled is not None:
                coupled.remove()
            self.live_coupled = None
            return "rejection"
        if coupled is None:
            try:
                coupled = self.live_coupled = Coupled(self.model_runner)
            except ValueError:
                if verification is not None:
                    raise
                return "rejection"
            coupled.install()
        return "coupled"

    def live_near_ties(self) -> int:
        """Samples since the last call that rounding might have made others; see `Coupled`."""
        coupled = getattr(self, "live_coupled", None)
        if coupled is None:
            return 0
        found, coupled.near_ties = coupled.near_ties, 0
        return found

    def live_versions(self) -> list[int]:
        """Versions of the policy and of the draft; 0 for weights that came from the disk at the start."""
        return [getattr(self, "live_policy", 0), getattr(self, "live_draft", 0)]

    def live_follow(self) -> list[int]:
        """`live_versions`; from now on `live_under_way` knows of requests that have ended."""
        if not hasattr(self, "live_ended"):
            self.live_ended: deque[str] = deque(maxlen=LATEST)
            self._remember_ended(self.model_runner)
        return self.live_versions()

    def live_under_way(self) -> dict[str, int] | None:
        """Tokens that each request has drawn, FINISHED for those that ended lately, by vLLM's names; None on a runner
        that is a step ahead of what it knows. Between two steps."""
        if self.model_runner.use_async_scheduling:
            return None
        ended = dict.fromkeys(self.live_ended, FINISHED)
        return ended | {name: len(row.output_token_ids) for name, row in self.model_runner.requests.items()}

    def live_forget(self) -> None:
        """Drop what was kept of requests that go on: they are read anew, from their beginning, by the new weights."""
        if getattr(self, "live_coupled", None) is not None:
            self.live_coupled.batch.forget()
        if hasattr(self, "live_head"):
            self.live_head.pending = None

    def _remember_ended(self, runner: Any) -> None:
        update = runner._update_states

        def remember(scheduler_output: Any, *others: Any) -> Any:
            self.live_ended.extend(scheduler_output.finished_req_ids)
            return update(scheduler_output, *others)

        runner._update_states = remember

    def live_probe(self) -> dict[str, float]:
        """`probe` of this worker's shard of the draft that is really there, measured through its own layers."""
        draft = self._draft()
        attention = draft.model.layers[0].self_attn
        rows = draft.lm_head.shard_indices
        found: dict[str, float] = {
            "rank": attention.qkv_proj.tp_rank,
            "ranks": attention.qkv_proj.tp_size,
            "kv_replicas": attention.qkv_proj.num_kv_head_replicas,
            "rows_from": rows.org_vocab_start_index,
            "rows": rows.num_org_elements,
        }
        with torch.inference_mode():
            found["lm_head"] = _response(draft.lm_head, rows.num_org_elements)
            if getattr(draft, "draft_id_to_target_id", None) is not None:
                found["d2t"] = draft.draft_id_to_target_id.float().mean().item()
            for name, module in draft.named_modules():
                short = name.split(".")[-1]
                if short in LINEAR:
                    found[short] = _response(module)
                elif short.endswith("norm"):
                    found[short] = module.weight.float().abs().mean().item()
        return found

    def _draft(self) -> nn.Module:
        draft = self.model_runner.get_draft_model()
        if draft is None:
            raise RuntimeError("vLLM was started without a draft: start it with a speculative_config.")
        return draft

    def _load_draft(self, tensors: dict[str, Tensor]) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        runner, draft = self.model_runner, self._draft()
        if "lm_head.weight" in tensors and draft.lm_head is runner.get_model().lm_head:
            raise RuntimeError(
                "The draft shares the policy's output head inside vLLM, so loading an lm_head.weight with it would "
                "overwrite the policy's: leave it out, or start vLLM with a draft whose output head differs."
            )
        repair_experts(draft)
        with torch.inference_mode(), set_current_vllm_config(runner.vllm_config):
            initialize_layerwise_reload(draft)
            draft.load_weights(tensors.items())
            finalize_layerwise_reload(draft, runner.speculative_config.draft_model_config)


LINEAR = {
    "fc": ("fc.weight",),
    "qkv_proj": tuple(f"midlayer.self_attn.{part}_proj.weight" for part in "qkv"),
    "o_proj": ("midlayer.self_attn.o_proj.weight",),
    "gate_up_proj": ("midlayer.mlp.gate_proj.weight", "midlayer.mlp.up_proj.weight"),
    "down_proj": ("midlayer.mlp.down_proj.weight",),
}
"""vLLM's layers, and the weights of a checkpoint that each of them is made of."""


def probe(tensors: dict[str, Tensor], place: dict[str, float] | None = None) -> dict[str, float]:
    """How the layers of an EAGLE-3 head respond to a fixed input, by name, from the weights of its checkpoint.

    A read-back that needs no weights: vLLM repacks them for its kernels, on a CPU so that they cannot be read.

    Args:
        place: of a worker among those that share the head, as its `live_probe` tells it; None for one that has it all.
    """
    place = place or {}
    rank, ranks, replicas = (
        int(place.get(name, least)) for name, least in (("rank", 0), ("ranks", 1), ("kv_replicas", 1))
    )
    found = {}
    for name, parts in LINEAR.items():
        weights = [tensors[part].float() for part in parts]
        if name in ("qkv_proj", "gate_up_proj"):  # by their outputs; several workers may hold the same key heads
            few = [replicas if ".k_proj" in part or ".v_proj" in part else 1 for part in parts]
            weights = [w.chunk(ranks // n, 0)[rank // n] for w, n in zip(weights, few, strict=True)]
        if name in ("o_proj", "down_proj"):  # by their inputs
            width = weights[0].shape[1] // ranks
            found[name] = _mean_response(weights[0].chunk(ranks, 1)[rank], rank * width)
        else:
            found[name] = _mean_response(torch.cat(weights))
    if "lm_head.weight" in tensors:
        begin = int(place.get("rows_from", 0))
        rows = tensors["lm_head.weight"][begin:].float()
        found["lm_head"] = _mean_response(rows[: int(place.get("rows", len(rows)))])
    if "d2t" in tensors:
        found["d2t"] = tensors["d2t"].float().mean().item()
    for name, tensor in tensors.items():
        short = name.removesuffix(".weight").split(".")[-1]
        if short.endswith("norm"):
            found[short] = tensor.float().abs().mean().item()
    return found


def _stimulus(begin: int, width: int) -> Tensor:
    return torch.arange(begin, begin + width, dtype=torch.float32).cos()[None]


def _mean_response(weight: Tensor, begin: int = 0) -> float:
    stimulus = _stimulus(begin, weight.shape[1]).to(weight.device)
    return nn.functional.linear(stimulus, weight).abs().mean().item() if len(weight) else 0.0


def _response(layer: nn.Module, size: int | None = None) -> float:
    """Of the first `size` outputs of a linear layer of vLLM's, or of an output head, by the kernel that serves it. One
    that is shared out by its inputs answers to those that it has."""
    like = next(layer.parameters())
    width = layer.input_size if hasattr(layer, "input_size") else layer.embedding_dim
    own = getattr(layer, "input_size_per_partition", width)
    begin = layer.tp_rank * own if own != width else 0
    output = layer.quant_method.apply(layer, _stimulus(begin, own).to(device=like.device, dtype=like.dtype))
    return output[:, :size].float().abs().mean().item() if size != 0 else 0.0
