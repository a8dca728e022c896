"""Find wrong labels: the training examples that rest on themselves, as a contact sheet.

python examples/find_mislabelled.py                                  # digits, one label in twenty made wrong on purpose
python examples/find_mislabelled.py --data cifar10n --root FOLDER    # CIFAR-10 with labels that people got wrong
"""

import argparse

import torch
from matplotlib.figure import Figure

import fastif
from fastif.evaluation import mislabel_detection
from fastif.evaluation.models import build
from fastif.evaluation.training import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", choices=("digits", "cifar10n"), default="digits")
parser.add_argument("--root", help="folder with cifar10 and cifar10n")
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--out", default="mislabelled.png")
given = parser.parse_args()

# The labels as they are given, and the true ones, which only the last lines look at.
data = fastif.data.load("digits" if given.data == "digits" else "cifar10", given.root)
x, true = data.x_train[:20_000], data.y_train[:20_000]
if given.data == "cifar10n":
    labels = fastif.data.human_labels("aggre", given.root)[:20_000]
else:
    draw = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(true), generator=draw) < 0.05
    labels = torch.where(wrong, (true + torch.randint(1, 10, true.shape, generator=draw)) % 10, true)

channels, height, width = x.shape[1:]
model = train(build("cnn", (channels, height, width), 10), x, labels, epochs=given.epochs, lr=0.1)

# Self-influence: how much an example's own loss would rise if it were not there. The curvature of the last layer comes
# from a twentieth of the data, chosen and weighted by the uncertainty of its predictions.
features, logits, _ = fastif.extract(model, (x, labels))
subset = fastif.samplers.logit(logits, labels, k=len(x) // 20, generator=torch.Generator().manual_seed(0))
influence = fastif.Influence(model, curvature=fastif.ExactBlock(damping=1e-3)).fit((x, labels), subset=subset)
suspicion = influence.self_influence((x, labels))

found = mislabel_detection(suspicion, labels, true)
hits, all_wrong = round(found.precision * found.checked), round(found.wrong * len(labels))
print(f"{hits} of the {all_wrong} wrong labels are among the {found.checked} most suspicious of {len(labels):,}")
loss = mislabel_detection(torch.nn.functional.cross_entropy(logits, labels, reduction="none"), labels, true)
print(f"AUC: {found.auc:.4f}, of the loss alone {loss.auc:.4f}")

figure = Figure(figsize=(9, 4.8), dpi=100, layout="constrained")
for axis, index in zip(figure.subplots(4, 8).flat, suspicion.argsort(descending=True).tolist(), strict=False):
    image = x[index].permute(1, 2, 0).numpy()
    axis.imshow((image - image.min()) / (image.max() - image.min()), cmap="gray_r")
    is_wrong = bool(labels[index] != true[index])
    axis.set_title(f"called {data.classes[labels[index]]}", fontsize=8, color="#d55e00" if is_wrong else "#222222")
    axis.set_xticks([], labels=[])
    axis.set_yticks([], labels=[])
    axis.spines[:].set(color="#d55e00" if is_wrong else "#cccccc", linewidth=3 if is_wrong else 1)
figure.suptitle("The most suspicious labels; framed where they are wrong indeed", fontsize=10)
figure.savefig(given.out)
print(given.out)
