"""What a language model still knows of questions and answers: what removals from it are judged by. docs/math.md (32).

Texts are rows of words' numbers, int64 [n, t]; labels are the same with −100 wherever a word does not belong to the
answer. The model takes tokens and says logits [n, t, v] of the next ones. An answer is one run of words, with at least
one word of the question before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import comb
from statistics import harmonic_mean

import torch
from torch import Tensor, nn

from fastif.model.calls import call
from fastif.model.losses import IGNORED, logits_of

Texts = tuple[Tensor, Tensor]  # tokens and labels


def answer_probabilities(model: nn.Module, texts: Texts, batch_size: int = 256) -> Tensor:
    """P(a | q)^(1/|a|) of each answer, its words' geometric mean: float64 [n]. docs/math.md (32).

    Raises ValueError for a text without an answer, with its index, and for labels of another shape.
    """
    found = []
    for own, answers in _log_probabilities(model, texts, batch_size):
        found.append(((own * answers).sum(1) / answers.sum(1)).exp())
    return torch.cat(found)


def truth_ratios(model: nn.Module, right: Texts, wrong: Sequence[Texts], batch_size: int = 256) -> Tensor:
    """How likely wrong answers are, as a share of how likely the right one is: float64 [n], near 0 where it is known.

    The mean over the wrong answers of P(wrong | q)^(1/|wrong|), divided by P(right | q)^(1/|right|), where `right` has
    the right answers in other words than the network was trained on (Maini et al. 2024). docs/math.md (32).

    Raises ValueError for no wrong answers, and for others than one of each to a text.
    """
    n = len(right[0])
    if not wrong or any(len(tokens) != n for tokens, _ in wrong):
        raise ValueError(f"truth_ratios: wrong must be texts of n={n} each, got {[len(tokens) for tokens, _ in wrong]}")
    others = torch.stack([answer_probabilities(model, texts, batch_size) for texts in wrong]).mean(0)
    return others / answer_probabilities(model, right, batch_size)


def forget_quality(ratios: Tensor, retrained: Tensor) -> float:
    """p of the two-sided Kolmogorov–Smirnov test that both are of one law: near 0 where they are not.

    `ratios` [n] are the truth ratios of the removed texts, `retrained` [m] those of a network trained without them
    (Maini et al. 2024). Exact for samples without ties, by counting paths: n · m steps. docs/math.md (32).

    >>> forget_quality(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.7, 0.8, 0.9]))  # 2 of 20 orders part them
    0.1

    Raises ValueError for an empty sample and for numbers that are not finite.
    """
    for name, values in (("ratios", ratios), ("retrained", retrained)):
        if values.dim() != 1 or not len(values) or not bool(values.isfinite().all()):
            raise ValueError(f"forget_quality: {name} must be finite numbers [n], n >= 1, got {list(values.shape)}")
    n, m = len(ratios), len(retrained)
    at = torch.cat([ratios, retrained]).double()
    below = [torch.searchsorted(values.double().sort().values, at, right=True) for values in (ratios, retrained)]
    gap = int((below[0] * m - below[1] * n).abs().max())  # n m D
    paths = [0] * (m + 1)  # to (i, j) with |i/n − j/m| < D all the way
    for i in range(n + 1):
        for j in range(m + 1):
            before = 1 if i == j == 0 else paths[j] + (paths[j - 1] if j else 0)
            paths[j] = before if abs(i * m - j * n) < gap else 0
    return float(1 - Fraction(paths[m], comb(n + m, n)))


def extraction_strengths(model: nn.Module, texts: Texts, batch_size: int = 256) -> Tensor:
    """1 − k/|a|, k the fewest first words of the answer after which the model says the others by itself: float64 [n].

    1: the question alone brings the whole answer; 0: not even its last word comes (Carlini et al. 2021). Words are the
    likeliest ones, so that the others come by themselves where each is the likeliest after what stands before it.
    docs/math.md (32). Raises ValueError as `answer_probabilities`.
    """
    found = []
    for start in range(0, len(texts[0]), batch_size):
        logits, labels, answers = _said(model, texts, start, batch_size)
        wrong = (logits.argmax(2) != labels) & answers
        order = answers.cumsum(1)  # 1 for the answer's first word
        k = torch.where(wrong, order, 0).amax(1)
        found.append(1 - k.double() / answers.sum(1))
    return torch.cat(found)


@torch.no_grad()
def say(model: nn.Module, texts: Texts, batch_size: int = 256) -> list[list[int]]:
    """The likeliest words, one after another, in the place of each answer: as many as the answer has."""
    found: list[list[int]] = []
    for start in range(0, len(texts[0]), batch_size):
        tokens, labels = (part[start : start + batch_size].clone() for part in texts)
        answers = labels != IGNORED
        first, lengths, rows = answers.int().argmax(1), answers.sum(1), torch.arange(len(tokens))
        tokens[answers] = 0
        for word in range(int(lengths.max())):
            place = (first + word).clamp(max=tokens.shape[1] - 1)
            said = logits_of(call(model, tokens))[rows, place - 1].argmax(1)
            tokens[rows, place] = torch.where(word < lengths, said, tokens[rows, place])
        found += [row[here].tolist() for row, here in zip(tokens, answers, strict=True)]
    return found


def rouge_l_recall(said: Sequence[int], answer: Sequence[int]) -> float:
    """The longest common subsequence's share of the answer (Lin 2004).

    >>> rouge_l_recall([1, 9, 3], [1, 2, 3, 4])
    0.5
    """
    row = [0] * (len(answer) + 1)
    for word in said:
        before = row
        row = [0]
        for j, wanted in enumerate(answer):
            row.append(before[j] + 1 if word == wanted else max(before[j + 1], row[j]))
    return row[-1] / len(answer)


def utility(model: nn.Module, parts: Sequence[tuple[Texts, Texts, Sequence[Texts]]]) -> float:
    """The harmonic mean, over parts of the data, of three figures each: one that is 0 makes it 0. docs/math.md (32).

    Of a part (texts, right, wrong): the mean probability of its answers, the mean ROUGE-L recall of what the model
    says, and the mean of max(0, 1 − truth ratio) (Maini et al. 2024).
    """
    figures: list[float] = []
    for texts, right, wrong in parts:
        answers = [row[row != IGNORED].tolist() for row in texts[1]]
        recalls = [rouge_l_recall(*pair) for pair in zip(say(model, texts), answers, strict=True)]
        figures.append(float(answer_probabilities(model, texts).mean()))
        figures.append(sum(recalls) / len(recalls))
        figures.append(float((1 - truth_ratios(model, right, wrong)).clamp(min=0).mean()))
    return harmonic_mean(figures)


def _log_probabilities(model: nn.Module, texts: Texts, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(texts[0]), batch_size):
        logits, labels, answers = _said(model, texts, start, batch_size)
        own = logits.double().log_softmax(2).gather(2, labels.clamp(min=0)[..., None])[..., 0]
        yield own, answers


@torch.no_grad()
def _said(model: nn.Module, texts: Texts, start: int, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of each next word [m, t − 1, v], its label, and whether it belongs to the answer."""
    tokens, labels = (part[start : start + batch_size] for part in texts)
    if tokens.shape != labels.shape or tokens.dim() != 2:
        raise ValueError(
            f"answers: tokens and labels must both be [n, t], got {list(tokens.shape)} and {list(labels.shape)}"
        )
    answers = labels[:, 1:] != IGNORED
    if not bool(answers.any(1).all()):
        row = start + int((~answers.any(1)).nonzero()[0])
        raise ValueError(f"answers: text {row} has no answer: its labels are −100 behind the first word")
    return logits_of(call(model, tokens))[:, :-1], labels[:, 1:], answers
