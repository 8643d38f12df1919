"""Compare the variants of one graph by their predicted plans: the batch at once, in slices, recomputed more or less.

Variants are traced, and their problems built, when they are first looked at. The problems are solved again with what
audits found, by other options, and for the least peak.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

from xconv_fx.errors import OptionError, XConvError
from xconv_fx.options import Options, Probes
from xconv_fx.passes.channels_last_3d import volume_convolutions
from xconv_fx.passes.slice_graph import own_gradient
from xconv_fx.plan.log import log
from xconv_fx.planner.microbatches import Batch, Microbatches
from xconv_fx.planner.problem import PlanningProblem, corrected
from xconv_fx.planner.solve import lowest as lowest_plan

from .candidates import (
    FULL_BATCH,
    NEGLIGIBLE,
    Candidate,
    Variant,
    allowed_seconds,
    best_candidates,
    compared_variant,
    select,
    slowdown,
)
from .capture import CaptureRequest, noted
from .feedback import NOTHING_FOUND, Feedback
from .pipeline import Analysed, Planned
from .refusals import Lowest, refusal

# Shares of the residuals' bytes that torch's partitioner is asked to save, besides all.
SAVED = (0.5, 0.25)
# Nodes of the largest joint graph of which torch's partitioner is asked for smaller cuts.
LARGEST_CUT = 2000


class Comparison:
    """The variants of one graph, within the budget and the limits of its options.

    `planning` are the planning problems of those that were compared; of a variant in slices it is that of one slice,
    and the variant that of which no slices are held.
    """

    def __init__(self, request: CaptureRequest) -> None:
        self.request = request
        self.planning: dict[Variant, PlanningProblem] = {}
        self._notes: dict[str, None] = {}
        self._solved: dict[tuple[Variant, int | None, tuple[tuple[str, int], ...]], list[Candidate]] = {}
        self._sliced: dict[int, Microbatches | None] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """Why there are no slices, as far as was seen until now."""
        return tuple(self._notes)

    @functools.cached_property
    def whole(self) -> PlanningProblem | None:
        """The problem of the batch at once, to which slowdowns refer; None for a graph without a backward."""
        return self.request.problem(FULL_BATCH)

    @property
    def seconds(self) -> float:
        """What a step takes with everything kept, the batch at once."""
        return 0.0 if self.whole is None else sum(self.whole.seconds.values())

    def candidate_of(self, variant: Variant, planned: Planned | None) -> Candidate:
        """What was planned, as a candidate."""
        assert planned is not None and self.whole is not None
        slower = slowdown(planned.planning, self.whole, variant.microbatches, planned.plan.time)
        return Candidate(variant, planned.plan.noise, slower)

    def extra_seconds(self, candidate: Candidate) -> float | None:
        """The predicted extra seconds of a candidate that is more than codecs, which is all that a plan knows of."""
        return None if candidate.variant == FULL_BATCH else candidate.slowdown * self.seconds

    def refusal(self, found: Lowest | None, smallest: int | None = None) -> XConvError:
        """Why there is no plan; by predictions the smallest budget is that of the plan of least peak, `found`."""
        options = self.request.options
        if smallest is None:
            smallest = 0 if found is None else options.smallest_for(found.predicted)
        notes = noted(self.request, self.notes).notes
        return refusal(options, smallest, found, self.candidates_by, self.lowest, notes)

    def candidates(self, feedback: Feedback = NOTHING_FOUND) -> list[Candidate]:
        """The candidates whose plans, as predicted with what audits found, fit the budget; best first."""
        options = self.request.options
        if self.whole is None:
            return [Candidate(FULL_BATCH, 0.0, 0.0)]
        found: list[Candidate] = []
        at_once = options.slices in (None, 1)
        if at_once:
            self.planning[FULL_BATCH] = self.whole
            found = self.candidates_of(FULL_BATCH, feedback)
        if not _settled(found):
            found = self._in_slices(found, feedback)
        if at_once and not _settled(found):
            others = [candidate for variant in self._at_once() for candidate in self.candidates_of(variant, feedback)]
            log.debug("other candidates at once: %s", others)
            found = found + others
        return select(found, options)

    def candidates_of(self, variant: Variant, feedback: Feedback) -> list[Candidate]:
        """The candidates of a variant whose problem was built, with what audits found of it."""
        budget = self.request.options.mem_budget
        corrections = feedback.corrections(variant)
        key = variant, None if budget is None else budget.bytes, tuple(sorted(corrections.items()))
        if key not in self._solved:
            assert self.whole is not None
            planning = corrected(self.planning[variant], corrections)
            self._solved[key] = best_candidates(planning, self.request.options, self.whole, variant)
        return self._solved[key]

    def candidates_by(self, options: Options) -> list[Candidate]:
        """The candidates of all variants whose problems were built, by other options, and without what audits found."""
        assert self.whole is not None
        return [
            candidate
            for variant, planning in self.planning.items()
            for candidate in best_candidates(planning, options, self.whole, variant)
        ]

    def _in_slices(self, found: list[Candidate], feedback: Feedback) -> list[Candidate]:
        """What was found, and candidates that run the batch in more and more slices, until they get no better."""
        prefer = self.request.options.prefer
        if self.request.options.slices == 1 or self.unsliceable():
            return found
        for microbatches in self.slices():
            if microbatches is None:
                break
            best = min((candidate.cost(prefer) for candidate in found), default=None)
            found = found + self.candidates_of(Variant(microbatches), feedback)
            log.debug("candidates up to %d slices: %s", microbatches.count, found)
            if best is not None and best <= min(candidate.cost(prefer) for candidate in found):
                break
        return found

    def unsliceable(self) -> bool:
        """Whether the batch cannot be run in slices; notes why. Raises `OptionError` where the user wants some."""
        graphs = "a replayed CUDA graph overwrites what the slice before it holds"
        cuda_graphs = self.request.options.inductor_config().get("triton.cudagraphs")
        mixing = (graphs if cuda_graphs else self._full_batch().mixing) or own_gradient(self.request.gm)
        if self.request.batch is None or mixing:
            self._cannot_slice(mixing)
            return True
        return False

    def asked_slices(self) -> Microbatches | None:
        """The slices that the options ask for; None where they ask for none, or the graph has no backward.

        Raises `OptionError` where the batch cannot be sliced so.
        """
        if self.request.options.slices in (None, 1) or self.whole is None or self.unsliceable():
            return None
        (microbatches,) = filter(None, self.slices())
        return microbatches

    def _full_batch(self) -> Analysed:
        found = self.request.analysed(FULL_BATCH)
        assert found is not None, "a graph without a backward is not compared"
        return found

    def slices(self) -> Iterator[Microbatches | None]:
        """Slicings whose problems are built when they are asked for; None, and no more, where the graph is not the same
        for a slice."""
        assert self.request.batch is not None
        for wanted in self._slicings(self.request.batch):
            if wanted.count not in self._sliced:
                self._sliced[wanted.count] = self._traceable(wanted)
            found = self._sliced[wanted.count]
            if found is not None and (planning := self.request.problem(Variant(found))) is not None:
                self.planning[Variant(found)] = planning
            yield found
            if found is None:
                return

    def _at_once(self) -> Iterator[Variant]:
        """The batch at once in other variants: sums of gradients in memory of their own, contiguous volumes, and
        convolutions recomputed by a smaller cut.

        Their problems are built. The cut takes torch longer than all else in a large graph.
        """
        options = self.request.options
        variants = [Variant(relayout=False)] if volume_convolutions(self.request.gm) else []
        if self._full_batch().has_sums:
            variants.append(Variant(store_gradients=True))
        small = self._full_batch().operations <= LARGEST_CUT
        if small and "recompute" in options.codecs and options.probes == Probes():
            variants += [Variant(saved=saved) for saved in SAVED]
        for variant in variants:
            planning = self.request.problem(variant)
            if planning is not None:
                self.planning[variant] = planning
                yield variant

    def _slicings(self, batch: Batch) -> list[Microbatches]:
        """What to compare: numbers of slices that cut the batch into equal parts, each at least 1.5 times the last."""
        counts, fixed = batch.counts(), self.request.options.slices
        if fixed is not None and fixed not in counts:
            some = f"write one of {', '.join(map(str, counts))}, which divide a batch of {batch.size}, 1, or None"
            raise OptionError("slices", fixed, some)
        chosen: list[int] = []
        for count in counts:
            if count == counts[-1] or not chosen or 2 * count >= 3 * chosen[-1]:
                chosen.append(count)
        whole = self._full_batch()
        return [
            Microbatches(batch, count, 0, whole.draws, whole.relaid, whole.copies, whole.changed)
            for count in (chosen if fixed is None else [fixed])
        ]

    def _traceable(self, microbatches: Microbatches) -> Microbatches | None:
        """The slicing as the graph can be traced for it; None, with a note, when the graph is not the same for a slice.

        Weights laid out channels-last make channels-last activations, of which a model's `view` may not be possible:
        then every slice lays them out for itself.
        """
        reason = ""
        for sliced in dict.fromkeys((microbatches, replace(microbatches, relaid=(), copies=0))):
            try:
                found = self.request.analysed(Variant(sliced))
            except XConvError:
                raise
            except Exception as error:  # The model wrote the batch's size into its graph: whatever it then fails at.
                reason = str(error).partition("\n")[0]
                continue
            if found is not None and not found.mixing:
                return sliced
            reason = "" if found is None else found.mixing
            break
        of = f"{microbatches.samples} sample{'s' * (microbatches.samples != 1)}"
        if any(found is not None for found in self._sliced.values()):
            self._notes[f"slices of {of} or less are not tried: it cannot be traced for them: {reason}"] = None
        else:
            self._cannot_slice(f"it cannot be traced for {of}: {reason}")
        return None

    def _cannot_slice(self, reason: str) -> None:
        if self.request.options.slices is not None:
            raise OptionError("slices", self.request.options.slices, f"the batch cannot be sliced: {reason}")
        self._notes[f"the batch is not run in slices: {reason}"] = None

    def allowed(self, variant: Variant) -> float | None:
        """What `Bounds` says of the variant's choices."""
        limit = self.request.options.max_slowdown
        if limit is None or self.whole is None:
            return None
        planning = self.whole if variant == FULL_BATCH else self.planning[compared_variant(variant)]
        return allowed_seconds(planning, self.whole, variant.microbatches, limit)

    def lowest(self, options: Options, feedback: Feedback = NOTHING_FOUND) -> Lowest | None:
        """The plan of least predicted peak within the limits of `options`, over all variants; None where none is within
        `max_slowdown`."""
        assert self.whole is not None
        if options.slices in (None, 1):
            self.planning[FULL_BATCH] = self.whole
            list(self._at_once())
        if options.slices != 1 and not self.unsliceable():
            list(self.slices())
        plans = []
        for variant, planning in self.planning.items():
            seconds = self.allowed(variant)
            if seconds is None or seconds >= 0:
                planning = corrected(planning, feedback.corrections(variant))
                plans.append(Lowest(variant, planning, lowest_plan(planning, options, variant.microbatches, seconds)))
        return min(plans, key=lambda plan: plan.predicted, default=None)


def _settled(candidates: list[Candidate]) -> bool:
    """Whether there is an exact candidate that is so fast that no other is looked for."""
    return any(candidate.noise == 0 and candidate.slowdown <= NEGLIGIBLE for candidate in candidates)
