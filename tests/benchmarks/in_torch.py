"""The contenders of `speed.py` that run in torch."""

from __future__ import annotations

import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from contenders import HIDDEN, LATENTS, LEARNING_RATE, Job, Weights
from pyro.infer import ELBO, SVI, JitTrace_ELBO, RenyiELBO, Trace_ELBO
from torch import Tensor, nn

import pyro_vae
import pyro_vae.capture  # registers the product by oneDNN


def initial_weights(job: Job) -> Weights:
    """Those of `pyro_vae.build`, for all."""
    return _exported(_built(job)[0])


def _built(job: Job) -> tuple[pyro_vae.VAE, pyro_vae.Splits]:
    data = pyro_vae.DataConfig(source=str(job.data), validation_size=1, max_value=255)
    splits = pyro_vae.load_data(data).to(job.device)
    model = pyro_vae.ModelConfig(
        latent_dim=LATENTS, hidden=(HIDDEN,), activation="Softplus", likelihood="bernoulli"
    )
    vae = pyro_vae.build(model, splits)
    assert isinstance(vae, pyro_vae.VAE)
    return vae.to(job.device), splits


def _exported(vae: pyro_vae.VAE) -> Weights:
    """In the form of `_Net`'s state dict."""
    names = {
        "mean": "encoder.mean",
        "std": "encoder.std",
        "encoder.0.weight": "encoder.layers.1.weight",
        "encoder.0.bias": "encoder.layers.1.bias",
        "encoder.2.weight": "encoder.layers.3.weight",
        "encoder.2.bias": "encoder.layers.3.bias",
        "decoder.0.weight": "decoder.layers.0.weight",
        "decoder.0.bias": "decoder.layers.0.bias",
        "decoder.2.weight": "decoder.layers.2.weight",
        "decoder.2.bias": "decoder.bias",
    }
    state = vae.state_dict()
    flat = ("mean", "decoder.2.bias")  # which here have the shape of an image
    return {
        name: (state[own].flatten() if name in flat else state[own]).cpu().numpy().copy()
        for name, own in names.items()
    }


class Ours:
    """`pyro_vae.fit`, whose epochs are those of one training. Validation is a single row."""

    compile = "on"

    def __init__(self, job: Job) -> None:
        _prepare(job)
        self.vae, splits = _built(job)
        config = pyro_vae.FitConfig(
            objective="trace" if job.particles == 1 else "iwae",
            num_particles=job.particles,
            epochs=job.epochs,
            batch_size=job.batch_size,
            learning_rate=LEARNING_RATE,
            schedule="constant",
            learning_rate_warmup=0.0,
            gradient_clip=math.inf,
            compile=self.compile,  # type: ignore[arg-type]
            precision=job.precision,  # type: ignore[arg-type]
        )
        self.records = pyro_vae.iterate(self.vae, splits, config)

    def epoch(self) -> None:
        next(self.records)
        _finish()

    def weights(self) -> Weights:
        return _exported(self.vae)


class OursEager(Ours):
    compile = "off"


class OursData:
    """What `pyro_vae.fit` does for its batches."""

    def __init__(self, job: Job) -> None:
        _prepare(job)
        self.train, self.batch_size = _built(job)[1].train, job.batch_size

    def epoch(self) -> None:
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(self.train)))
        for index in order.split(self.batch_size):
            self.train.take(index, "binary")
        _finish()

    def weights(self) -> None:
        return None


class _Loop:
    """Data in memory, shuffled and sliced: no DataLoader, which would cost more than the rest."""

    def __init__(self, job: Job) -> None:
        _prepare(job)
        torch.manual_seed(0)
        self.job = job
        self.grey = torch.from_numpy(job.images()).to(job.device)
        self.net = _Net(job.particles)
        self.net.load_state_dict({k: torch.from_numpy(v) for k, v in job.initial().items()})
        self.net.to(job.device)

    def epoch(self) -> None:
        order = torch.randperm(len(self.grey), device=self.grey.device)
        for index in order.split(self.job.batch_size):
            with _products(self.job):
                self.step(self.grey[index])
        _finish()

    def step(self, grey: Tensor) -> None:
        raise NotImplementedError

    def weights(self) -> Weights:
        return {name: value.cpu().numpy().copy() for name, value in self.net.state_dict().items()}


