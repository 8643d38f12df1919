"""torch's walks through nested lists, tuples and dicts, which all of it uses and none of its documents names.

Private parts of PyTorch: `torch.utils._pytree`, the same from torch 2.12 to 2.15.
"""

from __future__ import annotations

from torch.utils._pytree import tree_iter as tree_iter
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map_only as tree_map_only
