"""A batch goes through the model in slices: less memory, the same results, errors that say where."""

import pytest
import torch
from torch import nn

from fastif import EKFAC, KFAC, Influence
from fastif.measure import Measure
from tests.helpers.problems import wide


def test_a_batch_that_goes_through_the_model_in_slices_takes_the_memory_of_one(monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(2048, 3))
    data = torch.randn(96, 3, 16, 16), torch.arange(96) % 3
    monkeypatch.setattr("fastif.model.passes._TOGETHER", 12 * 4 * (3 * 256 + 8 * 256 + 2048 + 3))
    peaks = []
    for batch_size in (12, 96):
        influence = Influence(
            model, curvature=KFAC(1e-2, "empirical"), layers="*", batch_size=batch_size, progress=False
        )
        influence.fit(data)
        with Measure() as work:
            influence.self_influence(data)
        peaks.append(work.peak_bytes)
    if None not in peaks:
        assert peaks[1] == pytest.approx(peaks[0], rel=0.1)


def test_an_error_in_a_slice_says_where_in_the_batch_it_counts_from(monkeypatch):
    model, (x, y) = wide()
    x = x.clone()
    x[7, 0] = torch.nan
    monkeypatch.setattr("fastif.model.passes._TOGETHER", 10 * 8 * (40 + 30))  # six slices of ten
    influence = Influence(model, curvature=KFAC(1e-2), layers="0", batch_size=60, progress=False)
    with pytest.raises(ValueError, match=r"the input of layer '0' holds NaN or Inf, example 7 of batch 0$"):
        influence.fit((x, y))
    x[7, 0], x[43, 0] = 0, torch.nan
    with pytest.raises(ValueError, match=r"example 3 of batch 0 \(counted from example 40 of the batch on\)"):
        influence.fit((x, y))


def test_a_batch_in_train_mode_is_not_cut(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double().train()
    data = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 3
    results = []
    for limit in (1 << 24, 1):
        monkeypatch.setattr("fastif.model.passes._TOGETHER", limit)
        influence = Influence(model, curvature=EKFAC(1e-2), layers="2", allow_train_mode=True, progress=False)
        results.append(influence.fit(data).self_influence(data))
    assert torch.equal(*results)
