"""Scores of the training run backwards, held against retraining, closed forms and the recursion written out."""

import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from fastif import ExactBlock, Influence
from fastif.evaluation.correlation import spearman
from fastif.replay import Replay, TrainingLog
from fastif.replay.schedule import Schedule
from tests.helpers.trainings import OPTIMIZERS, Transformer, batches, data, losses, network, recorded, train

EXAMPLES, QUERY = data(), data(4, seed=1)
ORDER = batches(torch.arange(24), 8, 4)


def linear():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 3)).double()


def replayed(logs, model, **how):
    return Replay(logs, model, EXAMPLES, progress=False, **how)


def halves(build=network, optimizer="Nesterov", every=5, pairs=1, epochs=4):
    logs, model = [], None
    for pair in range(pairs):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(pair))
        for side in range(2):
            kept = order[side * 12 : side * 12 + 12]
            made = batches(kept, 5, epochs, seed=2 * pair + side)
            model, log = recorded(OPTIMIZERS[optimizer], EXAMPLES, made, every=every, build=build)
            logs.append(log)
    return logs, model


# --------------------------------------------------------------------------------------------------- against an oracle


@pytest.mark.parametrize("optimizer", ["momentum", "Adam"])
def test_ggn_is_the_hessian_of_a_linear_model(optimizer):
    model, log = recorded(OPTIMIZERS[optimizer], EXAMPLES, ORDER, build=linear)
    ggn, exact = (replayed(log, model, matrix=matrix).scores(QUERY) for matrix in ("ggn", "hessian"))
    torch.testing.assert_close(ggn, exact, rtol=1e-10, atol=1e-14)


def test_long_descent_converges_to_the_exact_block():
    """Full batches of logistic regression with weight decay γ: (1/n) ∇ℓ_qᵀ (G + γI)⁻¹ ∇ℓ_t at the optimum."""
    order, model = [torch.arange(24)] * 60, linear()
    log = TrainingLog(model, every=50)
    train(
        model, lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.5, weight_decay=0.2), EXAMPLES, order, log=log, peak=1.0
    )
    influence = Influence(model, curvature=ExactBlock(damping=0.2), progress=False).fit(EXAMPLES)
    replay = replayed(log, model)
    torch.testing.assert_close(replay.self_influence(), influence.self_influence(EXAMPLES), rtol=1e-6, atol=1e-9)
    for largest in (True, False):
        found, wanted = (one.top(QUERY, EXAMPLES, 24, largest=largest) for one in (replay, influence))
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-6, atol=1e-9)
        assert torch.equal(found[1], wanted[1])


def by_hand(logs, query, crossed):
    """The recursion of docs/math.md (24) for SGD with Nesterov momentum on a linear model, with dense Hessians."""
    x, y = EXAMPLES
    model, one_hot = linear(), F.one_hot(y, 3).double()
    runs = []
    for number, log in enumerate(logs):
        schedule, path = Schedule(log.steps, 24, 0, number), []
        at, v = log.point(0).at, torch.zeros(log.layout.size, dtype=torch.float64)
        for step in log.steps:
            path.append(at)
            lr, momentum, decay, _ = step.numbers[0]
            leaf = at.clone().requires_grad_()
            F.cross_entropy(functional_call(model, log.layout.split(leaf), (x[step.rows],)), y[step.rows]).backward()
            g = leaf.grad + decay * at
            v = momentum * v + g
            at = at - lr * (g + momentum * v)
        runs.append((log, schedule, path, at))
    shares = torch.zeros(2, runs[0][1].epochs, 24, 3, dtype=torch.float64)
    counts = torch.zeros(2, 24, dtype=torch.float64)
    for log, schedule, path, _ in runs:
        for step, epochs in schedule.middles.items():
            out = functional_call(model, log.layout.split(path[step]), (x,)).softmax(1) - one_hot
            for epoch in epochs:
                shares[schedule.present.long(), epoch, torch.arange(24)] += out
        counts[schedule.present.long(), torch.arange(24)] += 1
    trapezoid = (shares / counts[:, None, :, None]).mean(0)
    rows = []
    for log, schedule, path, end in runs:
        layout, scores = log.layout, torch.zeros(len(query[1]), 24, dtype=torch.float64)
        for q in range(len(query[1])):
            leaf = end.clone().requires_grad_()
            out = functional_call(model, layout.split(leaf), (query[0][q : q + 1],))
            (a,) = torch.autograd.grad(F.cross_entropy(out, query[1][q : q + 1]), leaf)
            b = torch.zeros_like(a)
            for number in reversed(range(len(path))):
                step, at = log.steps[number], path[number]
                lr, momentum, decay, _ = step.numbers[0]
                c = b - lr * (1 + momentum) * a
                b = momentum * (b - lr * momentum * a)

                def mean(vector, rows=step.rows, layout=layout):
                    return F.cross_entropy(functional_call(model, layout.split(vector), (x[rows],)), y[rows])

                a = a + hessian(mean)(at) @ c + decay * c
                joining = schedule.joining[number]
                for chosen, share in ((step.rows, 1.0), (joining, schedule.rate)):
                    moved = functional_call(model, layout.split(c), (x[chosen],))  # a linear model is its own Jacobian
                    e = functional_call(model, layout.split(at), (x[chosen],)).softmax(1) - one_hot[chosen]
                    e = trapezoid[schedule.epoch_of[number], chosen] if crossed else e
                    scores[q].index_add_(0, chosen, -share / len(step.rows) * (moved * e).sum(1))
        rows.append(scores)
    spread = torch.stack([row.std(1, correction=0) for row in rows])
    scaled = torch.stack([row / row.std(1, correction=0, keepdim=True) for row in rows]).mean(0)
    return scaled * torch.quantile(spread, 0.5, dim=0)[:, None]


