"""Evaluations held against closed forms, scipy and scikit-learn; parallel retraining gives the serial bits."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastif import ExactBlock, Influence
from fastif.evaluation import (
    Retrained,
    agreement,
    brittleness,
    leave_group_out,
    leave_one_out,
    linear_datamodeling_score,
    mislabel_detection,
    random_subsets,
    retrain,
    subset_counterfactual,
    without,
)
from fastif.evaluation.correlation import interval, pearson, ranks, spearman
from fastif.journal import described
from tests.problems import clusters

N, QUERIES, PENALTY = 60, 8, 0.05
DRAWN = clusters(N + QUERIES, 0)
BLURRED = DRAWN[0] + torch.randn(N + QUERIES, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
X, Y = BLURRED[:N], DRAWN[1][:N]
QUERY = BLURRED[N:], DRAWN[1][N:]
HOW = dict(progress=False)


def ridge(kept: Tensor, seed: int, x: Tensor, y: Tensor, penalty: float) -> nn.Module:
    """The minimiser of Σ_kept (y − xᵀθ)² + penalty·‖θ‖²."""
    del seed
    model = nn.Linear(x.shape[1], 1, bias=False, dtype=torch.float64)
    x, y = x[kept], y[kept]
    with torch.no_grad():
        model.weight.copy_(torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]).double(), x.T @ y).T)
    return model


def logistic(kept: Tensor, seed: int) -> nn.Module:
    """The optimum of (1/N) Σ_kept ℓ + ½ PENALTY ‖θ‖²: N whatever is kept, as in docs/math.md (3)."""
    del seed
    model = nn.Sequential(nn.Linear(5, 3, dtype=torch.float64))
    parameters = list(model.parameters())
    for parameter in parameters:
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=200, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(model(X[kept]), Y[kept], reduction="sum") / N
        value = value + PENALTY / 2 * sum(parameter.square().sum() for parameter in parameters)
        value.backward()
        return value

    optimizer.step(objective)
    return model


def few_steps(kept: Tensor, seed: int, x: Tensor, y: Tensor, steps: int = 3) -> nn.Module:
    """A float32 net whose start is drawn from torch's global generator: it differs from seed to seed."""
    del seed
    model = nn.Sequential(nn.Linear(x.shape[1], 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[kept]), y[kept]).backward()
        optimizer.step()
    return model


NET = partial(few_steps, x=X.float(), y=Y)
NET_QUERY = (QUERY[0].float(), QUERY[1])
SETS = [torch.arange(k, N) for k in range(4)]


class Killed(Exception): ...


class DiesAfter:
    """A train_fn that fails at its call number `calls`, and is described as `NET` is."""

    def __init__(self, calls: int):
        self.calls = calls

    def __call__(self, kept: Tensor, seed: int) -> nn.Module:
        self.calls -= 1
        if self.calls < 0:
            raise Killed
        return NET(kept, seed)


# ----------------------------------------------------------------------------------------------------------- retraining


def test_values_are_those_of_networks_trained_by_hand():
    found = retrain(NET, SETS, NET_QUERY, seeds=[5, 2], **HOW)
    assert found.values.shape == (4, 2, QUERIES)
    assert found.seeds == [5, 2]
    for number, kept in enumerate(SETS):
        for place, seed in enumerate((5, 2)):
            torch.manual_seed(seed)
            with torch.no_grad():
                logits = few_steps_with_grad(kept, seed)(NET_QUERY[0])
            want = nn.functional.cross_entropy(logits, NET_QUERY[1], reduction="none")
            torch.testing.assert_close(found.values[number, place], want.double(), rtol=1e-5, atol=1e-7)
    assert not torch.equal(found.values[:, 0], found.values[:, 1])


def few_steps_with_grad(kept: Tensor, seed: int) -> nn.Module:
    with torch.enable_grad():
        return NET(kept, seed)


def test_callers_generator_threads_and_grad_mode_are_as_they_were():
    torch.manual_seed(7)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    with torch.no_grad():  # training needs gradients all the same
        retrain(NET, SETS[:1], NET_QUERY, threads=1 if threads > 1 else 2, **HOW)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads


