"""What must hold for a case, and what is found instead.

* Plain autograd: results, every gradient, buffers, inputs and the generator's state after each step. A compiled float32
  step may be as far from a float64 one as eager PyTorch is, times `SLACK`; where codecs add noise, the result is exact
  and the gradient unbiased over draws.
* Draws: Inductor is told to draw as ATen does (`fallback_random`), so that a net that draws is compared number by
  number. A step in slices draws in another order; there the loss is differentiated numerically with the same draws.
* The measured peak of a step, the loss included, is within the budget; or a warning of ours said that it is not, which
  is counted ("over budget, said").
* A refusal names a smallest budget above the one it refuses, which then compiles, and so does a larger one.
* No other error, unless plain Inductor has it as well.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import math
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xconv_fx.errors import BudgetInfeasibleError, OptionError, XConvError
from xconv_fx.measure import physical_peak

from .cases import Case
from .interpreted import interpreted
from .options import biased, noisy
from .programs import Program
from .writer import Misfit

# How much further from float64 than eager float32 a compiled step may be, and what is no error at all.
SLACK, ROUNDING = 20.0, {"float32": 3e-5, "float64": 1e-9, "bfloat16": 0.05, "autocast": 0.05}
# How many draws the mean of noisy gradients is of, and how far above its expectation its square may be.
DRAWS, UNLIKELY = 24, 6.0
# A numerical derivative's relative distance; draws that are made again miss by 10% and more.
NUMERICAL = 0.03
# Tensors of a smaller norm are rounding errors themselves, such as the mean of what a normalisation made.
TINY = {"float32": 1e-3, "float64": 1e-3, "bfloat16": 0.02, "autocast": 0.02}
RATE = 0.01
# What no plan can help: plain Inductor trains on without it, and without a word.
LOST = "Dynamo loses what the model changes in place"
# Steps before the measured one.
SETTLED = 4
# Of so many refused cases one is tried with more than the budget that was named.
LARGER = 3


@dataclass
class Verdict:
    """What became of a case: `kind` is "ok", or what is wrong, `detail` says where; `seen` what the case covered."""

    kind: str = "ok"
    detail: str = ""
    seen: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        return self.kind not in ("ok", "refused", "inductor's", "misfit", "torch's")


class Failed(Exception):
    """The case ends with this kind of finding."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


@dataclass
class Step:
    """What one step left: tensors by name, and the generator's state."""

    results: dict[str, Tensor]
    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]
    inputs: dict[str, Tensor]
    flags: list[tuple[str, bool, str]]
    state: Tensor


def check(case: Case, stage: Callable[[str], None] = lambda name: None, interpret: bool = False) -> Verdict:
    """Run a case, compiled or interpreted. `stage` is told what runs now: what a crash of the process is blamed on."""
    verdict = Verdict(seen=["interpreted" if interpret else "compiled"])
    stage("torch's")
    try:
        program = Program(case)
        with interpreted() if interpret else contextlib.nullcontext():
            Check(program, verdict, stage, interpret).run()
    except Misfit:
        return Verdict("misfit")
    except Failed as failed:
        verdict.kind, verdict.detail = failed.kind, failed.detail
    return verdict


