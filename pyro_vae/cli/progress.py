"""What `train` shows of a run: the data and the model, then its progress."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

    from ..training.records import Progress
    from ..training.run import RunFolder


def show(bar: tqdm[Any], progress: Progress) -> None:
    """Update the progress bar."""
    if bar.total is None:
        bar.reset(total=progress.epochs * progress.steps_per_epoch)
        bar.update(progress.step - 1)
    bar.update()
    bar.set_description(f"epoch {progress.epoch}/{progress.epochs}", refresh=False)
    parts = {"ELBO": progress.elbo, "rec": progress.reconstruction, "KL": progress.kl}
    shown = {key: f"{value:.2f}" for key, value in parts.items() if value is not None}
    bar.set_postfix({**shown, "rows/s": f"{progress.images_per_second:,.0f}"}, refresh=False)


def say(line: dict[str, Any], epochs: int) -> None:
    """Print an epoch if there is no progress bar; in long runs, about 20 epochs in all."""
    from ..training.records import summary

    if line["epoch"] % max(1, epochs // 20) == 0 or line["epoch"] == 1:
        print(summary(line, epochs), flush=True)


def add_scalars(writer: Any, line: dict[str, Any]) -> None:
    for name, value in line.items():
        if value is not None and name not in ("epoch", "step"):
            writer.add_scalar(name, value, line["epoch"])


def describe(run: RunFolder) -> None:
    """Print data, model and run folder before the training."""
    from ..data.columns import describe_columns
    from ..training.modes import run_mode

    splits, model, spec = run.splits, run.config.model, run.splits.spec
    sizes = " ".join(str(size) for size in model.hidden or ()) or "without hidden layers"
    count = sum(p.numel() for p in run.vae.parameters())
    binarized = spec.binarizes(run.vae.likelihood_module.units)
    binarization = " (binarized at random at each access)" if binarized else ""
    print(
        f"data   {splits.name}: {len(splits.train):,} training, {len(splits.validation):,} "
        f"validation, {len(splits.test):,} test rows of {'x'.join(map(str, spec.shape))}, "
        f"{splits.describe()}"
        f"{f', {len(splits.class_names)} classes' if splits.class_names else ''}"
    )
    notes = (splits.found, *describe_columns(splits), _labels(run), spec.describe_units())
    for line in filter(None, notes):
        print(f"       {line}")
    print(
        f"model  {model.kind}: {model.architecture} {sizes}, {model.latent_dim} latents, "
        f"likelihood {model.likelihood}{binarization}, "
        f"{count:,} parameters on {next(run.vae.parameters()).device}"
    )
    inferred = model.condition == "partial"
    if inferred:
        print("graph  none: the sum over labels leaves out those of probability 0")
    if run_mode(run.config.fit, splits.train, inferred) == "compiled":
        print("graph  the ELBO is compiled first, which takes about 10 seconds")
    print(f"run    {run.path}", flush=True)


def _labels(run: RunFolder) -> str:
    """How the model uses the labels of the training rows, or nothing."""
    train, condition = run.splits.train, run.config.model.condition
    if condition == "none" or train.labels is None:
        return ""
    known = len(train.labelled)
    if condition == "label":
        return "the model is conditional on the label"
    return (
        f"{known:,} training rows with a label; the labels of {len(train) - known:,} are inferred"
    )


def summary_writer() -> Any:
    """TensorBoard's writer class."""
    from ..runtime.packages import of_extra

    reason = "--tensorboard requires a package"
    return of_extra("torch.utils.tensorboard", "tensorboard", reason).SummaryWriter
