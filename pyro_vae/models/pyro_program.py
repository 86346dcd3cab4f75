"""The three distributions of any Pyro model and guide with one latent and one observed site.

    prior, likelihood    the latent and the observed site of model(x)
    posterior            the latent site of guide(x)

Both sites lie in a plate over the rows of x. The distributions are read from traces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import torch
from pyro import poutine
from pyro.distributions import Distribution, TorchDistribution
from pyro.poutine.util import site_is_subsample
from torch import Tensor


class Program:
    """A `PyroModel` made of any Pyro model and guide with the sites of `VAE`.

    Args:
        model, guide: functions of x (B, *data_shape), for any B. Each has one plate over the B rows
            with a latent site, event (Z,); the model observes x in a second site.
        x: (B, *data_shape), B ≥ 1, example rows.
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
        for program, name, dims in (
            (model, latent, 1),
            (guide, latent, 1),
            (model, observed, x.dim() - 1),
        ):
            site = self._site(program, name, self.row)
            if len(site.event_shape) != dims:
                raise _misshapen(name, site, 1)

    def prior(self) -> Distribution:
        """p(z): batch (), event (Z,)."""
        return _Shaped(self._site(self.model, self.latent, self.row), torch.Size())

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
        """The unconstrained parameters of model and guide in Pyro's store."""
        with pyro.validation_enabled(False):
            traces = [poutine.trace(f).get_trace(self.row) for f in (self.model, self.guide)]
        nodes = [trace.nodes[name] for trace in traces for name in trace.param_nodes]
        return [node["value"].unconstrained() for node in nodes]

    def _site(self, program: Callable[[Tensor], Any], name: str, x: Tensor) -> TorchDistribution:
        trace = poutine.trace(program).get_trace(x)
        nodes = {
            other: node["fn"]
            for other, node in trace.nodes.items()
            if node["type"] == "sample" and not site_is_subsample(node)
        }
        if name not in nodes:
            raise ValueError(f"expected a sample site {name!r}; got {', '.join(nodes) or 'none'}")
        site = nodes[name]
        if site.batch_shape != (len(x),):
            raise _misshapen(name, site, len(x))
        return site


def _misshapen(name: str, site: TorchDistribution, rows: int) -> ValueError:
    return ValueError(
        f"site {name!r} expects batch shape ({rows},), one plate over the rows of x; got "
        f"{tuple(site.batch_shape)} and event shape {tuple(site.event_shape)}. Is a "
        f".to_event(…) missing?"
    )


class _Shaped(TorchDistribution):
    """A distribution of batch shape (B,), reshaped to another batch shape of B elements."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base: TorchDistribution, batch_shape: torch.Size) -> None:
        self.base = base
        super().__init__(batch_shape, base.event_shape, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)
        value = value.expand(shape)
        num_dims = len(shape) - len(self.event_shape)
        lead = num_dims - len(self.batch_shape)
        # The batch dimension of the base holds the batch dimensions of more than one element. The
        # others come first, as sample dimensions, along which the base broadcasts.
        own = [lead + i for i, size in enumerate(self.batch_shape) if size != 1]
        order = [*(i for i in range(num_dims) if i not in own), *own]
        moved = value.permute(*order, *range(num_dims, len(shape)))
        samples = moved.shape[: num_dims - len(own)]
        flat = moved.reshape(samples + self.base.batch_shape + self.event_shape)
        log_prob = self.base.log_prob(flat).reshape(moved.shape[:num_dims])
        return log_prob.permute(*(order.index(i) for i in range(num_dims)))

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:  # noqa: B008
        sample_shape = torch.Size(sample_shape)
        return self.base.sample(sample_shape).reshape(self._extended_shape(sample_shape))

    @property
    def support(self) -> Any:
        return self.base.support

    @property
    def mean(self) -> Tensor:
        return self.base.mean.reshape(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        return self.base.variance.reshape(self.batch_shape + self.event_shape)
