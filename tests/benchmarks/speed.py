"""Speed of training: pyro_vae against Pyro, PyTorch by hand, NumPyro and the matrix products alone.

    python tests/benchmarks/speed.py                  # seconds an epoch, MNIST-shaped data
    python tests/benchmarks/speed.py --evidence       # log p(x) against its decoder's products
    python tests/benchmarks/speed.py --run            # the command `train`, from start to end
    python tests/benchmarks/speed.py --busy 1         # beside one process that is always busy
    python tests/benchmarks/speed.py --images 6000 --repeats 3 --contenders ours torch floor

All in one run: each contender has a process of its own, which lives as long as its measurements,
and only one of them works at a time, A, B, C, A, B, C, so that whatever else the machine does meets
all. The first epoch compiles, without a cache, and warms up; the ELBO is that of the weights after
it, on held-out rows, computed here, the same for all. Medians are over the later epochs; ratios are
medians of the ratios within a round. `idle` is the largest share of a CPU that a process took while
others were measured.

Everybody trains 784-400-50-400-784 with softplus on the same rows from the same initial weights
(those of `pyro_vae.build`), by Adam at 1e-3, each epoch in a new order, pixels binarized afresh at
each access, on one draw of z (the ELBO) or on 50 (the importance-weighted bound). All standardize
the encoder's input as pyro_vae does: without that an epoch ends dozens of nats lower. Precision is
highest unless a name says @medium or @bf16. No KL is in closed form.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from contenders import CONTENDERS, Job, Weights, work

TRAINING = ["ours", "ours@medium", "ours@bf16", "ours-eager", "pyro", "pyro-jit", "torch"]
TRAINING += ["torch-compile", "torch-compile@medium", "torch-compile@bf16", "numpyro", "data"]
TRAINING += ["floor", "floor@medium", "floor@bf16"]
EVIDENCE = [f"evidence{part}{p}" for p in ("", "@medium", "@bf16") for part in ("", "-floor")]

# Rows that the ELBO is computed on.
HELD_OUT = 1000

# Batches larger than this are not run with more than one particle.
LARGEST_WEIGHTED = 128


class Failed(Exception):
    """A contender's error; the others go on."""


class Worker:
    """A contender's process, seen from here."""

    def __init__(self, job: Job, cache: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, job, cache))
        self.process.start()
        other.close()

    def answer(self) -> Any:
        try:
            answer = self.connection.recv()
        except EOFError:
            raise Failed("the process died") from None
        if isinstance(answer, str):
            raise Failed(answer)
        return answer

    def ask(self, command: str) -> Any:
        self.connection.send(command)
        return self.answer()

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.send("end")
        self.connection.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def spin() -> None:
    """Keep one core busy."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    while True:
        pass


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Other processes that are busy during the block, as on a shared machine."""
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=spin, daemon=True) for _ in range(count)]
    try:
        for other in others:
            other.start()
        yield
    finally:
        for other in others:
            other.kill()
            other.join()


def measure(jobs: list[Job], folder: Path) -> dict[str, dict[str, Any]]:
    """Each job's times, in rounds; those that fail have an "error"."""
    results: dict[str, dict[str, Any]] = {job.contender: {"seconds": []} for job in jobs}
    workers: dict[str, Worker] = {}
    try:
        for turn in range(jobs[0].epochs):
            for job in jobs:
                name, result = job.contender, results[job.contender]
                if "error" in result:
                    continue
                print(f"\r  round {turn} of {job.epochs - 1}: {name:24}", end="", flush=True)
                try:
                    if turn == 0:
                        workers[name] = Worker(job, Path(tempfile.mkdtemp(dir=folder)))
                        workers[name].answer()
                    seconds, idle = workers[name].ask("epoch")
                    if turn > 0:
                        result["seconds"].append(seconds)
                        result["idle_cpu_seconds"].append(idle)
                        continue
                    result |= {"first_seconds": seconds, "idle_cpu_seconds": []}
                    weights = workers[name].ask("weights")
                    if weights is not None:
                        result |= evaluate(weights, job)
                except Failed as error:
                    result["error"] = str(error)
    except KeyboardInterrupt:
        for worker in workers.values():
            worker.process.kill()  # one of them is busy
        raise
    finally:
        for worker in workers.values():
            worker.end()
        print("\r" + " " * 60, end="\r", flush=True)
    return results


