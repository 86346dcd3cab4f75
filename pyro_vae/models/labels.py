"""Variational autoencoders of rows with labels, which are given, or a latent of the model.

    conditional       z ~ p(z)               x ~ p(x|z, y)         q(z|x, y)
    semi-supervised   y ~ p(y), z ~ p(z)     x ~ p(x|z, y)         q(y|x) q(z|x, y)

    log p(x|y) ≥ ELBO(x, y) = E_q(z|x,y)[log p(x|z, y)] − KL(q(z|x, y) ‖ p(z))
    log p(x)   ≥ ELBO(x)    = E_q(y|x)[ELBO(x, y)] − KL(q(y|x) ‖ p(y))

y is one of C classes. A semi-supervised model sums over all of them (`pyro.infer.TraceEnum_ELBO`).
The label of a row may be known: q(y|x) is then a point mass, and the row has the bound
ELBO(x, y) + log p(y) on log p(x, y). The classifier learns from it by a term α log q(y|x).

`given(y)` is an ordinary `VAE` of p(x|z, y) and q(z|x, y) at fixed y, with the same modules:
whatever works on a `VAE` works on it.

Source: "Semi-supervised learning with deep generative models", arXiv 1406.5298.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pyro
import torch
from pyro.distributions import Categorical, Distribution
from torch import Tensor, nn

from ..config import InputError
from ..config.options import shown
from ..data.source import is_number
from ..data.splits import Split
from .autoencoder import Autoencoder
from .interface import register
from .likelihoods import Likelihood
from .posteriors import DiagonalGaussian, kl
from .refined import Refined, StudentT
from .vae import VAE

# A logit this far below the others has the probability 0 in float32 and float64, and is finite: in
# the ELBO, 0 · log 0 does not arise.
NEVER = -1e4


class ConditionalVAE(nn.Module):
    """A generative model p(z) p(x|z, y) of rows with labels, and its posterior q(z|x, y).

    Source: "Semi-supervised learning with deep generative models", arXiv 1406.5298; "Learning
    structured output representation using deep conditional generative models", NeurIPS 2015.

    Args:
        prior, likelihood, family: as in `VAE`.
        encoder: module x (..., *data_shape), one-hot y (..., C) → features (..., F) of q(z|x, y).
        decoder: module z (..., Z), one-hot y (..., C) → input of `likelihood`.
        shares: (C,) the share of each class among the rows whose label is known.

    Attributes:
        label_logits: (C,) log-shares, the distribution from which labels are drawn.
    """

    latent = "z"
    label_logits: Tensor

    def __init__(
        self,
        prior: nn.Module,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        shares: Tensor,
        family: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.prior_module = prior
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood_module = likelihood
        self.family = DiagonalGaussian() if family is None else family
        self.register_buffer("label_logits", shares.log())

    @property
    def num_classes(self) -> int:
        return len(self.label_logits)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their numbers."""
        return self.likelihood_module.spec.classes or tuple(map(str, range(self.num_classes)))

    def given(self, label: int | str | Tensor) -> VAE:
        """p(z), p(x|z, y) and q(z|x, y) at fixed y: a `VAE` with the modules of this one.

        Args:
            label: number or name of a class, for all rows; or (B,) int64, one for each row.
                Functions that split many rows into chunks need a class.

        Raises:
            InputError: there is no such class.
        """
        if not isinstance(label, Tensor):
            label = torch.tensor(class_number(label, self.class_names))
        y = one_hot(label.to(self.label_logits.device), self.label_logits)
        encoder, decoder = _Given(self.encoder, y), _Given(self.decoder, y)
        kind = _AtRows if y.dim() > 1 else VAE
        vae = kind(self.prior_module, encoder, decoder, self.likelihood_module, self.family)
        return vae.train(self.training)

    def prior(self) -> Distribution:
        """p(z): batch (), event (Z,)."""
        return self.prior_module()

    def label_prior(self) -> Distribution:
        """p(y): batch (), the shares of the classes."""
        return Categorical(logits=self.label_logits)

    def likelihood(self, z: Tensor, y: Tensor) -> Distribution:
        """p(x|z, y): z (..., Z), y (...) int64 → batch (...), event `data_shape`."""
        return self.likelihood_module(self.decoder(z, one_hot(y, self.label_logits)))

    def posterior(self, x: Tensor, y: Tensor) -> Distribution:
        """q(z|x, y): x (..., *data_shape), y (...) int64 → batch (...), event (Z,)."""
        if isinstance(self.family, Refined):
            return self.given(y).posterior(x)
        return self.family(self.encoder(x, one_hot(y, self.label_logits)))

    def model(self, x: Tensor, y: Tensor) -> None:
        """p(x, z|y), with x (B, *data_shape) observed and y (B,) given."""
        register("prior", self.prior_module)
        register("decoder", self.decoder)
        register("likelihood", self.likelihood_module)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z, y), obs=x)

    def guide(self, x: Tensor, y: Tensor) -> None:
        """q(z|x, y), for x (B, *data_shape) and y (B,)."""
        register("encoder", self.encoder)
        register("family", self.family)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", self.posterior(x, y))

    @torch.no_grad()
    def elbo_terms(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction and KL (B,), nats, as those of a `VAE`, of rows with labels y (B,)."""
        posterior = self.posterior(x, y)
        z = posterior.sample()
        return self.likelihood(z, y).log_prob(x), kl(posterior, self.prior(), z.unsqueeze(0))

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean of p(x|z, y) at the posterior mean: (B, *data_shape)."""
        return self.likelihood(self.posterior(x, y).mean, y).mean


class SemiSupervisedVAE(ConditionalVAE):
    """A generative model p(y) p(z) p(x|z, y), and its posterior q(y|x) q(z|x, y).

    p(y) has the shares of the classes among the rows whose label is known.

    Args:
        prior, encoder, decoder, likelihood, shares, family: as in `ConditionalVAE`.
        classifier: module x (..., *data_shape) → logits (..., C) of q(y|x).
    """

    def __init__(
        self,
        prior: nn.Module,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: Likelihood,
        shares: Tensor,
        classifier: nn.Module,
        family: nn.Module | None = None,
    ) -> None:
        super().__init__(prior, encoder, decoder, likelihood, shares, family)
        self.classifier = classifier

    def label_posterior(self, x: Tensor, y: Tensor | None = None) -> Distribution:
        """q(y|x): x (..., *data_shape) → batch (...).

        With known labels y (...) int64, a point mass at these; −1 is a label that is not known.
        """
        logits = self.classifier(x)
        if y is not None:
            known = NEVER * (1 - one_hot(y, logits))
            logits = torch.where((y >= 0).unsqueeze(-1), known, logits)
        return Categorical(logits=logits)

    def model(
        self,
        x: Tensor,
        y: Tensor,
        x_labelled: Tensor | None = None,
        y_labelled: Tensor | None = None,
        classification_weight: float = 1.0,
    ) -> None:
        """p(x, y, z), with x (B, *data_shape) observed, and y (B,) int64, −1 if not known.

        Sites "y", "z" and "x" in one plate "data"; the guide knows the known labels. Rows with
        known labels, `x_labelled` and `y_labelled`, add `classification_weight` · log q(y|x).
        """
        register("prior", self.prior_module)
        register("decoder", self.decoder)
        register("likelihood", self.likelihood_module)
        register("classifier", self.classifier)
        if x_labelled is not None:
            with pyro.plate("labelled", len(x_labelled), dim=-1):
                log_q = self.label_posterior(x_labelled).log_prob(y_labelled)
                pyro.factor("classification", classification_weight * log_q)
        with pyro.plate("data", len(x), dim=-1):
            label = pyro.sample("y", self.label_prior())
            z = pyro.sample("z", self.prior())
            pyro.sample("x", self.likelihood(z, label), obs=x)

    def guide(self, x: Tensor, y: Tensor, *labelled: Tensor, **weight: float) -> None:
        """q(y|x) q(z|x, y), for x (B, *data_shape) and y (B,) int64, −1 if not known.

        The other arguments are those of the model only.
        """
        register("encoder", self.encoder)
        register("family", self.family)
        register("classifier", self.classifier)
        with pyro.plate("data", len(x), dim=-1):
            label = pyro.sample(
                "y", self.label_posterior(x, y), infer={"enumerate": "parallel"}
            )  # all classes at once, (C, B)
            pyro.sample("z", self.posterior(x, label))

    @torch.no_grad()
    def elbo_terms(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction and KL (B,), nats, of rows with labels y (B,), −1 if not known.

        Means over q(y|x), with a draw of z for each class. The KL is that of y and z together.
        """
        labels = torch.arange(self.num_classes, device=x.device).unsqueeze(-1)
        posterior, q = self.posterior(x, labels), self.label_posterior(x, y)
        z = posterior.sample()  # (C, B, Z)
        divergence = kl(posterior, self.prior(), z.unsqueeze(0))
        return self.summed_out(q, self.likelihood(z, labels).log_prob(x), divergence)

    def summed_out(
        self, q: Any, log_likelihood: Tensor, divergence: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Reconstruction and KL (B,) from those of each class (C, B), under q(y|x), batch (B,)."""
        weights, of_labels = q.probs.mT, (q.logits - self.label_prior().logits)
        of_labels = (q.probs * of_labels).sum(-1)
        return (weights * log_likelihood).sum(0), of_labels + (weights * divergence).sum(0)


Model = VAE | Autoencoder | ConditionalVAE


def at_rows(vae: Any, x: Tensor, y: Tensor | None) -> Any:
    """The model at `labels_at` of rows x (B, *data_shape), y (B,); one without labels as it is."""
    return vae.given(labels_at(vae, x, y)) if isinstance(vae, ConditionalVAE) else vae


@torch.no_grad()
def labels_at(vae: ConditionalVAE, x: Tensor, y: Tensor | None) -> Tensor:
    """Labels (B,) of rows x (B, *data_shape): y or, of a semi-supervised model, the most probable.

    Raises:
        InputError: a row has no label that a conditional model needs.
    """
    if isinstance(vae, SemiSupervisedVAE):
        return vae.classifier(x).argmax(-1)
    return arguments(vae, x, y)[1]


def models_at(vae: Any, given: Tensor | None) -> Iterator[tuple[int | None, Any, Any]]:
    """Each label among `given` (N,), the model at it, and the indices of its rows.

    Of a model without labels: None, the model, and all rows.
    """
    if given is None or not isinstance(vae, ConditionalVAE):
        yield None, vae, slice(None)
        return
    for label in given.unique().tolist():
        yield label, vae.given(label), (given == label).nonzero().flatten()


def rows_with_label(vae: ConditionalVAE, split: Split, label: int, seed: int) -> Split:
    """The rows of a split that have one label: by the data or, if that is not known, by q(y|x)."""
    found = []
    for x, y in split.fixed_with_labels(vae.likelihood_module.units, seed):
        at = labels_at(vae, x, y)
        found.append((at if y is None else torch.where(y < 0, at, y)).cpu())
    index = (torch.cat(found) == label).nonzero().flatten() if found else torch.arange(0)
    labels = None if split.labels is None else split.labels[index]
    return dataclasses.replace(split, rows=split.rows[index], labels=labels)


def arguments(vae: Any, x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
    """The arguments of `model` and `guide`: x (B, *data_shape) and, if there are labels, y (B,).

    Raises:
        InputError: a row has no label that a conditional model needs.
    """
    if not isinstance(vae, ConditionalVAE):
        return (x,)
    if y is None or (needs_labels(vae) and bool((y < 0).any())):
        raise InputError("a conditional model expects the label of each row; there are none")
    return x, y.to(x.device)


def needs_labels(vae: Any) -> bool:
    """Whether a model is conditional, and does not infer labels."""
    return isinstance(vae, ConditionalVAE) and not isinstance(vae, SemiSupervisedVAE)


def class_number(label: int | str, names: Sequence[str]) -> int:
    """The number of a class, given by its number or, as text, by its name.

    Text may also be the number, if no name is one: "1" is then the second class.

    Raises:
        InputError: there is no such class.
    """
    if isinstance(label, str) and label in names:
        return names.index(label)
    by_number = not isinstance(label, str) or not any(map(is_number, names))
    if by_number and str(label).isdecimal() and int(label) < len(names):
        return int(label)
    listed = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    if by_number:
        listed += f", or a number from 0 to {len(names) - 1}"
    raise InputError(f"label expects one of {listed}; got {shown(label)}")


def one_hot(y: Tensor, like: Tensor) -> Tensor:
    """y (...) int64 → (..., C) of the dtype of `like` (..., C); zeros for −1."""
    classes = torch.arange(like.shape[-1], device=y.device)
    return (y.unsqueeze(-1) == classes).to(like.dtype)


class _AtRows(VAE):
    """A model at a label for each row. A refined posterior is found class by class."""

    def posterior(self, x: Tensor) -> Distribution:
        encoder, decoder = cast("_Given", self.encoder), cast("_Given", self.decoder)
        if len(x) != len(encoder.label):
            raise ValueError(
                f"the model is at the labels of {len(encoder.label)} rows; got {len(x)} rows. Call "
                f"given() with the labels of these rows, or with one class for all"
            )
        if not isinstance(self.family, Refined):
            return super().posterior(x)
        rows, found = encoder.label.argmax(-1), {}
        for label in rows.unique().tolist():
            y = encoder.label[rows == label][0]
            parts = _Given(encoder.module, y), _Given(decoder.module, y)
            one = VAE(self.prior_module, *parts, self.likelihood_module, self.family)
            found[label] = one.posterior(x[rows == label])
        first = next(iter(found.values()))
        loc = x.new_empty(len(x), *first.event_shape)
        factor = loc.new_empty(*loc.shape, loc.shape[-1])
        for label, q in found.items():
            loc[rows == label], factor[rows == label] = q.loc, q.scale_tril
        return StudentT(self.family.df.to(loc), loc, factor)


class _Given(nn.Module):
    """A module of (value, label) at a fixed one-hot label, (C,) or (B, C)."""

    label: Tensor

    def __init__(self, module: nn.Module, label: Tensor) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("label", label)

    def forward(self, value: Tensor) -> Tensor:
        return self.module(value, self.label)
