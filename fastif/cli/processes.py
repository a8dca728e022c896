"""The command line on several processes: `torchrun --nproc-per-node N -m fastif scores ...`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout

import torch
import torch.distributed as dist

from fastif.ranks import Ranks, find_ranks

DIVIDED = ("scores", "info")  # commands that work on several processes


@contextmanager
def ranks_of_torchrun() -> Iterator[Ranks]:
    """The processes that torchrun started, for as long as the command runs; the first alone prints."""
    world = os.environ.get("WORLD_SIZE", "1")
    if dist.is_initialized() or not (world.isdigit() and int(world) > 1):
        yield find_ranks()
        return
    cuda = torch.cuda.is_available()
    if cuda:  # --device cuda is then this process's own
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        ranks = find_ranks()
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if ranks.rank else nullcontext():
            yield ranks
    finally:
        dist.destroy_process_group()


def check_divided(command: str | None) -> None:
    """Raises ValueError for a command that every process would do again."""
    if command not in (None, *DIVIDED) and find_ranks().world > 1:
        raise ValueError(f"fastif {command} works in one process: run it without torchrun, which divides fastif scores")
