"""Evaluate a run: ELBO, importance-sampled log p(x), bits per dimension, active units.

The densities of a conditional model are those given the label of each row. Of a semi-supervised
one, labels are summed out, and its accuracy is reported with a 95% interval.

The default split is the test split, which training does not use. With a Bernoulli likelihood, grey
images are binarized once, by the seed.

  python -m pyro_vae.evaluate runs/digits
  python -m pyro_vae.evaluate runs/mnist --num-samples 500 --num-images 1000 --json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from .cli import RunArguments, open_run, parse, print_json, run_command
from .config import InputError, auto
from .config.options import check_integer


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments(RunArguments):
    """Arguments of `evaluate`.

    Attributes:
        num_samples: Number of importance samples of z per row (K).
        split: Split to evaluate.
        num_images: Number of rows, from the beginning of the split.
        json: Print the numbers as JSON.
    """

    num_samples: int = 5000
    split: Literal["train", "validation", "test"] = "test"
    num_images: Annotated[int | None, auto("INT", "all")] = None
    json: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("num-samples", self.num_samples)
        check_integer("num-images", self.num_images)


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _main(parse(EvaluateArguments, argv, "evaluate", __doc__)))


def _main(arguments: EvaluateArguments) -> None:
    run = open_run(arguments)
    split = getattr(run.splits, arguments.split)
    count = len(split) if arguments.num_images is None else arguments.num_images
    if not len(split):
        raise InputError(f"--split {arguments.split} is empty: all rows of --data are test rows")
    if count > len(split):
        raise InputError(
            f"--num-images expects at most {len(split)}, the rows of the {arguments.split} split; "
            f"got {count}"
        )

    from tqdm import tqdm

    from .evidence.evaluation import evaluate, num_pairs
    from .models.autoencoder import Autoencoder

    hidden = True if isinstance(run.vae, Autoencoder) else None  # None: hidden without a terminal
    total = num_pairs(run.vae, count, arguments.num_samples)
    with tqdm(total=total, unit="sample", unit_scale=True, disable=hidden) as bar:
        result = evaluate(
            run.vae,
            split,
            arguments.num_samples,
            count,
            run.seed,
            on_chunk=bar.update,
            on_batch=lambda elbo, density: bar.set_postfix(
                {"ELBO": f"{elbo:.2f}", "log p(x)": f"{density:.2f}"}
            ),
        )
    likelihood = run.checkpoint.config.model.likelihood
    values = {**asdict(result), "split": arguments.split, "likelihood": likelihood}
    values |= values.pop("accuracies") or {}
    if run.checkpoint.model.condition != "none":
        values["condition"] = run.checkpoint.model.condition
    spec = run.splits.spec
    if spec.log_scale:
        values["nats_to_units_of_data"] = -spec.log_scale
    if arguments.json:
        print_json(values)
    else:
        print(run.checkpoint.path)
        print(_table(values, run.splits.name))
        if units := spec.describe_units():
            print(f"  {units}")


def _table(values: dict[str, Any], name: str) -> str:
    """The protocol, followed by the numbers."""
    protocol = f"{values['num_images']:,} {values['split']} rows of {name}"
    if values["binarization"] != "none":
        protocol += f", binarized once ({values['binarization']})"
    lines = [f"{protocol}; likelihood {values['likelihood']}; nats per row"]
    if values.get("condition") == "label":
        lines[0] += "; densities given the label of each row, as log p(x|y)"
    for label, key, remark in (
        ("ELBO", "elbo", ""),
        ("reconstruction", "reconstruction", "E_q[log p(x|z)]"),
        ("KL(q(z|x) ‖ p(z))", "kl", ""),
        ("log p(x)", "log_evidence", f"{values['num_samples']} importance samples per row"),
        ("  standard error", "standard_error", "over rows"),
        ("  Monte Carlo error", "monte_carlo_error", "from the importance weights"),
        ("  unreliable weights", "unreliable_weights", "share of rows with heavy-tailed weights"),
        ("bits per dimension", "bits_per_dim", "from log p(x)"),
        ("active units", "active_units", "latents whose posterior mean varies"),
    ):
        value = values[key]
        if value is not None:
            text = f"{value:10.3f}" if abs(value) < 1e9 else f"{value:10.4g}"
            text = f"{value:10d}" if isinstance(value, int) else text
            lines.append(f"  {label:<20}{text}   {remark}".rstrip())
    for label, key, of in (
        ("accuracy", "accuracy", "of q(y|x)"),
        ("Bayes accuracy", "bayes_accuracy", "of p(y|x), the model's own classifier"),
    ):
        if key in values:
            low, high = values[f"{key}_low"], values[f"{key}_high"]
            lines.append(
                f"  {label:<20}{values[key]:10.4f}   [{low:.4f}, {high:.4f}] {of}, "
                f"{values['num_labelled']:,} rows with a label"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
