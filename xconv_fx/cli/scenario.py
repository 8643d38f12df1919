"""The flags that say what a plan is made for: device, GPU, precision, layout and optimiser."""

from __future__ import annotations

import argparse
from typing import Any

from xconv_fx.errors import OptionError, UsageError

FLAGS = {
    "device": "--device",
    "gpu": "--gpu",
    "amp": "--amp",
    "channels_last": "--channels-last",
    "optimizer": "--optimizer",
}


def add_scenario(command: argparse.ArgumentParser) -> None:
    """Declare the flags. What they may say is checked by `scenario`: the lists of names import torch."""
    add = command.add_argument_group("what is planned for; none of it has to be there").add_argument
    add("--device", metavar="NAME", help="cpu or cuda (default: where the model is built)")
    add("--gpu", metavar="NAME", help="h100, a100, l4, t4, rtx4090, ...: times and memory by its data sheet")
    add("--amp", metavar="DTYPE", help="bf16 or fp16: train under torch.autocast")
    add("--channels-last", action="store_true", help="model and inputs are laid out channels-last")
    add("--optimizer", metavar="NAME", help="sgd, momentum, adam or adamw: count its state as well")


def scenario(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `explain` that `add_scenario` declared, as far as they are given. Raises `UsageError`.

    A command may have declared some of the flags itself.
    """
    given: dict[str, Any] = {name: getattr(arguments, name, None) for name in FLAGS}
    given = {name: value for name, value in given.items() if value not in (None, False)}
    if not given:
        return given
    from xconv_fx.device.scenario import Scenario

    try:
        Scenario.parse(**given)
    except OptionError as error:
        raise UsageError(f"{FLAGS[error.option]} {error.value!r} cannot be planned for", error.hint) from error
    return given
