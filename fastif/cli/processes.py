"""The command line on several processes: `torchrun --nproc-per-node N -m fastif scores ...`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist

from fastif.ranks import Ranks, find_ranks

DIVIDED = ("scores", "index", "query", "remove", "class-removal", "info")  # commands that work on several processes


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
    # A rank may wait for as long as another trains a network; of one that ends torchrun knows, and ends all.
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(days=1))
    try:
        ranks = find_ranks()
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if ranks.rank else nullcontext():
            yield ranks
    finally:
        dist.destroy_process_group()


def check_divided(command: str | None) -> None:
    """Raises ValueError for a command that every process would do again: `sample` reads arrays and draws from them."""
    if command not in (None, *DIVIDED) and find_ranks().world > 1:
        raise ValueError(
            f"fastif {command} works in one process: run it without torchrun, which divides {', '.join(DIVIDED[:-1])}"
        )
