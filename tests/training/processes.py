"""Several processes on one policy: how a test starts them, and what each of them is told."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUIET = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "DS_BUILD_OPS": "0"}
ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}
STAGE_3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
KINDS = {
    "ddp": {"use_cpu": True},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}},
    "zero2": {"deepspeed": {**ZERO, "zero_optimization": {"stage": 2}}},
    "zero3": {"deepspeed": {**ZERO, "zero_optimization": STAGE_3}},
}
"""Options of the trainer."""


def torchrun(module: str, kind: str, folder: Path) -> list[dict]:
    """Runs `module` in two processes; returns what each rank wrote to `folder`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    left_behind = ("ACCELERATE_", "FSDP_")  # by trainers of other tests in this process
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(left_behind)}
    # A folder of its own for compiled extensions: whoever waits for a lock that a killed process left waits for ever.
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    process = subprocess.Popen(
        [*command, "-m", module, kind, str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=inherited | QUIET | own,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the ranks too, or they would go on waiting for one another
        raise
    assert process.returncode == 0, errors[-6000:]
    assert not (folder / "extensions").exists(), "DeepSpeed compiled an extension"
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def join(kind: str) -> None:
    """Accelerate shards on accelerators only: it is told that there are some, and talks over gloo all the same."""
    if kind == "ddp":
        return
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *given: ("gloo", DistributedType.MULTI_GPU)
    if kind.startswith("zero"):
        # Not `import deepspeed.comm.torch`: that package's attribute `torch` is PyTorch itself.
        deepspeed_torch = importlib.import_module("deepspeed.comm.torch")
        deepspeed_torch.build_shm_op = lambda: None  # it would be compiled first, and gloo serves as well
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"


def report(folder: Path, figures: dict) -> None:
    """What a rank has to say, as the last thing that it does."""
    import torch.distributed as dist
    from accelerate.state import PartialState

    (folder / f"rank{PartialState().process_index}.json").write_text(json.dumps(figures))
    dist.barrier()
    os._exit(0)  # an orderly end now and then finds a thread of gloo's still running, and aborts
