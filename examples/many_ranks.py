"""The same influence on one process and on many: which training digits made the network say so.

python examples/many_ranks.py                                  # one process
torchrun --nproc-per-node 2 examples/many_ranks.py             # two, on this machine
torchrun --nproc-per-node 2 examples/many_ranks.py --sharded   # each holds a part of the network alone
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import fastif
from fastif.evaluation.models import build
from fastif.evaluation.training import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--examples", type=int, help="train on so many digits; default all")
parser.add_argument("--out", help="also write all scores into this folder, which all processes share")
parser.add_argument("--sharded", action="store_true", help="let each process hold a part of the network's weights")
given = parser.parse_args()

# torchrun says in the environment how many processes there are; fastif takes the group that was made, and makes none.
if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    torch.set_num_threads(1)

# Every rank has the same model and the same data; here each trains it, from one seed, to the same weights.
data = fastif.data.load("digits")
digits = data.x_train[: given.examples], data.y_train[: given.examples]
query = data.x_test[:20], data.y_test[:20]
torch.manual_seed(0)
model = train(build("cnn", tuple(data.x_train.shape[1:]), 10), *digits, epochs=given.epochs, lr=0.1)
if given.sharded:  # torch gathers a layer when a pass reaches it
    for layer in (*model.body, model.head):
        fully_shard(layer)
    fully_shard(model)

influence = fastif.Influence(model, curvature=fastif.EKFAC(damping=1e-3), layers="all", progress=False)
influence.fit(digits)  # each rank sees its batches; moments and eigenvectors are exchanged
values, indices = influence.top(query, digits, k=5)  # the same on every rank
if given.out:
    influence.scores(query, digits, out=given.out, resume=True)

ranks = influence.ranks
if ranks.rank == 0:
    if not given.sharded:
        plan = influence.plan(digits, query, ranks=ranks.world)
        print(f"{ranks.world} ranks; the first took {plan.ranks[0].examples} of {plan.n} examples")
    print(f"sent {ranks.bytes_sent:,} bytes")
    for number, (row, score) in enumerate(zip(indices.tolist(), values[:, 0].tolist(), strict=True)):
        print(f"test digit {number}: rests most on training digits {row}, of which the first is worth {score:.3g}")
if dist.is_initialized():
    dist.destroy_process_group()