class _Net(nn.Module):
    """The networks; as a function, the loss of grey images, binarized here."""

    mean: Tensor
    std: Tensor

    def __init__(self, particles: int) -> None:
        super().__init__()
        self.particles = particles
        pixels = 28 * 28
        self.register_buffer("mean", torch.zeros(pixels))
        self.register_buffer("std", torch.ones(()))
        self.encoder = nn.Sequential(
            nn.Linear(pixels, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, 2 * LATENTS)
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENTS, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, pixels)
        )

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and log standard deviations."""
        loc, log_scale = self.encoder((x - self.mean) / self.std).float().chunk(2, dim=-1)
        return loc, log_scale

    def forward(self, grey: Tensor) -> Tensor:
        x = _binarized(grey)
        loc, log_scale = self.posterior(x)
        if self.particles == 1:
            noise = torch.randn_like(loc)
            z = loc + log_scale.exp() * noise
            logits = self.decoder(z).float()
            kl = 0.5 * (z.square() - noise.square()) - log_scale  # log q(z|x) − log p(z)
            return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") + kl.sum()
        noise = torch.randn(self.particles, *loc.shape, device=loc.device)
        z = loc + log_scale.exp() * noise
        logits = self.decoder(z).float()
        cross = F.binary_cross_entropy_with_logits(
            logits, x.expand_as(logits), reduction="none"
        ).sum(-1)
        # log p(z) − log q(z|x), less the constants that cancel
        log_w = (0.5 * (noise.square() - z.square()) + log_scale).sum(-1) - cross
        return (math.log(self.particles) - log_w.logsumexp(0)).sum()


class InTorch(_Loop):
    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.loss = self.net
        self.adam = torch.optim.Adam(self.net.parameters(), lr=LEARNING_RATE, fused=True)

    def step(self, grey: Tensor) -> None:
        self.adam.zero_grad()
        self.loss(grey).backward()
        self.adam.step()


class InTorchCompiled(InTorch):
    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.loss = torch.compile(self.net, dynamic=False)


class InPyro(_Loop):
    """As Pyro's tutorial "Variational Autoencoders" has it, but logits and one encoder head.

    Validation is off, which is faster.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        pyro.clear_param_store()
        pyro.enable_validation(False)
        optimizer = pyro.optim.Adam({"lr": LEARNING_RATE})
        # One for each size of batch, since a trace of torch.jit holds for one.
        sizes = {job.batch_size, len(self.grey) % job.batch_size}
        self.svis = {n: SVI(self.model, self.guide, optimizer, self.elbo(job)) for n in sizes}

    def elbo(self, job: Job) -> ELBO:
        if job.particles == 1:
            return Trace_ELBO()
        return RenyiELBO(
            alpha=0, num_particles=job.particles, vectorize_particles=True, max_plate_nesting=1
        )

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.net.decoder)
        with pyro.plate("data", x.shape[0]):
            shape = torch.Size((x.shape[0], LATENTS))
            z = pyro.sample("z", dist.Normal(x.new_zeros(shape), x.new_ones(shape)).to_event(1))
            logits = self.net.decoder(z).float()
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.net.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.net.posterior(x)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def step(self, grey: Tensor) -> None:
        self.svis[len(grey)].step(_binarized(grey))


class InPyroJit(InPyro):
    def elbo(self, job: Job) -> ELBO:
        if job.particles > 1:
            raise NotImplementedError("Pyro has no RenyiELBO under torch.jit")
        return JitTrace_ELBO(ignore_jit_warnings=True)


class Floor:
    """The products of a training step alone: no activation, no draw, no loss, no optimizer.

    By the faster of torch.mm and oneDNN.
    """

    def __init__(self, job: Job) -> None:
        _prepare(job)
        with np.load(job.data) as arrays:
            steps, rest = divmod(len(arrays["x_train"]) - 1, job.batch_size)
        self.steps = [_step_products(job, job.batch_size)] * steps
        if rest:
            self.steps.append(_step_products(job, rest))
        self.multiply = _fastest(self.steps[0])

    def epoch(self) -> None:
        for step in self.steps:
            for factors in step:
                self.multiply(*factors)
        _finish()

    def weights(self) -> None:
        return None


