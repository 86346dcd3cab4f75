"""log p(x, zₖ) and log q(zₖ|x) of each row, for any Pyro model and guide.

A row is one element of the plates that contain all sites of model and guide. Other dimensions, such
as inner plates, are summed. The scale of the plates stays outside: the bound of a subsampled plate
is the scaled sum of the bounds of its rows. (Pyro's RenyiELBO scales inside the logarithm. It and
ReweightedWakeSleep silently give the whole batch one weight if a site lies outside the plate.)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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

from ..runtime.memory import rows_at_once
from ..runtime.randomness import random_states

PLATE = "num_particles_vectorized"  # Pyro's name for it

PathWeight = Callable[[], Tensor | None]


@dataclass(frozen=True)
class Draws:
    """K particles of N rows, nats, without the scale of the plates.

    Attributes:
        log_p: (K, N) log p(x, zₖ).
        log_q: (K, N) log q(zₖ|x).
        log_q_fixed: (K, N) log q(zₖ|x) with zₖ held fixed, whose gradient is the score; the same
            as `log_q` in `draw_total`.
        scale: () or (N,) factor of each row, N/B if a plate of N is subsampled to B.
        subsample: the rows that the plates have selected.
    """

    log_p: Tensor
    log_q: Tensor
    log_q_fixed: Tensor
    scale: Tensor
    subsample: Trace


def draw_total(model: Callable, guide: Callable, args: Any, kwargs: Any, nesting: int) -> Draws:
    """Particles whose gradient in φ is the total one, through z(φ) and log q(z; φ).

    Args:
        model, guide: programs `in_particles`.
        args, kwargs: their arguments.
        nesting: number of nested plates, without that of the particles.

    Raises:
        ValueError: a latent has no reparameterized sampler, or sites are scaled differently.
    """
    guide_trace = _trace(guide, args, kwargs)
    check_reparameterized(latent_sites(guide_trace))
    return _draws(model, guide_trace, args, kwargs, nesting)


def draw_score(model: Callable, guide: Callable, args: Any, kwargs: Any, nesting: int) -> Draws:
    """Particles with z held fixed, for any guide: the gradient in φ is the score.

    Arguments and errors are those of `draw_total`; latents need no reparameterized sampler.
    """
    with Detached():
        guide_trace = _trace(guide, args, kwargs)
    return _draws(model, guide_trace, args, kwargs, nesting)


def draw_path(
    model: Callable, guide: Callable, args: Any, kwargs: Any, nesting: int, path_weight: PathWeight
) -> Draws:
    """Particles with the gradient through z(φ) apart from the score, which is in `log_q_fixed`.

    Arguments and errors are those of `draw_total`. `path_weight` is called in the backward pass and
    returns (K, N) factors of the gradient with respect to zₖ, or None for 1.
    """
    guide_trace = _trace(guide, args, kwargs)
    latents = latent_sites(guide_trace)
    check_reparameterized(latents)
    copies = {name: site["value"].view_as(site["value"]) for name, site in latents.items()}
    model_trace = _trace(model, args, kwargs, _with_values(guide_trace, copies))
    shape, scale = _layout(model_trace, guide_trace, nesting)
    for name, copy in copies.items():
        if copy.requires_grad:
            _weigh_gradient(copy, path_weight, shape + (1,) * latents[name]["fn"].event_dim)
    fixed = {name: copy.detach() for name, copy in copies.items()}
    log_q, log_q_fixed = (
        _row_sums(_again(guide, guide_trace, values, args, kwargs), shape)
        for values in (copies, fixed)
    )
    return Draws(_row_sums(model_trace, shape), log_q, log_q_fixed, scale, _subsample(guide_trace))


def in_particles(program: Callable, num_particles: int, nesting: int) -> Callable:
    """The program inside an outermost plate of particles; `nesting` counts the others."""
    return pyro.plate(PLATE, num_particles, dim=-nesting - 1)(program)


def chunk_sizes(num_particles: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Numbers of particles that fit in memory, with the sum `num_particles`."""
    most = rows_at_once(sum(tensor.numel() for tensor in _tensors(args, kwargs)))
    return [min(most, num_particles - done) for done in range(0, num_particles, most)]


def know_plate_nesting(
    elbo: ELBO, model: Callable, guide: Callable, args: Any, kwargs: Any
) -> None:
    """Let Pyro find an unknown `max_plate_nesting`, and restore the random state afterwards."""
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
    """The `sample_sites` that are not observed."""
    return {name: site for name, site in sample_sites(trace).items() if is_latent(site)}


def check_reparameterized(latents: dict[str, dict[str, Any]]) -> None:
    """Check that gradients flow through the draws of a guide.

    Raises:
        ValueError: a latent site has no reparameterized sampler.
    """
    for name, site in latents.items():
        if not getattr(site["fn"], "has_rsample", False):
            kind = type(getattr(site["fn"], "base_dist", site["fn"])).__name__
            raise ValueError(
                f"this objective expects a guide with reparameterized samplers; site {name!r} is a "
                f"{kind}, which has none. Use trace, score-function, score-baseline or wake-sleep"
            )


def common_plates(sites: list[dict[str, Any]]) -> list[CondIndepStackFrame]:
    """The vectorized plates that contain all these sites, without that of the particles."""
    plates = [
        {f.name: f for f in site["cond_indep_stack"] if f.vectorized and f.name != PLATE}
        for site in sites
    ]
    return [f for f in plates[0].values() if all(f.name in others for others in plates)]


