"""An Influence that was pickled comes back as it was, to the last bit of its answers."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastif import CG, EKFAC, DataInf, Diagonal, ExactBlock, Influence, RandomProjection, samplers
from tests.helpers.by_hand import answers


class Recurrent(nn.Module):
    """Its LSTM is covered as loose parameters."""

    def __init__(self):
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(9, 4), nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, ids):
        return self.head(self.body(self.words(ids))[0][:, -1])


def data():
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 9, (12, 5), generator=g), torch.arange(12) % 3


def smoothed(outputs, y):
    return F.cross_entropy(outputs, y, reduction="none", label_smoothing=0.1)


def made(curvature, loss="cross_entropy", **options):
    torch.manual_seed(0)
    return Influence(Recurrent().eval(), loss, curvature, progress=False, **options)


def through_pickle(influence):
    return pickle.loads(pickle.dumps(influence))


@pytest.mark.parametrize("back", [through_pickle, copy.deepcopy])
@pytest.mark.parametrize(
    "curvature",
    [
        EKFAC(1e-2, "empirical"),
        ExactBlock(1e-2),
        DataInf(1e-2),
        RandomProjection(8),
        {"head": ExactBlock(1e-2), "*": Diagonal(1e-2)},
    ],
    ids=["EKFAC", "ExactBlock", "DataInf", "RandomProjection", "mapping"],
)
def test_it_comes_back_with_the_same_bits(curvature, back):
    influence = made(curvature, smoothed, layers=("trained", "!words"), batch_size=5, seed=3)
    again = back(influence)
    subset = samplers.Subset(torch.arange(8), torch.full((8,), 1 / 8, dtype=torch.float64))
    want = answers(influence.fit(data(), subset=subset), data())
    assert torch.equal(answers(again.fit(data(), subset=subset), data()), want)
    again = back(influence)
    assert again.model is not influence.model
    assert again.n == 12
    assert torch.equal(again.subset.indices, subset.indices)
    assert torch.equal(answers(again, data()), want)
    assert again.capture.covered == influence.capture.covered
    assert torch.equal(answers(again.fit(data(), subset=subset), data()), want)  # and can be fitted anew


def test_padded_texts_go_through_in_the_same_slices():
    """The first batch of the fit decides how many examples go through at a time, and no batch after it."""
    long = torch.arange(12 * 700).view(12, 700) % 9, torch.arange(12) % 3
    influence = made(EKFAC(1e-2, "empirical"), memory=1).fit(long)
    want = influence.scores(data(), data())
    assert torch.equal(through_pickle(influence).scores(data(), data()), want)


def test_what_pickle_cannot_take_is_named():
    influence = made(EKFAC(1e-2), lambda outputs, y: smoothed(outputs, y))
    with pytest.raises(pickle.PicklingError, match=r"Influence: loss cannot be pickled: .*<lambda> .*keep state_dict"):
        pickle.dumps(influence)
    assert isinstance(copy.deepcopy(influence), Influence)
    influence = made(EKFAC(1e-2), measurement=lambda outputs, y: smoothed(outputs, y))
    with pytest.raises(pickle.PicklingError, match="Influence: measurement cannot be pickled"):
        pickle.dumps(influence)
    influence = made(EKFAC(1e-2))
    influence.model.head.register_forward_hook(lambda *_: None)
    with pytest.raises(pickle.PicklingError, match=r"Influence: model cannot be pickled: Recurrent .*hooks too"):
        pickle.dumps(influence)


def test_weights_that_changed_since_the_fit_do_not_go_along():
    influence = made(EKFAC(1e-2)).fit(data())
    with torch.no_grad():
        influence.model.head.bias += 1
    with pytest.raises(ValueError, match="not those of the fit"):
        pickle.dumps(influence)


def test_products_need_the_data_that_no_pickle_holds():
    again = through_pickle(made(CG(1e-2)).fit(data()))
    with pytest.raises(ValueError, match=r"CG: multiplies with the data's curvature, .* call fit\(train\)"):
        again.scores(data(), data())
    assert again.fit(data()).scores(data(), data()).shape == (12, 12)
