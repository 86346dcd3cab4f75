"""log p(x, zₖ) and log q(zₖ|x) of each datum, for any Pyro model and guide.

A datum is what can be weighed by itself: one element of the plates in which all sites of model and
guide lie, one image in `VAE`. What else a site has is summed: several latents, inner plates. The
plates' scale stays outside: the bound of a subsampled plate is the scaled sum of the bounds of its
data. (Pyro's RenyiELBO takes the scale into the logarithm, and it and ReweightedWakeSleep weigh the
batch as one where a site lies outside the plate, without a word.)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from .randomness import random_states

__all__ = [
    "Detached",
    "Draws",
    "Route",
    "check_reparameterized",
    "chunk_sizes",
    "common_plates",
    "draw",
    "in_particles",
    "is_latent",
    "know_plate_nesting",
    "latent_sites",
    "sample_sites",
]

Route = Literal["total", "path", "score"]

PLATE = "num_particles_vectorized"  # Pyro's own name for it

# Values of the arguments times particles at once. A network keeps some ten times as many for the
# gradient, so this is a gigabyte or two.
VALUES_AT_ONCE = 2**25


@dataclass(frozen=True)
class Draws:
    """K particles of N data, nats, without the plates' scale.

    Attributes:
        log_p: (K, N) log p(x, zₖ).
        log_q: (K, N) log q(zₖ|x).
        log_q_fixed: (K, N) the same, but for the route total with zₖ held fixed: its gradient is
            the score.
        scale: () or (N,) factor of each datum, N/B where a plate of N is subsampled to B.
        subsample: the rows that the plates have taken.
    """

    log_p: Tensor
    log_q: Tensor
    log_q_fixed: Tensor
    scale: Tensor
    subsample: Trace


def draw(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_particles: int,
    max_plate_nesting: int,
    route: Route = "total",
    path_weight: Callable[[], Tensor | None] = lambda: None,
    subsample: Trace | None = None,
) -> Draws:
    """Run the guide in K particles, and the model against it.

    Args:
        model, guide: Pyro programs of `args` and `kwargs`.
        max_plate_nesting: number of plates inside each other, without that of the particles.
        route: how gradients reach the guide's parameters φ. total: through z(φ) and log q(z; φ).
            path: the same, and `log_q_fixed` tells the second part from the first. score: z held
            fixed, which any guide allows.
        path_weight: for the route path: gives (K, N) factors of the gradient with respect to zₖ, or
            None for 1; called in the backward pass.
        subsample: which rows the plates take, from other particles of the same data; drawn where
            it is not given.

    Raises:
        ValueError: a site of the guide has no reparameterized sampler, and the route needs one; or
            the sites are scaled differently, so that the scale cannot stay outside.
    """
    model, guide = (
        in_particles(program, num_particles, max_plate_nesting) for program in (model, guide)
    )
    if subsample is not None:
        guide = poutine.replay(guide, trace=subsample)
    with Detached() if route == "score" else nullcontext():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    latents = latent_sites(guide_trace)
    if route != "score":
        check_reparameterized(latents)
    drawn = guide_trace
    if route == "path":
        copies = {name: site["value"].view_as(site["value"]) for name, site in latents.items()}
        drawn = _with_values(guide_trace, copies)
    model_trace = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
    _check(model_trace, guide_trace, max_plate_nesting)
    layout = _Layout(model_trace, guide_trace, max_plate_nesting)
    log_p = layout.sum(model_trace)
    if route != "path":
        log_q = layout.sum(guide_trace)
        return Draws(log_p, log_q, log_q, layout.scale, _subsample(guide_trace))
    for name, copy in copies.items():
        if copy.requires_grad:
            _weigh_gradient(copy, path_weight, layout, latents[name]["fn"].event_dim)
    fixed = {name: copy.detach() for name, copy in copies.items()}
    log_q, log_q_fixed = (
        layout.sum(_again(guide, guide_trace, values, args, kwargs)) for values in (copies, fixed)
    )
    return Draws(log_p, log_q, log_q_fixed, layout.scale, _subsample(guide_trace))


def in_particles(
    program: Callable[..., Any], num_particles: int, max_plate_nesting: int
) -> Callable[..., Any]:
    """The program inside an outermost plate of so many particles."""
    return pyro.plate(PLATE, num_particles, dim=-max_plate_nesting - 1)(program)


def chunk_sizes(num_particles: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """`num_particles` as a sum of numbers that memory allows at once."""
    values = sum(tensor.numel() for tensor in _tensors(args, kwargs))
    most = max(1, VALUES_AT_ONCE // max(1, values))
    return [min(most, num_particles - done) for done in range(0, num_particles, most)]


def know_plate_nesting(
    elbo: ELBO,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Let Pyro find `max_plate_nesting` where it is not known, at no random numbers' cost."""
    if math.isinf(elbo.max_plate_nesting):
        tensors = _tensors(args, kwargs)
        with random_states(tensors[0].device if tensors else torch.device("cpu")):
            elbo._guess_max_plate_nesting(model, guide, args, kwargs)


def sample_sites(trace: Trace) -> dict[str, dict[str, Any]]:
    """The sample statements of a trace, observed or not, that have a density.

    Those of plates and of `pyro.deterministic` have none.
    """
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample"
        and not site_is_subsample(node)
        and not node["infer"].get("_deterministic")
    }


def latent_sites(trace: Trace) -> dict[str, dict[str, Any]]:
    """Those of `sample_sites` that are not observed."""
    return {name: site for name, site in sample_sites(trace).items() if is_latent(site)}