def test_two_processes_end_a_killed_job_with_the_bits_of_one(tmp_path):
    whole = retrain(NET, SETS, NET_QUERY, seeds=2, out=tmp_path / "whole", **HOW)
    stored = json.loads((tmp_path / "whole" / "retrained.json").read_text())
    # What a kill in the middle of a line leaves: three records and a part of the fourth.
    lines = [json.dumps({"retrained": record}) for record in stored["retrained"]]
    journal = [json.dumps({"settings": stored["settings"]}), *lines[:3], lines[3][:20]]
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "retrained.jsonl").write_text("\n".join(journal))
    resumed = retrain(NET, SETS, NET_QUERY, seeds=2, processes=2, out=tmp_path / "cut", resume=True, **HOW)
    assert torch.equal(whole.values, resumed.values)
    assert torch.equal(whole.seconds[:3, 0], resumed.seconds[:3, 0])  # these were not trained again
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["retrained.json"]


def test_a_killed_job_goes_on_where_it_stopped(tmp_path):
    whole = retrain(DiesAfter(99), SETS, NET_QUERY, **HOW)
    settings = dict(out=tmp_path, **HOW)
    dies = DiesAfter(2)
    with pytest.raises(Killed):
        retrain(dies, SETS, NET_QUERY, **settings)
    assert len((tmp_path / "retrained.jsonl").read_text().splitlines()) == 3
    with pytest.raises(ValueError, match="holds an unfinished job"):
        retrain(DiesAfter(2), SETS, NET_QUERY, **settings)
    resumed = retrain(again := DiesAfter(2), SETS, NET_QUERY, resume=True, **settings)
    assert again.calls == 0
    assert torch.equal(whole.values, resumed.values)
    with pytest.raises(ValueError, match=r"retrained\.json holds a finished job; resume it, or remove the file"):
        retrain(DiesAfter(2), SETS, NET_QUERY, **settings)
    again.calls = 2  # as it was when the job began
    finished = retrain(again, SETS, NET_QUERY, resume=True, **settings)
    assert again.calls == 2
    assert torch.equal(whole.values, finished.values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(kept=SETS[:3]), "sets was 4, is 3"),
        (dict(seeds=2), r"seeds was \[0\], is \[0, 1\]"),
        (dict(query=(NET_QUERY[0] + 1, NET_QUERY[1])), "query was"),
        (dict(measurement="margin"), "measurement was 'loss', is 'margin'"),
        (dict(train_fn=partial(NET, steps=4)), "train_fn was .*steps"),
        (dict(train_fn=partial(few_steps, x=X.float() + 1, y=Y)), "train_fn was"),
        (dict(threads=2), "threads was 1, is 2"),
    ],
)
def test_another_job_is_not_taken_for_this_one(tmp_path, change, words):
    job = dict(train_fn=NET, kept=SETS, query=NET_QUERY, out=tmp_path, progress=False)
    retrain(**job)
    with pytest.raises(ValueError, match=words):
        retrain(**{**job, **change}, resume=True)


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "retrained.json").write_text("{}")
    with pytest.raises(ValueError, match=r"retrained\.json is not a file of retrain"):
        retrain(NET, SETS, NET_QUERY, out=tmp_path, resume=True, **HOW)


def no_module(kept: Tensor, seed: int) -> None: ...


def hidden(kept: Tensor, seed: int, steps: int) -> nn.Module:
    return few_steps(kept, seed, X, Y, steps)


hidden = partial(hidden, steps=1)  # the function cannot be found by its name any more


def broken(kept: Tensor, seed: int) -> nn.Module:
    model = NET(kept, seed)
    with torch.no_grad():
        model[2].bias[1] = torch.nan
    return model


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (dict(kept=[]), ValueError, "at least one set"),
        (dict(kept=[torch.arange(0)]), ValueError, "set 0 keeps no example"),
        (dict(kept=[*SETS, torch.tensor([3, 1, 3])]), ValueError, "set 4 has 3 twice"),
        (dict(kept=[torch.tensor([-1])]), ValueError, "must be >= 0, set 0 has -1"),
        (dict(kept=[torch.tensor([1.0])]), TypeError, "int64"),
        (dict(kept=[[1, 2]]), TypeError, "got list"),
        (dict(train_fn=no_module), TypeError, "must return an nn.Module, got NoneType"),
        (dict(train_fn=broken), ValueError, "set 0, seed 0 gives query 0 a measurement of nan"),
        (dict(train_fn=3), TypeError, "train_fn must be a function"),
        (dict(train_fn=lambda kept, seed: None, processes=2), TypeError, "picklable"),
        (
            dict(train_fn=hidden, processes=2),
            TypeError,
            r"`f = partial\(f, ...\)` hides f",
        ),
        (dict(query=iter([NET_QUERY])), ValueError, "query is an iterator"),
        (dict(processes=0), ValueError, "processes must be an integer >= 1, got 0"),
        (dict(threads=1.5), ValueError, "threads must be"),
        (dict(seeds=0), ValueError, "seeds must be"),
        (dict(measurement="probability"), ValueError, "measurement must be one of"),
        (dict(loss="hinge"), ValueError, "loss must be one of"),
    ],
)
def test_bad_retraining_is_refused(change, kind, words):
    job = dict(train_fn=NET, kept=SETS[:1], query=NET_QUERY, progress=False)
    with pytest.raises(kind, match=words):
        retrain(**{**job, **change})


