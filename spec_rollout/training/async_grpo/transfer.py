"""TRL's `weight_transfer`: policy and draft on their way to a server, pushed as they are for the other trainers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from torch import Tensor
from trl.experimental.async_grpo import AsyncGRPOTrainer

from spec_rollout.backends.vllm.backend import MOST_RESTARTS, VLLMBackend
from spec_rollout.backends.vllm.engine import EngineRestarted
from spec_rollout.backends.vllm.server import Server
from spec_rollout.config import SpecConfig


class PushTransfer:
    """The five methods that TRL calls on the main process. The server holds its requests by itself, from a push's
    first call to its last, so there is nothing to do in `pause` and `resume`.

    Attributes:
        backend: of the policy that is pushed; from `attach` on.
    """

    backend: VLLMBackend

    def attach(self, trainer: AsyncGRPOTrainer, config: SpecConfig) -> None:
        """Push the policy of `trainer`, and an EAGLE-3 head for it.

        Raises:
            ValueError: an MTP head is asked for, or the policy needs one.
        """
        args, self._trainer = trainer.args, trainer
        if config.draft_head == "mtp":
            raise ValueError(
                "draft_head='mtp' was not tested with asynchronous GRPO: set draft_head='eagle3', for the server too "
                "(--draft_head), or use SpecGRPOTrainer."
            )
        self._config = config = replace(config, draft_head="eagle3")
        self.backend = VLLMBackend(
            trainer.accelerator.unwrap_model(trainer.model), config, lambda *_: self.server(), seed=args.seed
        )
        if self.backend.learner is not None:
            self.backend.learner.temperature = args.temperature

    @cache  # noqa: B019  (one for the run)
    def server(self) -> Server:
        """The server, which has to be there now.

        Raises:
            ConnectionError: it is not.
            PermissionError: it wants another key.
            ValueError: it samples lossily, or guesses other numbers of tokens or with another kind of head.
        """
        args, weights = self._trainer.args, self._trainer._streaming_iter
        shown, pushed = not args.disable_tqdm, {"method": "eagle3"} if self.backend.learner else None
        return Server(args.vllm_server_base_url, weights, self._config, args.vllm_server_timeout, shown, pushed)

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
