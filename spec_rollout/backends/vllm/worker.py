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
from spec_rollout.backends.vllm.engine import MTP
from spec_rollout.backends.vllm.intake import FINISHED, Intake
from spec_rollout.backends.vllm.lazy_head import LazyHead
from spec_rollout.backends.vllm.mtp_readback import measured_mtp
from spec_rollout.backends.vllm.readback import measured
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
        """What `probe` says, of this worker's shard of the draft that is really there."""
        runner = self.model_runner
        with torch.inference_mode():
            if runner.speculative_config.method == MTP:
                return measured_mtp(self._draft(), runner.get_model())
            return measured(self._draft())

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