def test_an_error_in_a_process_is_the_callers():
    with pytest.raises(TypeError, match="must return an nn.Module, got NoneType"):
        retrain(no_module, SETS[:1], NET_QUERY, processes=2, **HOW)


def test_query_may_come_in_batches_of_any_size():
    batches = list(zip(NET_QUERY[0].split([3, 1, 4]), NET_QUERY[1].split([3, 1, 4]), strict=True))
    whole, parts = (retrain(NET, SETS[:1], query, **HOW).values for query in (NET_QUERY, batches))
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-7)


def test_one_example_is_enough_to_train_on():
    assert retrain(NET, [torch.tensor([3])], NET_QUERY, **HOW).values.isfinite().all()


def test_described_tells_what_a_function_holds():
    def closed(x):
        return lambda kept, seed: x

    assert described(closed(X)) != described(closed(X + 1))
    assert described(closed(X)) == described(closed(X.clone()))
    assert described(nn.Linear(2, 2)) != described(nn.Linear(2, 2))
    assert described(partial(few_steps, steps=1)) != described(partial(few_steps, steps=2))
    assert described(no_module) != described(few_steps)
    json.dumps(
        described(
            {
                "ufunc": np.add,
                "method": X.sum,
                "a": [1, 2.5, (None, NET)],
                "b": DiesAfter(1),
                "c": nn.ReLU,
                "d": X.numpy(),
            }
        )
    )


# ------------------------------------------------------------------------------------------------------------ leave out


def test_leave_one_out_of_ridge_regression_is_its_closed_form():
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(12, 4, generator=g, dtype=torch.float64), torch.randn(12, 1, generator=g, dtype=torch.float64)
    penalty = 0.7
    train = partial(ridge, x=x, y=y, penalty=penalty)
    found = leave_one_out(train, range(12), (x, y), 12, loss="mse", **HOW)
    hat = x @ torch.linalg.solve(x.T @ x + penalty * torch.eye(4).double(), x.T)
    residuals = (y - hat @ y)[:, 0]
    torch.testing.assert_close(found.before, residuals.square())
    want = (residuals / (1 - hat.diagonal())).square() - residuals.square()
    torch.testing.assert_close(found.rises.diagonal(), want, rtol=1e-10, atol=1e-12)
    assert found.groups == [[t] for t in range(12)]
    assert found.errors is None


def test_groups_are_left_out_together_and_pair_by_seed():
    groups = [[0, 5], torch.tensor([7])]
    found = leave_group_out(NET, groups, NET_QUERY, N, seeds=3, **HOW)
    sets = [torch.arange(N), without(N, [0, 5]), without(N, [7])]
    values = retrain(NET, sets, NET_QUERY, seeds=3, **HOW).values
    rises = values[1:] - values[:1]  # [groups, seeds, q]
    torch.testing.assert_close(found.rises, rises.mean(1).T)
    torch.testing.assert_close(found.errors, (rises.std(1) / 3**0.5).T)
    torch.testing.assert_close(found.before, values[0].mean(0))
    assert found.groups == [[0, 5], [7]]


@pytest.fixture(scope="module")
def logistic_scores():
    model = logistic(torch.arange(N), 0)
    return Influence(model, curvature=ExactBlock(PENALTY), progress=False).fit((X, Y)).scores(QUERY, (X, Y))


