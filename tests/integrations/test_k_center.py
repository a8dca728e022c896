"""k-center in others' places: against a re-enactment of anomalib's loop, scikit-learn's own checks, the definition."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastif.integrations import next_batch
from fastif.integrations.anomalib import KCenterGreedy


def reenacted(features, size, selected=()):
    """What anomalib's documentation says of its loop, written down anew; without its random projection."""
    first = int(torch.randint(high=len(features), size=(1,)))
    nearest = torch.full((len(features),), float("inf"), dtype=features.dtype)
    for centre in selected:
        nearest = torch.minimum(nearest, F.pairwise_distance(features, features[centre][None], eps=0.0))
    picks, latest = [], first
    for _ in range(size):
        nearest = torch.minimum(nearest, F.pairwise_distance(features, features[latest][None], eps=0.0))
        latest = int(nearest.argmax())
        nearest[latest] = 0
        picks.append(latest)
    return picks


@pytest.mark.parametrize("shape", [(200, 6), (60, 3, 2, 2), (1, 4)])
@pytest.mark.parametrize("ratio", [0.1, 0.33, 0.0])
def test_the_core_set_is_that_of_the_published_loop(shape, ratio):
    embedding = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    greedy = KCenterGreedy(embedding, ratio)
    torch.manual_seed(4)
    expected = reenacted(embedding.flatten(1), int(len(embedding) * ratio))
    torch.manual_seed(4)
    assert greedy.select_coreset_idxs() == expected
    torch.manual_seed(4)
    assert torch.equal(greedy.sample_coreset(), embedding[expected])


def test_rows_that_were_selected_are_centres():
    embedding = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.manual_seed(1)
    expected = reenacted(embedding, 10, selected=[3, 8, 20])
    torch.manual_seed(1)
    assert KCenterGreedy(embedding, 0.2).select_coreset_idxs([3, 8, 20]) == expected


def test_step_by_step():
    """The methods that the loop is made of give its picks."""
    embedding = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.manual_seed(2)
    expected = reenacted(embedding, 8)
    greedy = KCenterGreedy(embedding, 0.2)
    with pytest.raises(TypeError, match="must be of type Tensor. Got <class 'NoneType'>"):
        greedy.get_new_idx()
    torch.manual_seed(2)
    latest = int(torch.randint(high=40, size=(1,)))
    for pick in expected:
        greedy.update_distances([latest])
        assert greedy.min_distances is not None
        assert greedy.min_distances.shape == (40, 1)
        latest = greedy.get_new_idx()
        assert latest == pick
    greedy.reset_distances()
    greedy.update_distances([])
    assert greedy.min_distances is None
    greedy.update_distances([1, 5])
    both = torch.cdist(embedding, embedding[[1, 5]]).amin(1)
    torch.testing.assert_close(greedy.min_distances[:, 0], both)


def test_all_rows_and_too_many():
    embedding = torch.tensor([[0.0], [1.0], [1.0], [7.0]])
    assert sorted(KCenterGreedy(embedding, 1.0).select_coreset_idxs()) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="asks for 4 of 4 rows, of which 1 are selected already"):
        KCenterGreedy(embedding, 1.0).select_coreset_idxs([0])
    with pytest.raises(ValueError, match="sampling_ratio must be in"):
        KCenterGreedy(embedding, 2.0)


def test_nothing_of_others_is_imported():
    names = ("anomalib", "sklearn", "transformers", "peft")
    code = f"import sys, fastif.integrations.anomalib; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------- scikit-learn


def test_scikit_learns_checks():
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    from sklearn.utils.estimator_checks import check_estimator

    from fastif.integrations.sklearn import KCenterSelector

    rows = "it selects rows: transform gives fewer than it takes, and takes those of the fit alone"
    checks = ("transformer_general", "transformer_data_not_an_array", "methods_sample_order_invariance")
    checks += ("methods_subset_invariance", "fit_idempotent")
    expected = {f"check_{name}": rows for name in checks}
    found = check_estimator(
        KCenterSelector(random_state=0), expected_failed_checks=expected, on_skip=None, on_fail=None
    )
    assert [one["check_name"] for one in found if one["status"] == "failed"] == []
    failed = {one["check_name"] for one in found if one["status"] == "xfail"}
    assert failed <= expected.keys()
    assert sum(one["status"] == "passed" for one in found) > 25


def test_the_selector_is_k_center():
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    from sklearn.exceptions import NotFittedError

    from fastif.integrations.sklearn import KCenterSelector

    x = np.random.default_rng(0).normal(size=(30, 4))
    with pytest.raises(NotFittedError):
        KCenterSelector().get_support()
    selector = KCenterSelector(k=5, random_state=3).fit(x)
    distances = np.linalg.norm(x[:, None] - x[None], axis=2)
    for i in range(1, 5):  # each pick is the farthest from those before
        assert selector.indices_[i] == distances[:, selector.indices_[:i]].min(1).argmax()
    nearest = distances[:, selector.indices_].argmin(1)
    np.testing.assert_allclose(selector.weights_, np.bincount(nearest, minlength=5) / 30)
    assert selector.get_support().sum() == 5
    assert selector.get_support(indices=True).tolist() == sorted(selector.indices_)
    assert np.array_equal(selector.transform(x), x[selector.indices_])
    assert np.array_equal(KCenterSelector(k=5, random_state=3).fit_transform(x), x[selector.indices_])
    assert len(KCenterSelector(k=0.2).fit(x).indices_) == 6
    with pytest.raises(ValueError, match="takes the 30 rows of the fit, got 2"):
        selector.transform(x[:2])
    for k in (0, 31, 1.5, True, "all"):
        with pytest.raises(ValueError, match=r"k must be an integer in \[1, n=30\] or a share in \(0, 1\)"):
            KCenterSelector(k=k).fit(x)


# --------------------------------------------------------------------------------------------------- active learning


@pytest.mark.parametrize("as_mask", [False, True])
def test_the_next_batch_is_far_from_all_that_have_labels(as_mask):
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    labelled = torch.tensor([4, 17, 30])
    given = torch.zeros(40, dtype=torch.bool).index_fill(0, labelled, True) if as_mask else labelled
    batch = next_batch(x, given, 6)
    distances, known = torch.cdist(x.double(), x.double()), labelled.tolist()
    for pick in batch.tolist():
        assert pick == int(distances[:, known].amin(1).argmax())
        known.append(pick)
    assert torch.equal(next_batch(x.numpy(), labelled.tolist(), 6), batch)
    assert next_batch(x, batch, 34).unique().numel() == 34


def test_the_first_batch_is_drawn():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    first, again, other = (next_batch(x, [], 3, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_batches_that_cannot_be():
    x = torch.randn(6, 2)
    with pytest.raises(ValueError, match=r"k must be an integer in \[1, 4 without a label\], got k=5"):
        next_batch(x, [0, 1], 5)
    with pytest.raises(ValueError, match="distinct indices"):
        next_batch(x, [0, 0], 1)
    with pytest.raises(ValueError, match=r"a mask of labelled must be \[n=6\], got \[3\]"):
        next_batch(x, torch.tensor([True, False, True]), 1)
