"""What a loss outside of the compiled graph takes, which no trace of the graph tells.

`benchmarks/losses.py` measures it, in units of the model's result. L1 and squared errors, written out or not, and the
sum of Dice and cross entropy take up to five tensors of that size at once between forward and backward, the result
itself and the gradient that goes back to the model included; cross entropy takes three. One may live as long as the
loss: the memory of `mse_loss`'s scalar is that of the squares it is the mean of. Focal losses, divergences and
structural similarity take more (6 to 17), and a result that is kept in a variable one more for some; these are left to
the first-step check (`runtime/first_step.py`), as is whatever else a step does.

A graph whose results go on into further code of the model has no loss behind it: what is alive then is counted where
that code is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from xconv_fx.passes.graph import is_primal, nbytes, numel, tensor_of

# Tensors of the results' size that are alive at once between forward and backward, besides the results, and during the
# backward. Losses compute in 32 bits or more.
LOSS_COPIES = 4
KEPT = 1
LOSS_ITEMSIZE = 4


@dataclass(frozen=True)
class Ends:
    """What is alive at the ends of a graph, in bytes.

    `results` of the forward as a caller holds them, and their gradients, the `tangents`; `between` forward and backward
    a loss takes so much, gradients included, of which so much is `kept` during the backward.
    """

    results: int
    tangents: int
    between: int
    kept: int

    @staticmethod
    def of(results: Iterable[fx.Node], tangents: Iterable[fx.Node], goes_on: bool) -> Ends:
        """Of these results and tangents of a graph. `goes_on` says that no loss follows."""
        own = [node for node in dict.fromkeys(results) if not is_primal(node)]
        size = nbytes if goes_on else bytes_in_loss
        returned, arriving = sum(map(size, own)), sum(map(size, tangents))
        return Ends(returned, arriving, arriving * (1 if goes_on else LOSS_COPIES), 0 if goes_on else KEPT * returned)

    def times(self, count: int) -> Ends:
        """So many of them at once."""
        return Ends(count * self.results, count * self.tangents, count * self.between, count * self.kept)


def bytes_in_loss(node: fx.Node) -> int:
    """What a result, or its gradient, takes outside of the graph: a caller makes a float32 copy of 16-bit results."""
    value = tensor_of(node)
    widened = value is not None and value.is_floating_point() and value.dtype.itemsize < LOSS_ITEMSIZE
    return LOSS_ITEMSIZE * numel(node) if widened else nbytes(node)