def test_scores_agree_with_leaving_out_in_logistic_regression(logistic_scores):
    truth = leave_one_out(logistic, range(0, N, 2), QUERY, N, **HOW)
    found = agreement(logistic_scores, truth)
    assert found.pearson.mean > 0.99
    assert found.spearman.mean > 0.98
    assert found.constant == 0
    opposite = agreement(-logistic_scores, truth)
    assert opposite.pearson.mean == pytest.approx(-found.pearson.mean)
    predicted = logistic_scores[:, ::2]
    by_hand = torch.stack(
        [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(predicted, truth.rises, strict=True)]
    )
    assert found.pearson.mean == pytest.approx(float(by_hand.mean()))
    scale = float((predicted * truth.rises).sum() / predicted.square().sum())
    assert 1 < scale < 1.3  # to first order: a removed example's own curvature is still in G, docs/math.md (14)


def test_agreement_sums_scores_of_a_group():
    truth = leave_group_out(NET, [[0, 1], [2], [3, 4, 5]], NET_QUERY, N, **HOW)
    scores = torch.randn(QUERIES, N, generator=torch.Generator().manual_seed(0))
    predicted = torch.stack([scores[:, [0, 1]].sum(1), scores[:, 2], scores[:, 3:6].sum(1)], 1)
    assert agreement(scores, truth).by_query == pytest.approx(spearman(predicted, truth.rises).tolist())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: without(3, [0, 1, 2]), "all n=3 examples are removed"),
        (lambda: without(3, [1, 1]), "index 1 is removed twice"),
        (lambda: without(3, [3]), r"must be in \[0, n=3\), got 3"),
        (lambda: leave_group_out(NET, [], NET_QUERY, N), "at least one group"),
        (lambda: leave_group_out(NET, [[0], []], NET_QUERY, N), "group 1 is empty"),
        (lambda: leave_one_out(NET, [1, 2, 1], NET_QUERY, N), "1 appears twice"),
    ],
)
def test_bad_groups_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ------------------------------------------------------------------------------------------------------------------ LDS


def outcomes(scores: Tensor, kept: list[Tensor]) -> Retrained:
    """What a network whose measurement is exactly additive would give."""
    removed = torch.stack([scores.sum(1) - scores[:, k].sum(1) for k in kept])
    return Retrained(kept, [0], removed[:, None].double(), torch.zeros(len(kept), 1))


def test_lds_is_the_mean_of_scipys_rank_correlation():
    stats = pytest.importorskip("scipy.stats")
    g = torch.Generator().manual_seed(0)
    kept = random_subsets(9, subsets=15, share=0.4, seed=2)
    truth = torch.randn(15, 3, 4, generator=g, dtype=torch.float64)  # three seeds, four queries
    scores = torch.randint(-2, 3, (4, 9), generator=g).double()  # sums of few integers: many ties
    found = linear_datamodeling_score(scores, Retrained(kept, [0, 1, 2], truth, torch.zeros(15, 3)))
    want = []
    for q in range(4):
        predicted = [-sum(float(scores[q, t]) for t in k.tolist()) for k in kept]
        want.append(stats.spearmanr(predicted, truth[:, :, q].mean(1).tolist()).statistic)
        assert len(set(predicted)) < 15
    assert found.by_query == pytest.approx(want)
    assert found.score.mean == pytest.approx(sum(want) / 4)
    assert min(want) <= found.score.low <= found.score.mean <= found.score.high <= max(want)


def test_perfect_scores_give_one_and_their_negative_minus_one():
    scores = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    retrained = outcomes(scores.double(), random_subsets(20, 30, 0.5))
    assert linear_datamodeling_score(scores * 7e-30, retrained).score == pytest.approx((1, 1, 1))
    assert linear_datamodeling_score(-scores, retrained).score == pytest.approx((-1, -1, -1))


def test_queries_without_a_correlation_count_as_zero_and_are_counted():
    scores = torch.randn(4, 20, generator=torch.Generator().manual_seed(0)).double()
    retrained = outcomes(scores, random_subsets(20, 30, 0.5))
    scores[1] = 0
    found = linear_datamodeling_score(scores, retrained)
    assert found.constant == 1
    assert found.by_query == pytest.approx([1, 0, 1, 1])


def test_lds_of_logistic_regression(logistic_scores):
    retrained = retrain(logistic, random_subsets(N, 20, 0.7), QUERY, **HOW)
    assert linear_datamodeling_score(logistic_scores, retrained).score.mean > 0.9


