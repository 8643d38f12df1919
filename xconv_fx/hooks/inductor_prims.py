"""Inductor's own operators: importing this defines them, as `prims`.

Private parts of PyTorch, read in torch 2.13: `torch/_inductor/inductor_prims.py`.
"""

from __future__ import annotations

import torch
import torch._inductor.inductor_prims

prims = torch.ops.prims
