# pyright: strict
"""What a user writes. `make lint` reads it as strictly as pyright can, and the tests run it."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastif
from fastif.integrations import data_of, influence_of, next_batch, problem_of
from fastif.integrations.anomalib import KCenterGreedy
from fastif.integrations.sklearn import KCenterSelector


def loss(outputs: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, y, reduction="none")


def of_a_folder(folder: str) -> Tensor:
    problem = problem_of(folder, "train.csv", "query.csv", text=["question", "answer"], label="label")
    assert problem.train is not None
    assert problem.query is not None
    influence = fastif.Influence(problem.model, problem.loss, fastif.EKFAC()).fit(problem.train.loader)
    return influence.scores(problem.query.loader, problem.train.loader)


def of_a_trainer(trainer: object, curvature: fastif.EKFAC) -> tuple[Tensor, Tensor]:
    train: DataLoader[object] = data_of(trainer)
    return influence_of(trainer, curvature, layers="*.mlp.*").fit(train).top(train, train, k=10)


if __name__ == "__main__":  # a look for doctests imports it, and writes no files
    digits = fastif.data.load("digits")
    data, query = (digits.x_train, digits.y_train), (digits.x_test[:5], digits.y_test[:5])
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    fastif.set_progress(False)

    influence = fastif.Influence(model, curvature=fastif.EKFAC(damping=1e-3), layers="*", batch_size=64).fit(data)
    print(influence, influence.plan(data))
    values, indices = influence.top(query, data, k=3)
    rows = fastif.top_rows(values, indices, ids=[str(i) for i in range(len(digits.y_train))])
    fastif.write_rows(rows, "top.csv")
    scores: Tensor = influence.scores(query, data)
    by_layer: dict[str, Tensor] = influence.scores(query, data, by="layer")
    stored: fastif.ScoreFolder = influence.scores(query, data, out="scores", resume=True)
    block: Tensor = stored[0, :3]
    stored.write("top.jsonl", top=3)
    frame = stored.to_pandas(top=3)
    suspicion: Tensor = influence.self_influence(data)

    index = fastif.Index.build(influence, data, "index")
    found = index.top(query, 3)
    best: Tensor = found.indices

    subset: fastif.Subset = fastif.samplers.random(100, 10)
    removal: fastif.Removal = fastif.remove(
        model, data, torch.arange(5), subset=partial(fastif.samplers.logit, k=144), steps=8, weight_decay=5e-4
    )
    model.load_state_dict(removal.state_dict)
    objectives: list[float] = [step.objective for step in removal.history]

    log, optimizer = fastif.TrainingLog(model, every=10), torch.optim.SGD(model.parameters(), lr=0.1)
    with fastif.capture(model, keep="numbers") as captured:
        for first in range(0, 100, 10):
            batch = torch.arange(first, first + 10)
            optimizer.zero_grad()
            mean = nn.functional.cross_entropy(model(digits.x_train[batch]), digits.y_train[batch])
            mean.backward()  # pyright: ignore[reportUnknownMemberType]  torch's own
            norms: Tensor = captured.norms()
            log.step(optimizer, batch)
    replay = fastif.Replay(log, model, data, "cross_entropy")
    replayed: Tensor = replay.scores(query)

    own = fastif.Influence(model, loss, fastif.KFAC("auto", fisher="empirical")).fit(data)
    choice = fastif.choose(model, data, query, seconds=1)
    chosen: fastif.Influence = choice.influence(model).fit(data, subset=choice.subset(len(digits.y_train)))
    low, high = digits.x_train.min(), digits.x_train.max()
    train_images, query_images = (
        (x - low) / (high - low) for x in (digits.x_train, digits.x_test[:5].clamp(low, high))
    )
    pages = fastif.report.explain(scores, query_images, train_images, "pages", k=5)

    coreset: Tensor = KCenterGreedy(digits.x_train.flatten(1), sampling_ratio=0.1).sample_coreset()
    mask = KCenterSelector(k=0.05, random_state=0).fit(digits.x_train.flatten(1).numpy()).get_support()
    to_label: Tensor = next_batch(digits.x_train.flatten(1), [3, 77], k=20)
