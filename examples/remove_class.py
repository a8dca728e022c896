"""Remove a class from a trained network, and compare with a network that never saw it.

python examples/remove_class.py               # the sevens
python examples/remove_class.py --digit 3
"""

import argparse
import time
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import nn

import fastif
from fastif.evaluation.models import build
from fastif.evaluation.training import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--digit", type=int, default=7, choices=range(10))
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--out", default="removed.png")
given = parser.parse_args()

data = fastif.data.load("digits")
x, y, gone = data.x_train, data.y_train, data.y_train == given.digit
learn = partial(train, epochs=given.epochs, lr=0.15, weight_decay=5e-4)


def right(model: nn.Module) -> torch.Tensor:
    """Share of each digit's test images that are called so."""
    answers = fastif.extract(model, (data.x_test, data.y_test), progress=False).logits.argmax(1)
    return torch.stack([(answers[data.y_test == digit] == digit).float().mean() for digit in range(10)])


model = learn(build("cnn", (1, 8, 8), 10), x, y)
shares = {"as trained": right(model)}

began = time.perf_counter()
subset = partial(fastif.samplers.logit, k=len(x) // 10)  # the curvature of each step comes from a tenth of the data
draw = torch.Generator().manual_seed(0)
removal = fastif.remove(model, (x, y), gone.nonzero()[:, 0], subset=subset, weight_decay=5e-4, generator=draw)
model.load_state_dict(removal.state_dict)
shares["removed"] = right(model)
print(f"removed {int(gone.sum())} images in {len(removal.history)} steps, {time.perf_counter() - began:.2f} s")

began = time.perf_counter()
shares["never seen"] = right(learn(build("cnn", (1, 8, 8), 10), x[~gone], y[~gone]))
print(f"trained anew without them in {time.perf_counter() - began:.2f} s")
for words, share in shares.items():
    others = share[torch.arange(10) != given.digit].mean()
    own, rest = f"{share[given.digit]:.1%} of the {given.digit}s", f"{others:.1%} of the others"
    print(f"{words}: {own} are right, {rest}")

figure = Figure(figsize=(8, 3), dpi=100, layout="constrained")
axis = figure.subplots()
for number, (words, share) in enumerate(shares.items()):
    colour = ("#bbbbbb", "#0072b2", "#e69f00")[number]
    axis.bar([digit + 0.27 * (number - 1) for digit in range(10)], share.tolist(), 0.25, label=words, color=colour)
axis.set(xticks=range(10), xlabel="digit", ylabel="called by its name", title=f"Removing the {given.digit}s")
axis.spines[["top", "right"]].set_visible(False)
figure.legend(loc="outside right upper", frameon=False)
figure.savefig(given.out)
print(given.out)
