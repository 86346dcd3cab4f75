"""Evaluate a run: ELBO, importance-sampled log-evidence, bits per dimension, active units.

The test split is used, which no choice of the training has seen. Grey images under a Bernoulli
likelihood are binarized once, fixed by the run's seed.

  python -m pyro_vae.evaluate runs/digits
  python -m pyro_vae.evaluate runs/mnist --num-samples 500 --num-images 1000 --json
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .command import choose_device, load_run_data, parse, print_json, run_command
from .config import InputError, auto, check_seed

if TYPE_CHECKING:
    from .autoencoder import Autoencoder
    from .data import Split
    from .vae import VAE


@dataclass(frozen=True)
class EvaluateArguments:
    """What to evaluate.

    Attributes:
        run: Run folder, or a checkpoint file.
        num_samples: Number of importance samples of z an image (K).
        split: Which rows to evaluate on.
        num_images: Number of rows, taken from the beginning of the split.
        data: Other data in place of the run's own; all its rows are evaluated.
        data_root: Folder of torchvision's data sets.
        seed: Seed of the importance samples and of the binarization.
        device: Where to compute: cpu, cuda, cuda:1, or auto (cuda where there is one).
        json: Print the numbers as JSON.
    """

    run: Annotated[Path, tyro.conf.Positional]
    num_samples: int = 5000
    split: Literal["train", "validation", "test"] = "test"
    num_images: Annotated[int | None, auto("INT", "all")] = None
    data: Annotated[str | None, auto("NAME|PATH", "the run's own")] = None
    data_root: Annotated[Path | None, auto("DIR", "the run's own")] = None
    seed: Annotated[int | None, auto("INT", "the run's own")] = None
    device: str = "auto"
    json: bool = False

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.num_samples < 1:
            raise InputError(f"--num-samples expects at least 1; got {self.num_samples}")
        if self.num_images is not None and self.num_images < 1:
            raise InputError(f"--num-images expects at least 1; got {self.num_images}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(parse(EvaluateArguments, argv, "evaluate", __doc__)))


def _main(arguments: EvaluateArguments) -> None:
    from .checkpoint import load_checkpoint

    device = choose_device(arguments.device)
    checkpoint = load_checkpoint(arguments.run)
    splits = load_run_data(checkpoint, arguments.data, arguments.data_root).to(device)
    split: Split = getattr(splits, arguments.split)
    if not len(split):
        raise InputError(f"--split {arguments.split} is empty: all rows of --data are test rows")
    if arguments.num_images is not None and arguments.num_images > len(split):
        raise InputError(
            f"--num-images expects at most {len(split)}, the rows of the {arguments.split} split; "
            f"got {arguments.num_images}"
        )
    seed = checkpoint.config.seed if arguments.seed is None else arguments.seed
    vae = checkpoint.vae.to(device)
    results = evaluate(vae, split, arguments.num_samples, arguments.num_images, seed)
    results["split"] = arguments.split
    results["likelihood"] = checkpoint.config.model.likelihood
    if arguments.json:
        print_json(results)
    else:
        print(_table(results, splits.name, str(checkpoint.path)))


def evaluate(
    vae: VAE | Autoencoder,
    split: Split,
    num_samples: int = 5000,
    num_images: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a model on the first `num_images` rows of a split.

    Returns:
        Means over images, nats per image: `elbo` = `reconstruction` − `kl` (reconstruction over
        `num_samples` draws of z, KL in closed form) and `log_evidence`. `standard_error` of the
        mean log-evidence over images, as a sample of their population; `monte_carlo_error` of the
        same mean for these very images, from the importance weights; `unreliable_weights`, the
        share of images whose weights have too heavy a tail for that error, and for log p(x), to be
        relied on (`evidence.reliable_k`). `bits_per_dim` = −log p(x) / (D log 2) where the data are
        discrete. None where the model or the likelihood has no such number.
    """
    import torch
    from tqdm import tqdm

    from .evidence import MIN_TAIL_SAMPLES, choose_mode, importance_sample, reliable_k
    from .latents import ACTIVE_VARIANCE
    from .randomness import derive, random_states
    from .svi import elbo_terms
    from .vae import VAE

    likelihood = vae.likelihood_module
    count = min(len(split), num_images or len(split))
    binarized = split.spec.binarizes(likelihood.units)
    results: dict[str, Any] = dict.fromkeys(
        [
            "elbo",
            "reconstruction",
            "kl",
            "log_evidence",
            "standard_error",
            "monte_carlo_error",
            "unreliable_weights",
            "bits_per_dim",
            "active_units",
        ]
    )
    results["num_images"] = count
    results["num_samples"] = num_samples
    results["binarization"] = f"fixed, seed {seed}" if binarized else "none"
    if not isinstance(vae, VAE):
        results["reconstruction"] = elbo_terms(vae, split, seed, count)[0]
        results["num_samples"] = None
        return results
    log_evidence, errors, reconstructions, kls, means, tails = [], [], [], [], [], []
    mode = choose_mode(count * num_samples * math.prod(split.spec.shape))
    bar = tqdm(total=count * num_samples, unit="sample", unit_scale=True, disable=None)
    with bar, random_states(split.device, derive(seed, "posterior")), torch.no_grad():
        for x in split.fixed(likelihood.units, seed, count):
            evidence = importance_sample(
                vae,
                x,
                num_samples,
                bar.update,
                with_pareto_k=num_samples >= MIN_TAIL_SAMPLES,
                mode=mode,
            )
            posterior = vae.posterior(x)
            log_evidence.append(evidence.log_evidence)
            errors.append(evidence.standard_error)
            if evidence.pareto_k is not None:
                tails.append(evidence.pareto_k)
            reconstructions.append(evidence.reconstruction)
            kls.append(torch.distributions.kl_divergence(posterior, vae.prior()).double())
            means.append(posterior.mean.double())
            elbo = (torch.cat(reconstructions) - torch.cat(kls)).mean()
            bar.set_postfix(
                {"ELBO": f"{elbo:.2f}", "log p(x)": f"{torch.cat(log_evidence).mean():.2f}"}
            )
    evidences = torch.cat(log_evidence)
    results["reconstruction"] = torch.cat(reconstructions).mean().item()
    results["kl"] = torch.cat(kls).mean().item()
    results["elbo"] = results["reconstruction"] - results["kl"]
    results["log_evidence"] = evidences.mean().item()
    if count > 1:
        results["standard_error"] = (evidences.std() / math.sqrt(count)).item()
        variances = torch.cat(means).var(0)
        results["active_units"] = int((variances > ACTIVE_VARIANCE).sum())
    if num_samples > 1:
        results["monte_carlo_error"] = torch.cat(errors).square().sum().sqrt().item() / count
    if tails:
        unreliable = torch.cat(tails) > reliable_k(num_samples)
        results["unreliable_weights"] = unreliable.double().mean().item()
    if likelihood.is_discrete:
        size = math.prod(split.spec.shape)
        results["bits_per_dim"] = -results["log_evidence"] / (size * math.log(2))
    return results


