"""Gradients are autograd's, example by example, whatever form the batches and the outputs have."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastif
from fastif.data import Shared
from fastif.model.losses import output_columns, per_sample

N = 7
G = torch.Generator().manual_seed(0)
X, Z = (torch.randn(N, 6, dtype=torch.float64, generator=G) for _ in range(2))
Y = torch.arange(N) % 3
BANK = torch.randn(11, 6, dtype=torch.float64, generator=G)
TOKENS, TAGS = torch.randn(N, 4, 6, dtype=torch.float64, generator=G), torch.randint(0, 4, (N, 4), generator=G)
TAGS[1, 2] = TAGS[4, 0] = -100


class Output(dict):
    """What transformers return."""

    logits = property(lambda self: self["logits"])


def built(kind):
    torch.manual_seed(0)
    return kind().double().eval()


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(self.a(x).tanh())


class Two(Linear):
    def forward(self, x, z):
        return super().forward(x * z.cos())


class Banked(Linear):
    def forward(self, x, bank, scale=1.0):
        return super().forward((x @ bank.T * scale).softmax(-1) @ bank)


class Squeezed(Linear):
    def forward(self, x):
        return super().forward(x).squeeze()


class OneSqueezed(Linear):
    def forward(self, x):
        return super().forward(x)[:, 0].squeeze()


class Wrapped(Linear):
    def forward(self, x):
        return Output(logits=super().forward(x), other=x)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.b(self.a(x).tanh())  # [n, t, c], t = c = 4


class WrappedTagger(Tagger):
    def forward(self, x):
        return Output(logits=super().forward(x))


class Channels(Tagger):
    def forward(self, x):
        return super().forward(x).mT  # [n, c, t]


def classes(model, *x):
    return lambda i: F.cross_entropy(Linear.forward(model, *(part[i : i + 1] for part in x)), Y[i : i + 1])


def assert_autograds(model, data, loss_of, loss="cross_entropy", **options):
    """Squared norms and pairwise products of all examples' gradients."""
    parameters = list(model.parameters())
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(i), parameters)]) for i in range(N)]
    want = torch.stack(rows)
    influence = fastif.Influence(model, loss, fastif.Identity(), progress=False, batch_size=3, **options).fit(data)
    assert influence.n == N
    torch.testing.assert_close(influence.self_influence(data) * N, want.square().sum(1), rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(influence.scores(data, data) * N, want @ want.T, rtol=1e-10, atol=1e-14)
    return influence


IDS = [f"example {i}" for i in range(N)]


def parts(make):
    return [make(slice(0, 4)), make(slice(4, 6)), make(slice(6, 7))]  # the last one alone


BANKED = {
    "a bank": lambda s: ({"x": X[s], "bank": BANK}, Y[s]),
    "labels in the mapping": lambda s: {"bank": BANK, "x": X[s], "labels": Y[s]},
    "strings, numbers and scalars": lambda s: {
        "x": X[s],
        "bank": BANK,
        "scale": torch.tensor(1.0, dtype=torch.float64),
        "id": IDS[s],
        "note": "all",
        "labels": Y[s],
    },
    "inputs one after another": lambda s: (X[s], BANK, Y[s]),
    "arrays": lambda s: {"x": X[s].numpy(), "bank": BANK.numpy(), "labels": Y[s].numpy()},
    "said": lambda s: {"x": X[s], "bank": Shared(BANK), "labels": Y[s]},
}


@pytest.mark.parametrize("form", BANKED)
def test_what_all_examples_share_goes_in_whole(form):
    model = built(Banked)
    assert_autograds(
        model,
        parts(BANKED[form]),
        lambda i: F.cross_entropy(model(X[i : i + 1], BANK), Y[i : i + 1]),
    )


@pytest.mark.parametrize("rows", [4, 2, 1])
def test_a_bank_as_long_as_a_batch_is_refused_or_said(rows):
    """Batches of 4, 2 and 1 examples: with 4 rows it passes for rows in the first, with 2 in the second."""
    model, bank = built(Banked), BANK[:rows]
    loss_of = lambda i: F.cross_entropy(model(X[i : i + 1], bank), Y[i : i + 1])  # noqa: E731
    assert_autograds(model, parts(lambda s: {"x": X[s], "bank": Shared(bank), "labels": Y[s]}), loss_of)
    data = parts(lambda s: {"x": X[s], "bank": bank, "labels": Y[s]})
    if rows == 4:
        with pytest.raises(ValueError, match=r"fastif\.data\.Shared"):
            fastif.Influence(model, curvature=fastif.Identity(), progress=False).fit(data)
    else:
        assert_autograds(model, data, loss_of)


def test_a_bank_as_long_as_the_whole_batch_names_the_way_out_where_the_model_fails():
    """The check takes the first examples, and so many rows of what is no row of an example."""

    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(16, 3)

        def forward(self, x, mix):
            return self.head(torch.einsum("ij,njd->nid", mix, x).flatten(1))

    model = built(Mixing)
    x, mix, y = torch.randn(8, 8, 2).double(), torch.randn(8, 8).double(), torch.arange(8) % 3
    with pytest.raises(ValueError, match=r"takes the 8 examples .* and not 5 of them .*fastif\.data\.Shared"):
        fastif.Influence(model, curvature=fastif.Identity(), progress=False).fit([(x, mix, y)])
    fastif.Influence(model, curvature=fastif.Identity(), progress=False).fit([(x, Shared(mix), y)])


def test_single_examples_as_mappings_are_no_batches():
    rows = [{"x": X[i], "labels": Y[i]} for i in range(4)]
    with pytest.raises(ValueError, match="batch 0 has one label of no axis"):
        fastif.data.batch_lengths(rows)


def test_rows_that_become_shared_name_the_batch():
    data = [({"x": X[:4], "bank": BANK[:4]}, Y[:4]), ({"x": X[4:], "bank": BANK[:4]}, Y[4:])]
    with pytest.raises(ValueError, match=r"batch 1 has 3 examples and 4 rows of x\['bank'\]"):
        fastif.data.batch_lengths(data)


FORMS = {
    "three parts": lambda: parts(lambda s: (X[s], Z[s], Y[s])),
    "a data set of three": lambda: TensorDataset(X, Z, Y),
    "a loader of three": lambda: DataLoader(TensorDataset(X, Z, Y), batch_size=4),
    "keywords": lambda: parts(lambda s: {"z": Z[s], "x": X[s], "labels": Y[s]}),
    "a mapping": lambda: {"z": Z, "x": X, "labels": Y},
    "a table": lambda: Table({"x": X, "z": Z, "labels": Y}),
}


class Table:
    """A data set of the library `datasets`, as much of it as counts: lists, until tensors are asked for."""

    def __init__(self, columns, kind=None):
        self.columns, self.format, self.column_names = columns, {"type": kind}, list(columns)

    def with_format(self, kind):
        return Table(self.columns, kind)

    def __len__(self):
        return N

    def __getitem__(self, i):
        row = {key: value[i] for key, value in self.columns.items()}
        return row if self.format["type"] else {key: value.tolist() for key, value in row.items()}


@pytest.mark.parametrize("form", FORMS)
def test_several_inputs(form):
    model = built(Two)
    assert_autograds(model, FORMS[form](), lambda i: F.cross_entropy(model(X[i : i + 1], Z[i : i + 1]), Y[i : i + 1]))


def test_columns_that_the_model_does_not_take_are_left_out_and_said():
    model = built(Linear)
    data = parts(lambda s: {"x": X[s], "row": torch.arange(N)[s], "id": IDS[s], "labels": Y[s]})
    with pytest.warns(UserWarning, match=r"Linear\.forward takes no 'row': left out"):
        assert_autograds(model, data, classes(model, X))


def test_what_is_left_out_is_said_at_the_users_line():
    class Own(Linear): ...

    data = parts(lambda s: {"x": X[s], "row": torch.arange(N)[s], "labels": Y[s]})
    with pytest.warns(UserWarning, match=r"Own\.forward takes no 'row': left out") as found:
        fastif.Influence(built(Own), curvature=fastif.Diagonal(), progress=False).fit(data)
    assert [warning.filename for warning in found] == [__file__]


def test_arrays_are_tensors():
    model = built(Linear)
    assert_autograds(model, (X.numpy(), Y.numpy()), classes(model, X))


@pytest.mark.parametrize("kind", [Squeezed, Wrapped])
def test_outputs_squeezed_or_wrapped(kind):
    model = built(kind)
    assert_autograds(model, (X, Y), classes(model, X))


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_one_squeezed_output(loss):
    model, y = built(OneSqueezed), (Y > 0).double()
    function = F.mse_loss if loss == "mse" else F.binary_cross_entropy_with_logits
    assert_autograds(
        model, (X, y), lambda i: function(Linear.forward(model, X[i : i + 1])[0, 0], y[i]), loss, layers="*"
    )


@pytest.mark.parametrize("fisher", ["exact", "monte_carlo", "empirical"])
def test_a_squeezed_output_is_fitted_as_the_whole(fisher):
    data = [(X[:4], Y[:4]), (X[4:6], Y[4:6]), (X[6:], Y[6:])]
    estimator = fastif.EKFAC(0.1, fisher=fisher)
    a, b = (
        fastif.Influence(built(kind), curvature=estimator, progress=False).fit(data).scores(data, data)
        for kind in (Squeezed, Linear)
    )
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


# ------------------------------------------------------------------------------------------------------------ positions


def tagging(kind, t=4):
    """A model, its data of t positions, and the loss of an example."""
    model, x, y = built(kind), TOKENS[:, :t], TAGS[:, :t]
    return model, (x, y), lambda i: F.cross_entropy(Tagger.forward(model, x[i]), y[i], reduction="sum")


def torchs(outputs, y):
    return F.cross_entropy(outputs, y, reduction="none").flatten(1).sum(1)


def test_the_class_axis_of_as_many_positions_as_classes():
    assert_autograds(*tagging(WrappedTagger))
    assert_autograds(*tagging(Tagger), "token_cross_entropy")
    assert_autograds(*tagging(Channels), torchs)
    for kind in (Tagger, Channels):
        model, data, _ = tagging(kind)
        with pytest.raises(ValueError, match=r"fit as \[n, c, ...\] and as \[n, ..., c\]: pass loss='token_cross"):
            fastif.Influence(model, curvature=fastif.Identity(), progress=False).fit(data)


@pytest.mark.parametrize("kind", [Tagger, WrappedTagger, Channels])
def test_the_class_axis_is_read_by_shape_where_one_reading_fits(kind):
    assert_autograds(*tagging(kind, t=3))


def test_segmented_images_of_transformers_have_their_classes_second():
    logits, y = torch.randn(2, 4, 4, 4, dtype=torch.float64), torch.randint(0, 4, (2, 4, 4))
    assert torch.equal(per_sample("cross_entropy", Output(logits=logits), y, 2), torchs(logits, y))
    assert not torch.equal(per_sample("token_cross_entropy", logits, y, 2), torchs(logits, y))


# ------------------------------------------------------------------------------------------------- losses as functions


def own_loss(outputs, y):
    logits = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
    return F.cross_entropy(logits, y, reduction="none") + 0.01 * logits.square().sum(1)


@pytest.mark.parametrize("fisher", ["exact", "monte_carlo"])
def test_a_function_as_loss_takes_what_transformers_return(fisher):
    logits = torch.randn(N, 3, dtype=torch.float64)
    pairs = [
        list(output_columns(own_loss, outputs, Y, N, fisher, torch.Generator().manual_seed(0)))
        for outputs in (logits, Output(logits=logits))
    ]
    for (_, a), (_, b) in zip(*pairs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("curvature", [fastif.EKFAC(0.1), fastif.CG(0.1), fastif.ExactBlock(0.1)], ids=str)
def test_curvature_with_a_function_is_that_of_the_plain_model(curvature):
    found = [
        fastif.Influence(built(kind), own_loss, curvature, layers="*", progress=False)
        .fit((X, Y))
        .scores((X, Y), (X, Y))
        for kind in (Linear, Wrapped)
    ]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-13)


def test_a_function_of_more_than_the_logits_has_no_curvature_in_them():
    def loss(outputs, y):
        return F.cross_entropy(outputs.logits, y, reduction="none") + outputs["other"].square().sum(1)

    influence = fastif.Influence(built(Wrapped), loss, fastif.EKFAC(0.1), layers="*", progress=False)
    with pytest.raises(ValueError, match="a function of the logits alone, it asks for 'other'"):
        influence.fit((X, Y))
    fastif.Influence(built(Wrapped), loss, fastif.EKFAC(0.1, fisher="empirical"), progress=False).fit((X, Y))


# ---------------------------------------------------------------------------------------------- what surrounds the call


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_what_surrounds_the_call_does_not_matter(around):
    model = built(Linear)
    loss_of = classes(model, X)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(i), list(model.parameters()))]) for i in range(N)
    ]
    want = torch.stack(rows) @ torch.stack(rows).T
    influence = fastif.Influence(model, curvature=fastif.Identity(), progress=False)
    with around():
        data = X.clone(), Y.clone()  # made in inference mode
        found = influence.fit(data).scores(data, data) * N
        change = influence.on_parameters({"x": X, "labels": Y})
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-14)
    whole = torch.cat([change[name].flatten() for name, _ in model.named_parameters()])
    torch.testing.assert_close(whole, -torch.stack(rows).sum(0), rtol=1e-10, atol=1e-14)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("when", ["before", "after", "in place", "a part"])
