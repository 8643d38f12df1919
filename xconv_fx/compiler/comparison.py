"""Compare the ways to run one graph by their predicted plans: the batch at once, in slices, recomputed more or less.

Problems are posed when they are first looked at, from a trace alone, and kept: they are solved again with what audits
found, by other options, and for the least peak.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from xconv_fx.errors import OptionError, XConvError
from xconv_fx.options import Options, Probes
from xconv_fx.passes.channels_last_3d import volume_convolutions
from xconv_fx.passes.slice_graph import own_gradient
from xconv_fx.plan.log import log
from xconv_fx.planner.problem import Posed, corrected
from xconv_fx.planner.slicing import Batch, Slicing
from xconv_fx.planner.solve import lowest as lowest_plan

from .attempt import Compilation, Traced
from .candidates import AT_ONCE, NEGLIGIBLE, Route, Way, allowed_seconds, best_ways, select
from .pipeline import Job
from .refusals import Lowest

# Shares of the residuals' bytes that torch's partitioner is asked to save, besides all.
SAVED = (0.5, 0.25)
# Nodes of the largest joint graph of which torch's partitioner is asked for smaller cuts.
LARGEST_CUT = 2000


class Comparison:
    """The ways to run one graph, within the budget and the limits of its options."""

    def __init__(self, traced: Traced) -> None:
        self.traced = traced
        self.jobs: dict[Route, Job] = {}
        self.seconds = 0.0
        self.whole: Job | None = None
        # By routes of which no slices are held: what audits found, and the ways that were found with that.
        self.corrections: dict[Route, dict[str, int]] = {}
        self.compared: dict[Route, tuple[dict[str, int], list[Way]]] = {}
        self.sliced: dict[int, tuple[Slicing, Job] | None] = {}

    @property
    def posed(self) -> dict[Route, Posed]:
        """The planning problems that were compared, by their routes."""
        return {route: job.posed for route, job in self.jobs.items() if job.posed is not None}

    def pose(self, route: Route) -> Job | None:
        """The job of a route up to its planning problem; None for a graph without a backward."""
        return Compilation(self.traced, route).pose()

    def ways(self) -> list[Way]:
        """The ways whose predicted plans fit the budget, best first.

        Keeps the problems that it poses on the way (`posed`, of one slice with none held), and notes why there are no
        slices.
        """
        options = self.traced.options
        whole = self.whole = self.whole or self.pose(AT_ONCE)
        if whole is None or whole.posed is None:
            return [Way(AT_ONCE, 0.0, 0.0)]
        found = []
        self.seconds = sum(whole.posed.seconds.values())
        at_once = options.slices in (None, 1)
        if at_once:
            self.jobs[AT_ONCE] = whole
            found = self.ways_of(AT_ONCE)
        if not _settled(found):
            found = self._in_slices(whole, found)
        if at_once and not _settled(found):
            others = [way for route in self._at_once(whole) for way in self.ways_of(route)]
            log.debug("other ways at once: %s", others)
            found = found + others
        return select(found, options)

    def ways_of(self, route: Route, options: Options | None = None) -> list[Way]:
        """The ways of a posed route, with what audits found of it; with other options, without."""
        assert self.whole is not None and self.whole.posed is not None
        if options is not None:
            return best_ways(self.posed[route], options, self.whole.posed, route)
        corrections = self.corrections.get(route, {})
        known, ways = self.compared.get(route, (None, []))
        if known != corrections:
            posed = corrected(self.posed[route], corrections)
            ways = best_ways(posed, self.traced.options, self.whole.posed, route)
            self.compared[route] = dict(corrections), ways
        return ways

    def _in_slices(self, whole: Job, found: list[Way]) -> list[Way]:
        """What was found, and ways to run the batch in more and more slices, until they get no better."""
        prefer = self.traced.options.prefer
        if self.traced.options.slices == 1 or self.unsliceable(whole):
            return found
        for sliced in self.slices(whole):
            if sliced is None:
                break
            best = min((way.cost(prefer) for way in found), default=None)
            found = found + self.ways_of(Route(sliced[0]))
            log.debug("ways up to %d slices: %s", sliced[0].count, found)
            if best is not None and best <= min(way.cost(prefer) for way in found):
                break
        return found

    def unsliceable(self, whole: Job) -> bool:
        """Whether the batch cannot be run in slices; notes why. Raises `OptionError` where the user wants some."""
        graphs = "a replayed CUDA graph overwrites what the slice before it holds"
        mixing = graphs if self.traced.options.inductor_config().get("triton.cudagraphs") else whole.mixing
        mixing = mixing or own_gradient(self.traced.gm)
        if self.traced.batch is None or mixing:
            self._cannot_slice(mixing)
            return True
        return False

    def slices(self, whole: Job) -> Iterator[tuple[Slicing, Job] | None]:
        """Slicings and their jobs, posed when they are asked for; None, and no more, where the graph is not the same
        for a slice."""
        assert self.traced.batch is not None
        for wanted in self._slicings(self.traced.batch, whole):
            if wanted.count not in self.sliced:
                self.sliced[wanted.count] = self._sliced(wanted)
            found = self.sliced[wanted.count]
            if found is not None:
                self.jobs[Route(found[0])] = found[1]
            yield found
            if found is None:
                return

    def _at_once(self, whole: Job) -> Iterator[Route]:
        """Other ways to run all of the batch, posed: contiguous volumes, and recomputed convolutions by a smaller cut.

        The cut takes torch longer than all else in a large graph.
        """
        options = self.traced.options
        routes = [Route(relayout=False)] if volume_convolutions(self.traced.gm) else []
        small = len(whole.joint.graph.nodes) <= LARGEST_CUT
        if small and "recompute" in options.codecs and options.probes == Probes():
            routes += [Route(saved=saved) for saved in SAVED]
        for route in routes:
            job = self.jobs.get(route) or self.pose(route)
            if job is not None and job.posed is not None:
                self.jobs[route] = job
                yield route

    def _slicings(self, batch: Batch, whole: Job) -> list[Slicing]:
        """What to compare: numbers of slices that cut the batch into equal parts, each about twice the one before."""
        counts, fixed = batch.counts(), self.traced.options.slices
        if fixed is not None and fixed not in counts:
            some = f"write one of {', '.join(map(str, counts))}, which divide a batch of {batch.size}, 1, or None"
            raise OptionError("slices", fixed, some)
        chosen: list[int] = []
        for count in counts:
            if count == counts[-1] or not chosen or count >= 2 * chosen[-1]:
                chosen.append(count)
        relaid, copies = whole.relaid
        return [
            Slicing(batch, n, 0, whole.draws, relaid, copies, whole.changed)
            for n in (chosen if fixed is None else [fixed])
        ]

    def _sliced(self, slicing: Slicing) -> tuple[Slicing, Job] | None:
        """The job of a slice; None, with a note, when the graph is not the same for a slice.

        Weights laid out channels-last make channels-last activations, of which a model's `view` may not be possible:
        then every slice lays them out for itself.
        """
        for way in dict.fromkeys((slicing, replace(slicing, relaid=(), copies=0))):
            try:
                job = self.pose(Route(way))
            except XConvError:
                raise
            except Exception as error:  # The model wrote the batch's size into its graph: whatever it then fails at.
                reason = str(error).partition("\n")[0]
                continue
            if job is not None and not job.mixing:
                return way, job
            reason = "" if job is None else job.mixing
            break
        self._cannot_slice(f"it cannot be traced for {slicing.samples} samples: {reason}")
        return None

    def _cannot_slice(self, reason: str) -> None:
        if self.traced.options.slices is not None:
            raise OptionError("slices", self.traced.options.slices, f"the batch cannot be sliced: {reason}")
        note = f"the batch is not run in slices: {reason}"
        if note not in self.traced.notes:
            self.traced = replace(self.traced, notes=(*self.traced.notes, note))

    def allowed(self, route: Route) -> float | None:
        """What `Bounds` says of the route's choices."""
        limit = self.traced.options.max_slowdown
        if limit is None or self.whole is None or self.whole.posed is None:
            return None
        posed = self.whole.posed if route == AT_ONCE else self.posed[compared_route(route)]
        return allowed_seconds(posed, self.whole.posed, route.slicing, limit)

    def lowest(self, options: Options, corrections: Mapping[Route, dict[str, int]] | None = None) -> Lowest | None:
        """The plan of least predicted peak within the limits of `options`, over all routes; None where none is within
        `max_slowdown`."""
        whole = self.whole
        assert whole is not None
        if options.slices in (None, 1):
            self.jobs[AT_ONCE] = whole
            list(self._at_once(whole))
        if options.slices != 1 and not self.unsliceable(whole):
            list(self.slices(whole))
        plans = []
        for route, posed in self.posed.items():
            seconds = self.allowed(route)
            if seconds is None or seconds >= 0:
                posed = corrected(posed, (corrections or {}).get(route, {}))
                plans.append(Lowest(route, posed, lowest_plan(posed, options, route.slicing, seconds)))
        return min(plans, key=lambda plan: plan.predicted, default=None)


def compared_route(route: Route) -> Route:
    """The route whose problem was posed for `route`: the same whatever number of slices is held."""
    return route if route.slicing is None else replace(route, slicing=replace(route.slicing, held=0))


def _settled(ways: list[Way]) -> bool:
    """Whether there is an exact way that is so fast that no other is looked for."""
    return any(way.noise == 0 and way.slowdown <= NEGLIGIBLE for way in ways)