def _table(results: dict[str, Any], name: str, path: str) -> str:
    """The numbers and their protocol, for people."""
    protocol = f"{results['num_images']:,} {results['split']} images of {name}"
    if results["binarization"] != "none":
        protocol += f", binarized once ({results['binarization']})"
    lines = [path, f"{protocol}; likelihood {results['likelihood']}; nats per image"]
    rows = [
        ("ELBO", "elbo", ""),
        ("reconstruction", "reconstruction", "E_q[log p(x|z)]"),
        ("KL(q(z|x) ‖ p(z))", "kl", ""),
        ("log p(x)", "log_evidence", f"{results['num_samples']} importance samples an image"),
        ("  standard error", "standard_error", "over images"),
        ("  Monte Carlo error", "monte_carlo_error", "from the importance weights"),
        (
            "  unreliable weights",
            "unreliable_weights",
            "share of images with a heavy tail of weights",
        ),
        ("bits per dimension", "bits_per_dim", "from log p(x)"),
        ("active units", "active_units", "latents whose posterior mean moves with x"),
    ]
    for label, key, remark in rows:
        value = results[key]
        if value is not None:
            text = f"{value:10d}" if isinstance(value, int) else f"{value:10.3f}"
            lines.append(f"  {label:<20}{text}   {remark}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