def test_random_subsets_are_uniform_and_seeded():
    drawn = random_subsets(10, subsets=2000, share=0.3, seed=4)
    assert {len(k) for k in drawn} == {3}
    assert all((k[1:] > k[:-1]).all() for k in drawn)
    counts = torch.cat(drawn).bincount(minlength=10)
    assert (counts - 600).abs().max() < 4 * (2000 * 0.3 * 0.7) ** 0.5
    assert torch.equal(torch.cat(random_subsets(10, 2000, 0.3, 4)), torch.cat(drawn))
    assert not torch.equal(torch.cat(random_subsets(10, 2000, 0.3, 5)), torch.cat(drawn))


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda s: s[:, :3], ValueError, "scores have n=3 columns, a subset holds example"),
        (lambda s: s[:2], ValueError, r"scores must be \[q=5, n\], got shape \[2, 20\]"),
        (lambda s: s[0], ValueError, r"scores must be \[q=5, n\], got shape \[20\]"),
        (lambda s: s / (torch.arange(20) != 2), ValueError, r"finite, scores\[0, 2\] is"),
        (lambda s: s.long(), TypeError, "floating-point"),
        (lambda s: s.numpy(), TypeError, "floating-point"),
    ],
)
def test_bad_scores_are_refused(change, kind, words):
    scores = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    retrained = outcomes(scores.double(), random_subsets(20, 30, 0.5))
    with pytest.raises(kind, match=words):
        linear_datamodeling_score(change(scores), retrained)


def test_bad_subsets_are_refused():
    for share in (0.0, 1.0, 0.04, 0.96, -1):
        with pytest.raises(ValueError, match="share must leave"):
            random_subsets(10, 5, share)
    with pytest.raises(ValueError, match="subsets must be an integer >= 2, got 1"):
        random_subsets(10, 1)
    one = Retrained([torch.arange(3)], [0], torch.zeros(1, 1, 2), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="at least two subsets"):
        linear_datamodeling_score(torch.zeros(2, 3), one)


# --------------------------------------------------------------------------------------------------------- correlations


def test_ranks_and_correlations_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    g = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 5, (3, 2, 11), generator=g).double(), torch.randn(3, 2, 11, generator=g)
    torch.testing.assert_close(ranks(a), torch.from_numpy(stats.rankdata(a.numpy(), axis=-1)))
    for index in ((0, 0), (2, 1)):
        x, y = a[index].numpy(), b[index].numpy()
        assert float(spearman(a, b)[index]) == pytest.approx(stats.spearmanr(x, y).statistic)
        assert float(pearson(a, b)[index]) == pytest.approx(stats.pearsonr(x, y).statistic, rel=1e-6)


def test_interval_covers_the_mean_as_often_as_it_says():
    g = torch.Generator().manual_seed(0)
    found = [interval(torch.randn(40, generator=g)) for _ in range(200)]
    covered = sum(i.low <= 0 <= i.high for i in found)
    assert 178 <= covered <= 199  # of 200 at 95 %, less what percentile intervals of 40 values lack
    assert interval(torch.ones(1)) == (1, 1, 1)


# ------------------------------------------------------------------------------------------------------ counterfactuals


def test_most_helpful_examples_removed_raise_the_loss_more_than_random_ones(logistic_scores):
    found = subset_counterfactual(logistic, logistic_scores, QUERY, [2, 8], draws=2, **HOW)
    assert found.rises.shape == found.random.shape == (2, QUERIES)
    assert [m.mean for m in found.mean] == pytest.approx(found.rises.mean(1).tolist())
    assert found.mean[1].mean > found.mean[0].mean > 0
    for own, chance in zip(found.mean, found.random_mean, strict=True):
        assert own.low > chance.high
    for q in (0, 3):
        sets = [torch.arange(N), without(N, logistic_scores[q].topk(8).indices)]
        values = retrain(logistic, sets, QUERY, **HOW).values[:, 0, q]
        assert float(found.rises[1, q]) == pytest.approx(float(values[1] - values[0]))


