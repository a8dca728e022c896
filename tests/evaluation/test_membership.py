"""Membership inference against scikit-learn, scipy and closed forms."""

import numpy as np
import pytest
import torch
from scipy import stats

from fastif.evaluation import membership, u_lira

metrics = pytest.importorskip("sklearn.metrics")


def losses(r, m, apart=0.5, seed=0, ties=False):
    g = np.random.default_rng(seed)
    members, others = g.normal(0, 1, r), g.normal(apart, 1, m)
    if ties:
        members, others = members.round(), others.round()
    return torch.from_numpy(members), torch.from_numpy(others)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("r", "m"), [(2, 2), (5, 40), (200, 90)])
def test_auc_is_scikit_learns(r, m, ties):
    members, others = losses(r, m, ties=ties)
    truth = np.r_[np.ones(r), np.zeros(m)]
    want = metrics.roc_auc_score(truth, -torch.cat([members, others]).numpy())
    assert membership(members, others).auc == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_balanced_accuracy_is_that_of_a_threshold_from_the_other_half(ties):
    """Every threshold tried by scikit-learn's own balanced accuracy."""
    members, others = losses(41, 30, 1.0, ties=ties)
    found = []
    for fit, judge in ((slice(0, None, 2), slice(1, None, 2)), (slice(1, None, 2), slice(0, None, 2))):

        def score(threshold, part):
            values = torch.cat([members[part], others[part]])
            truth = np.r_[np.ones(len(members[part])), np.zeros(len(others[part]))]
            return metrics.balanced_accuracy_score(truth, (values <= threshold).numpy())

        candidates = torch.cat([members[fit], others[fit]]).unique().tolist()
        scores = [score(t, fit) for t in candidates]
        best = candidates[int(np.argmax(np.round(scores, 12)))]
        found.append(score(best, judge))
    assert membership(members, others).balanced_accuracy == pytest.approx(np.mean(found), abs=1e-12)


def test_balanced_accuracy_by_chance_is_one_half():
    """A threshold judged where it was chosen would be above."""
    found = [membership(*losses(20, 20, 0.0, seed)).balanced_accuracy for seed in range(300)]
    assert abs(np.mean(found) - 0.5) < 4 * np.std(found) / 300**0.5


def test_auc_of_two_normals_is_the_closed_form():
    members, others = losses(20_000, 20_000, 0.7)
    assert membership(members, others).auc == pytest.approx(stats.norm.cdf(0.7 / 2**0.5), abs=0.01)


def shadows(pairs, r, effect, seed=0):
    """Log-odds of examples, each harder or easier, that are higher by `effect` where the network was trained on it."""
    g = torch.Generator().manual_seed(seed)
    first = torch.rand(pairs, r, generator=g) < 0.5
    trained_on = torch.stack([first, ~first], 1).view(2 * pairs, r)
    hardness = 5 * torch.randn(r, generator=g)
    noise = torch.randn(2 * pairs, r, generator=g)
    return hardness + noise + effect * trained_on, trained_on


def test_u_lira_is_the_likelihood_ratio_by_scipy():
    values, trained_on = shadows(4, 7, 1.0)
    ratios = {True: [], False: []}
    for network in range(8):
        others = [k for k in range(8) if k // 2 != network // 2]
        for t in range(7):
            phi = values[others, t].double().numpy()
            side = trained_on[others, t].numpy()
            ratio = stats.norm.logpdf(values[network, t], phi[side].mean()) - stats.norm.logpdf(
                values[network, t], phi[~side].mean()
            )
            ratios[bool(trained_on[network, t])].append(ratio)
    truth = np.r_[np.ones(28), np.zeros(28)]
    every = np.array(ratios[True] + ratios[False])
    found = u_lira(values, trained_on)
    assert found.auc == pytest.approx(metrics.roc_auc_score(truth, every), abs=1e-12)
    assert found.balanced_accuracy == pytest.approx(metrics.balanced_accuracy_score(truth, every > 0), abs=1e-12)
    assert found.by_example.shape == (7,)
    assert found.by_pair.shape == (4,)


def test_u_lira_by_chance_and_where_there_is_something_to_find():
    chance = [u_lira(*shadows(3, 40, 0.0, seed)).auc for seed in range(200)]
    assert abs(np.mean(chance) - 0.5) < 4 * np.std(chance) / 200**0.5
    # With many networks the means are known: φ is told from φ' like two normals that are 2 apart.
    assert u_lira(*shadows(200, 50, 2.0)).auc == pytest.approx(stats.norm.cdf(2 / 2**0.5), abs=0.02)
    plain = metrics.roc_auc_score(*(part.flatten() for part in reversed(shadows(200, 50, 2.0))))
    assert plain < 0.7  # one threshold for all examples finds less


def test_refusals():
    with pytest.raises(ValueError, match="members must be losses .* of at least two examples"):
        membership(torch.zeros(1), torch.zeros(3))
    with pytest.raises(ValueError, match="others must be finite"):
        membership(torch.zeros(3), torch.tensor([0.0, float("nan")]))
    values, trained_on = shadows(3, 5, 0.0)
    trained_on[2, 4] = trained_on[3, 4]
    with pytest.raises(ValueError, match="of pair 1 exactly one network must be trained on example 4"):
        u_lira(values, trained_on)
    with pytest.raises(ValueError, match="K even, at least 4"):
        u_lira(values[:2], trained_on[:2])
    with pytest.raises(ValueError, match="must be finite"):
        u_lira(values / 0.0, shadows(3, 5, 0.0)[1])