@pytest.mark.parametrize("crossed", [True, False])
def test_halves_as_written_out_by_hand(crossed):
    logs, model = halves(linear)
    found = replayed(logs, model, crossed=crossed).scores(QUERY)
    torch.testing.assert_close(found, by_hand(logs, QUERY, crossed), rtol=1e-10, atol=1e-14)


def test_leaving_one_out_in_the_same_run():
    """The example's weight set to zero in every batch, for a smooth network."""
    model, log = recorded(OPTIMIZERS["Nesterov"], EXAMPLES, batches(torch.arange(24), 8, 6))
    scores = replayed(log, model, matrix="hessian").scores(QUERY)
    ends = []
    for example in range(24):
        weights = torch.ones(24, dtype=torch.float64)
        weights[example] = 0
        order = batches(torch.arange(24), 8, 6)
        ends.append(losses(train(network(), OPTIMIZERS["Nesterov"], EXAMPLES, order, weights=weights), QUERY))
    truth = torch.stack(ends, 1) - losses(model, QUERY)[:, None]
    assert spearman(scores, truth).mean() > 0.7


# ------------------------------------------------------------------------------------------------- what must not matter


@pytest.mark.parametrize("optimizer", ["Nesterov", "Adam"])
def test_neither_checkpoints_nor_memory_nor_slices_matter(optimizer):
    model, log = recorded(OPTIMIZERS[optimizer], EXAMPLES, ORDER, every=100)
    wanted = replayed(log, model).scores(QUERY)
    state = (1 + len(log.rule.state)) * log.layout.size * 8
    for memory in (8 * state, 12 * state):  # four and six states; one query and three at a time
        assert torch.equal(replayed(log, model, memory=memory).scores(QUERY), wanted)
    for how in ({"batch_size": 3}, {"queries_at_a_time": 1}):
        torch.testing.assert_close(replayed(log, model, **how).scores(QUERY), wanted, rtol=1e-11, atol=1e-15)
    for every in (1, 5):
        same, other = recorded(OPTIMIZERS[optimizer], EXAMPLES, ORDER, every=every)
        torch.testing.assert_close(replayed(other, same).scores(QUERY), wanted, rtol=1e-11, atol=1e-15)
    with pytest.raises(ValueError, match=rf"memory must hold 8 states of the network, {8 * state:,} bytes"):
        replayed(log, model, memory=8 * state - 2)


@pytest.mark.parametrize("room", [1, 2, 3, 4, 7, 31, 32, 100])
def test_every_point_is_passed_once_and_few_are_held(room):
    model, log = recorded(OPTIMIZERS["Nesterov"], EXAMPLES, batches(torch.arange(24), 3, 4), every=100)
    path = replayed(log, model).runs[0].path
    with path.network.running(log.modes):
        wanted = [path.checkpoint(0)]
        for number in range(31):
            wanted.append(path.advance(wanted[-1], number))
        numbers, made, most = [], weakref.WeakSet(), 0
        advance = path.advance

        def watched(*args):
            point = advance(*args)
            made.add(point.at)
            return point

        path.advance = watched
        for number, point in path._reverse(wanted[0], 0, 32, room):
            assert torch.equal(point.at, wanted[number].at)
            numbers.append(number)
            most = max(most, len(made))
    assert most <= room
    assert numbers == list(reversed(range(32)))


