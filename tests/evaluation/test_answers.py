"""What removals from language models are judged by, against hand computations and scipy."""

import math

import pytest
import torch
from scipy.stats import ks_2samp
from torch import nn

from fastif.evaluation import answers


class Fixed(nn.Module):
    """Says the next word's probabilities from a table [v, v] of the last word alone."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table).log())

    def forward(self, tokens):
        return self.table[tokens]


TABLE = [[0.25, 0.25, 0.25, 0.25], [0.1, 0.2, 0.6, 0.1], [0.1, 0.1, 0.3, 0.5], [0.4, 0.2, 0.2, 0.2]]


def texts(*rows):
    """Each (question, answer), padded with 0 to five words."""
    tokens, labels = torch.zeros(len(rows), 5, dtype=torch.int64), torch.full((len(rows), 5), -100)
    for n, (question, answer) in enumerate(rows):
        tokens[n, : len(question) + len(answer)] = torch.tensor(question + answer)
        labels[n, len(question) : len(question) + len(answer)] = torch.tensor(answer)
    return tokens, labels


def test_probabilities_are_geometric_means_over_the_answer_alone():
    found = answers.answer_probabilities(Fixed(TABLE), texts(([1], [2, 3]), ([3, 1], [2])), batch_size=1)
    assert found.tolist() == pytest.approx([math.sqrt(0.6 * 0.5), 0.6])


def test_truth_ratios_by_hand():
    right = texts(([1], [2, 3]))
    wrong = [texts(([1], [1, 2])), texts(([1], [3]))]
    got = answers.truth_ratios(Fixed(TABLE), right, wrong)
    assert got.tolist() == pytest.approx([(math.sqrt(0.2 * 0.6) + 0.1) / 2 / math.sqrt(0.6 * 0.5)])


def test_extraction_strengths_by_hand():
    """After 1 comes 2, after 2 comes 3, after 3 comes 0: [2, 3, 0] whole, [2, 3, 1] not to its end, [3, 0] from 1."""
    given = texts(([1], [2, 3, 0]), ([1], [2, 3, 1]), ([1], [3, 0]), ([0, 1], [2]))
    assert answers.extraction_strengths(Fixed(TABLE), given).tolist() == pytest.approx([1, 0, 0.5, 1])


def test_what_a_model_says_is_its_own_and_not_the_answer():
    given = texts(([1], [1, 1, 1]), ([3, 2], [0]))
    assert answers.say(Fixed(TABLE), given) == [[2, 3, 0], [3]]
    assert answers.rouge_l_recall([2, 3, 0], [0, 2, 0, 3]) == 0.5
    assert answers.rouge_l_recall([], [1]) == 0


def test_utility_by_hand():
    model, part = Fixed(TABLE), texts(([1], [2, 3]))
    wrong = [texts(([1], [3]))]
    p = math.sqrt(0.3)
    assert answers.utility(model, [(part, part, wrong)]) == pytest.approx(3 / (1 / p + 1 / 1 + 1 / (1 - 0.1 / p)))
    assert answers.utility(model, [(part, texts(([1], [3])), [part])]) == 0  # more likely wrong than right


@pytest.mark.parametrize("sizes", [(1, 1), (7, 7), (12, 5), (80, 80), (30, 90)])
@pytest.mark.parametrize("shift", [0.0, 0.5, 3.0])
def test_forget_quality_is_scipys_exact_ks_p(sizes, shift):
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, generator=draw, dtype=torch.float64) for n in sizes)
    want = ks_2samp(a.numpy(), (b + shift).numpy(), method="exact").pvalue
    assert answers.forget_quality(a, b + shift) == pytest.approx(want, rel=1e-9, abs=1e-300)
    assert answers.forget_quality(a, a) == 1


def test_what_cannot_be_judged_is_refused():
    model, good = Fixed(TABLE), texts(([1], [2]))
    with pytest.raises(ValueError, match="text 1 has no answer"):
        answers.answer_probabilities(model, texts(([1], [2]), ([1], [])), batch_size=1)
    with pytest.raises(ValueError, match=r"must both be \[n, t\]"):
        answers.extraction_strengths(model, (good[0], good[1][:, :2]))
    with pytest.raises(ValueError, match="wrong must be texts of n=1"):
        answers.truth_ratios(model, good, [])
    with pytest.raises(ValueError, match="retrained must be finite"):
        answers.forget_quality(torch.ones(2), torch.tensor([1.0, math.nan]))
