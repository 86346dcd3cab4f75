"""A Pyro model and guide of a user's own, seen through the three distributions.

What judges inference here asks for `prior()`, `posterior(x)` and `likelihood(z)`. A model(x) and a
guide(x) with one latent site and one observed site in a plate over the rows of x have all three;
they are read from traces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import torch
from pyro import poutine
from pyro.distributions import Distribution, TorchDistribution
from torch import Tensor

__all__ = ["Program"]


class Program:
    """The distributions of any Pyro model and guide of the shape of `VAE.model` and `VAE.guide`.

    Args:
        model, guide: called with x (B, *data_shape), for any B. Each has one plate over the B rows
            with a latent site, event (Z,); the model observes x in a second site.
        x: (B, *data_shape), some rows, for their shape; any B from 1.
        latent, observed: names of the sites.

    Raises:
        ValueError: a site is missing, or has another shape than expected.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        guide: Callable[[Tensor], Any],
        x: Tensor,
        latent: str = "z",
        observed: str = "x",
    ) -> None:
        self.model, self.guide = model, guide
        self.latent, self.observed = latent, observed
        self.row = x[:1]
        self.prior()
        self.posterior(self.row)

    def prior(self) -> Distribution:
        """p(z): batch (), event (Z,)."""
        site = self._site(self.model, self.latent, self.row)
        return _Shaped(site, torch.Size())

    def posterior(self, x: Tensor) -> Distribution:
        """q(z|x): batch (B,), event (Z,)."""
        return self._site(self.guide, self.latent, x)

    def likelihood(self, z: Tensor) -> Distribution:
        """p(x|z): z (..., Z) → batch (...), event `data_shape`."""
        flat = z.reshape(-1, z.shape[-1])
        rows = self.row.expand(len(flat), *self.row.shape[1:])
        model = poutine.condition(self.model, data={self.latent: flat})
        return _Shaped(self._site(model, self.observed, rows), z.shape[:-1])

    def parameters(self) -> list[Tensor]:
        """Those that model and guide ask Pyro's store for, before their constraints."""
        with pyro.validation_enabled(False):
            traces = [poutine.trace(f).get_trace(self.row) for f in (self.model, self.guide)]
        nodes = [trace.nodes[name] for trace in traces for name in trace.param_nodes]
        return [node["value"].unconstrained() for node in nodes]

    def _site(self, program: Callable[[Tensor], Any], name: str, x: Tensor) -> TorchDistribution:
        # Without validation: the rows given to the model are there for their number alone.
        with pyro.validation_enabled(False):
            trace = poutine.trace(program).get_trace(x)
        if name not in trace.nodes or trace.nodes[name]["type"] != "sample":
            sites = ", ".join([*trace.stochastic_nodes, *trace.observation_nodes]) or "none"
            raise ValueError(f"expected a sample site {name!r}; got {sites}")
        site = trace.nodes[name]["fn"]
        if site.batch_shape != (len(x),):
            raise ValueError(
                f"site {name!r} expects batch shape ({len(x)},), one plate over the rows of x; got "
                f"{tuple(site.batch_shape)} and event shape {tuple(site.event_shape)}. Is a "
                f".to_event(…) missing?"
            )
        return site


class _Shaped(TorchDistribution):
    """A distribution of batch (B,) seen as one of another batch shape with B elements."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base: TorchDistribution, batch_shape: torch.Size) -> None:
        self.base = base
        super().__init__(batch_shape, base.event_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        event_dim = len(self.event_shape)
        shape = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
        sample_shape = shape[: len(shape) - event_dim - len(self.batch_shape)]
        flat = value.expand(shape).reshape(sample_shape + self.base.batch_shape + self.event_shape)
        return self.base.log_prob(flat).reshape(shape[: len(shape) - event_dim])

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        sample_shape = torch.Size(sample_shape)
        return self.base.sample(sample_shape).reshape(self._extended_shape(sample_shape))

    @property
    def mean(self) -> Tensor:
        return self.base.mean.reshape(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        return self.base.variance.reshape(self.batch_shape + self.event_shape)