@pytest.mark.parametrize(("optimizer", "matrix", "way", "each"), [("SGD", "ggn", 6, 4), ("Adam", "hessian", 9, 6)])
def test_operations_are_those_of_the_page(optimizer, matrix, way, each):
    """docs/replay.md, in forward passes over the training's batches; the first layer and the last cost less."""
    model, log = recorded(OPTIMIZERS[optimizer], EXAMPLES, ORDER, build=lambda: deep().double())
    replay, order = replayed(log, model, matrix=matrix), torch.cat([step.rows for step in log.steps])
    queries = data(8, seed=1)

    def operations(what):
        with FlopCounterMode(display=False) as counted:
            what()
        return counted.get_total_flops()

    forward = operations(lambda: model(EXAMPLES[0][order]))
    assert 0.9 * 3 * forward < operations(replay.verify) < 1.2 * 3 * forward  # with a second look at the first batch
    few, many = (operations(lambda q=q: replay.scores((queries[0][:q], queries[1][:q]))) for q in (4, 8))
    assert 0.8 * each * forward < (many - few) / 4 <= each * forward
    assert 0.7 * way * forward < few - (many - few) < 1.1 * way * forward  # with the queries' own gradients


def deep():
    torch.manual_seed(0)
    layers = [part for _ in range(6) for part in (nn.Linear(8, 8), nn.GELU())]
    return nn.Sequential(nn.Linear(3, 8), *layers, nn.Linear(8, 3))


def test_data_in_other_forms():
    model, log = recorded(OPTIMIZERS["momentum"], EXAMPLES, ORDER)
    wanted = replayed(log, model).scores(QUERY)
    for train_data in (TensorDataset(*EXAMPLES), DataLoader(TensorDataset(*EXAMPLES), batch_size=5)):
        found = Replay(log, model, train_data, progress=False).scores(QUERY, train_data)
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-15)
    batches_of = [(EXAMPLES[0][:12], EXAMPLES[1][:12]), (EXAMPLES[0][12:], EXAMPLES[1][12:])]
    with pytest.raises(ValueError, match="examples can be had one by one"):
        Replay(log, model, batches_of, progress=False)


def test_groups_of_queries_are_summed():
    model, log = recorded(OPTIMIZERS["Adam"], EXAMPLES, ORDER)
    replay = replayed(log, model)
    scores = replay.scores(QUERY)
    grouped = replay.scores(QUERY, EXAMPLES, query_groups=torch.tensor([2, 0, 0, 2]))
    wanted = torch.stack([scores[1] + scores[2], torch.zeros(24, dtype=torch.float64), scores[0] + scores[3]])
    torch.testing.assert_close(grouped, wanted)
    with pytest.raises(ValueError, match=r"query_groups must be \[4\]"):
        replay.scores(QUERY, query_groups=torch.tensor([0]))
    memory = 8 * (1 + len(log.rule.state)) * log.layout.size * 8  # two groups at a time, of which two have no query
    few = replayed(log, model, memory=memory).scores(QUERY, query_groups=torch.tensor([5, 0, 0, 5]))
    torch.testing.assert_close(few[[0, 5]], torch.stack([scores[1] + scores[2], scores[0] + scores[3]]))
    assert not few[1:5].any()