def is_latent(site: dict[str, Any]) -> bool:
    """Whether a sample statement is of a latent variable."""
    return not site["is_observed"] and not site_is_subsample(site)


class Detached(Messenger):
    """Detaches each draw from the parameters of its distribution."""

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if is_latent(msg):
            msg["value"] = msg["value"].detach()


def _trace(program: Callable, args: Any, kwargs: Any, drawn: Trace | None = None) -> Trace:
    if drawn is not None:
        program = poutine.replay(program, trace=drawn)
    return poutine.trace(program).get_trace(*args, **kwargs)


def _draws(model: Callable, guide_trace: Trace, args: Any, kwargs: Any, nesting: int) -> Draws:
    model_trace = _trace(model, args, kwargs, guide_trace)
    shape, scale = _layout(model_trace, guide_trace, nesting)
    log_p, log_q = (_row_sums(trace, shape) for trace in (model_trace, guide_trace))
    return Draws(log_p, log_q, log_q, scale, _subsample(guide_trace))


def _layout(model_trace: Trace, guide_trace: Trace, nesting: int) -> tuple[torch.Size, Tensor]:
    """Shape (K, …) with the sizes of the rows' plates, and 1 where sites are summed; the scale."""
    _check(model_trace, guide_trace, nesting + 1)
    sites = [*sample_sites(model_trace).values(), *sample_sites(guide_trace).values()]
    common = common_plates(sites)
    if not common:
        warnings.warn(
            "no plate holds all sites of model and guide: the whole batch is weighted as one row. "
            "Put each row's latents and observations into one pyro.plate",
            stacklevel=2,
        )
    sizes = {plate.dim: plate.size for plate in common}
    sizes |= {f.dim: f.size for f in sites[0]["cond_indep_stack"] if f.name == PLATE}
    shape = torch.Size(sizes.get(d, 1) for d in range(-nesting - 1, 0))
    return shape, _common_scale(sites, shape[1:])


def _check(model_trace: Trace, guide_trace: Trace, nesting: int) -> None:
    """The checks that Pyro's ELBOs make."""
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, nesting)
        for trace in (model_trace, guide_trace):
            trace = prune_subsample_sites(trace)
            trace.compute_log_prob()
            for site in sample_sites(trace).values():
                check_site_shape(site, nesting)


def _common_scale(sites: list[dict[str, Any]], rows: torch.Size) -> Tensor:
    """The scale of all sites, () or (N,), for plates of these sizes."""
    first = sites[0]["scale"]
    for site in sites[1:]:
        other = site["scale"]
        same = other is first or other == first
        if not (same.all() if isinstance(same, Tensor) else same):
            raise ValueError(
                f"an importance-weighted objective expects all sites of a row to be scaled alike; "
                f"{sites[0]['name']!r} has {_brief(first)}, {site['name']!r} has {_brief(other)}. "
                f"Use the objective trace for annealed KLs and latents outside a subsampled plate"
            )
    if not isinstance(first, Tensor):
        return torch.tensor(first, dtype=torch.float32, device="cpu")
    scale = first
    if scale.dim() == 0:
        return scale
    if scale.dim() > len(rows) or any(
        size not in (1, rows[-i]) for i, size in enumerate(reversed(scale.shape), 1)
    ):
        raise ValueError(
            f"an importance-weighted objective expects one scale for each row; got "
            f"{_brief(scale)} for {tuple(rows)} rows"
        )
    return scale.expand(rows).flatten()


def _brief(scale: Any) -> str:
    return f"{scale:.6g}" if isinstance(scale, (int, float)) else f"{tuple(scale.shape)} factors"


def _row_sums(trace: Trace, shape: torch.Size) -> Tensor:
    """(K, N) sums of the log-densities of all sites, without scale."""
    trace = prune_subsample_sites(trace)
    trace.compute_log_prob()
    total = torch.zeros((), dtype=torch.float32, device="cpu")
    for site in sample_sites(trace).values():
        log_prob = scale_and_mask(site["unscaled_log_prob"], 1.0, site["mask"])
        summed = [d for d in range(-log_prob.dim(), 0) if shape[d] == 1]
        total = total + (log_prob.sum(summed, keepdim=True) if summed else log_prob)
    return total.expand(shape).reshape(shape[0], -1)


def _with_values(trace: Trace, values: dict[str, Tensor]) -> Trace:
    changed = trace.copy()
    for name, value in values.items():
        # without the cached densities at the old value
        node = {k: v for k, v in trace.nodes[name].items() if "log_prob" not in k}
        changed.nodes[name] = {**node, "value": value}
    return changed


def _again(
    guide: Callable, trace: Trace, values: dict[str, Tensor], args: Any, kwargs: Any
) -> Trace:
    """The guide's trace at other values of its latents."""
    changed = _with_values(trace, values)
    if len(sample_sites(trace)) == 1:  # its distribution depends on no other value
        return changed
    return _trace(guide, args, kwargs, changed)


def _weigh_gradient(value: Tensor, path_weight: PathWeight, shape: tuple[int, ...]) -> None:
    def weigh(gradient: Tensor) -> Tensor:
        weight = path_weight()
        return gradient if weight is None else gradient * weight.reshape(shape)

    value.register_hook(weigh)


def _subsample(trace: Trace) -> Trace:
    rows = Trace()
    rows.nodes.update({name: node for name, node in trace.nodes.items() if site_is_subsample(node)})
    return rows


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
