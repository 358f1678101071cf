"""TRL's vLLM with a draft beside the policy, in the trainer's process or on a server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import Trainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import ensure_master_addr_port

from spec_rollout.backends.vllm.colocated import Colocated, engine_options
from spec_rollout.backends.vllm.engine import VLLMEngine, require_vllm
from spec_rollout.backends.vllm.server import Server
from spec_rollout.backends.vllm.shared import SharedServer
from spec_rollout.backends.vllm.starting import StartEngine
from spec_rollout.backends.vllm.steady import guesses_steadily, refuse_precision, step_tokens
from spec_rollout.config import SpecConfig
from spec_rollout.training.gathering import whole_weight
from spec_rollout.training.merged_weights import merged_weights
from spec_rollout.training.ppo.value_head import ATTRIBUTE


class SpeculativeVLLMGeneration(VLLMGeneration):
    """[`~trl.generation.vllm_generation.VLLMGeneration`] that starts vLLM with a draft and is driven as an `engine`.

    How it names the policy's weights for vLLM is TRL's; adapters are merged into copies. With several ranks, rank 0
    alone talks to a server.

    Args:
        speculative: vLLM's speculative_config; None for plain decoding.
    """

    def __init__(self, trainer: Trainer, config: SpecConfig, speculative: dict[str, Any] | None):
        args = trainer.args
        self.config, self.args, self.speculative = config, args, speculative
        self.engine: VLLMEngine | None = None
        super().__init__(
            model=trainer.model,
            accelerator=trainer.accelerator,
            processing_class=trainer.processing_class,
            mode=args.vllm_mode,
            server_base_url=args.vllm_server_base_url,
            server_host=args.vllm_server_host,
            server_port=args.vllm_server_port,
            server_timeout=args.vllm_server_timeout,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length,
            max_num_seqs=config.max_slots,
            enable_sleep_mode=args.vllm_enable_sleep_mode,
            model_impl=args.vllm_model_impl,
            trust_remote_code=args.trust_remote_code,
        )

    def _init_vllm(self) -> None:
        if self.mode == "server":
            self._init_server()
        else:
            self._init_colocated()
        self.accelerator.wait_for_everyone()

    def _init_server(self) -> None:
        host = self.server_host.replace("0.0.0.0", "127.0.0.1")
        url = self.server_base_url or f"http://{host}:{self.server_port}"
        shown = self.accelerator.is_main_process and not self.args.disable_tqdm

        def connect() -> Server:
            return Server(url, self.policy, self.config, self.server_timeout, shown, self.speculative)

        several = self.accelerator.num_processes > 1 and dist.is_initialized()
        self.engine = SharedServer(connect, self.policy) if several else connect()

    def _init_colocated(self) -> None:
        require_vllm()
        from vllm import LLM
        from vllm.platforms import current_platform

        text = self.model.config.get_text_config(decoder=True)
        refuse_precision(text.model_type, self._dtype(), current_platform.is_cpu())
        # vLLM's own launcher would set these; with this one its engine core stays in the trainer's process.
        os.environ["RANK"] = str(self.accelerator.process_index)
        os.environ["LOCAL_RANK"] = str(self.accelerator.local_process_index)
        os.environ["WORLD_SIZE"] = str(self.accelerator.num_processes)
        ensure_master_addr_port()
        self.llm = LLM(
            model=self.model.name_or_path,
            dtype=self._dtype(),
            gpu_memory_utilization=self.gpu_memory_utilization,
            max_model_len=self._max_model_len(),
            max_num_seqs=self.max_num_seqs,
            enable_sleep_mode=self.enable_sleep_mode,
            model_impl=self.model_impl,
            distributed_executor_backend="external_launcher",
            seed=self.accelerator.process_index,
            max_num_batched_tokens=max(4096, step_tokens(self.speculative, self.max_num_seqs)),
            trust_remote_code=self.trust_remote_code,
            **engine_options(self.speculative),
        )
        self.engine = Colocated(self.llm, self.policy, self.enable_sleep_mode, self.config.verification)

    def policy(self) -> Iterator[tuple[str, Tensor]]:
        """The live policy's weights under vLLM's names, whole one at a time; all ranks walk through them together."""
        saved = ["modules_to_save.default."] if is_peft_model(self.model) else []
        for name, weight in merged_weights(self.model, whole_weight) if saved else self._own_weights():
            if not name.startswith(f"{ATTRIBUTE}."):  # PPO's, which vLLM does not hold
                yield self._fix_param_name_to_vllm(name, extra_prefixes=saved), weight

    def _own_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            with whole_weight(parameter) as weight:
                yield name, weight

    def _max_model_len(self) -> int | None:
        """With room behind the rows for guesses whose number must not change, where the policy's context has it."""
        asked = self.max_model_length
        if asked is None or not guesses_steadily(self.speculative):
            return asked
        own = self.model.config.get_text_config(decoder=True).max_position_embeddings
        return max(asked, min(asked + self.speculative["num_speculative_tokens"], own))

    def _dtype(self) -> str:
        """What the trainer computes in, so that both have the same log-probs but for rounding."""
        if self.args.bf16:
            return "bfloat16"
        return "float16" if self.args.fp16 else str(next(self.model.parameters()).dtype).removeprefix("torch.")


def engine_starter(trainer: Trainer, config: SpecConfig) -> StartEngine:
    """What `VLLMBackend` starts its engine with."""
    return lambda speculative: SpeculativeVLLMGeneration(trainer, config, speculative).engine
