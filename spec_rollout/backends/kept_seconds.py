"""Measured seconds on disk, kept between runs: one file for each policy's shape, dtype, draft, device and versions."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from spec_rollout.config import cache_folder
from spec_rollout.engine.engine import RolloutEngine
from spec_rollout.engine.lean.recognition import family_of
from spec_rollout.gamma.cost_model import Measurement


def read(path: Path) -> tuple[int, list[Measurement]]:
    """The slots covered by, and the measurements in, a file of this version; (0, []) if there is none."""
    try:
        saved = json.loads(path.read_text())
        return int(saved["slots"]), [Measurement(**m) for m in saved["measurements"]]
    except (OSError, ValueError, TypeError, KeyError):
        return 0, []


def write(path: Path, slots: int, measurements: list[Measurement]) -> None:
    """Keep `measurements`, which cover up to `slots` rows; a folder that takes none is told by a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_suffix(f".{os.getpid()}")
        staging.write_text(json.dumps({"slots": slots, "measurements": [vars(m) for m in measurements]}))
        staging.replace(path)
    except OSError as error:
        warnings.warn(
            f"The measured pass times cannot be kept in {path.parent} and will be measured again in the next run: "
            f"{error}. Name another folder with `calibration_cache`.",
            RuntimeWarning,
            stacklevel=3,
        )


def path_of(engine: RolloutEngine, widest: int, folder: str | None, shape_of_draft: dict | None = None) -> Path:
    """The file for the policy of `engine` at `widest` guesses, or for a draft of `shape_of_draft` beside it."""
    device = engine.target.device
    config = engine.target.config.to_dict()
    shape = {k: v for k, v in config.items() if isinstance(v, int | float) and not k.endswith("token_id")}
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    key = [
        type(engine.target.model).__name__,
        shape,
        config.get("layer_types"),
        str(engine.target.dtype),
        where,
        _version(),
        torch.__version__,
        widest,
        shape_of_draft,
        engine.config.compile_passes,
        family_of(engine.target.model) is not None,
    ]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return cache_folder(folder) / f"cost-{digest}.json"


def _processor() -> list:
    """The processor's name, its cores and the threads that torch uses."""
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return [names[:1], os.cpu_count(), torch.get_num_threads()]


def _version() -> str:
    try:
        return version("spec-rollout")
    except PackageNotFoundError:
        return "source"
