"""What happens where a loss or gradient is not finite (--on_nan), in the order in which it happens.

1. The update moves no weight: `Step` leaves it out on the device, and with fp16 torch's loss scaling halves the scale.
2. At the next log point `Run` reads the losses and norms, of which means leave out what is not finite, and `Strikes`
   judges them: one bad step is forgiven; after that --on_nan stops the run, skips, or has `Run` roll it back.
3. Before each save `check_weights` looks at the weights: an update after the last log point may have broken them.
4. A run that stops saves the weights without the bad updates, and ends with exit code 3 (util/run/exits.py).
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import nn

from util.dist import sum_over_ranks
from util.errors import NonFiniteLossError
from util.log import log

WINDOW = 1000  # optimizer steps within which a second strike counts
IN_A_ROW = 20  # optimizer steps without a good one among them, after which going on makes no sense
ROLL_BACKS = 3
LEAST_LOSS_SCALE = 1e-4  # 30 overflows below torch's first 65536: that no scale can help


def check_weights(model: nn.Module, epoch: int) -> None:
    """Raise NonFiniteLossError, on all ranks together, unless all weights and running statistics are finite."""
    tensors = [*model.parameters(), *model.buffers()]
    finite = torch.stack([tensor.detach().isfinite().all() for tensor in tensors]).all()
    if sum_over_ranks((~finite).float()).item() > 0:
        raise NonFiniteLossError(
            f"weights became non-finite in the last steps of epoch {epoch}, which is not saved. Resume from the last "
            "checkpoint with a lower --blr, a longer --warmup_epochs or --amp off"
        )


class Strikes:
    """Judges what is read at a log point; all ranks read the same, so all of them do the same.

    stop: one bad step is forgiven, two within 1000 raise NonFiniteLossError. rollback: they call `roll_back`, which
    returns False where there is nothing to go back to; three times at most. skip: each is forgiven. Whatever the
    policy, 20 bad steps in a row raise, and so does a `loss_scale` (1 without fp16) that falls and falls.
    """

    def __init__(
        self, policy: str, accum_iter: int, roll_back: Callable[[], bool], loss_scale: Callable[[], float]
    ) -> None:
        self.policy, self.accum_iter, self.roll_back, self.loss_scale = policy, accum_iter, roll_back, loss_scale
        self.steps = self.in_a_row = self.rolled_back = 0
        self.last_strike, self.last_norm, self.last_scale = -math.inf, math.nan, 0.0
        self.open: list[tuple[int, dict[str, float], float]] = []  # passes of a step that a log point cuts in two

    def judge(self, header: str, passes: list[tuple[int, dict[str, float], float]]) -> None:
        """`passes`: (iteration, values with `lr` and `loss`, norm of the gradient or 0 where none was measured)."""
        self._judge_scale(header, passes)
        passes, self.open = self.open + passes, []
        for _, group in itertools.groupby(passes, lambda one: one[0] // self.accum_iter):
            group = list(group)
            if (group[-1][0] + 1) % self.accum_iter:
                self.open = group
                return
            if self._good(group):
                continue
            again = self.steps - self.last_strike <= WINDOW
            self.last_strike = self.steps
            what = self._describe(header, group, passes)
            if self.in_a_row < IN_A_ROW and (self.policy == "skip" or not again):
                log.warning(f"NOT FINITE: {what}; such a gradient moves no weight")
                continue
            if self.policy == "rollback" and self.rolled_back < ROLL_BACKS and self.roll_back():
                log.warning(f"NOT FINITE AGAIN: {what}; back to the last checkpoint, and on with the next batch")
                self.rolled_back, self.in_a_row, self.last_strike = self.rolled_back + 1, 0, -math.inf
                return  # what else was read belongs to the weights that are gone
            raise NonFiniteLossError(
                f"{what}, for the second time within {WINDOW} steps or the {IN_A_ROW}th in a row. Go on from a "
                "checkpoint before with a lower --blr, a longer --warmup_epochs, --amp off or another --on_nan"
            )

    def _judge_scale(self, header: str, passes: list[tuple[int, dict[str, float], float]]) -> None:
        """With fp16 an overflow is no strike; but where gradients are never finite, each halves the scale."""
        scale = self.loss_scale()
        before, self.last_scale = self.last_scale, scale
        if scale < min(before, LEAST_LOSS_SCALE):  # a run resumed below may have found a way up
            raise NonFiniteLossError(
                f"{header} the loss scale has fallen to {scale:.2g} (read at iterations {passes[0][0]} to "
                f"{passes[-1][0]}): gradients overflow float16 whatever it is. Go on from a checkpoint before with a "
                "lower --blr, a longer --warmup_epochs, or --amp bf16 or off"
            )

    def _good(self, group: list[tuple[int, dict[str, float], float]]) -> bool:
        self.steps += 1
        if all(math.isfinite(values["loss"]) and math.isfinite(norm) for _, values, norm in group):
            self.in_a_row, self.last_norm = 0, group[-1][2] or self.last_norm
            return True
        self.in_a_row += 1
        return False

    def _describe(self, header: str, group: list, passes: list) -> str:
        losses = [values["loss"] for _, values, _ in group]
        loss = next((loss for loss in losses if not math.isfinite(loss)), losses[-1])
        iteration, values, norm = group[-1]
        return (
            f"{header} loss {loss:.4g}, gradient norm {norm:.4g} at iteration {iteration} (read at iterations "
            f"{passes[0][0]} to {passes[-1][0]}; lr {values.get('lr', math.nan):.3g}, gradient norm before "
            f"{self.last_norm:.4g})"
        )