def test_weights_and_repeats():
    """A batch with an example twice is one with its weight doubled, once the mean is taken over as many."""
    doubled = torch.tensor([0, 1, 1, 2])
    runs = []
    for rows, weights in ((doubled, None), (torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0, 1.0]) * 3 / 4)):
        model = network()
        log = TrainingLog(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(6):
            optimizer.zero_grad()
            own = 1 if weights is None else weights
            (F.cross_entropy(model(EXAMPLES[0][rows]), EXAMPLES[1][rows], reduction="none") * own).mean().backward()
            log.step(optimizer, rows, weights)
        runs.append(replayed(log, model, matrix="hessian").scores(QUERY)[:, :3])
    torch.testing.assert_close(*runs)


def test_a_measurement_and_a_loss_of_ones_own():
    model, log = recorded(OPTIMIZERS["Nesterov"], EXAMPLES, ORDER)
    named = replayed(log, model, matrix="hessian").scores(QUERY)

    def own(outputs, labels):
        return F.cross_entropy(outputs, labels, reduction="none")

    for matrix in ("ggn", "hessian"):
        found = replayed(log, model, loss=own, matrix=matrix).scores(QUERY)
        torch.testing.assert_close(found, replayed(log, model, matrix=matrix).scores(QUERY))
    margin = replayed(log, model, measurement="log_odds", matrix="hessian").scores(QUERY)
    p = torch.exp(-losses(model, QUERY))
    torch.testing.assert_close(margin, named * (-1 / (1 - p))[:, None])  # d log(p/(1 − p)) = −dℓ/(1 − p)


# ------------------------------------------------------------------------------------------------- several networks


def test_who_is_absent_joins_once_an_epoch():
    logs, _ = halves()
    schedule = Schedule(logs[0].steps, 24, seed=0, network=0)
    assert (schedule.epochs, schedule.rate) == (4, 1.0)
    absent = (~schedule.present).nonzero()[:, 0]
    for epoch in range(4):
        joined = [
            r for rows, e in zip(schedule.joining, schedule.epoch_of, strict=True) if e == epoch for r in rows.tolist()
        ]
        assert sorted(joined) == absent.tolist()
    assert max(map(len, schedule.joining)) <= 6  # 12 examples on steps of 5, 5 and 2
    again = Schedule(logs[0].steps, 24, seed=0, network=0)
    other = Schedule(logs[0].steps, 24, seed=1, network=0)
    assert all(map(torch.equal, schedule.joining, again.joining))
    assert not all(map(torch.equal, schedule.joining, other.joining))
    # A run of one and a half epochs counts as two, in which who is absent joins twice and counts 3/4 each time.
    half = Schedule(logs[0].steps[:3] + logs[0].steps[3:4], 24, seed=0, network=0)
    assert half.epochs == 1
    assert half.rate == pytest.approx(17 / 12)


def test_examples_that_all_networks_saw_keep_their_own_residuals():
    first, log = recorded(OPTIMIZERS["Nesterov"], EXAMPLES, ORDER)
    _, other = recorded(OPTIMIZERS["Nesterov"], EXAMPLES, batches(torch.arange(24), 8, 4, seed=5))
    crossed, plain = (replayed([log, other], first, crossed=c).scores(QUERY) for c in (True, False))
    torch.testing.assert_close(crossed, plain)


def test_networks_that_cannot_be_crossed():
    logs, model = halves()
    _, longer = recorded(OPTIMIZERS["Nesterov"], EXAMPLES, batches(torch.arange(12), 5, 6))
    with pytest.raises(ValueError, match=r"the logs have \[4, 6\] epochs; pass crossed=False"):
        replayed([*logs, longer], model).scores(QUERY)
    assert replayed([*logs, longer], model, crossed=False).scores(QUERY).shape == (4, 24)
    logs, model = halves(epochs=9)
    with pytest.raises(ValueError, match=r"keeps residuals \[2, 9, 24, 3\] .* 10,368 bytes, more than memory=10,000"):
        replayed(logs, model, memory=10_000).scores(QUERY)


# ----------------------------------------------------------------------------------------------------- other models


def test_a_language_model():
    """Mappings as batches, outputs with logits, attention, tied weights, positions that do not count."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 7, (12, 5), generator=g)
    labels = tokens.clone()
    labels[::3, -1] = -100
    text = {"input_ids": tokens, "labels": labels}
    query = {key: value[:3] for key, value in text.items()}

    def lm_losses(model, rows):
        logits = model(tokens[rows])["logits"][:, :-1]
        return (
            F.cross_entropy(logits.flatten(0, 1), labels[rows, 1:].flatten(), reduction="none")
            .view(len(rows), -1)
            .sum(1)
        )

    def trained(weights, log=None):
        torch.manual_seed(0)
        model = Transformer().double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, eps=1e-3)
        log = TrainingLog(model, every=3) if log is None else log
        for rows in batches(torch.arange(12), 4, 2):
            optimizer.zero_grad()
            (lm_losses(model, rows) * weights[rows]).mean().backward()
            log.step(optimizer, rows)
        return model, log

    model, log = trained(torch.ones(12, dtype=torch.float64))
    assert len(log.layout.names) == 5  # the tied weight once
    exact = Replay(log, model, text, loss="causal_lm", matrix="hessian", progress=False).scores(query)
    ends = []
    for sign in (1, -1):
        weights = torch.ones(12, dtype=torch.float64)
        weights[4] += sign * 1e-5
        ends.append(lm_losses(trained(weights)[0], torch.arange(3)).detach())
    wanted = (ends[1] - ends[0]) / 2e-5
    assert float((exact[:, 4] - wanted).norm() / wanted.norm()) < 1e-7
    ggn = Replay(log, model, text, loss="causal_lm", progress=False).scores(query)
    assert float(torch.corrcoef(torch.stack([ggn.flatten(), exact.flatten()]))[0, 1]) > 0.9


def test_a_convolutional_network_in_single_precision():
    """Pooling, GroupNorm, a BatchNorm that is kept in eval mode, frozen parameters, slices of a batch."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, 1, 6, 6, generator=g), torch.arange(16) % 3
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3)),
        *(nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)),
    )
    model[1].eval()
    model[8].bias.requires_grad_(False)
    log = TrainingLog(model, every=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for rows in batches(torch.arange(16), 4, 2):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        log.step(optimizer, rows)
    assert "8.bias" in log.constants
    assert "1.running_mean" in log.constants
    replay = Replay(log, model, (x, y), progress=False)
    scores = replay.scores((x[:2], y[:2]))
    assert max(replay.deviations) < 1e-4
    sliced = Replay(log, model, (x, y), batch_size=3, progress=False).scores((x[:2], y[:2]))
    torch.testing.assert_close(scores, sliced, rtol=1e-3, atol=1e-6)
