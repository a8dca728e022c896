"""extract: what it captures is what the model computes, and the model is left as it was, whatever happens."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fastif.model.features import Extracted, extract, find_head
from fastif.ops._checks import first_nonfinite_row

N, D, C = 23, 6, 3


class Net(nn.Module):
    """A body with dropout and batch norm, frozen norm statistics, and a head that is not its last module."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, D), nn.BatchNorm1d(D), nn.Tanh(), nn.Dropout(0.5))
        self.head = nn.Linear(D, C)
        self.unused = nn.Identity()
        self.body[1].eval()

    def forward(self, x):
        return self.head(self.body(x))


class Rows(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], int(self.y[i])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def xy():
    g = torch.Generator().manual_seed(1)
    return torch.randn(N, 4, generator=g), torch.randint(C, (N,), generator=g)


def run(model, data, **options) -> Extracted:
    return extract(model, data, progress=False, **options)


def state_of(model):
    """All that extract could leave behind."""
    hooks = [(m._forward_hooks.copy(), m._forward_pre_hooks.copy()) for m in model.modules()]
    values = {key: value.clone() for key, value in model.state_dict().items()}
    return [m.training for m in model.modules()], hooks, [id(p) for p in model.parameters()], values


def assert_unchanged(model, before):
    flags, hooks, parameters, values = state_of(model)
    assert flags == before[0]
    assert hooks == before[1]
    assert parameters == before[2]
    assert all(torch.equal(values[key], before[3][key]) for key in values)
    assert torch.is_grad_enabled()


def test_rows_are_the_heads_input_and_output_in_eval_mode(model, xy):
    x, y = xy
    features, logits, labels = run(model, xy, batch_size=5)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(features, model.body(x))
        torch.testing.assert_close(logits, model(x))
    torch.testing.assert_close(features @ model.head.weight.T + model.head.bias, logits)
    assert torch.equal(labels, y)
    assert labels.dtype == torch.int64
    assert not features.requires_grad
    assert not logits.requires_grad


def test_the_batch_size_does_not_matter(model, xy):
    whole = run(model.double(), (xy[0].double(), xy[1]), batch_size=N)
    for batch_size in (1, 7, 1000):
        parts = run(model, (xy[0].double(), xy[1]), batch_size=batch_size)
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_any_data_gives_the_same_rows(model, xy):
    x, y = xy
    expected = run(model, xy, batch_size=10)
    batches = [(x[:10], y[:10].int()), [x[10:20], y[10:20]], (x[20:], y[20:])]
    for data in (TensorDataset(x, y), Rows(x, y), DataLoader(Rows(x, y), batch_size=10), batches):
        got = run(model, data, batch_size=10)
        for a, b in zip(expected, got, strict=True):
            assert torch.equal(a, b)
    alone = run(model, x, batch_size=10)
    assert torch.equal(alone.features, expected.features)
    assert alone.labels is None


def test_structured_inputs_reach_the_model(xy):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, C)

        def forward(self, left, right):
            return self.head(input=left + right[0])  # the head may be called by keyword

    x, y = xy
    model = Pair()
    got = run(model, [({"left": x, "right": (x, "a note")}, y)])  # a mapping is keyword arguments
    assert torch.equal(got.features, 2 * x)


def test_outputs_have_the_dtype_of_the_head(model, xy):
    for dtype in (torch.float64, torch.bfloat16):
        features, logits, _ = run(model.to(dtype), (xy[0].to(dtype), xy[1]))
        assert features.dtype == logits.dtype == dtype


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_model_visits_the_device_and_comes_home(model, xy):
    before = state_of(model)
    cpu, cuda = run(model, xy), run(model, xy, device="cuda")
    assert_unchanged(model, before)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    torch.testing.assert_close(cpu, cuda, rtol=1e-4, atol=1e-4)
    assert run(model.cuda(), xy).features.device.type == "cpu"


# ------------------------------------------------------------------------------------------ the model is left as it was


def test_the_model_is_untouched_after_success(model, xy):
    model.head.register_forward_hook(lambda *_: None)
    before = state_of(model)
    assert before[0].count(False) == 1  # the frozen batch norm stays frozen, the rest stays in training mode
    run(model, xy)
    assert_unchanged(model, before)


def test_the_model_is_untouched_after_any_failure(model, xy):
    x, y = xy
    before = state_of(model)

    def breaks_off():
        yield x[:5], y[:5]
        raise OSError("the disk is gone")

    failures = [
        (breaks_off(), OSError, "the disk is gone"),
        ((x[:, :3], y), RuntimeError, "mat1 and mat2"),  # the forward pass fails
        ((x, y + C), ValueError, "labels must be in"),
        ((x * float("nan"), y), ValueError, "features must be finite"),
    ]
    for data, error, message in failures:
        with pytest.raises(error, match=message):
            run(model, data)
        assert_unchanged(model, before)


def test_the_progress_bar_can_be_silenced(model, xy, capsys):
    extract(model, xy, batch_size=5, progress=False)
    assert capsys.readouterr().err == ""
    extract(model, xy, batch_size=5)
    assert "5/5" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- the head