def evaluate(weights: Weights, job: Job) -> dict[str, float]:
    """ELBO (KL in closed form) and importance-weighted bound, nats a row, of the held-out rows.

    Binarization and draws are fixed: 8 of z, or as many as there were particles.
    """
    draws = np.random.default_rng(1)
    with np.load(job.data) as arrays:
        grey = arrays["x_test"][:HELD_OUT].reshape(-1, 28 * 28) / 255
    x = (draws.random(grey.shape) < grey).astype(np.float32)

    def layer(name: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def softplus(x: np.ndarray) -> np.ndarray:
        return np.logaddexp(x, np.float32(0))

    features = softplus(layer("encoder.0", (x - weights["mean"]) / weights["std"]))
    loc, log_scale = np.split(layer("encoder.2", features), 2, axis=1)
    kl = (0.5 * (np.exp(2 * log_scale) + loc**2 - 1) - log_scale).sum(1, dtype=np.float64)
    reconstructions, log_weights = [], []
    for _ in range(max(8, job.particles)):
        noise = draws.standard_normal(loc.shape, dtype=np.float32)
        z = loc + np.exp(log_scale) * noise
        logits = layer("decoder.2", softplus(layer("decoder.0", z)))
        reconstruction = -softplus(np.where(x > 0, -logits, logits)).sum(1, dtype=np.float64)
        ratio = (0.5 * (noise**2 - z**2) + log_scale).sum(1, dtype=np.float64)
        reconstructions.append(reconstruction)
        log_weights.append(reconstruction + ratio)
    result = {"elbo": float((np.mean(reconstructions, 0) - kl).mean())}
    if job.particles > 1:
        bound = np.logaddexp.reduce(log_weights) - math.log(len(log_weights))
        result["bound"] = float(bound.mean())
    return result


def ratio(one: dict[str, Any], other: dict[str, Any] | None) -> float | None:
    """How many times as long one takes, in the same rounds."""
    if not one["seconds"] or other is None or not other["seconds"]:
        return None
    return statistics.median(a / b for a, b in zip(one["seconds"], other["seconds"], strict=False))


def own_floor(name: str, floor: str = "floor") -> str:
    """The matrix products alone, at the precision of a contender."""
    return floor + name[len(name.partition("@")[0]) :]


def table(
    results: dict[str, dict[str, Any]], references: dict[str, Callable[[str], str]], count: int
) -> str:
    """Lines of a table.

    Args:
        results: by name.
        references: title → name → whose times the ratio is to.
        count: of images, or whatever else, in an epoch.
    """
    columns = ["median s", "min", "max", "per second", *(f"/ {title}" for title in references)]
    columns += ["first s", "ELBO", "bound", "idle"]
    lines = [" " * 24 + "".join(f"{column:>11}" for column in columns)]
    for name, result in results.items():
        if not result["seconds"]:
            lines.append(f"{name:24}  failed: {result.get('error', 'no time')[:100]}")
            continue
        seconds = result["seconds"]
        median = statistics.median(seconds)
        cells = [f"{median:.3f}", f"{min(seconds):.3f}", f"{max(seconds):.3f}"]
        cells.append(f"{count / median:,.0f}")
        ratios = [ratio(result, results.get(of(name))) for of in references.values()]
        cells += ["" if r is None else f"{r:.2f}" for r in ratios]
        cells.append(f"{result['first_seconds']:.1f}" if "first_seconds" in result else "")
        cells += [f"{result[key]:.2f}" if key in result else "" for key in ("elbo", "bound")]
        cells.append(f"{result['idle']:.0%}" if "idle" in result else "")
        lines.append(f"{name:24}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def add_idle(results: dict[str, dict[str, Any]]) -> None:
    """The largest share of a CPU that each took in the rounds while others were measured."""
    turns = zip(*(r["seconds"] for r in results.values() if "error" not in r), strict=False)
    rounds = [sum(seconds) for seconds in turns]
    for result in results.values():
        if "error" not in result and len(results) > 1:
            pairs = zip(
                result["idle_cpu_seconds"][1:], rounds[:-1], result["seconds"], strict=False
            )
            shares = [idle / max(whole - own, 1e-9) for idle, whole, own in pairs]
            if shares:
                result["idle"] = max(shares)


def train_part(arguments: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Each setting's results, as soon as there are any."""
    for particles in arguments.particles:
        images = arguments.images if particles == 1 else arguments.weighted_images
        data = write_data(folder / f"data-{images}.npz", images, arguments)
        for batch_size in arguments.batch_sizes:
            if particles > 1 and batch_size > LARGEST_WEIGHTED:
                continue
            jobs = make_jobs(arguments.contenders, data, batch_size, particles, arguments)
            results = measure(jobs, folder)
            add_idle(results)
            bound = "ELBO" if particles == 1 else f"importance-weighted bound of {particles}"
            print(f"\n{bound}, batch {batch_size}, {images:,} images an epoch")
            references = {"ours": lambda name: "ours", "own floor": own_floor}
            print(table(results, references, images), flush=True)
            yield {
                "batch_size": batch_size,
                "particles": particles,
                "images": images,
                "results": results,
                "ratios_to_ours": {n: ratio(r, results.get("ours")) for n, r in results.items()},
                "ratios_to_own_floor": {
                    n: ratio(r, results.get(own_floor(n))) for n, r in results.items()
                },
            }


def evidence_part(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    images, samples = arguments.evidence_images, arguments.evidence_samples
    data = write_data(folder / "data-evidence.npz", HELD_OUT, arguments)
    results = measure(make_jobs(EVIDENCE, data, images, samples, arguments), folder)
    print(f"\nlog p(x) of {images} images by {samples} samples; per second: images")
    floor = partial(own_floor, floor="evidence-floor")
    print(table(results, {"own floor": floor}, images), flush=True)
    return {
        "images": images,
        "samples": samples,
        "results": results,
        "ratios_to_own_floor": {n: ratio(r, results[floor(n)]) for n, r in results.items()},
    }


def run_part(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The command, from its start to its end, and where its time goes."""
    if arguments.data_root:
        source = ["--data", "mnist", "--data-root", str(arguments.data_root.absolute())]
    else:
        data = write_data(folder / "data-run.npz", arguments.images, arguments)
        source = ["--data", str(data), "--max-value", "255", "--likelihood", "bernoulli"]
    modes = ("off", "on", "auto")
    results: dict[str, dict[str, Any]] = {mode: {"seconds": [], "split": []} for mode in modes}
    for turn in range(arguments.run_repeats):
        for mode in modes:
            if "error" in results[mode]:
                continue
            out = folder / f"run-{mode}-{turn}"
            command = [sys.executable, "-m", "pyro_vae.train", *source, "--out", str(out)]
            command += ["--epochs", str(arguments.run_epochs), "--compile", mode]
            command += ["--device", arguments.device]
            environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
            environment["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=folder)
            started = time.perf_counter()
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            seconds = time.perf_counter() - started
            if done.returncode:
                results[mode]["error"] = (done.stderr.strip() or "failed").splitlines()[-1]
                continue
            results[mode]["seconds"].append(seconds)
            said = re.search(r"([\d,]+) training", done.stdout)
            images = int(said[1].replace(",", "")) if said else 0
            results[mode]["split"].append(split(out / "metrics.jsonl", images, seconds))
    print(f"\npython -m pyro_vae.train, {arguments.run_epochs} epochs, --compile …")
    print(table(results, {"off": lambda mode: "off"}, arguments.run_epochs))
    for mode, result in results.items():
        parts = result["split"]
        if parts:
            medians = {key: statistics.median(part[key] for part in parts) for key in parts[0]}
            cells = ", ".join(f"{key} {value:.1f} s" for key, value in medians.items())
            print(f"{mode:6} {cells}", flush=True)
    return {"epochs": arguments.run_epochs, "results": results}


def split(metrics: Path, images: int, wall: float) -> dict[str, float]:
    """Where a run's time went, from its metrics; steps include the gathering of their batches."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    first, *others = [images / line["images_per_second"] for line in lines]
    extra = first - statistics.median(others) if others else 0.0
    within = lines[-1]["seconds"]
    return {
        "steps": first + sum(others) - extra,
        "first epoch's extra": extra,
        "validation": within - first - sum(others),
        "start, figures, files": wall - within,
    }


def write_data(path: Path, images: int, arguments: argparse.Namespace) -> Path:
    """MNIST where it is given, else grey images of a fixed random decoder of ten latents."""
    if path.exists():
        return path
    if arguments.data_root:
        import pyro_vae

        splits = pyro_vae.load_data(pyro_vae.DataConfig("mnist", arguments.data_root))
        if images >= len(splits.train):
            raise SystemExit(f"--images expects fewer than {len(splits.train):,} with --data-root")
        parts = [(splits.train, images + 1), (splits.test, HELD_OUT)]
        train, test = (
            np.concatenate([x.numpy() for x in split.fixed("count", 0, count)]).astype(np.uint8)
            for split, count in parts
        )
    else:
        draws = np.random.default_rng(0)
        inner, outer = draws.standard_normal((10, 64)), draws.standard_normal((64, 28 * 28))
        z = draws.standard_normal((HELD_OUT + images + 1, 10))
        logits = np.tanh(z @ inner / math.sqrt(10)).astype(np.float32) @ outer.astype(np.float32)
        grey = 1 / (1 + np.exp(2 - logits))
        values = np.rint(255 * grey).astype(np.uint8).reshape(-1, 1, 28, 28)
        test, train = values[:HELD_OUT], values[HELD_OUT:]
    np.savez(path, x_train=train, x_test=test)
    return path


def make_jobs(
    names: list[str],
    data: Path,
    batch_size: int,
    particles: int,
    arguments: argparse.Namespace,
) -> list[Job]:
    weights = data.with_suffix(".weights.npz")
    jobs = [
        Job(
            contender=name,
            data=data,
            weights=weights,
            batch_size=batch_size,
            particles=particles,
            epochs=1 + arguments.repeats,
            threads=arguments.threads,
            device=arguments.device,
        )
        for name in names
    ]
    if not weights.exists():
        from in_torch import initial_weights

        np.savez(weights, **initial_weights(jobs[0]))  # type: ignore[arg-type]
    return jobs


def machine() -> dict[str, Any]:
    """Where and with what this ran."""

    def read(path: str, key: str) -> str | None:
        with contextlib.suppress(OSError):
            lines = Path(path).read_text().splitlines()
            return next((line.partition(":")[2].strip() for line in lines if key in line), None)
        return None

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    def git(*command: str) -> str | None:
        folder = Path(__file__).parent
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.check_output(
                ["git", *command], cwd=folder, text=True, stderr=subprocess.DEVNULL
            ).strip()
        return None

    names = ["pyro-vae", "torch", "pyro-ppl", "numpy", "numpyro", "jax", "jaxlib"]
    return {
        "platform": platform.platform(),
        "cpu": read("/proc/cpuinfo", "model name"),
        "cpus": os.cpu_count(),
        "memory": read("/proc/meminfo", "MemTotal"),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in names},
        "commit": git("rev-parse", "HEAD"),
        "changed_files": (git("status", "--short") or "").splitlines(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add = parser.add_argument
    add("--threads", type=int, default=cpus, help="of each process (default: all CPUs)")
    add("--busy", type=int, default=0, help="busy processes beside each contender")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--repeats", type=int, default=5, help="timed rounds")
    add("--batch-sizes", type=int, nargs="+", default=[20, 128, 256, 1024])
    add("--particles", type=int, nargs="+", default=[1, 50])
    add("--images", type=int, default=50_000, help="rows of an epoch")
    add("--weighted-images", type=int, help="the same for several particles (a tenth)")
    add("--contenders", nargs="+", default=TRAINING, metavar="NAME[@PRECISION]")
    add("--data-root", type=Path, help="folder of MNIST (default: synthetic images)")
    add("--json", type=Path, default=Path("speed.json"))
    add("--evidence", action="store_true", help="measure log_evidence in place of training")
    add("--evidence-images", type=int, default=20)
    add("--evidence-samples", type=int, default=5000)
    add("--run", action="store_true", help="measure the command in place of training")
    add("--run-epochs", type=int, default=20)
    add("--run-repeats", type=int, default=3)
    arguments = parser.parse_args()
    unknown = {name.partition("@")[0] for name in arguments.contenders} - set(CONTENDERS)
    if unknown:
        parser.error(f"--contenders expects some of {', '.join(CONTENDERS)}; got {unknown}")
    arguments.weighted_images = arguments.weighted_images or arguments.images // 10
    return arguments


def main() -> int:
    arguments = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the workers, as Ctrl-C does
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(arguments).items()
    }
    report: dict[str, Any] = {
        "command": sys.argv,
        "machine": machine(),
        "settings": settings,
        "protocol": __doc__,
        "contenders": {name: text for name, (_, _, text) in CONTENDERS.items()},
    }

    def write() -> None:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")

    print(
        f"{report['machine']['cpu']}, {arguments.threads} threads, {arguments.device}; "
        + ", ".join(f"{k} {v}" for k, v in report["machine"]["versions"].items() if v)
    )
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        busy(arguments.busy),
    ):
        try:
            if arguments.evidence:
                report["evidence"] = evidence_part(arguments, Path(folder))
                write()
            if arguments.run:
                report["run"] = run_part(arguments, Path(folder))
                write()
            if not (arguments.evidence or arguments.run):
                report["training"] = []
                for setting in train_part(arguments, Path(folder)):
                    report["training"].append(setting)
                    write()
        except KeyboardInterrupt:
            print("\nstopped; what was complete is in", arguments.json)
            return 130
    print(f"\n{arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
