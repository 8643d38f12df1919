"""Numbers in, numbers out: which residuals to hold how, within a byte budget. Imports neither torch nor FX.

memory  bytes alive at every step as a function of the choices      noise    one currency for gradient noise
greedy  a plan in milliseconds                                      timing   seconds of a kernel, by the roofline
solver  the best plan, with a bound on how much better one may be   device   what a machine sustains
"""

from xconv_fx.cost_model.memory import Item, Option, Problem, dominant_steps, peak, profile
from xconv_fx.cost_model.solver import Infeasible, Solution, minimum_peak, solve

__all__ = [
    "Infeasible",
    "Item",
    "Option",
    "Problem",
    "Solution",
    "dominant_steps",
    "minimum_peak",
    "peak",
    "profile",
    "solve",
]
