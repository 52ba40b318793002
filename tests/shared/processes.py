"""Two processes on the CPU that communicate by gloo, for tests; a failure in one of them fails the test."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing as mp

WORLD = 2


def _serve(rank: int, work: Callable[..., Any], port: int, folder: str, arguments: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(WORLD), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # noise differs from process to process, as it should
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    try:
        torch.save(work(rank, *arguments), Path(folder) / f"{rank}.pt")
        dist.barrier()  # rank 0 holds the store that the other still needs
    finally:
        dist.destroy_process_group()
    # A thread of gloo that frees a tensor during the interpreter's shutdown aborts the process (PyTorch pull request
    # 179291). Only successful work gets here, so no failure is hidden.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def in_processes(work: Callable[..., Any], *arguments: Any, seconds: float = 120) -> list[Any]:
    """The results of ``work(rank, *arguments)`` in two processes, which end with the call."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        # forks of a process that has no threads and imports these once for all tests
        mp.get_context("forkserver").set_forkserver_preload(["l0hooks", "torch.distributed.fsdp", "pytest"])
        given = work, port, folder, arguments
        context = mp.start_processes(_serve, given, nprocs=WORLD, join=False, start_method="forkserver")
        try:
            for _ in range(2 * WORLD):  # each join returns when one more has ended
                if context.join(timeout=seconds):
                    break
            else:
                raise TimeoutError(f"the processes did not end within {seconds} s")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
