"""The cost of an EK-FAC on many ranks, by the formulas of docs/scale.md: measured here, and predicted for GPUs.

`ranks_table` shows what `make bench-ranks` measured, `scale_table` what the formulas give where every assumption is one
of the constants below.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.figures.tables import results_of
from fastif.ranks import divide

N, QUERIES, TOKENS = 10_000_000, 1000, 512  # examples, queries, tokens of each
FLOPS = 2e14  # a GPU's operations per second on products and passes: a fifth of an H200's dense bf16 peak of 989e12
EIGEN_FLOPS = 1e12  # on float64 eigenvectors and on singular vectors, which are bound by memory and latency
INSIDE, BETWEEN = 4.5e11, 5e10  # bytes per second each way: NVLink among the 8 of a node, 400 Gbit/s per GPU between
NODE, MEMORY = 8, 141e9  # GPUs of a node, bytes of each
LOW_RANK = 16  # of queries: whole, each is as large as the model


class Network(NamedTuple):
    """A transformer whose linear layers are covered."""

    name: str
    depth: int
    width: int
    inner: int  # of the gated feed-forward
    keys: int  # width of keys, and of values

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(o, d) of each."""
        h, f, k = self.width, self.inner, self.keys
        return [(h, h), (k, h), (k, h), (h, h), (f, h), (f, h), (h, f)] * self.depth


NETWORKS = (Network("1B", 16, 2048, 8192, 512), Network("8B", 32, 4096, 14336, 1024))
WORLDS = (1, 8, 64)


class Predicted(NamedTuple):
    passes: float  # seconds
    eigenvectors: float
    exchanges: float
    during: float  # bytes of the curvature on every rank while it is fitted
    held: float  # and after it, on the rank that owns most
    train: float  # seconds of scores, the training side
    queries: float  # seconds of scores: gradients of a rank's share of the queries, and solves for its layers
    sent: float  # seconds in which gradients travel to owners, and what they solved to all
    gather: float

    @property
    def fit(self) -> float:
        return self.passes + self.eigenvectors + self.exchanges

    @property
    def scores(self) -> float:
        return self.train + self.queries + self.sent + self.gather


def predict(network: Network, world: int) -> Predicted:
    layers = network.layers
    covered = sum(o * d for o, d in layers)
    moments = sum(o * o + d * d for o, d in layers)
    first = TOKENS * (6 * covered + 2 * moments)  # forward and backward, and second moments
    second = TOKENS * (6 * covered + 2 * moments + 2 * covered)  # turned into the bases, and squared
    share, speed = (world - 1) / world, INSIDE if world <= NODE else BETWEEN
    owners = divide({place: 10.0 * (o**3 + d**3) for place, (o, d) in enumerate(layers)}, world)
    owned = [[layers[place] for place, owner in owners.items() if owner == rank] for rank in range(world)]
    # A query into the bases and back, and its singular vectors: 6 m n² + 20 n³ of n × m (Golub & Van Loan, 8.6).
    solves = [sum(4 * 2 * o * d * (o + d) for o, d in own) / FLOPS for own in owned]
    singular = [sum(6 * o * d * min(o, d) + 20 * min(o, d) ** 3 for o, d in own) / EIGEN_FLOPS for own in owned]
    factors = sum(o + d for o, d in layers)
    pairs = QUERIES * 2 * LOW_RANK * TOKENS * factors
    return Predicted(
        passes=N / world * (first + second) / FLOPS,
        eigenvectors=max(sum(10.0 * (o**3 + d**3) for o, d in own) for own in owned) / EIGEN_FLOPS,
        exchanges=share
        * 4
        * (2 * moments + covered)
        / speed,  # moments to owners, bases from them, eigenvalues to them
        during=4 * (moments + covered),
        held=max(sum(4 * (o * o + d * d + o * d) for o, d in own) for own in owned),
        train=N / world * (6 * TOKENS * covered + pairs) / FLOPS,
        queries=QUERIES * (6 * TOKENS * covered / world / FLOPS + max(map(sum, zip(solves, singular, strict=True)))),
        sent=share * QUERIES * 4 * (covered / world + LOW_RANK * factors) / speed,
        gather=share * QUERIES * N * 4 / speed,
    )


def scale_table(_name: str) -> str:
    heads = ["parameters covered", "GPUs", "fit: passes", "eigenvectors", "exchanges", "efficiency"]
    heads += ["scores: training side", "queries", "queries sent", "gather", "efficiency"]
    heads += ["curvature on each during the fit", "after it"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for network in NETWORKS:
        alone = predict(network, 1)
        for world in WORLDS:
            one = predict(network, world)
            fits = ["" if held < MEMORY / 2 else ", does not fit beside the model" for held in (one.during, one.held)]
            fit, scores = alone.fit / (world * one.fit), alone.scores / (world * one.scores)
            lines.append(
                f"| {network.name}, {sum(o * d for o, d in network.layers) / 1e9:.2f}e9 | {world} "
                f"| {one.passes / 3600:.1f} h | {one.eigenvectors:.0f} s | {one.exchanges:.1f} s | {fit:.1%} "
                f"| {one.train / 3600:.1f} h | {one.queries / 3600:.2f} h | {one.sent:.1f} s | {one.gather:.1f} s "
                f"| {scores:.1%} | {one.during / 1e9:.0f} GB{fits[0]} | {one.held / 1e9:.1f} GB{fits[1]} |"
            )
    return "\n".join(lines)


def ranks_table(name: str) -> str:
    results = results_of(name)
    heads = ["network, training examples × queries", "ranks", "fit: CPU seconds of all", "scores: CPU seconds of all"]
    heads += ["fit: MiB sent", "planned", "scores: MiB sent", "planned"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in results["ranks"]:
        same = [row["model"], row.get("replicate", False)]
        alone = next(
            one for one in results["ranks"] if [one["model"], one.get("replicate", False)] == same and one["world"] == 1
        )
        copies = " (replicate=True)" if same[1] else ""
        cells = [f"{row['model']}{copies}, {row['n']:,} × {row['q']:,}", str(row["world"])]
        for stage in ("fit", "scores"):
            seconds = row[stage]["cpu_seconds"]
            cells.append(f"{seconds:.2f} ({seconds / alone[stage]['cpu_seconds']:.2f}×)")
        for stage in ("fit", "scores"):
            cells += [f"{row[stage][key] / 2**20:.2f}" for key in ("sent", "sent_planned")]
        lines.append(f"| {' | '.join(cells)} |")
    facts = results["environment"]
    runs = f"the median of {facts['repeats']} runs" if facts["repeats"] > 1 else "one run"
    lines += [
        "",
        "EK-FAC with the empirical Fisher, float32; CPU seconds summed over the ranks, in brackets as a multiple of "
        f"one rank's, {runs} on two cores; bytes of the rank that sends most. "
        f"{facts['device']}, torch {facts['versions']['torch']}. Made by `make bench-ranks`.",
    ]
    return "\n".join(lines)
