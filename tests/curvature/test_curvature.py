import pytest
import torch

from fastif.curvature import ExactBlock, NotPositiveDefinite
from fastif.model.gradients import Dense
from fastif.samplers import certified
from tests import reference

G = torch.Generator().manual_seed(0)
INPUTS = torch.randn(60, 4, generator=G, dtype=torch.float64)
LOGITS = torch.randn(60, 3, generator=G, dtype=torch.float64)
LABELS = torch.randint(0, 3, (60,), generator=G)
WEIGHTS = torch.rand(60, generator=G, dtype=torch.float64)


def dense(matrix: str) -> torch.Tensor:
    if matrix == "empirical_fisher":
        u = LOGITS.softmax(1) - torch.nn.functional.one_hot(LABELS, 3)
        grads = torch.einsum("na,nj->naj", u, INPUTS).flatten(1)
        return grads.T @ (grads * WEIGHTS[:, None])
    return reference.ggn_block(INPUTS, LOGITS.softmax(1), WEIGHTS).reshape(12, 12)


@pytest.mark.parametrize("matrix", ["ggn", "hessian", "empirical_fisher"])
def test_block_solve_and_inverse(matrix):
    block = ExactBlock(0.1, matrix).fit(INPUTS, LOGITS, LABELS, WEIGHTS)
    damped = dense(matrix) + 0.1 * torch.eye(12, dtype=torch.float64)
    assert torch.allclose(block.block.view(12, 12), dense(matrix), atol=1e-13)
    assert torch.allclose(block.inverse(), damped.inverse(), atol=1e-11)
    rhs = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    assert torch.allclose(block.solve(rhs), (rhs.flatten(2) @ damped.inverse()).view_as(rhs), atol=1e-11)
    rank_one = Dense(INPUTS[None, :5, None], LOGITS[None, :5, None])
    formed = rank_one.formed().flatten(1)
    norms = torch.einsum("ip,pq,iq->i", formed, damped.inverse(), formed)
    assert torch.allclose(block.sq_norms(rank_one), norms, atol=1e-11)


def test_ggn_and_empirical_fisher_are_different_matrices():
    assert (dense("ggn") - dense("empirical_fisher")).norm() > 0.1 * dense("ggn").norm()


@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("size", [1, 7, 60])
def test_batches_do_not_matter(matrix, size):
    block = ExactBlock(0.1, matrix)
    for rows in torch.arange(60).split(size):
        block.update(INPUTS[rows], LOGITS[rows], LABELS[rows], WEIGHTS[rows])
    assert torch.allclose(block.block.view(12, 12), dense(matrix), atol=1e-13)


@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher"])
def test_downdate_equals_a_fit_without_the_examples(matrix):
    removed, kept = torch.arange(20), torch.arange(20, 60)
    block = ExactBlock(0.1, matrix).fit(INPUTS, LOGITS, LABELS, WEIGHTS)
    before = block.inverse()
    block.downdate(INPUTS[removed], LOGITS[removed], LABELS[removed], WEIGHTS[removed])
    refit = ExactBlock(0.1, matrix).fit(INPUTS[kept], LOGITS[kept], LABELS[kept], WEIGHTS[kept])
    assert torch.allclose(block.block, refit.block, atol=1e-13)
    assert torch.allclose(block.inverse(), refit.inverse(), atol=1e-10)
    assert not torch.allclose(block.inverse(), before)


def test_fit_forgets_what_was_there():
    block = ExactBlock(0.1).fit(INPUTS, LOGITS)
    assert torch.equal(
        block.fit(INPUTS, LOGITS, weights=WEIGHTS).block, ExactBlock().fit(INPUTS, LOGITS, None, WEIGHTS).block
    )


def test_certified_bound_holds_for_the_block():
    features, logits = INPUTS[:, :-1], 4 * LOGITS
    inputs = torch.cat([features, torch.ones(60, 1, dtype=torch.float64)], 1)
    subset = certified(features, logits, 0.2)
    whole = ExactBlock().fit(inputs, logits).block.view(12, 12)
    part = ExactBlock().fit(inputs[subset.indices], logits[subset.indices], weights=subset.weights).block.view(12, 12)
    error = torch.linalg.matrix_norm(whole - part, 2)
    assert 0 < error <= subset.bound


def test_singular_block_raises_with_a_diagnosis():
    with pytest.raises(NotPositiveDefinite, match=r"head \[12, 12\] with damping 0 is not positive definite") as caught:
        _ = ExactBlock(0).fit(INPUTS, LOGITS).factor
    message = str(caught.value)
    assert "smallest pivot is" in message
    advised = float(message.split("; damping ")[1].split()[0])
    assert ExactBlock(advised).fit(INPUTS, LOGITS).inverse().isfinite().all()


