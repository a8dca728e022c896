"""Find wrong labels with adapters alone: LoRA on a network that was trained before, some of its labels made wrong.

python examples/find_mislabelled_lora.py    # digits, one label in twenty made wrong on purpose; needs peft
"""

import argparse
import math

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fastif
from fastif.evaluation import mislabel_detection
from fastif.evaluation.training import train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=15)
given = parser.parse_args()

digits = fastif.data.load("digits")
x, true = digits.x_train.flatten(1), digits.y_train
before, own = slice(0, 300), slice(300, None)  # what the network was trained on, and what the adapters are
torch.manual_seed(0)
base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
base = train(base, x[before], true[before], epochs=20, lr=0.05, progress=False)

draw = torch.Generator().manual_seed(0)
x, true = x[own], true[own]
wrong = torch.rand(len(true), generator=draw) < 0.05
labels = torch.where(wrong, (true + torch.randint(1, 10, true.shape, generator=draw)) % 10, true)
model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2", "4"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(given.epochs):
    for rows in torch.randperm(len(x), generator=draw).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), labels[rows]).backward()
        optimizer.step()

# What is trained is covered, and nothing else: the adapters, with no pattern to write.
influence = fastif.Influence(model.eval(), curvature=fastif.EKFAC("auto"), progress=False).fit((x, labels))
suspicion = influence.self_influence((x, labels))
covered, size = influence.capture.covered, sum(p.numel() for p in model.parameters())
adapters = sum(math.prod(shape) for shape in covered.values())
print(f"covered: {len(covered)} matrices of the adapters, {adapters:,} of {size:,} parameters")
found = mislabel_detection(suspicion, labels, true)
hits, all_wrong = round(found.precision * found.checked), round(found.wrong * len(labels))
print(f"{hits} of the {all_wrong} wrong labels are among the {found.checked} most suspicious of {len(labels):,}")
print(f"AUC: {found.auc:.4f}")