def test_a_compiled_model_is_as_one_that_is_not(when):
    model = built(Linear)
    if when == "in place":
        model.compile(backend="eager")
    elif when == "a part":
        model.a = torch.compile(model.a, backend="eager")
    compiled = model if when in ("in place", "a part") else torch.compile(model, backend="eager")
    if when != "after":
        for size in (N, 3, 5):
            compiled(X[:size]).sum().backward()
    plain = built(Linear)
    loss_of = classes(plain, X)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(i), list(plain.parameters()))]) for i in range(N)
    ]
    want = torch.stack(rows) @ torch.stack(rows).T
    influence = fastif.Influence(compiled, curvature=fastif.Identity(), progress=False).fit((X, Y))
    torch.testing.assert_close(influence.scores((X, Y), (X, Y)) * N, want, rtol=1e-10, atol=1e-14)
    compiled(X).sum().backward()  # and still runs


# ------------------------------------------------------------------------------------------------- features and removal


@pytest.mark.parametrize("kind", [Wrapped, Squeezed])
def test_features_and_removal_of_wrapped_and_squeezed_outputs(kind):
    data = [{"x": X[s], "id": IDS[s], "labels": Y[s]} for s in (slice(0, 6), slice(6, 7))]
    found = fastif.extract(built(kind), data, progress=False)
    for got, want in zip(found, fastif.extract(built(Linear), (X, Y), progress=False), strict=True):
        torch.testing.assert_close(got, want)
    removals = [
        fastif.remove(built(model), source, torch.arange(2), layers=layers, steps=2, progress=False).state_dict
        for layers in ("b", "*")
        for model, source in ((kind, data), (Linear, (X, Y)))
    ]
    for got, want in (removals[:2], removals[2:]):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


def test_features_of_a_token_model_are_those_of_its_positions():
    model = built(WrappedTagger)
    features, logits, labels = fastif.extract(model, (TOKENS, TAGS), batch_size=3, progress=False)
    torch.testing.assert_close(features, model.a(TOKENS).tanh().detach())
    torch.testing.assert_close(logits, Tagger.forward(model, TOKENS).detach())
    assert torch.equal(labels, TAGS)
    with pytest.raises(ValueError, match="one number of positions, got 4 and 3; pad"):
        fastif.extract(model, [(TOKENS[:3], TAGS[:3]), (TOKENS[3:, :3], TAGS[3:, :3])], progress=False)
    with pytest.raises(ValueError, match=r"\[7, 4, 5\]"):
        fastif.remove(model, (TOKENS, TAGS.clamp(min=0)), torch.arange(2), progress=False)
