"""Every pass through data brings the examples of the first one, or an error names the batch that does not."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
    random_split,
)

import fastif
from fastif.data import Shared, Walked, as_loader, batch_lengths, count, picked
from fastif.data.checksums import checksums

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(100, 6, generator=G), torch.arange(100) % 3
Q = (X[:7], Y[:7])


def fitted(train, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    estimator = options.pop("curvature", fastif.EKFAC(1e-2, fisher="empirical"))
    return fastif.Influence(model, "cross_entropy", estimator, progress=False, **options).fit(train)


WANTED = fitted((X, Y)).scores(Q, (X, Y))


class Source(Dataset):
    """The first n examples, each changed as it is loaded."""

    def __init__(self, change=None, n=100):
        self.change, self.n = change, n

    def __len__(self):
        return self.n

    def __getitem__(self, k):
        if not 0 <= k < self.n:
            raise IndexError(k)
        return (X[k], Y[k]) if self.change is None else self.change(k)


class Batches(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, k):
        return X[10 * k : 10 * k + 10], Y[10 * k : 10 * k + 10]


class Stream(IterableDataset):
    def __init__(self, shared=True, shuffled=False):
        self.shared, self.shuffled = shared, shuffled

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        order = torch.randperm(100).tolist() if self.shuffled else list(range(100))
        if info is not None and self.shared:
            order = order[info.id * 50 : info.id * 50 + 50]
        return iter([(X[k], Y[k]) for k in order])


def without_thirds(rows):
    kept = [row for row in rows if int(row[1]) != 2]
    return torch.stack([x for x, _ in kept]), torch.stack([y for _, y in kept])


# ------------------------------------------------------------------------------------------------------- n is as walked


COUNTED = {
    "tensors": lambda: (X, Y),
    "arrays": lambda: (X.numpy(), Y.numpy()),
    "mapping": lambda: {"input": X, "labels": Y},
    "dataset": lambda: Source(),
    "workers": lambda: DataLoader(Source(), batch_size=16, num_workers=2),
    "dataset of batches": lambda: DataLoader(Batches(), batch_size=None),
    "list of batches": lambda: list(zip(X.split([40, 1, 59]), Y.split([40, 1, 59]), strict=True)),
    "empty batches": lambda: [(X[:0], Y[:0]), (X[:30], Y[:30]), (X[:0], Y[:0]), (X[30:], Y[30:])],
    "stream": lambda: DataLoader(Stream(), batch_size=16),
    "shared stream": lambda: DataLoader(Stream(), batch_size=10, num_workers=2),
    "batches of labels as a list": lambda: [(X.numpy(), Y.tolist())],
    "sampler in a fixed order": lambda: DataLoader(TensorDataset(X, Y), batch_size=16, sampler=range(100)),
    "batch sampler": lambda: DataLoader(TensorDataset(X, Y), batch_sampler=[[*range(30)], [30], [*range(31, 100)]]),
    "nothing to drop": lambda: DataLoader(TensorDataset(X, Y), batch_size=25, drop_last=True),
    "accelerate's": lambda: DataLoader(
        TensorDataset(X, Y), batch_sampler=BatchSampler(SequentialSampler(range(100)), 30, drop_last=False)
    ),
}


@pytest.mark.parametrize("form", COUNTED)
def test_every_form_of_the_same_examples_gives_the_same_scores(form):
    data = COUNTED[form]()
    influence = fitted(data)
    assert influence.n == count(data) == sum(batch_lengths(data)) == 100
    order = torch.arange(100)
    if form == "shared stream":  # its workers take turns
        order = torch.cat([torch.arange(k, k + 10) for pair in range(5) for k in (10 * pair, 50 + 10 * pair)])
    torch.testing.assert_close(influence.scores(Q, data), WANTED[:, order], rtol=1e-3, atol=1e-6)


def test_a_part_of_a_data_set_has_its_own_length():
    half, rest = random_split(TensorDataset(X, Y), [60, 40], generator=torch.Generator().manual_seed(1))
    influence = fitted(half)
    assert influence.n == 60
    assert influence.scores(rest, half).shape == (40, 60)
    want = fitted((X[half.indices], Y[half.indices])).scores(
        (X[rest.indices], Y[rest.indices]), (X[half.indices], Y[half.indices])
    )
    torch.testing.assert_close(influence.scores(rest, half), want, rtol=1e-3, atol=1e-6)


def test_what_a_sampler_leaves_out_and_moves_is_not_counted():
    order = torch.randperm(100, generator=torch.Generator().manual_seed(2))[:50].tolist()
    loader = DataLoader(TensorDataset(X, Y), batch_size=16, sampler=order)
    influence = fitted(loader)
    assert influence.n == 50
    got, want = influence.scores(Q, loader), fitted((X[order], Y[order])).scores(Q, (X[order], Y[order]))
    assert float((got - want).abs().max()) <= 1e-6 * float(want.abs().max())  # batches of other sizes round differently
    (((x, y), places),) = picked(loader, 256, torch.tensor([3, 8]))
    assert torch.equal(x, X[order][[3, 8]])
    assert (y.tolist(), places.tolist()) == (Y[order][[3, 8]].tolist(), [0, 1])


@pytest.mark.parametrize("subset", [None, fastif.Subset(torch.tensor([0, 5, 40]), torch.full((3,), 1 / 3))])
def test_what_a_collate_function_drops_is_not_counted(subset):
    loader = DataLoader(TensorDataset(X, Y), batch_size=16, collate_fn=without_thirds)
    kept = Y != 2
    assert count(loader) == int(kept.sum())
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    influence = fastif.Influence(model, "cross_entropy", fastif.EKFAC(0.1), progress=False).fit(loader, subset=subset)
    plain = fastif.Influence(model, "cross_entropy", fastif.EKFAC(0.1), progress=False)
    plain.fit((X[kept], Y[kept]), subset=subset)
    torch.testing.assert_close(influence.scores(Q, loader), plain.scores(Q, (X[kept], Y[kept])), rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- what is no batch


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(X[:5], Y[:5]), (X[5:9], Y[5:8])], r"batch 1 has x of shape \[4, 6\] and 3 labels"),
        ([({"a": X[:5], "b": X[:5]}, Y[:4])], "batch 0 has 4 labels, and no part of x has 4 rows"),
        ([(X[0], Y[0])], "batch 0 has one label of no axis and 6 rows of x: single examples are no batches"),
        ([(X[:0], Y[:0])], "holds no examples"),
    ],
)
def test_rows_and_labels_that_do_not_match_name_the_batch(data, message):
    with pytest.raises(ValueError, match=message):
        fitted(data)


# -------------------------------------------------------------------------------------------- passes that are not alike


def walk(data, times=2):
    data = Walked(data, 16)
    for _ in range(times):
        for _ in data:
            pass
    return data


def changing(kind):
    """Data of which one thing is another one in the second pass: batch 3 of 16, example 50."""
    x, y = X.clone(), Y.clone()
    batches = [[a, b] for a, b in zip(x.split(16), y.split(16), strict=True)]
    walked = Walked(batches, 16)
    list(walked)
    if kind == "a label":
        y[50] += 1
    elif kind == "a bit":
        x.view(torch.int32)[50, 2] ^= 1
    elif kind == "a sign":
        x[50] *= -1
    elif kind == "two rows":
        x[[50, 51]] = x[[51, 50]]
    return walked


@pytest.mark.parametrize("kind", ["a label", "a bit", "a sign", "two rows"])
def test_the_first_difference_names_its_batch_and_example(kind):
    with pytest.raises(ValueError, match=r"changed between passes: batch 3 \(examples 48 to 63\).*first in example 50"):
        list(changing(kind))


def test_another_order_says_which_example_came():
    batches = list(X.split(20))
    walked = Walked(batches, 16)
    list(walked)
    batches[1], batches[2] = batches[2], batches[1]
    with pytest.raises(ValueError, match=r"batch 1 .* in its place is what was example 40"):
        list(walked)


def test_fewer_more_and_longer_batches_are_refused():
    for change, message in (
        (lambda b: b.pop(), "80 examples in 4 batches, 100 in 5 before"),
        (lambda b: b.append(X[:3]), "batch 5 has 3 examples, 0 before"),
        (lambda b: b.__setitem__(2, X[40:59]), "batch 2 has 19 examples, 20 before"),
    ):
        batches = list(X.split(20))
        walked = Walked(batches, 16)
        list(walked)
        change(batches)
        with pytest.raises(ValueError, match=message):
            list(walked)


@pytest.mark.parametrize("loader", [False, True], ids=["dataset", "workers"])
def test_random_augmentation_is_refused_at_the_first_batch(loader):
    data = Source(lambda k: (X[k] + torch.randn(6), Y[k]))
    data = DataLoader(data, batch_size=16, num_workers=1) if loader else data
    with pytest.raises(ValueError, match="batch 0, loaded twice, differs"):
        fitted((X, Y)).scores(Q, data)  # one pass alone
    with pytest.raises(ValueError, match="changed between passes"):
        fitted(data)


def test_augmentation_of_some_examples_is_refused_when_it_comes():
    data = Source(lambda k: (X[k] + (torch.randn(6) if k == 70 else 0), Y[k]))
    with pytest.raises(ValueError, match=r"example 70"):
        fitted(data, batch_size=16)


def test_streams_that_shuffle_or_are_not_shared_are_refused():
    with pytest.raises(ValueError, match="changed between passes: batch 0"):
        fitted(DataLoader(Stream(shuffled=True), batch_size=16))
    with pytest.raises(ValueError, match="workers 0 and 1 of the DataLoader bring the same 100 examples"):
        fitted(DataLoader(Stream(shared=False), batch_size=10, num_workers=2))


def test_data_that_was_fitted_is_held_against_the_fit_and_other_data_is_not():
    x, y = X.clone(), Y.clone()
    influence = fitted((x, y))
    y[60] = (y[60] + 1) % 3
    with pytest.raises(ValueError, match="example 60"):
        influence.scores(Q, (x, y))
    with pytest.raises(ValueError, match="example 60"):
        influence.self_influence((x, y))
    assert influence.scores(Q, (x.clone(), y.clone())).shape == (7, 100)
    assert influence.scores(Q, (x[:9], y[:9])).shape == (7, 9)


def test_picked_examples_are_those_of_the_walk():
    data = Source()
    walked = Walked(data, 16)
    list(walked)
    data.change = lambda k: (X[k], (Y[k] + (k == 33)) % 3)
    assert len(list(walked.picked(torch.tensor([1, 32])))) == 1
    with pytest.raises(ValueError, match=r"picked examples 1 to 40 differs .* in 1 of 3 examples, first in example 33"):
        list(walked.picked(torch.tensor([1, 33, 40])))


def test_what_all_examples_share_is_compared_too():
    bank = torch.zeros(7, 6)
    batches = [({"x": X[:20], "bank": bank}, Y[:20]), ({"x": X[20:50], "bank": bank}, Y[20:50])]
    walked = Walked(batches, 16)
    list(walked)
    bank[3] = 1
    with pytest.raises(ValueError, match="what all examples of batch 0 share is not what it was"):
        list(walked)


def test_strings_and_numbers_of_a_batch_are_compared():
    batches = [{"x": X[:3], "id": ["a", "b", "c"], "labels": Y[:3]}]
    walked = Walked(batches, 16)
    list(walked)
    batches[0]["id"][1] = "z"
    with pytest.raises(ValueError, match="first in example 1"):
        list(walked)


# ------------------------------------------------------------------------------------------------------ the fingerprint


def test_the_fingerprint_tells_data_labels_order_and_batches_apart():
    forms = [
        (X, Y),
        (X, Y.roll(1)),
        (X.flip(0), Y),
        (X[:-1], Y[:-1]),
        (X, Y.int()),
        (-X, Y),
        (X * 2, Y),
        (X.double(), Y),
    ]
    prints = [Walked(data, 16).identity.fingerprint for data in forms] + [Walked((X, Y), 20).identity.fingerprint]
    assert len({*prints}) == len(prints)
    assert Walked(TensorDataset(X, Y), 16).identity.fingerprint == prints[0]
    assert Walked(DataLoader(TensorDataset(X, Y), batch_size=16), 3).identity.fingerprint == prints[0]


def test_the_fingerprint_is_that_of_another_process_and_of_any_number_of_threads():
    code = (
        "import torch; from fastif.data import Walked; torch.set_num_threads(2)\n"
        "x = torch.arange(60000, dtype=torch.float64).view(60, 1000).sin()\n"
        "print(Walked((x, torch.arange(60)), 7).identity.fingerprint)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    x = torch.arange(60000, dtype=torch.float64).view(60, 1000).sin()
    assert told.stdout.strip() == Walked((x, torch.arange(60)), 7).identity.fingerprint


DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.bool, torch.int64, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 3), (5, 1), (5, 7, 3), (5, 70001), (5,), (5, 0, 3)], ids=str)
def test_checksums_see_every_bit_and_not_the_place_in_memory(dtype, shape):
    x = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 9).to(dtype)
    rows, _ = checksums((x, torch.zeros(5)), None)
    assert rows.shape == (5,)
    strange = torch.empty(11, *shape[1:], dtype=dtype)[1::2]
    strange.copy_(x)
    assert torch.equal(checksums((strange, torch.zeros(5)), None)[0], rows)
    for i in range(5):
        (own, _) = checksums((x[i : i + 1], torch.zeros(1)), None)
        assert torch.equal(own, rows[i : i + 1])
    if x.numel():
        bits = x.clone().view(torch.uint8)
        bits.view(5, -1)[2, -1] ^= 1
        changed, _ = checksums((bits.view(dtype), torch.zeros(5)), None)
        assert (changed != rows).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("change", [lambda x: -x, lambda x: 2 * x, lambda x: x.flip(1), lambda x: x.roll(1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_done_to_a_whole_row_changes_its_checksum(change, dtype):
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert bool((checksums(x, None)[0] != checksums(change(x), None)[0]).all())
    constant = torch.ones(50, 8, dtype=dtype)  # 8 words that change in the same bits
    assert checksums(constant, None)[0][0] != checksums(-constant, None)[0][0]


def test_checksums_in_torch_are_those_in_numpy(monkeypatch):
    """What runs on other devices, here on the CPU."""
    from fastif.data import checksums as module

    x = torch.randn(9, 333)
    want = module.checksums(x, Y[:9])[0]
    words, w = module._words(x), module._words(x).shape[1]
    mixed = ((words >> 29) & ((1 << 35) - 1)) ^ words
    direct = (mixed * torch.from_numpy(module._weights(w).view(np.int64))).sum(1)
    assert torch.equal(direct, module._of_words(words))
    if torch.cuda.is_available():
        assert torch.equal(module.checksums(x.cuda(), Y[:9].cuda())[0], want)


def test_what_was_walked_pickles_without_its_data():
    walked = walk((X, Y))
    again = pickle.loads(pickle.dumps(walked))
    assert again.identity.fingerprint == walked.identity.fingerprint
    assert not again.holds((X, Y))
    assert len(pickle.dumps(walked)) < 5000


def test_an_iterator_has_no_second_pass():
    with pytest.raises(TypeError, match="walked through only once"):
        count(iter([(X, Y)]))
    with pytest.raises(ValueError, match="empty after one pass"):
        walk(iter([(X, Y)]))


def test_shared_is_said_where_it_cannot_be_seen():
    data = [({"x": X[:7], "bank": Shared(X[:7])}, Y[:7])]
    ((x, _),) = as_loader(data)
    assert isinstance(x["bank"], Shared)


@pytest.mark.parametrize("kind", [np.float32, np.int64, np.bool_, float, str])
def test_a_column_of_single_values_is_told_by_them(kind):
    def identity(values):
        return walk([({"x": X[:2], "column": [kind(value) for value in values]}, Y[:2])]).identity

    assert identity([0, 1]).fingerprint == identity([0, 1]).fingerprint
    assert bool((identity([0, 1]).rows != identity([1, 0]).rows).all())


class Graph:
    """An object of the user's, one for each example."""

    def __init__(self, edges):
        self.edges = edges


@pytest.mark.parametrize("where", [{"graph": [0, 1]}, {"graph": Shared([0, 1, 2])}], ids=["by example", "shared"])
def test_objects_are_told_by_what_they_hold(where):
    def batch(scale):
        def graphs(numbers):
            return [Graph(torch.tensor([scale * number, 1])) for number in numbers]

        kept = {
            key: Shared(graphs(value.value)) if isinstance(value, Shared) else graphs(value)
            for key, value in where.items()
        }
        return [({"x": X[:2], **kept}, Y[:2])]

    fingerprints = [walk(batch(scale)).identity.fingerprint for scale in (1, 1, 2)]  # other objects, the same examples
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
