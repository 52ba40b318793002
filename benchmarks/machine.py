"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def description(threads: int) -> dict[str, Any]:
    """Processor, memory, graphics card and versions."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "memory GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": threads,
        "load": round(os.getloadavg()[0], 1),
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def available_gib() -> float:
    """Memory that a program could still take."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    line = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(line.split()[1]) / 2**20


def revision() -> str:
    """The commit, with a plus where the tree differs from it."""
    tell = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=10", "--dirty=+"]
    done = subprocess.run(tell, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def now() -> str:
    """The date and minute, UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M")


def in_words(machine: dict[str, Any]) -> str:
    """One line."""
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory GiB']} GiB{gpu}, {machine['system']}, "
        f"Python {machine['python']}, torch {machine['torch']}, {threads}, load {machine['load']} at the start"
    )