Multiply = Callable[[Tensor, Tensor, Tensor], object]


def _by_onednn(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return torch.ops.pyro_vae.product(a, b)


def _by_torch(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    return torch.mm(a, b, out=out)


def _fastest(products: list[tuple[Tensor, Tensor, Tensor]]) -> Multiply:
    """The faster way to compute some products; torch.mm calls oneDNN itself for bfloat16."""
    a, _, _ = products[0]
    if a.dtype != torch.float32 or a.device.type != "cpu":
        return _by_torch

    def seconds(multiply: Multiply) -> float:
        times = []
        for _ in range(7):
            started = time.perf_counter()
            for factors in products:
                multiply(*factors)
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    return min((_by_torch, _by_onednn), key=seconds)


def _step_products(job: Job, batch: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(a, b, a·b) of each product: outputs, gradients of weights and, but for x, of inputs."""
    rows = batch * job.particles
    layers = [(batch, 28 * 28, HIDDEN), (batch, HIDDEN, 2 * LATENTS)]
    layers += [(rows, LATENTS, HIDDEN), (rows, HIDDEN, 28 * 28)]
    products = []
    for i, (n, inputs, outputs) in enumerate(layers):
        x, weight, y = _random(job, n, inputs), _random(job, outputs, inputs), _random(job, n, 1)
        y = y.expand(n, outputs).contiguous()
        products += [(x, weight.t(), y.clone()), (y.t(), x, weight.clone())]
        if i > 0:
            products.append((y, weight, x.clone()))
    return products


class Evidence:
    """`pyro_vae.importance_sample` of `batch_size` images by `particles` samples each.

    Compiled, as it is by default where there are more of them.
    """

    def __init__(self, job: Job) -> None:
        _prepare(job)
        self.job = job
        self.vae, splits = _built(job)
        self.x = torch.cat(list(splits.test.fixed("binary", 0, job.batch_size)))

    def epoch(self) -> None:
        with _products(self.job):
            pyro_vae.importance_sample(self.vae, self.x, self.job.particles, mode="compiled")
        _finish()

    def weights(self) -> None:
        return None


class EvidenceFloor:
    """The decoder's products on as many rows, in chunks of the size that is fastest."""

    def __init__(self, job: Job) -> None:
        _prepare(job)
        self.job = job
        self.up, self.out = _random(job, LATENTS, HIDDEN), _random(job, HIDDEN, 28 * 28)
        shapes = [(2048, LATENTS), (2048, HIDDEN), (2048, 28 * 28)]
        z, hidden, x = (_random(job, *shape) for shape in shapes)
        self.multiply = _fastest([(z, self.up, hidden), (hidden, self.out, x)])
        self.size = min((2**i for i in range(7, 15)), key=self._seconds)

    def _seconds(self, size: int) -> float:
        """Of many rows, the same for each size."""
        self._multiply(size, size)
        started = time.perf_counter()
        self._multiply(2**15, size)
        return time.perf_counter() - started

    def _multiply(self, rows: int, size: int) -> None:
        shapes = [(size, LATENTS), (size, HIDDEN), (size, 28 * 28)]
        z, hidden, x = (_random(self.job, *shape) for shape in shapes)
        for _ in range(math.ceil(rows / size)):
            self.multiply(z, self.up, hidden)
            self.multiply(hidden, self.out, x)
        _finish()

    def epoch(self) -> None:
        self._multiply(self.job.batch_size * self.job.particles, self.size)

    def weights(self) -> None:
        return None


def _prepare(job: Job) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(job.threads)
    if job.precision != "bf16":
        torch.set_float32_matmul_precision(job.precision)


def _products(job: Job) -> AbstractContextManager[object]:
    """Of the job's precision, within; float32 ones have been set for the whole process."""
    return torch.autocast(job.device, torch.bfloat16) if job.precision == "bf16" else nullcontext()


def _random(job: Job, *shape: int) -> Tensor:
    """In the type that the job's products have."""
    kind = torch.bfloat16 if job.precision == "bf16" else torch.float32
    return torch.randn(shape, device=job.device).mul_(0.01).to(kind)


def _binarized(grey: Tensor) -> Tensor:
    return (torch.rand_like(grey) < grey).float()


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
