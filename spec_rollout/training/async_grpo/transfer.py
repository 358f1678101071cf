"""TRL's `weight_transfer`: policy and draft on their way to a server, pushed as they are for the other trainers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from spec_rollout.backends.vllm.backend import MOST_RESTARTS, VLLMBackend
from spec_rollout.backends.vllm.engine import EngineRestarted
from spec_rollout.backends.vllm.server import Server

if TYPE_CHECKING:
    from spec_rollout.training.async_grpo.trainer import SpecAsyncGRPOTrainer


class PushTransfer:
    """The five methods that TRL calls on the main process. The server holds its requests by itself, from a push's
    first call to its last, so there is nothing to do in `pause` and `resume`.

    Attributes:
        backend: of the policy that is pushed; from `attach` on.
    """

    backend: VLLMBackend

    def attach(self, trainer: SpecAsyncGRPOTrainer, config) -> None:
        """Push the policy of `trainer`, and a draft for it."""
        args = trainer.args

        def connect(*given) -> Server:
            shown = not args.disable_tqdm
            return Server(args.vllm_server_base_url, trainer._streaming_iter, config, args.vllm_server_timeout, shown)

        self.backend = VLLMBackend(trainer.accelerator.unwrap_model(trainer.model), config, connect, seed=args.seed)
        if self.backend.learner is not None:
            self.backend.learner.temperature = args.temperature

    def init_weight_transfer(self) -> None:
        """The first push connects."""

    def pause(self) -> None:
        """The server does so by itself."""

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]] | None = None) -> None:
        """Push. The weights are walked through anew where TRL's `iterator` would be spent: at the first push, whose
        shapes are announced, and if the server was started again meanwhile.

        Raises:
            ConnectionError: the server was started again in each of several attempts.
        """
        for _ in range(MOST_RESTARTS):
            try:
                self.backend.deliver()
            except EngineRestarted:
                continue
            return
        raise ConnectionError(
            f"vLLM was restarted in each of {MOST_RESTARTS} attempts to push weights: see its own log."
        )

    def resume(self) -> None:
        """The server does so by itself."""

    def destroy(self) -> None:
        """Nothing is held."""

    def renew(self) -> None:
        """Push once more if the server was started again: it holds none of what it was given."""
        engine = self.backend.engine
        try:
            lost = engine is not None and engine.versions() == [0, 0]
        except EngineRestarted:
            lost = True
        if lost:
            self.send_weights()
