"""Several processes train together: they meet first, and say who did not come."""

import os
import socket
import time
from datetime import timedelta

import torch
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch.distributed import DistError, TCPStore

from race import RaceError

CAME, OVER = "race/came", "race/over"  # in the store: how many processes have come; there once one has given up


class Together(DDPStrategy):
    """Lightning's data-parallel training, whose processes wait `minutes` for each other at the start, not longer."""

    def __init__(self, minutes: float, **settings):
        super().__init__(**settings)
        self.minutes = minutes

    def setup_distributed(self) -> None:
        """Meet, then connect."""
        # `timeout` stays 30 minutes: with gloo and NCCL it ends every later exchange too, and saving may take long
        store = None if torch.distributed.is_initialized() else meet(self.cluster_environment, self.minutes)
        super().setup_distributed()
        del store  # the first process has kept it open until all were connected


def meet(cluster: ClusterEnvironment, minutes: float) -> TCPStore:
    """Wait until all processes have come to the first one; returns where they met. Raises RaceError."""
    rank, world, came = cluster.global_rank(), cluster.world_size(), 1
    address, port = cluster.main_address, cluster.main_port
    others = "process" if world == 2 else f"{world - 1} processes"
    print(f"process {rank}: waiting for the other {others}, up to {minutes:g} minutes", flush=True)
    end, reason = time.monotonic() + 60 * minutes, "the time is over"
    try:
        store = _store(rank, world, address, port, end)
        came = store.add(CAME, 1)
        while came < world and time.monotonic() < end and not store.check([OVER]):
            time.sleep(0.1)
            came = store.add(CAME, 0)
        if came == world and not store.check([OVER]):
            return store
        store.set(OVER, "")
        time.sleep(1)  # the store ends with the first process: the others are to read this before
    except (OSError, DistError) as error:
        reason = str(error).partition("\n")[0]
    raise RaceError(
        f"only {came} of {world} processes came to {address}, port {port}, in {minutes:g} minutes ({reason}). Check "
        "that one srun or torchrun starts them all, that none has ended with an error, and that every node reaches "
        "this port (MASTER_PORT sets another one). More in docs/cluster.md"
    )


def _store(rank: int, world: int, address: str, port: int, end: float) -> TCPStore:
    """Where processes meet: the first one holds it, or torchrun; the others knock until it is open."""
    first = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while not first:
        try:
            socket.create_connection((address, port), timeout=5).close()
            break
        except OSError as error:
            if time.monotonic() > end:
                raise TimeoutError(f"the first process is not there: {error.strerror or error}") from error
            time.sleep(0.1)
    limit = timedelta(seconds=60)  # of one call, such as add()
    return TCPStore(address, port, world, first, limit, wait_for_workers=False, multi_tenant=True)
