"""Lossless compression of discrete data by a model: bits-back coding.

Rows share one stack of bits (asymmetric numeral systems). For each row x,

    1. decode z from the stack by q(z|x)        −log₂ 1/q(z|x) bits
    2. encode x by p(x|z)                       +log₂ 1/p(x|z)
    3. encode z by p(z)                         +log₂ 1/p(z)

so that the stack grows by −ELBO / log 2 bits a row on average. The receiver undoes the three steps
in reverse order, and gives step 1 its bits back. The stack begins with random bits for the first
row.

The bits on top of the stack, with which step 1 draws z, are those of the z of the row before. They
are uniform only if that z is a typical draw from the prior. A random shift of them, which the
receiver undoes, makes z a draw from q(z|x) for any model.

Latents are multiples of `SPACING`, which cancels between steps 1 and 3. The networks run in
float64, one row and one thread at a time, since the receiver must compute the same probabilities to
the last bit.

Source: "Practical lossless compression with latent variables using bits back coding",
arXiv 1901.04866; entropy coder: constriction, arXiv 2201.01741.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pyro.distributions import Independent, MultivariateNormal, Normal
from torch import Tensor

from ..config import InputError
from ..models.vae import VAE
from ..runtime.memory import Callback, ignore
from ..runtime.packages import of_extra
from ..runtime.randomness import usual_settings

SPACING = 2.0**-10
LIMIT = 16 * 1024  # latents are coded within ± this many multiples
REACH = 8.0

NOT_OURS = "the coded rows are damaged, or were made by another model or on another machine"

# A latent takes fewer bits than such a symbol has.
SYMBOLS = 2**16

# Rows with more possible values would need tables of their probabilities that take minutes.
MAX_VALUES = 1024


class Coder:
    """Codes rows by a model.

    Args:
        vae: a VAE with a discrete likelihood, Gaussian q(z|x) and p(z) = N(μ, diag σ²).

    Attributes:
        bound: the largest possible value of x.

    Raises:
        InputError: the model is of another kind, or the package constriction is missing.
    """

    def __init__(self, vae: VAE) -> None:
        self._constriction = of_extra(
            "constriction", "compression", "compression requires a package"
        )
        likelihood = vae.likelihood_module
        if not likelihood.is_discrete or likelihood.spec.bound >= MAX_VALUES:
            raise InputError(
                f"compression expects a likelihood of at most {MAX_VALUES} discrete values, such "
                f"as bernoulli, binomial or discretized-logistic; got {type(likelihood).__name__}"
            )
        self.vae = copy.deepcopy(vae).double().cpu().eval()
        spec = likelihood.spec
        self.shape = spec.shape
        self.bound = 1 if likelihood.units == "binary" else spec.bound
        self._values = torch.arange(self.bound + 1, dtype=torch.float64)
        with on_one_core():
            prior = self.vae.prior()
            if not (type(prior) is Independent and isinstance(prior.base_dist, Normal)):
                raise InputError(
                    "compression expects --prior normal, whose latents are independent"
                )
            self._prior = [
                p.expand(prior.event_shape).numpy() / SPACING
                for p in (prior.base_dist.loc, prior.base_dist.scale)
            ]
            posterior = self.vae.posterior(torch.zeros(1, *spec.shape, dtype=torch.float64))
        if type(posterior) not in (Independent, MultivariateNormal):
            raise InputError(
                f"compression expects --guide diagonal or full; this model's q(z|x) is a "
                f"{type(posterior).__name__}. Of a run whose guide was refitted, give "
                f"RUN/checkpoints/best.pt, which holds the trained one"
            )
        model = self._constriction.stream.model
        self._gaussian = model.QuantizedGaussian(-LIMIT, LIMIT)
        self._uniform = model.Uniform(SYMBOLS)
        self._categorical = model.Categorical(perfect=False)

    def encode(
        self, x: Tensor, seed: int = 0, on_row: Callback = ignore
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode rows x (N, *data_shape) of integers.

        Args:
            x: in the likelihood's units.
            seed: of the first bits.
            on_row: called with the number of rows just done.

        Returns:
            The stack (n,) and the random bits with which it began (m,), uint32.
        """
        first = self._first_bits(seed)
        stack = self._constriction.stream.stack.AnsCoder(first, seal=True)
        with on_one_core():
            # The stack gives the last row first.
            for i, row in reversed([*enumerate(x.double().cpu().split(1))]):
                self._shift(stack, [seed, i], 1)
                z = self._draw(stack, row)
                symbols = row.flatten().numpy().astype(np.int32)
                stack.encode_reverse(symbols, self._categorical, self._probabilities(z))
                stack.encode_reverse(z, self._gaussian, *self._prior)
                on_row(1)
        return stack.get_compressed(), first

    def decode(self, stack: np.ndarray, count: int, seed: int, on_row: Callback = ignore) -> Tensor:
        """The rows (N, *data_shape) that `encode` has put on a stack.

        Raises:
            InputError: the stack does not end in its first bits: it is damaged, or was made by
                another model.
        """
        coder = self._constriction.stream.stack.AnsCoder(np.asarray(stack, dtype=np.uint32))
        rows = torch.empty(count, *self.shape, dtype=torch.float64, device="cpu")
        with on_one_core():
            for i, row in enumerate(rows):
                z = coder.decode(self._gaussian, *self._prior)
                symbols = coder.decode(self._categorical, self._probabilities(z))
                row.copy_(torch.from_numpy(symbols.astype(np.float64)).view(self.shape))
                try:
                    self._put_back(coder, row.unsqueeze(0), z)
                except KeyError:  # z is far from q(z|x)
                    raise InputError(NOT_OURS) from None
                self._shift(coder, [seed, i], -1)
                on_row(1)
        try:
            rest = coder.get_compressed(unseal=True)
        except AssertionError:  # there is no seal
            rest = np.empty(0, np.uint32)
        if not np.array_equal(rest, self._first_bits(seed)):
            raise InputError(NOT_OURS)
        return rows

    def fingerprint(self) -> str:
        """A digest of the weights, and of what this machine computes with them."""
        digest = hashlib.blake2b(digest_size=16)
        for name, value in self.vae.state_dict().items():
            digest.update(name.encode() + value.numpy().tobytes())
        with on_one_core():
            size = len(self._prior[0])
            for step in range(8):
                z = np.arange(size) % 7 * 97 - 300 + step * 75
                digest.update(self._probabilities(z).tobytes())
                x = torch.full((1, *self.shape), float(step % len(self._values))).double()
                for part in self._posterior(x):
                    digest.update(part.tobytes())
        return digest.hexdigest()

    def _first_bits(self, seed: int) -> np.ndarray:
        """The random bits with which a stack begins, enough for a first z: (m,) uint32."""
        size = len(self._prior[0]) + 8
        return np.random.default_rng(seed).integers(0, 2**32, size, dtype=np.uint32)

    def _probabilities(self, z: np.ndarray) -> np.ndarray:
        """p(x|z) (D, K) of each value of x, for a latent in multiples of `SPACING`."""
        likelihood = self.vae.likelihood(torch.from_numpy(z * SPACING).double().unsqueeze(0))
        each = likelihood.base_dist  # independent values
        values = self._values.view(-1, 1, *[1] * len(self.shape))
        log_probs = each.log_prob(values.expand(len(self._values), *each.batch_shape))
        return np.ascontiguousarray(log_probs.flatten(1).T.exp().numpy())

    def _posterior(self, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Mean (Z,) and Cholesky factor (Z, Z) of q(z|x), in multiples of `SPACING`."""
        q = self.vae.posterior(x)
        if isinstance(q, MultivariateNormal):
            return q.loc[0].numpy() / SPACING, q.scale_tril[0].numpy() / SPACING
        return q.base_dist.loc[0].numpy() / SPACING, np.diag(q.base_dist.scale[0].numpy() / SPACING)

    def _shift(self, stack: Any, seed: list[int], sign: int) -> None:
        """Add random numbers to the symbols on top of the stack, or subtract them."""
        shift = np.random.default_rng(seed).integers(0, SYMBOLS, len(self._prior[0]))
        symbols = stack.decode(self._uniform, len(shift))
        stack.encode_reverse(((symbols + sign * shift) % SYMBOLS).astype(np.int32), self._uniform)

    def _draw(self, stack: Any, x: Tensor) -> np.ndarray:
        """Decode z by q(z|x), each latent given those before it: (Z,), int32."""
        loc, factor = self._posterior(x)
        z, noise = np.empty(len(loc), np.int32), np.zeros(len(loc))
        for j in range(len(loc)):
            mean = loc[j] + factor[j, :j] @ noise[:j]
            z[j] = stack.decode(self._near(mean, factor[j, j]))
            noise[j] = (z[j] - mean) / factor[j, j]
        return z

    def _put_back(self, stack: Any, x: Tensor, z: np.ndarray) -> None:
        """Encode z by q(z|x), the inverse of `_draw`."""
        loc, factor = self._posterior(x)
        models, noise = [], np.zeros(len(loc))
        for j in range(len(loc)):
            mean = loc[j] + factor[j, :j] @ noise[:j]
            models.append(self._near(mean, factor[j, j]))
            noise[j] = (z[j] - mean) / factor[j, j]
        for symbol, model in zip(z[::-1].tolist(), models[::-1], strict=True):
            stack.encode_reverse(symbol, model)

    def _near(self, mean: float, scale: float) -> Any:
        """A Gaussian on the multiples within `REACH` scales of its mean.

        The coder gives every symbol a share of at least 2^−24. In a wide range, these shares would
        add up to draws far out, for which p(x|z) needs many bits.
        """
        width = int(min(REACH * scale, LIMIT)) + 1
        centre = int(np.clip(round(mean), width - LIMIT, LIMIT - width))
        model = self._constriction.stream.model.QuantizedGaussian
        return model(centre - width, centre + width, mean, scale)


@contextmanager
def on_one_core() -> Iterator[None]:
    """Compute in one thread, without gradients: sums then have one order."""
    before = torch.get_num_threads()
    with usual_settings(validate=False), torch.no_grad():
        try:
            torch.set_num_threads(1)
            yield
        finally:
            torch.set_num_threads(before)
