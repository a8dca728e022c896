"""One step that takes from the network what it says of the removed examples, for networks that know all by heart.

Where every example is known by heart, the gradients of the losses are nearly zero and their curvature is, too: an
influence step foretells nothing and wrecks the network. What the network *says* still has a slope there. So this step
lowers the log-odds of the removed examples' labels, and moves what is said of the retained ones as little as it can, in
the square of their outputs; the head is refitted behind it. docs/math.md (34).
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from fastif.curvature import EKFAC, NotPositiveDefinite
from fastif.data.batches import batch_length
from fastif.model.calls import call
from fastif.model.losses import labels_in, labels_of, logits_of, measured
from fastif.progress import tqdm
from fastif.removal.network import Matrices
from fastif.removal.refit import WORTH, Refit, RefittedNetwork
from fastif.renamed import warn_outside


def squared_outputs(outputs: Any, batch: Any) -> Tensor:
    """½ ‖z‖² of every example, [n], whose curvature in the outputs is the identity."""
    squares = logits_of(outputs).square()
    return 0.5 * squares.reshape(len(labels_of(batch)), -1).sum(1)  # some models squeeze a batch of one


class LoweredNetwork(RefittedNetwork):
    """The step that lowers the removed examples' log-odds by `lower_odds` on average, to first order, and the head's
    steps behind it; arguments else as for `RefittedNetwork`."""

    def __init__(self, model: nn.Module, train: Any, removed: Tensor, *, lower_odds: float, **settings: Any):
        if settings.get("curvature") is None:
            settings["curvature"] = EKFAC(0.0, fisher="monte_carlo")
        super().__init__(model, train, removed, curved_by=squared_outputs, **settings)
        self._lower_odds = lower_odds

    def choose(self, steps: int, progress: bool) -> Refit:
        tried = self.refits(self.step_of_odds(), steps, lengths=(1.0,))
        try:
            for found in tqdm(tried, "remove", total=1, disable=not progress):
                self._warn_of_harm(found)
                return found
        except NotPositiveDefinite as error:
            why = str(error)
        else:
            why = "what it sees or says there is not finite"
        raise ValueError(
            f"remove: lower_odds={self._lower_odds:g} leads to a network behind which no head is found: {why}. A "
            "smaller one, more examples in subset= or a larger damping (or weight_decay) may do"
        )

    def _warn_of_harm(self, found: Refit) -> None:
        """Where the retained have lost half as much as the removed, or more, or are no better than guessed."""
        removed, retained = self._removed_loss / len(self.removed), self._retained_loss / len(self.kept)
        wrecked = found.retained >= math.log(self._head.out_features)
        if wrecked or found.removed - removed <= WORTH * (found.retained - retained):
            warn_outside(
                f"remove: lower_odds={self._lower_odds:g} takes the mean loss of the removed examples from "
                f"{removed:.2g} to {found.removed:.2g} and that of the retained from {retained:.2g} to "
                f"{found.retained:.2g}, behind the head: a smaller one, or more examples in subset=, may do less harm",
                UserWarning,
            )

    def step_of_odds(self) -> Matrices:
        """−s (G + γI)⁻¹ m, m the mean gradient of the removed examples' log-odds, and s so long that these fall by
        `lower_odds` along it."""
        odds, sums = self._sum_over(self.removed, self._log_odds)
        if not math.isfinite(odds):
            raise ValueError(
                "remove: lower_odds= needs finite log-odds of the removed examples' labels, and outputs of two classes "
                f"or more; theirs add up to {odds}"
            )
        mean = {p: g / len(self.removed) for p, g in sums.items()}
        step = self._newton_steps(mean)
        slope = -sum(float((self._matrices(mean)[name] * matrix.double()).sum()) for name, matrix in step.items())
        (slope, *_) = self._ranks.meet("the slope of the log-odds", slope)
        if not 0 < slope < math.inf:
            raise ValueError(
                f"remove: no step of these layers lowers the removed examples' log-odds: slope {slope:.3g}"
            )
        return {name: matrix * (self._lower_odds / slope) for name, matrix in step.items()}

    def _log_odds(self, x: Any, y: Any) -> Tensor:
        return measured("log_odds", self._loss, call(self.model, x), labels_in(x, y), batch_length(x))
