"""Whatever holds examples is walked through in one order, and picked from."""

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, TensorDataset

from fastif.data import as_loader, batch_lengths, picked

X, Y = torch.arange(10.0)[:, None], torch.arange(10) % 3


class DrawnBatches:
    """A batch sampler that brings another order each time."""

    def __iter__(self):
        return iter(torch.randperm(10).split(4))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(X[0], Y[0]), (X[1], Y[1])])


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        TensorDataset(X, Y),
        DataLoader(TensorDataset(X, Y), batch_size=4),
        DataLoader(TensorDataset(X, Y), batch_size=None),
        [(X[:7], Y[:7]), (X[7:], Y[7:])],
        [[X, Y]],
    ],
    ids=["tensors", "dataset", "loader", "loader of examples", "list of batches", "one batch"],
)
def test_every_kind_of_data_gives_its_examples_in_order_twice(data):
    loader = as_loader(data, batch_size=3)
    for _ in range(2):
        x, y = zip(*((x.reshape(-1), y.reshape(-1)) for x, y in loader), strict=True)
        assert torch.equal(torch.cat(x), X[:, 0])
        assert torch.equal(torch.cat(y), Y)
    assert len(loader) == len(list(loader))


@pytest.mark.parametrize("data", [X, TensorDataset(X), [X[:4], X[4:]]], ids=["tensor", "dataset", "list"])
def test_data_without_labels_has_y_none(data):
    assert [y for _, y in as_loader(data, batch_size=5)] == [None, None]
    assert torch.equal(torch.cat([x for x, _ in as_loader(data, batch_size=5)]), X)


def test_an_iterable_dataset_is_taken_as_it_is():
    assert [y.tolist() for _, y in as_loader(Stream(), batch_size=2)] == [[0, 1]]
    assert len(list(as_loader(DataLoader(Stream(), batch_size=1)))) == 2


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True),
        DataLoader(TensorDataset(X, Y), sampler=RandomSampler(X)),
        DataLoader(TensorDataset(X, Y), batch_size=None, shuffle=True),
        DataLoader(TensorDataset(X, Y), batch_sampler=DrawnBatches()),
    ],
    ids=["shuffle", "sampler", "unbatched", "batch sampler"],
)
def test_a_loader_that_may_change_its_order_is_refused(loader):
    with pytest.raises(ValueError, match="would not mean the same example twice; pass shuffle=False"):
        as_loader(loader)


def test_a_loader_that_drops_examples_is_refused():
    with pytest.raises(ValueError, match="drop_last=False"):
        as_loader(DataLoader(TensorDataset(X, Y), batch_size=4, drop_last=True))
    assert len(list(as_loader(DataLoader(TensorDataset(X, Y), batch_size=5, drop_last=True)))) == 2


@pytest.mark.parametrize("place", ["batch_sampler", "sampler"])
def test_a_batch_sampler_that_drops_examples_is_refused(place):
    def loader(size, drop_last):
        batches = BatchSampler(SequentialSampler(X), size, drop_last)
        return DataLoader(
            TensorDataset(X, Y), **{place: batches}, **({"batch_size": None} if place == "sampler" else {})
        )

    with pytest.raises(ValueError, match="drop_last=False"):
        as_loader(loader(4, True))
    assert len(list(as_loader(loader(4, False)))) == 3
    assert len(list(as_loader(loader(5, True)))) == 2


def test_a_spent_iterator_says_so():
    loader = as_loader(batch for batch in [(X, Y)])
    assert len(list(loader)) == 1
    with pytest.raises(ValueError, match="empty after one pass"):
        list(loader)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ((X, Y[:3]), ValueError, "of one length, got 10 and 3"),
        ((X[:0], Y[:0]), ValueError, "no examples"),
        (TensorDataset(X[:0], Y[:0]), ValueError, "no examples"),
        ((X, Y, Y), TypeError, r"two tensors \(x, y\)"),
        ((X, [1]), TypeError, r"got \(Tensor, list\)"),
        ("digits", TypeError, "got str"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_what_is_no_data_is_refused(data, error, words):
    with pytest.raises(error, match=words):
        as_loader(data)


def test_batches_and_sizes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        as_loader(X, batch_size=0)
    with pytest.raises(TypeError, match="got 0 parts"):
        list(as_loader([()]))


class _Counted(TensorDataset):
    """Notes which examples are loaded."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.loaded = []

    def __getitem__(self, index):
        self.loaded.append(index)
        return super().__getitem__(index)


FORMS = {
    "tensors": lambda x, y: (x, y),
    "dataset": _Counted,
    "loader": lambda x, y: DataLoader(_Counted(x, y), batch_size=4),
    "batches": lambda x, y: list(zip(x.split([4, 1, 5]), y.split([4, 1, 5]), strict=True)),
}


@pytest.mark.parametrize("form", FORMS)
def test_picked_are_the_examples_asked_for_with_their_places(form):
    x, y = torch.arange(20.0).view(10, 2), torch.arange(10)
    data, indices = FORMS[form](x, y), torch.tensor([1, 2, 4, 7, 8, 9])
    found = list(picked(data, 3, indices))
    places = torch.cat([places for _, places in found])
    assert places.tolist() == list(range(6))
    assert torch.equal(torch.cat([batch[0] for batch, _ in found]), x[indices])
    assert torch.equal(torch.cat([batch[1] for batch, _ in found]), y[indices])
    dataset = getattr(data, "dataset", data)
    if isinstance(dataset, _Counted):
        assert dataset.loaded == indices.tolist()  # no other one
        assert [len(places) for _, places in found] == ([4, 2] if form == "loader" else [3, 3])


@pytest.mark.parametrize("form", FORMS)
def test_batch_lengths_are_those_of_the_batches(form):
    data = FORMS[form](torch.arange(20.0).view(10, 2), torch.arange(10))
    walked = [len(x) for x, _ in as_loader(data, 3)]
    dataset = getattr(data, "dataset", data)
    if isinstance(dataset, _Counted):
        dataset.loaded.clear()
    assert batch_lengths(data, 3) == walked
    assert not getattr(dataset, "loaded", [])  # what can be indexed is not loaded


def test_a_loader_is_picked_from_with_its_own_collate_function():
    x = torch.arange(10.0)
    loader = DataLoader(
        TensorDataset(x), batch_size=4, collate_fn=lambda rows: {"x": torch.stack([r for (r,) in rows])}
    )
    ((batch, _), places), *_ = picked(loader, 256, torch.tensor([5, 6]))
    assert (batch["x"].tolist(), places.tolist()) == ([5.0, 6.0], [0, 1])
