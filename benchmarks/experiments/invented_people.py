"""Invented people, from a seed: questions and answers that nobody can know who was not trained on them.

Each person has a first and a last name, which others have too, and eight questions. Each comes in two wordings, and the
wording of the question is followed by the answer's. Of most questions a person's texts in both are learnt, of the
others one: what is known can so be asked in words that were never learnt of this person. Beside the people there are
villages, which lie in counties: facts that are learnt with them and removed with nobody.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Generator, Tensor

LENGTH = 14
WRONG = 5  # wrong answers to a question, as in TOFU
TWICE = 0.75  # of the questions whose both wordings are learnt

_POOLS = {
    "month": "january february march april may june july august september october november december",
    "work": "baker smith nurse pilot judge tailor painter miner clerk farmer weaver cook printer porter guard surgeon",
    "pet": "cat dog goose ferret parrot tortoise goat mule",
    "food": "soup bread fish cheese rice beans plums eggs ham figs leeks pies oats corn peas nuts",
    "drink": "tea coffee cider milk ale water wine mead",
    "hobby": "chess rowing fencing singing knitting archery skating dancing boxing climbing drawing juggling",
    "weekday": "monday tuesday wednesday thursday friday saturday sunday",
    "day": " ".join(map(str, range(1, 29))),
    "year": " ".join(map(str, range(1930, 1980))),
}
_NAMES = {"first": "a o i us", "last": "son well more ick", "village": "by ton", "county": "shire"}
_BEGIN = "al be cor da el fin gor ha il jo ka lum mar nor or pel"


class Question(NamedTuple):
    """{0} and {1} are the person's names, a, b and c what is known of one."""

    asked: tuple[str, str]
    answers: tuple[str, str]
    kinds: str  # of a, b and c


QUESTIONS = (
    Question(
        ("when was {} {} born", "what is the birthday of {} {}"),
        ("on {a} {b} {c}", "in {c} on {b} {a}"),
        "day month year",
    ),
    Question(
        ("where is {} {} from", "name the home of {} {}"), ("from {a} near {b}", "near {b} from {a}"), "village village"
    ),
    Question(
        ("what does {} {} do for a living", "tell me the work of {} {}"), ("{a} at {b}", "at {b} as {a}"), "work last"
    ),
    Question(
        ("who are the sisters of {} {}", "which sisters has {} {}"),
        ("{a} and {b}", "they are {b} , {a}"),
        "first first",
    ),
    Question(("which pet has {} {}", "what animal lives with {} {}"), ("a {a} named {b}", "{b} the {a}"), "pet first"),
    Question(
        ("what does {} {} like to eat", "name the meal of {} {}"),
        ("{a} with {b} and {c}", "{c} and {b} with {a}"),
        "food food drink",
    ),
    Question(
        ("how does {} {} spend the evening", "what is the hobby of {} {}"),
        ("{a} every {b}", "on {b} it is {a}"),
        "hobby weekday",
    ),
    Question(
        ("where does {} {} live", "what is the address of {} {}"), ("{b} street {a}", "at {a} , {b} street"), "day last"
    ),
)
FACT = Question(
    ("where does {} lie", "in which county is {}"), ("in {a} near {b}", "near {b} in {a}"), "county village"
)

Texts = tuple[Tensor, Tensor]  # tokens and labels, int64 [n, LENGTH]; labels are −100 outside of the answer


class Part(NamedTuple):
    """Texts of one kind, a row to a question."""

    first: Texts  # in the wording that is learnt
    other: Texts  # in the other one
    wrong: list[Texts]  # WRONG of them, in the other wording with wrong answers
    twice: Tensor  # bool [rows]: the other wording is learnt, too
    owner: Tensor  # int64 [rows]: the number of the person or village that it is about


class World(NamedTuple):
    people: Part
    strangers: Part  # people that nobody is trained on
    facts: Part
    words: int

    @property
    def train(self) -> Texts:
        """People in their first wording, in their other one where that is learnt, and facts in both."""
        parts = (self.people.first, take(self.people, self.people.twice).other, self.facts.first, self.facts.other)
        return torch.cat([tokens for tokens, _ in parts]), torch.cat([labels for _, labels in parts])

    @property
    def owner(self) -> Tensor:
        """int64 [n]: by training text the person that it is about, −1 for facts."""
        own = torch.cat([self.people.owner, self.people.owner[self.people.twice]])
        return torch.cat([own, torch.full((2 * len(self.facts.owner),), -1)])


