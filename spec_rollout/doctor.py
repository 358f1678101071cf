"""`spec-rollout doctor`: what the samplers need of this machine.

And what mends what is missing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

TESTED = {
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "deepspeed": "0.19.8",
    "huggingface_hub": "1.33.0",
    "matplotlib": "3.11.2",
    "numpy": "2.4.6",
    "packaging": "26.4",
    "peft": "0.21.2",
    "rich": "15.0.0",
    "safetensors": "0.8.0",
    "tokenizers": "0.23.3",
    "torch": "2.13.0",
    "tqdm": "4.70.1",
    "transformers": "5.17.0",
    "trl": "1.16.0",
}
"""The versions of `constraints.txt`, with which the tests and the published figures were run."""

USED_BY = {"peft": "LoRA policies", "deepspeed": "ZeRO-2 and ZeRO-3", "vllm": "rollout_backend: vllm"}
EVERY_NAME = "import spec_rollout; [getattr(spec_rollout, name) for name in spec_rollout.__all__]"
OK, NOTE, BROKEN = "ok", "note", "BROKEN"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        mark: `OK`, `NOTE` for what matters to some uses only, or `BROKEN` for what nothing runs without.
        remedy: what to do, empty where all is well.
    """

    mark: str
    found: str
    remedy: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line for everything looked at; returns 1 if something that is required is broken."""
    argparse.ArgumentParser(prog="spec-rollout doctor", description=__doc__).parse_args(argv)
    findings = list(packages())
    findings.append(imports())
    if findings[-1].mark == OK:
        findings += [device(), bfloat16()]
    findings += [compiler(), cache()]
    for finding in findings:
        remedy = f"\n{'':8}-> {finding.remedy}" if finding.remedy else ""
        print(f"{finding.mark:<8}{finding.found}{remedy}")
    broken = sum(finding.mark == BROKEN for finding in findings)
    print(f"\n{broken} of {len(findings)} broken." if broken else "\nEverything that is required is there.")
    return int(broken > 0)


def packages() -> Iterator[Finding]:
    """Python and each package that is declared, against the range that is allowed and the version that was tested."""
    yield Finding(OK, f"Python {sys.version.partition(' ')[0]}")
    try:
        declared = [Requirement(text) for text in requires("spec-rollout") or ()]
    except PackageNotFoundError:
        yield Finding(NOTE, "spec-rollout is not installed, only found on the path", "pip install .")
        return
    for need in declared:
        if need.marker is None:
            yield required(need)
        elif need.name in USED_BY and any(need.marker.evaluate({"extra": extra}) for extra in USED_BY):
            yield optional(need)


def required(need: Requirement) -> Finding:
    found = installed(need.name)
    if found is None:
        return Finding(BROKEN, f"{need.name} is not installed", f"pip install '{need}'")
    if found not in need.specifier:
        return Finding(BROKEN, f"{need.name} {found} is outside {need.specifier}", f"pip install '{need}'")
    tested = TESTED.get(need.name)
    return Finding(OK, f"{need.name} {found}" + (f" (tested with {tested})" if tested else ""))


def optional(need: Requirement) -> Finding:
    found, use, remedy = installed(need.name), USED_BY[need.name], f"pip install '{need.name}{need.specifier}'"
    if found is None:
        return Finding(NOTE, f"{need.name} is not installed: only {use} needs it", remedy)
    if found not in need.specifier:
        return Finding(NOTE, f"{need.name} {found} is outside {need.specifier}: {use} may fail", remedy)
    return Finding(OK, f"{need.name} {found}: {use}")


def installed(name: str) -> str | None:
    """The version without what a build adds (`+cpu`)."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


def imports() -> Finding:
    """Whether every public name can be imported, tried in another process: what breaks there may break anyhow."""
    done = subprocess.run([sys.executable, "-c", EVERY_NAME], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Finding(OK, "every public name of spec_rollout can be imported")
    last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
    return Finding(BROKEN, f"spec_rollout cannot be imported: {last}", "pip install --upgrade --force-reinstall .")


def device() -> Finding:
    """What torch computes on."""
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding(OK, f"{len(names)} GPU: {', '.join(dict.fromkeys(names))}")
    cores = f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists():
        remedy = f"install a torch {TESTED['torch']} built for your CUDA: https://pytorch.org/get-started/locally"
        return Finding(NOTE, f"{cores}; a GPU is there, but this torch ({torch.__version__}) does not see it", remedy)
    return Finding(OK, f"{cores}; no GPU: train with --use_cpu true --bf16 false")


def bfloat16() -> Finding:
    import torch

    from spec_rollout.draft.muon import multiplies_bfloat16

    if multiplies_bfloat16("cuda" if torch.cuda.is_available() else "cpu"):
        return Finding(OK, "fast bfloat16")
    return Finding(NOTE, "no fast bfloat16: it is emulated, slower than float32", "bf16: false, dtype: float32")


def compiler() -> Finding:
    """The C++ compiler that torch's compiler runs on a CPU."""
    named = os.environ.get("CXX")
    found = next((path for name in ([named] if named else ["g++", "clang++"]) if (path := shutil.which(name))), None)
    if found:
        return Finding(OK, f"C++ compiler {found}")
    without = f"CXX={named} is not there" if named else "no C++ compiler"
    return Finding(NOTE, f"{without}: only compile_passes on a CPU needs one", "apt install g++")


def cache() -> Finding:
    """Where measured pass times are kept, unless `calibration_cache` says otherwise."""
    folder = (Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "spec_rollout").expanduser()
    standing = next(path for path in (folder, *folder.parents) if path.exists())
    if standing.is_dir() and os.access(standing, os.W_OK):
        return Finding(OK, f"measured pass times are kept in {folder}")
    return Finding(NOTE, f"{folder} cannot be written: every run measures anew", "--calibration_cache FOLDER")
