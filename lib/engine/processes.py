"""The processes of a run under torchrun: who they are, and the few messages between them."""

import datetime
import json
import os

from torch.distributed.rendezvous import rendezvous


def rank():
    """(rank, number of processes) of this run, from torchrun's environment; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_cores():
    """How many cores this process may compute on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Group:
    """The few messages between the processes of a run, through torchrun's key-value store.

    A process group of gloo or nccl would do it, too. But its threads now and then end a process
    with an abort at its exit, and it must find a network interface on machines with several.
    """

    def __init__(self, me, processes):
        # The ranks may end days apart. (Milliseconds in 31 bits last for 24.)
        self.store = next(rendezvous("env://", timeout=datetime.timedelta(days=20)))[0]
        self.me, self.processes = me, processes

    def agree(self, name, function):
        """The result (JSON) of rank 0's call, on all ranks; its error ends all of them."""
        if self.me == 0:
            try:
                result = function()
            except (ValueError, OSError):
                self.store.set(name, "null")
                raise
            self.store.set(name, json.dumps([result]))
        result = json.loads(self.store.get(name))
        if result is None:
            raise SystemExit(1)  # rank 0 alone reports the error
        return result[0]

    def arrive(self, name):
        """Say that this process has come so far; rank 0 waits for all of them."""
        self.store.set(f"{name}-{self.me}", "")
        if self.me == 0:
            self.store.wait([f"{name}-{i}" for i in range(self.processes)])