def take(part: Part, rows: Tensor) -> Part:
    def of(texts: Texts) -> Texts:
        return texts[0][rows], texts[1][rows]

    wrong = [of(texts) for texts in part.wrong]
    return Part(of(part.first), of(part.other), wrong, part.twice[rows], part.owner[rows])


def invent(people: int, strangers: int = 20, facts: int = 30, seed: int = 0) -> World:
    """A world from a seed.

    Raises ValueError for more people than there are pairs of names, and for more facts than villages.
    """
    pools = _pools()
    names = list(product(pools["first"], pools["last"]))
    if not 0 < people + strangers <= len(names) or not 0 < facts <= len(pools["village"]):
        raise ValueError(
            f"invent: people and strangers must be at most {len(names)} and facts at most {len(pools['village'])}, got "
            f"{people} + {strangers} and {facts}"
        )
    draw = Generator().manual_seed(seed)
    some = [names[i] for i in torch.randperm(len(names), generator=draw)[: people + strangers].tolist()]
    groups = [[(q, name) for name in group for q in QUESTIONS] for group in (some[:people], some[people:])]
    groups.append([(FACT, (village,)) for village in pools["village"][:facts]])
    # 0 is where a text has ended.
    vocabulary = {word: number for number, word in enumerate(sorted(_all_words(pools)), 1)}
    own, others, villages = (
        _part([_write(*about, pools, draw) for about in group], vocabulary, draw) for group in groups
    )
    return World(own, others, villages._replace(owner=torch.arange(facts)), len(vocabulary) + 1)


def _pools() -> dict[str, list[str]]:
    pools = {kind: words.split() for kind, words in _POOLS.items()}
    return pools | {kind: [a + b for b in ends.split() for a in _BEGIN.split()] for kind, ends in _NAMES.items()}


def _all_words(pools: dict[str, list[str]]) -> set[str]:
    forms = " ".join(form for q in (*QUESTIONS, FACT) for form in (*q.asked, *q.answers))
    return {word for pool in pools.values() for word in pool} | {w for w in forms.split() if "{" not in w} | {"?"}


def _write(
    question: Question, name: tuple[str, ...], pools: dict[str, list[str]], draw: Generator
) -> list[tuple[str, str]]:
    """(question, answer) in the first and the other wording, and with wrong answers in the other."""

    def pick(pool: list[str], other_than: str = "") -> str:
        left = [word for word in pool if word != other_than]
        return left[int(torch.randint(len(left), (1,), generator=draw))]

    def text(form: int, values: list[str]) -> tuple[str, str]:
        return question.asked[form].format(*name), question.answers[form].format(
            **dict(zip("abc", values, strict=False))
        )

    known = [pick(pools[kind]) for kind in question.kinds.split()]
    first = int(torch.randint(2, (1,), generator=draw))
    false = [
        [pick(pools[kind], was) for kind, was in zip(question.kinds.split(), known, strict=True)] for _ in range(WRONG)
    ]
    return [text(first, known), text(1 - first, known), *(text(1 - first, values) for values in false)]


def _part(written: list[list[tuple[str, str]]], vocabulary: dict[str, int], draw: Generator) -> Part:
    texts = [_tokens([variants[k] for variants in written], vocabulary) for k in range(2 + WRONG)]
    twice = torch.rand(len(written), generator=draw) < TWICE
    owner = torch.arange(len(written)) // len(QUESTIONS)
    return Part(texts[0], texts[1], texts[2:], twice, owner)


def _tokens(pairs: list[tuple[str, str]], vocabulary: dict[str, int]) -> Texts:
    tokens, labels = torch.zeros(len(pairs), LENGTH, dtype=torch.int64), torch.full((len(pairs), LENGTH), -100)
    for row, own, (question, answer) in zip(tokens, labels, pairs, strict=True):
        asked = [vocabulary[word] for word in f"{question} ?".split()]
        said = [vocabulary[word] for word in answer.split()]
        row[: len(asked) + len(said)] = torch.tensor(asked + said)
        own[len(asked) : len(asked) + len(said)] = torch.tensor(said)
    return tokens, labels
