"""The most memory that something took: the device's on a GPU, the process's resident memory elsewhere."""

from __future__ import annotations

from pathlib import Path

import torch

GIB = 2**30
PROCESS = Path("/proc/self")


def reset_peak_memory() -> None:
    """Forget the peak so far. Where the system does not let a process do so, the peak stays that of its life."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_gib() -> float | None:
    """The largest since the last reset, in GiB; None where it is not known."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    status = PROCESS / "status"
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]  # kiB
    return peaks[0] * 1024 / GIB if peaks else None
