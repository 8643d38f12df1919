"""Numbers in, numbers out: which residuals to hold how, within a byte budget. Imports neither torch nor FX.

memory   bytes alive at every step, given the choices     noise    one currency for gradient noise
greedy   a plan in a fraction of a second                 timing   seconds of a kernel, by the roofline
program  the mixed-integer program, for HiGHS             device   what a machine sustains
solver   the best plan, and how much better one may be    gpus     what data sheets say of GPUs
allocator   blocks of torch's allocator for CUDA              limits   of noise and time, as rows of numbers
"""

from .limits import Limits
from .memory import Item, Option, Problem, dominant_steps, peak, profile
from .solver import Infeasible, OverLimits, Solution, minimum_peak, solve

__all__ = [
    "Infeasible",
    "Item",
    "Limits",
    "Option",
    "OverLimits",
    "Problem",
    "Solution",
    "dominant_steps",
    "minimum_peak",
    "peak",
    "profile",
    "solve",
]