def check_reparameterized(latents: dict[str, dict[str, Any]]) -> None:
    """Refuse latent sites of a guide through whose draws no gradient flows.

    Raises:
        ValueError: so, by name.
    """
    for name, site in latents.items():
        if not getattr(site["fn"], "has_rsample", False):
            kind = type(getattr(site["fn"], "base_dist", site["fn"])).__name__
            raise ValueError(
                f"this objective expects a guide with reparameterized samplers; site {name!r} is a "
                f"{kind}, which has none. Use trace, score-function, score-baseline or wake-sleep"
            )


def common_plates(sites: list[dict[str, Any]]) -> list[CondIndepStackFrame]:
    """The vectorized plates in which all these sites lie, but for that of the particles."""
    plates = [
        {f.name: f for f in site["cond_indep_stack"] if f.vectorized and f.name != PLATE}
        for site in sites
    ]
    return [f for f in plates[0].values() if all(f.name in others for others in plates)]


def is_latent(site: dict[str, Any]) -> bool:
    """Whether a sample statement is of a latent variable."""
    return not site["is_observed"] and not site_is_subsample(site)


class Detached(Messenger):
    """Cuts each draw from the parameters that it was drawn with."""

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if is_latent(msg):
            msg["value"] = msg["value"].detach()


class _Layout:
    """Which batch dimensions are data, and sums over all the others.

    Attributes:
        shape: (K, …) with the sizes of the data's plates, and 1 for what is summed.
        scale: () or (N,).
    """

    def __init__(self, model_trace: Trace, guide_trace: Trace, max_plate_nesting: int) -> None:
        sites = [*sample_sites(model_trace).values(), *sample_sites(guide_trace).values()]
        common = common_plates(sites)
        if not common:
            warnings.warn(
                "no plate holds all sites of model and guide, so the whole batch is weighed as one "
                "datum. Put each row's latents and observations into one pyro.plate",
                stacklevel=2,
            )
        sizes = {plate.dim: plate.size for plate in common}
        sizes |= {f.dim: f.size for f in sites[0]["cond_indep_stack"] if f.name == PLATE}
        self.shape = torch.Size(sizes.get(d, 1) for d in range(-max_plate_nesting - 1, 0))
        self.scale = self._common_scale(sites)

    def sum(self, trace: Trace) -> Tensor:
        """(K, N) sums of all sites' log-densities, without scale."""
        trace = prune_subsample_sites(trace)
        trace.compute_log_prob()
        total = torch.zeros(())
        for site in sample_sites(trace).values():
            log_prob = scale_and_mask(site["unscaled_log_prob"], 1.0, site["mask"])
            summed = [d for d in range(-log_prob.dim(), 0) if self.shape[d] == 1]
            total = total + (log_prob.sum(summed, keepdim=True) if summed else log_prob)
        return total.expand(self.shape).reshape(self.shape[0], -1)

    def _common_scale(self, sites: list[dict[str, Any]]) -> Tensor:
        first = sites[0]["scale"]
        for site in sites[1:]:
            other = site["scale"]
            same = other is first or other == first
            if not (same.all() if isinstance(same, Tensor) else same):
                raise ValueError(
                    f"an importance-weighted objective expects all sites of a datum to be scaled "
                    f"alike; {sites[0]['name']!r} has {_brief(first)}, {site['name']!r} has "
                    f"{_brief(other)}. Use the objective trace for annealed KL terms and for "
                    f"latents outside a subsampled plate"
                )
        scale = torch.as_tensor(first)
        if scale.dim() == 0:
            return scale
        data = self.shape[1:]
        if scale.dim() > len(data) or any(
            size not in (1, data[-i]) for i, size in enumerate(reversed(scale.shape), 1)
        ):
            raise ValueError(
                f"an importance-weighted objective expects one scale for each datum; got "
                f"{_brief(scale)} for {tuple(data)} data"
            )
        return scale.expand(self.shape[1:]).flatten()


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]


def _subsample(trace: Trace) -> Trace:
    rows = Trace()
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and site_is_subsample(node):
            rows.nodes[name] = node
    return rows


def _check(model_trace: Trace, guide_trace: Trace, max_plate_nesting: int) -> None:
    """Pyro's own checks of its ELBOs."""
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, max_plate_nesting + 1)
        for trace in (model_trace, guide_trace):
            trace = prune_subsample_sites(trace)
            trace.compute_log_prob()
            for site in sample_sites(trace).values():
                check_site_shape(site, max_plate_nesting + 1)


def _with_values(trace: Trace, values: dict[str, Tensor]) -> Trace:
    changed = trace.copy()
    for name, value in values.items():
        # without the densities at the old value, which Pyro keeps
        node = {k: v for k, v in trace.nodes[name].items() if "log_prob" not in k}
        changed.nodes[name] = {**node, "value": value}
    return changed


def _again(
    guide: Callable[..., Any],
    trace: Trace,
    values: dict[str, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Trace:
    """The guide's trace at other values of its latents."""
    changed = _with_values(trace, values)
    if len(sample_sites(trace)) == 1:  # whose distribution depends on no other value
        return changed
    return poutine.trace(poutine.replay(guide, trace=changed)).get_trace(*args, **kwargs)


def _weigh_gradient(
    value: Tensor, path_weight: Callable[[], Tensor | None], layout: _Layout, event_dim: int
) -> None:
    def weigh(gradient: Tensor) -> Tensor:
        weight = path_weight()
        return gradient if weight is None else gradient * weight.reshape(shape)

    shape = layout.shape + (1,) * event_dim
    value.register_hook(weigh)


def _brief(scale: Any) -> str:
    return f"{scale:.6g}" if isinstance(scale, (int, float)) else f"{tuple(scale.shape)} factors"