def test_brittleness_is_what_retraining_by_hand_gives(logistic_scores, tmp_path):
    sizes = [1, 4, 12, 24]
    found = brittleness(logistic, logistic_scores, QUERY, sizes, out=tmp_path, **HOW)
    order = logistic_scores.sort(dim=1, descending=True, stable=True).indices

    def right(kept: Tensor, q: int) -> bool:
        with torch.no_grad():
            return int(few_with_grad(kept)(QUERY[0][q : q + 1]).argmax()) == int(QUERY[1][q])

    for q in range(QUERIES):
        assert found.right[q] == right(torch.arange(N), q)
        flips = [size for size in sizes if not right(without(N, order[q, :size]), q)]
        assert found.flipped_at[q] == (flips[0] if found.right[q] and flips else None)
    assert any(at is not None for at in found.flipped_at)
    counted = sum(found.right)
    assert found.flipped == [sum(at is not None and at <= s for at in found.flipped_at) / counted for s in sizes]
    again = brittleness(logistic, logistic_scores, QUERY, sizes, out=tmp_path, resume=True, **HOW)
    assert again == found


def few_with_grad(kept: Tensor) -> nn.Module:
    with torch.enable_grad():
        return logistic(kept, 0)


@pytest.mark.parametrize("evaluate", [subset_counterfactual, brittleness])
@pytest.mark.parametrize("sizes", [[], [0], [2, 2], [3, 1], [N], [1.5]])
def test_bad_sizes_are_refused(evaluate, sizes):
    with pytest.raises(ValueError, match=rf"sizes must be ascending integers in \[1, n={N}\)"):
        evaluate(NET, torch.zeros(QUERIES, N), NET_QUERY, sizes, **HOW)


@pytest.mark.parametrize("evaluate", [subset_counterfactual, brittleness])
def test_scores_of_other_queries_are_refused(evaluate):
    with pytest.raises(ValueError, match="a row for each of q=8 queries, got 5"):
        evaluate(NET, torch.zeros(5, N), NET_QUERY, [1], **HOW)


def test_bad_counterfactuals_are_refused():
    with pytest.raises(ValueError, match="draws must be an integer >= 1, got 0"):
        subset_counterfactual(NET, torch.zeros(QUERIES, N), NET_QUERY, [1], draws=0, **HOW)
    with pytest.raises(TypeError, match="measurement= cannot be chosen"):
        brittleness(NET, torch.zeros(QUERIES, N), NET_QUERY, [1], measurement="loss", **HOW)


# ------------------------------------------------------------------------------------------------------ wrong labels


def test_auc_is_scikit_learns_with_and_without_ties():
    metrics = pytest.importorskip("sklearn.metrics")
    g = torch.Generator().manual_seed(0)
    true = torch.randint(0, 4, (300,), generator=g)
    given = torch.where(torch.rand(300, generator=g) < 0.3, torch.randint(0, 4, (300,), generator=g), true)
    wrong = given != true
    for suspicion in (torch.randn(300, generator=g) + wrong, torch.randint(0, 4, (300,), generator=g) + 2.0 * wrong):
        found = mislabel_detection(suspicion, given, true)
        assert found.auc == pytest.approx(metrics.roc_auc_score(wrong, suspicion))
        assert found.checked == 30
        top = sorted(range(300), key=lambda i: (-float(suspicion[i]), i))[:30]
        assert found.precision == pytest.approx(sum(bool(wrong[i]) for i in top) / 30)
        assert found.wrong == pytest.approx(float(wrong.double().mean()))


def test_detection_at_its_ends():
    given, true = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 1])
    best = mislabel_detection(torch.tensor([0.0, 0.1, 0.8, 0.9]), given, true, share=0.5)
    assert best == (1.0, 1.0, 2, 0.5)
    assert mislabel_detection(-torch.tensor([0.0, 0.1, 0.8, 0.9]), given, true, share=0.5) == (0.0, 0.0, 2, 0.5)
    assert mislabel_detection(torch.ones(4), given, true, share=0.01).auc == 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([0.1, torch.nan], [0, 1], [0, 0]), "row 1 is nan"),
        (([0.1, 0.2], [0, 1], [0, 1]), "0 of 2 labels are wrong"),
        (([0.1, 0.2], [1, 0], [0, 1]), "2 of 2 labels are wrong"),
        (([0.1, 0.2, 0.3], [0, 1], [0, 0]), "of one length"),
        (([[0.1], [0.2]], [0, 1], [0, 0]), "of one length"),
        (([], [], []), "of one length"),
    ],
)
def test_bad_detection_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        mislabel_detection(*map(torch.tensor, arguments))
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        mislabel_detection(torch.ones(2), torch.tensor([0, 1]), torch.tensor([0, 0]), share=0)
