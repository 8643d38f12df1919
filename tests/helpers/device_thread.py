"""A backward in a thread of its own, as autograd runs those of a CUDA device, whatever the device of the tensors.

Autograd hands what `torch._C._stash_obj_in_tls` keeps to such a thread, and nothing else of Python: context variables
have their defaults there, thread-locals are new, and counters of autograd nodes are the thread's own.
"""

from __future__ import annotations

import contextvars
import threading

import torch
from torch import Tensor
from torch.autograd import Variable


def backward(loss: Tensor) -> None:
    """`loss.backward()` by the engine's entry alone, which is what a device's thread runs. Raises what that raises."""
    context, errors = contextvars.copy_context(), []

    def run() -> None:
        torch._C._stash_obj_in_tls("context", context)
        try:
            Variable._execution_engine.run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )
        except Exception as error:
            errors.append(error)
        finally:
            if hasattr(torch._C, "_remove_obj_from_tls"):
                torch._C._remove_obj_from_tls("context")
            else:  # torch 2.12
                torch._C._stash_obj_in_tls("context", None)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
