"""Replays that ranks, and a process alone, are asked for in the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastif import Replay, Source, TrainingLog, sharded
from fastif.measure import Measure
from fastif.ranks import find_ranks
from tests.helpers.trainings import MANY, OPTIMIZERS, WIDE, batches, data, logs_of, network, recorded

EXAMPLES, QUERY = data(), data(5, seed=1)
GROUPS = torch.tensor([2, 0, 0, 3, 2])


def halves(number: int, optimizer: str = "Nesterov", every: int = 4) -> tuple[list[TrainingLog], nn.Module]:
    """Logs of networks on halves of the examples, pair after pair, and a network of their architecture."""
    logs, model = list[TrainingLog](), network()
    for place in range(number):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(place // 2))
        kept = order[place % 2 * 12 :][:12]
        model, log = recorded(OPTIMIZERS[optimizer], EXAMPLES, batches(kept, 5, 2, seed=place), every=every)
        logs.append(log)
    return logs, model


def whole(optimizer: str = "Adam") -> tuple[TrainingLog, nn.Module]:
    """A log of a network on all examples, and the network."""
    model, log = recorded(OPTIMIZERS[optimizer], EXAMPLES, batches(torch.arange(24), 8, 2), every=4)
    return log, model


def answers(number: int, states: int | None = None, how: dict[str, Any] | None = None) -> dict[str, Any]:
    """All that a replay of some logs answers; `states`: as many of them as memory holds, half of these of adjoints."""
    logs, model = halves(number) if number > 1 else whole()
    log, options = logs if isinstance(logs, TrainingLog) else logs[0], {} if how is None else dict(how)
    if states is not None:
        options["memory"] = states * (1 + len(log.rule.state)) * log.layout.size * 8
    replay = Replay(logs, model, EXAMPLES, progress=False, **options)
    scores, norms = replay.scores(QUERY, EXAMPLES), replay.adjoint_norms
    top, worst = replay.top(QUERY, EXAMPLES, 4), replay.top(QUERY, EXAMPLES, 4, largest=False)
    groups = replay.scores(QUERY, query_groups=GROUPS)
    return {
        "scores": scores, "norms": torch.cat(norms), "top": top[0],
        "indices": top[1], "worst": worst[0], "groups": groups, "self": replay.self_influence(),
        "off": torch.tensor(replay.verify(), dtype=torch.float64),
    }  # fmt: skip


def given_other(given: dict[str, Any]) -> Any:
    """Scores of a replay where ranks may be given different things."""
    (x, y), (logs, model) = EXAMPLES, halves(2)
    if given.get("log"):
        logs[1] = halves(2, "momentum")[0][1]
    if given.get("model"):
        model = network(nn.Tanh)
    x = x.clone()
    x[20] *= given.get("data", 1.0)
    options = {key: value for key, value in given.items() if key in ("seed", "crossed", "loss", "matrix")}
    replay = Replay(logs, model, (x, y), progress=False, **options)
    replay._verified = begun  # what differs is found before
    if "k" in given:
        return replay.top(QUERY, None, given["k"])
    if given.get("call") == "self_influence":
        return replay.self_influence()
    return replay.scores((QUERY[0] * given.get("query", 1.0), QUERY[1]))


def begun() -> Any:
    raise AssertionError("the ranks have begun")


def other_log(rank: int) -> Any:
    """One rank's copy of a log has a checkpoint that the training did not pass."""
    logs, model = halves(2)
    if find_ranks().rank == rank:
        logs[1].point(1).at[3] += 1e-3
    return Replay(logs, model, EXAMPLES, progress=False).scores(QUERY)


def exploding() -> Any:
    """Two trainings, of which the second one runs away, and so does its derivative."""
    x, logs = EXAMPLES[0], list[TrainingLog]()
    for lr in (0.01, 2.0):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 3)).double()
        log, optimizer = TrainingLog(model), torch.optim.SGD(model.parameters(), lr=lr)
        for rows in batches(torch.arange(24), 8, 4):
            optimizer.zero_grad()
            (model(x[rows]) - x[rows]).square().sum(1).mean().backward()
            log.step(optimizer, rows)
        logs.append(log)
    replay = Replay(logs, model, (x, x), loss="mse", crossed=False, max_growth=100, progress=False)
    return replay.scores((QUERY[0], QUERY[0]))


def refused(what: str) -> Any:
    logs, model = halves(2)
    train: Any = DataLoader(TensorDataset(*EXAMPLES), batch_size=5)
    if what == "train":
        return Replay(logs, model, sharded(train), progress=False)
    return Replay(logs, model, train, progress=False).scores(sharded(QUERY))


def in_a_group() -> Any:
    """Each rank on its own, in a group of its own; the first alone makes a replay."""
    alone = [torch.distributed.new_group([rank]) for rank in range(2)][find_ranks().rank]
    logs, model = halves(2)
    if find_ranks().rank == 1:
        return None
    return Replay(logs, model, EXAMPLES, progress=False, group=alone).scores(QUERY)


def sourced(optimizer: str, given: dict[str, Any] | None = None) -> Any:
    """Scores by segments of two networks' trainings; `given`: what ranks may be given differently."""
    logs, model = halves(2, optimizer, every=2)
    given = {} if given is None else given
    if given.get("log"):
        logs[1] = halves(2, "momentum", every=2)[0][1]
    x = QUERY[0] * given.get("query", 1.0)
    source = Source(logs, model, EXAMPLES, segments=given.get("segments", 2), batch_size=7, progress=False)
    few = EXAMPLES[0][:5], EXAMPLES[1][:5]  # one batch: a rank has none
    return {
        "scores": source.scores((x, QUERY[1])),
        "groups": source.scores(QUERY, query_groups=GROUPS),
        "few": source.scores(QUERY, few),
    }


def sent(number: int) -> dict[str, Any]:
    """What a replay's scores sent and received, and what was planned for it."""
    logs, model = halves(number) if number > 1 else whole()
    replay = Replay(logs, model, EXAMPLES, progress=False)
    plan = replay.plan(QUERY, ranks=replay.ranks.world)
    before = replay.ranks.bytes_sent, replay.ranks.bytes_received
    replay.scores(QUERY)
    now = replay.ranks.bytes_sent, replay.ranks.bytes_received
    return {"plan": plan, "sent": now[0] - before[0], "received": now[1] - before[1]}


def peaks(number: int) -> tuple[int | None, int | None]:
    """The peak of a replay's scores on this rank, as it was planned and as it was measured."""
    logs, model = logs_of(number)
    replay = Replay(logs, model, WIDE, progress=False)
    plan = replay.plan(MANY, ranks=replay.ranks.world)
    with Measure() as work:
        replay.scores(MANY)
    return plan.ranks[replay.ranks.rank].peak_bytes, work.peak_bytes