def test_indefinite_block_names_its_negative_pivot():
    from fastif.curvature.exact.cholesky import factorize

    with pytest.raises(NotPositiveDefinite, match=r"conv \[2, 2\] .* smallest pivot is -3 .*damping 10 would do"):
        factorize(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), 0.0, "conv")
    with pytest.raises(NotPositiveDefinite, match="smallest pivot is -1"):
        factorize(torch.tensor([[-1.0]]), 0.0, "conv")


def test_nan_is_counted_and_no_damping_is_advised():
    from fastif.curvature.exact.cholesky import factorize

    with pytest.raises(NotPositiveDefinite, match=r"holds 2 NaN and 1 Inf entries: no damping helps"):
        factorize(torch.tensor([[1.0, torch.nan], [torch.nan, torch.inf]]), 0.0, "head")


def test_auto_damping_is_the_smallest_power_of_ten_and_reported():
    block = ExactBlock("auto").fit(INPUTS.float(), LOGITS.float())
    assert 0 < block.damping_used <= 1e-4
    assert ExactBlock(block.damping_used).fit(INPUTS.float(), LOGITS.float()).inverse().isfinite().all()
    with pytest.raises(NotPositiveDefinite):
        _ = ExactBlock(block.damping_used / 10).fit(INPUTS.float(), LOGITS.float()).factor


@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher"])
def test_refused_batch_leaves_the_block_as_it_was(matrix):
    block = ExactBlock(0.1, matrix).fit(INPUTS, LOGITS, LABELS)
    before = block.block.clone()
    for call in (block.fit, block.update, block.downdate):
        with pytest.raises(ValueError, match="finite"):
            call(INPUTS * torch.nan, LOGITS, LABELS)
        assert torch.equal(block.block, before)
    fresh = ExactBlock(0.1, matrix)
    with pytest.raises(ValueError, match="finite"):
        fresh.fit(INPUTS * torch.nan, LOGITS, LABELS)
    with pytest.raises(ValueError, match="not fitted"):
        fresh.solve(torch.ones(3, 4))


@pytest.mark.parametrize("matrix", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize(
    ("labels", "weights", "message"),
    [
        (LABELS - 1, None, r"labels must be in \[0, c=3\), got -1 to 1"),
        (LABELS + 1, None, "got 1 to 3"),
        (LABELS[:9], None, r"labels must be int64 \[n=60\], got torch.int64 \[9\]"),
        (LABELS.double(), None, "got torch.float64"),
        (LABELS, -WEIGHTS, r"weights must be \[n=60\], finite and >= 0"),
        (LABELS, WEIGHTS[:1], "got shape \\[1\\]"),
        (LABELS, WEIGHTS * torch.nan, "finite"),
    ],
)
def test_labels_and_weights_are_checked_for_every_matrix(matrix, labels, weights, message):
    with pytest.raises(ValueError, match=message):
        ExactBlock(0.1, matrix).fit(INPUTS, LOGITS, labels, weights)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ExactBlock(-1.0), r"damping must be a finite number >= 0, .* or 'auto', got -1.0"),
        (lambda: ExactBlock(float("nan")), "got nan"),
        (lambda: ExactBlock(0.1, "fisher"), "matrix must be 'ggn', 'hessian' or 'empirical_fisher', got 'fisher'"),
        (lambda: ExactBlock().solve(INPUTS), "not fitted; call fit first"),
        (lambda: ExactBlock().downdate(INPUTS, LOGITS), "downdate needs a fitted block"),
        (
            lambda: ExactBlock().fit(INPUTS, LOGITS[:3]),
            r"inputs must be \[n, d\] and logits \[n, c\], got \[60, 4\] and",
        ),
        (lambda: ExactBlock().fit(INPUTS[:0], LOGITS[:0]), "at least one example, got 0"),
        (lambda: ExactBlock(0.1, "empirical_fisher").fit(INPUTS, LOGITS), "needs labels"),
        (
            lambda: ExactBlock().fit(INPUTS, LOGITS).solve(torch.ones(4, 3)),
            r"rhs must be \[..., c=3, d=4\], got \[4, 3\]",
        ),
        (
            lambda: ExactBlock().fit(INPUTS, LOGITS).update(INPUTS[:, :2], LOGITS),
            r"must agree .* \[3, 4\], got \[3, 2\]",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