def test_find_head_takes_the_last_linear_layer_or_the_named_one(model):
    assert find_head(model) == ("head", model.head)
    assert find_head(model, "body.0") == ("body.0", model.body[0])
    assert find_head(nn.Linear(2, 2))[0] == ""


def test_find_head_says_what_there_is(model):
    convolutional = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())
    with pytest.raises(ValueError, match=r"no nn.Linear; its last modules are .*'0' \(Conv2d\), '1' \(Flatten\)"):
        find_head(convolutional)
    with pytest.raises(ValueError, match=r"no module named 'fc'; its linear layers are 'body.0', 'head'"):
        find_head(model, "fc")
    with pytest.raises(ValueError, match=r"the head must be an nn.Linear, 'body.1' is BatchNorm1d"):
        find_head(model, "body.1")


class Around(nn.Module):
    """A head with something around it."""

    def __init__(self, forward):
        super().__init__()
        self.head, self.aside, self.around = nn.Linear(4, 4), nn.Linear(4, 4), forward

    def forward(self, x):
        return self.around(self, x)


@pytest.mark.parametrize(
    "after",
    [
        lambda m, x: m.head(x).log_softmax(1),
        lambda m, x: m.head(x)[:, :2],
        lambda m, x: m.head(x) + x,
        lambda m, x: nn.functional.relu(m.head(x), inplace=True),  # the very tensor of the head, with other values
    ],
    ids=["log-softmax", "slice", "residual", "in-place"],
)
def test_a_head_that_is_not_the_last_operation_is_refused(after, xy):
    with pytest.raises(ValueError, match="the head 'head' is not the last operation of the model"):
        run(Around(after), xy, head="head")


@pytest.mark.parametrize(("times", "forward"), [(2, lambda m, x: m.head(m.head(x))), (0, lambda m, x: m.aside(x))])
def test_a_head_that_does_not_run_exactly_once_is_refused(times, forward, xy):
    with pytest.raises(ValueError, match=f"'head' must run once per forward pass, it ran {times} times"):
        run(Around(forward), xy, head="head")


def test_a_head_that_does_not_see_one_row_per_example_is_refused(xy):
    with pytest.raises(ValueError, match=r"the model's output, shape \[23, 4\], is not the head's, shape \[23, 1, 4\]"):
        run(Around(lambda m, x: m.head(x[:, None])[:, 0]), xy, head="head")
    with pytest.raises(ValueError, match=r"must see one row per example, \[b=23, d\], .* it saw shape \[46, 4\]"):
        run(Around(lambda m, x: m.head(torch.cat([x, x]))), xy, head="head")


def test_a_model_that_does_not_return_a_tensor_is_refused(xy):
    with pytest.raises(TypeError, match=r"the model must return its logits as one tensor .*, got tuple"):
        run(Around(lambda m, x: (m.head(x),)), xy, head="head")


# ------------------------------------------------------------------------------------------------------------- the data


def test_a_loader_that_shuffles_is_refused(model, xy):
    with pytest.raises(ValueError, match="indices would not mean the same example twice"):
        run(model, DataLoader(TensorDataset(*xy), shuffle=True))


def test_bad_rows_are_named(model, xy):
    x, y = xy
    for value in (float("nan"), float("inf")):
        spoiled = x.clone()
        spoiled[17, 0] = value
        linear = nn.Sequential(nn.Linear(4, C))
        with pytest.raises(ValueError, match="extract: features must be finite, example 17 has NaN or Inf"):
            run(linear, (spoiled, y), batch_size=5)
    exploding = nn.Linear(4, C)
    nn.init.constant_(exploding.weight, 3e38)
    x = torch.zeros(N, 4).index_fill_(0, torch.tensor([9]), 10.0)
    with pytest.raises(ValueError, match="extract: logits must be finite, example 9 has NaN or Inf"):
        run(exploding, x, batch_size=4)


def test_bad_labels_are_named(model, xy):
    x, y = xy
    for bad in (-1, C):
        spoiled = y.clone()
        spoiled[12] = bad
        with pytest.raises(ValueError, match=rf"labels must be in \[0, c=3\), example 12 has {bad}"):
            run(model, (x, spoiled), batch_size=5)
    with pytest.raises(TypeError, match=r"extract: labels must be integers, got torch.float32"):
        run(model, (x, y.float()))
    with pytest.raises(ValueError, match=r"labels must be one per example, \[b=23\], got shape \[23, 1\]"):
        run(model, (x, y[:, None]))
    with pytest.raises(ValueError, match="extract: 1 of 2 batches have no labels"):
        run(model, [(x, y), (x,)])


def test_empty_data_is_refused(model):
    with pytest.raises(ValueError, match="no examples"):
        run(model, torch.empty(0, 4))
    with pytest.raises(ValueError, match="extract: the data holds no examples"):
        run(model, [])


def test_first_nonfinite_row_tells_overflow_from_inf():
    x = torch.full((3, 4), 1e308, dtype=torch.float64)
    assert first_nonfinite_row(x) is None
    x[2, 1] = float("nan")
    assert first_nonfinite_row(x) == 2