class Check:
    """One case's eager reference, its compiled model, and the comparisons."""

    def __init__(self, program: Program, verdict: Verdict, stage: Callable[[str], None], interpret: bool) -> None:
        self.interpret = interpret
        self.case, self.text, self.verdict, self.stage = program.case, program.text, verdict, stage
        self.names = program.namespace()
        self.draws = False
        self.plans: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.report: Path | None = None
        self.sliced = self.apart = False

    # The steps.

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.names["Model"]()

    def forward(self, call: Callable[..., Any], given: list[Tensor]) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.case.precision == "autocast"):
            return call(*given)

    def backward(self, call: Callable[..., Any], given: list[list[Tensor]], number: int) -> list[Any]:
        results = [self.forward(call, tensors) for tensors in given]
        sum(self.names["loss"](result, number) for result in results).backward()
        return results

    def inputs(self, number: int, wide: bool = False, **batch: int) -> list[list[Tensor]]:
        found = [self.names["inputs"](10 * number + turn, **batch) for turn in range(self.case.calls)]
        return [[_leaf(t.detach().double() if wide else t, t) for t in tensors] for tensors in found]

    def step(self, call: Callable[..., Any], net: nn.Module, number: int, wide: bool = False, **batch: int) -> Step:
        given = self.inputs(number, wide, **batch)
        net.zero_grad()
        torch.manual_seed(number)
        results = self.backward(call, given, number)
        leaves = {f"result{turn}.{n}": t for turn, r in enumerate(results) for n, t in _tensors(r)}
        inputs = {f"input{turn}.{n}": t for turn, tensors in enumerate(given) for n, t in enumerate(tensors)}
        grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        grads |= {f"{name}.grad": t.grad for name, t in inputs.items() if t.grad is not None}
        return Step(
            results={name: t.detach().clone() for name, t in leaves.items()},
            grads=grads,
            buffers={name: b.detach().clone() for name, b in net.named_buffers()},
            inputs={name: t.detach().clone() for name, t in inputs.items()},
            flags=[(name, t.requires_grad, str(t.dtype)) for name, t in leaves.items()],
            state=torch.get_rng_state(),
        )

    def steps(self, call: Callable[..., Any], net: nn.Module, wide: bool = False) -> list[Step]:
        """Every step of the case, each after an update by the gradients of the one before."""
        made = []
        for number in range(self.case.steps):
            made.append(self.step(call, net, number, wide))
            self.note_slices()
            with torch.no_grad():
                for p in net.parameters():
                    if p.grad is not None:
                        p -= RATE * p.grad / p.grad.norm().clamp_min(1.0)
            self.between(call, net, number, wide)
        return made

    def note_slices(self) -> None:
        """A plan of another batch size takes the place of the one that this step ran by."""
        self.sliced |= any(plan["slices"] > 1 for plan in self.reported())

    def reported(self) -> list[dict[str, Any]]:
        """The plans so far."""
        known = self.report is not None and self.report.exists()
        return json.loads(self.report.read_text() or "[]") if known else []

    def between(self, call: Callable[..., Any], net: nn.Module, number: int, wide: bool) -> None:
        if self.case.between == "eval" and number == 0:
            net.eval()
            with torch.no_grad():
                self.forward(call, self.inputs(50, wide)[0])
            net.train()
        if self.case.between == "batch" and number == 0 and self.case.batch > 1:
            self.step(call, net, 60, wide, B=max(1, self.case.batch // 2))

    # The comparison.

    def run(self) -> None:
        try:
            wanted, exact = self.reference()
        except (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError) as error:
            raise Misfit from error
        self.stage("crash")
        net, call, found = self.trained(self.case.options)
        if found is None:
            return
        self.cover()
        self.budget_kept(call, net)
        try:
            self.compare(wanted, exact, found)
        except Failed as failed:
            self.shared_with_inductor(failed, wanted, exact)
            raise
        self.differentiate(call, net)

    def shared_with_inductor(self, failed: Failed, wanted: list[Step], exact: list[Step]) -> None:
        """Raise when plain Inductor computes the wrong numbers as well."""
        if "noise" in self.verdict.seen:
            return
        found = self.inductors()
        try:
            self.compare(wanted, exact, found)
        except Failed:
            raise Failed("inductor's", failed.detail) from failed

    def trained(self, options: dict[str, Any]) -> tuple[nn.Module, Callable[..., Any], list[Step] | None]:
        """A compiled model after its steps, which are None where it is refused for good.

        A budget that is refused is replaced by the smallest feasible one that the error names: that one must compile.
        """
        net = self.model()
        call = self.compiled(net, options)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                return net, call, self.steps(call, net)
            except XConvError as error:
                refusal = error
            except Exception as error:
                self.crashed(error)
            finally:
                self.warnings = [str(w.message) for w in seen]
                self.plans = self.reported()
        smallest = self.refused(refusal)
        if smallest is None:
            return net, call, None
        if len(self.text) % LARGER == 0:
            self.verdict.seen.append("larger than named")
            smallest += smallest // 12
        return self.trained({**options, "mem_budget": smallest})

    def reference(self) -> tuple[list[Step], list[Step]]:
        """The steps by plain autograd, and in float64 (the same where draws would differ)."""
        net = self.model()
        wanted = self.steps(net, net)
        if not any(g.abs().max() > 0 for g in wanted[0].grads.values()):
            raise Misfit
        tensors = (t for step in wanted for group in (step.grads, step.results) for t in group.values())
        if not all(torch.isfinite(t.float()).all() and t.float().abs().max() < 1e6 for t in tensors if t.numel()):
            raise Misfit
        torch.manual_seed(self.case.steps - 1)
        self.draws = not torch.equal(torch.get_rng_state(), wanted[-1].state)
        if self.draws or self.case.precision != "float32":
            return wanted, wanted
        wide = self.model().double()
        try:
            return wanted, self.steps(wide, wide, wide=True)
        except RuntimeError:
            return wanted, wanted

    def compiled(self, net: nn.Module, options: dict[str, Any]) -> Callable[..., Any]:
        torch._dynamo.reset()
        self.report = Path(tempfile.mkdtemp()) / "plans.json"
        chosen = {**options, "report": str(self.report), "inductor": {"fallback_random": True}}
        if self.interpret:
            chosen["verify"] = "off"  # Peaks are not what a user gets.
        if self.case.calls > 1:
            chosen["calls"] = self.case.calls
        return torch.compile(net, backend="xconv", options=chosen)

    def refused(self, error: XConvError) -> int | None:
        """The smallest feasible budget that a refusal names, or None where it is right to refuse for good."""
        again = "refused" in self.verdict.seen
        self.apart |= "planned one after another" in str(error)
        self.verdict.seen.append("refused")
        if isinstance(error, BudgetInfeasibleError):
            if error.smallest <= error.budget:
                raise Failed("refusal", f"{error.budget} is refused, {error.smallest} is said to be feasible")
            if again and not self.plans:
                raise Failed("named budget", f"{error.budget} was named as feasible, now {error.smallest} is")
            limits = ("max_noise", "max_layer_noise", "max_slowdown")
            if not again and not any(self.case.options.get(limit) for limit in limits):
                return error.smallest
        elif again and self.case.between != "batch" and not self.apart:
            # Fewer samples may not be cut into as many slices, nor a graph that was not known yet.
            raise Failed("named budget", f"a smallest feasible budget was named, and then: {error}")
        elif not isinstance(error, OptionError) and LOST not in str(error):
            raise Failed("unexpected refusal", f"{type(error).__name__}: {error}")
        self.verdict.kind, self.verdict.detail = "refused", str(error).partition("\n")[0]
        return None

    def crashed(self, error: Exception) -> None:
        """Whether plain Inductor fails as well, or plain Inductor told not to hold gradients' draws."""
        text = f"{type(error).__name__}: {str(error)[:600]}"
        try:
            self.inductors()
        except Exception as other:
            raise Failed("inductor's", f"{type(other).__name__}: {str(other)[:300]}") from error
        raise Failed("crash", text) from error

    def inductors(self) -> list[Step]:
        """The steps as plain Inductor computes them."""
        self.stage("inductor's")
        torch._dynamo.reset()
        net = self.model()
        return self.steps(torch.compile(net, options={"fallback_random": True}), net)

    def cover(self) -> None:
        """What this case was."""
        case, seen = self.case, self.verdict.seen
        seen += [f"{case.dims}D", case.precision, case.loss]
        seen += ["sliced"] * self.sliced
        seen += ["several graphs"] * (len(self.plans) > 1) + ["no plan"] * (not self.plans)
        seen += ["draws"] * self.draws + ["called twice"] * (case.calls > 1) + ["several inputs"] * bool(case.second)
        seen += ["noise"] * any(plan["noise"] > 0 for plan in self.plans)
        seen += ["recomputed by the partitioner"] * any(plan["saved_share"] < 1 for plan in self.plans)
        seen += ["preset"] * any(case.options.get("codecs", "").startswith(p) for p in ("actnn", "xconv"))
        seen += [f"between: {case.between}"] * bool(case.between) + ["frozen"] * bool(case.frozen)
        seen += ["channels last"] * case.channels_last + ["input gradient"] * case.input_grad
        seen += ["mutated"] * (case.mutates or any(w in self.text for w in (".add_(", ".mul_(", "momentum")))
        codecs = {choice["codec"] for plan in self.plans for choice in plan["choices"]}
        seen += [f"codec {name}" for name in sorted(codecs)]
        seen += ["warned"] * any("xconv" in text for text in self.warnings)
        seen += ["budget"] * ("mem_budget" in case.options)

    def budget_kept(self, call: Callable[..., Any], net: nn.Module) -> None:
        """The measured peak is within the budget, and there is one."""
        if "mem_budget" not in self.case.options:
            return
        warned = any(text.startswith("xconv:") for text in self.warnings)
        budgets = [plan["budget"] for plan in self.plans if plan["budget"]]
        if not budgets:
            if not warned:
                raise Failed("budget lost", "no plan has a budget, and nothing warned")
            return
        if self.interpret:
            return
        given, number = self.inputs(70), 70
        for _ in range(SETTLED):  # Whatever the first-step check plans again is compiled.
            self.backward(call, self.inputs(number), number)
            net.zero_grad()
        gc.collect()
        tensors = [*(t for ts in given for t in ts), *net.parameters(), *net.buffers()]
        measured = physical_peak(lambda: self.backward(call, given, number), resident=tensors, device="cpu").bytes
        reserve = self.case.options.get("reserve", 0)
        allowed = max(budgets) - reserve
        if measured > allowed and warned:
            self.verdict.seen.append("over budget, said")
        elif measured > allowed:
            over = measured / allowed
            raise Failed(
                "over budget", f"{measured} measured of {allowed}: {over:.4f}, slices {self.plans[0]['slices']}"
            )

    def compare(self, wanted: list[Step], exact: list[Step], found: list[Step]) -> None:
        # Codecs draw their seeds from the same generator, unless they have one of their own.
        mixed = "noise" in self.verdict.seen and "seed" not in self.case.options
        ordered = not self.draws or not (mixed or "sliced" in self.verdict.seen)
        for number, (want, true, got) in enumerate(zip(wanted, exact, found, strict=True)):
            if want.flags != got.flags:
                raise Failed("results differ", f"step {number}: {want.flags} became {got.flags}")
            if want.grads.keys() != got.grads.keys():
                raise Failed("gradients differ", f"step {number}: {set(want.grads) ^ set(got.grads)} missing or added")
            if not ordered:
                continue
            if "noise" in self.verdict.seen or (noisy(self.case.options) and "fixed" in str(self.plans)):
                if number == 0:
                    self.group("result", want.results, true.results, got.results, number)
                    self.group("buffer", want.buffers, true.buffers, got.buffers, number)
                    self.group("input", want.inputs, true.inputs, got.inputs, number)
                continue
            for name in ("results", "buffers", "inputs", "grads"):
                self.group(name[:-1], getattr(want, name), getattr(true, name), getattr(got, name), number)
            if not torch.equal(want.state, got.state) and "noise" not in self.verdict.seen:
                raise Failed("random state", f"step {number}: the generator is elsewhere than after plain autograd")

    def group(
        self, what: str, want: dict[str, Tensor], true: dict[str, Tensor], got: dict[str, Tensor], step: int
    ) -> None:
        """Every tensor of one kind. Gradients are compared relative to the largest of all, in part: some are zero."""
        floor = max((t.double().norm().item() for t in true.values()), default=0.0) * 1e-3 if what == "grad" else 0.0
        for name, w in want.items():
            t, g = true[name].double(), got[name].double()
            if t.shape != g.shape or not torch.isfinite(g).all():
                raise Failed(
                    f"{what} wrong", f"step {step}, {name}: shape {tuple(g.shape)} of {tuple(t.shape)}, or not finite"
                )
            scale = max(t.norm().item(), floor, TINY[self.case.precision])
            own, off = ((w.double() - t).norm().item() / scale, (g - t).norm().item() / scale)
            if not want[name].is_floating_point():
                if (t != g).double().mean() > 0.02:
                    raise Failed(f"{what} wrong", f"step {step}, {name}: {off:.1e} off")
                continue
            allowed = SLACK * own + ROUNDING[self.case.precision] * 4 ** min(step, 2)
            if off > allowed:
                raise Failed(
                    f"{what} wrong", f"step {step}, {name}: {off:.1e} off, eager {own:.1e}, allowed {allowed:.1e}"
                )

    def differentiate(self, call: Callable[..., Any], net: nn.Module) -> None:
        """What no comparison with plain autograd shows: draws under slices, and whether noise is unbiased."""
        exact = "noise" not in self.verdict.seen
        if self.draws and exact and "sliced" in self.verdict.seen:
            return self.numerical(call, net)
        if not exact and not biased(self.case.options) and self.case.precision in ("float32", "float64"):
            return self.unbiased(call, net)
        return None

    def numerical(self, call: Callable[..., Any], net: nn.Module) -> None:
        """The derivative along the gradient, by differences of the loss with the same draws."""
        parameters = [p for p in net.parameters() if p.requires_grad]

        def loss(move: float, direction: list[Tensor]) -> float:
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p += move * d
            torch.manual_seed(5)
            start = copy.deepcopy(dict(net.named_buffers()))
            value = sum(self.names["loss"](self.forward(call, given), 80) for given in self.inputs(80)).item()
            with torch.no_grad():
                for name, b in net.named_buffers():
                    b.copy_(start[name])
                for p, d in zip(parameters, direction, strict=True):
                    p -= move * d
            return value

        start = copy.deepcopy(dict(net.named_buffers()))
        net.zero_grad()
        torch.manual_seed(5)
        self.backward(call, self.inputs(80), 80)
        with torch.no_grad():
            for name, b in net.named_buffers():
                b.copy_(start[name])
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))
        if norm < 1e-3:
            return
        direction = [g / norm for g in grads]
        slopes = [(loss(h, direction) - loss(-h, direction)) / (2 * h) for h in (1e-2, 3e-3)]
        if abs(slopes[0] - slopes[1]) > 0.01 * norm:
            return  # Too rough for differences.
        self.verdict.seen.append("differentiated numerically")
        if abs(slopes[1] / norm - 1) > NUMERICAL:
            raise Failed(
                "grad wrong", f"differences of the loss with the same draws: {slopes[1]:.4g}, gradient {norm:.4g}"
            )

    def unbiased(self, call: Callable[..., Any], net: nn.Module) -> None:
        """The mean of many draws comes near the exact gradient, as their own spread says."""
        other = self.model()
        other.load_state_dict(net.state_dict())

        def gradient(call: Callable[..., Any], of: nn.Module, draw: int) -> Tensor:
            start = copy.deepcopy(dict(of.named_buffers()))
            of.zero_grad()
            given = self.inputs(90)
            torch.manual_seed(7)
            results = [self.forward(call, tensors) for tensors in given]
            sum(self.names["loss"](result, 90) for result in results).backward()
            with torch.no_grad():
                for name, b in of.named_buffers():
                    b.copy_(start[name])
            found = [p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in of.parameters()]
            return torch.cat(found).double()

        if self.draws or "seed" not in self.case.options:
            return  # With the same seed the codecs draw the same.
        wanted = gradient(other, other, 0)
        drawn = torch.stack([gradient(call, net, draw) for draw in range(DRAWS)])
        self.verdict.seen.append("unbiased tried")
        spread = (drawn - wanted).square().sum(1).mean().item()
        bias = (drawn.mean(0) - wanted).square().sum().item()
        energy = wanted.square().sum().item()
        if bias > UNLIKELY * spread / DRAWS + 1e-7 * energy:
            raise Failed(
                "biased", f"mean of {DRAWS} draws: {bias / energy:.2e} off, of a spread of {spread / energy:.2e}"
            )
        predicted = sum(plan["noise"] for plan in self.plans)
        if spread / energy > 100 * predicted + 1e-3:
            raise Failed("noise", f"variance {spread / energy:.2e}, predicted {predicted:.2e}")


def _leaf(value: Tensor, like: Tensor) -> Tensor:
    return value.requires_grad_(like.requires_grad) if value.is_floating_point() else value


def _tensors(result: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a result, named."""
    flat, _ = torch.utils._pytree.tree_flatten_with_path(result)
    return [(torch.utils._pytree.keystr(path), leaf) for path, leaf in flat if isinstance(leaf, Tensor)]
