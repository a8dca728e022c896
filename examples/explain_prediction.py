"""Explain a prediction: the training images that helped it most, and those that harmed it most.

python examples/explain_prediction.py                # the digit of the test set that the network is least sure of
python examples/explain_prediction.py --query 17     # another one
"""

import argparse

import torch
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy

import fastif
from fastif.evaluation.models import build
from fastif.evaluation.training import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--query", type=int, help="index in the test set")
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--out", default="explained.png")
given = parser.parse_args()

data = fastif.data.load("digits")
images, labels = data.x_train, data.y_train


def learned(keep: torch.Tensor) -> torch.nn.Module:
    return train(build("cnn", (1, 8, 8), 10), images[keep], labels[keep], epochs=given.epochs, lr=0.15)


model = learned(torch.arange(len(labels)))

_, logits, _ = fastif.extract(model, (data.x_test, data.y_test))
certainty = logits.softmax(1)[torch.arange(len(logits)), data.y_test]
query = int(certainty.argmin()) if given.query is None else given.query
asked = (data.x_test[query : query + 1], data.y_test[query : query + 1])

# Scores are predicted rises of the query's loss when a training image is removed: positive helps, negative harms.
influence = fastif.Influence(model, curvature=fastif.EKFAC(damping=0.1)).fit((images, labels))
(helpful,), (helping,) = influence.top(asked, (images, labels), k=8)
(harmful,), (harming,) = influence.top(asked, (images, labels), k=8, largest=False)

# Is that true? Train anew without the eight, and look.
before = float(cross_entropy(logits[[query]], asked[1]))
print(f"test image {query} is a {int(asked[1])}, called {int(logits[query].argmax())}: loss {before:.2f}")
for words, values, indices in (("helpful", helpful, helping), ("harmful", harmful, harming)):
    other = learned(fastif.evaluation.without(len(labels), indices))
    predicted, true = before + float(values.sum()), cross_entropy(other(asked[0]), asked[1]).item()
    print(f"without the {len(indices)} most {words}: predicted {predicted:.2f}, trained anew {true:.2f}")

figure = Figure(figsize=(9, 2.9), dpi=100, layout="constrained")
axes = figure.subplots(2, 9)
for axis in axes.flat:
    axis.axis("off")
axes[0, 0].imshow(asked[0][0, 0].numpy(), cmap="gray_r")
axes[0, 0].set_title(f"a {int(asked[1])}, called {int(logits[query].argmax())}", fontsize=8)
for row, (values, indices, colour) in enumerate(((helpful, helping, "#0072b2"), (harmful, harming, "#d55e00"))):
    for axis, value, index in zip(axes[row, 1:], values.tolist(), indices.tolist(), strict=True):
        axis.imshow(images[index, 0].numpy(), cmap="gray_r")
        axis.set_title(f"{int(labels[index])}: {value:+.2f}", fontsize=8, color=colour)
figure.suptitle(
    "What helps it most (above), what harms it most (below): label, predicted rise of its loss without", fontsize=9
)
figure.savefig(given.out)
print(given.out)
