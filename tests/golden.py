"""A record of what the commands compute, to show that a change of structure changes no number.

    python tests/golden.py record DIR           # before a change
    python tests/golden.py check DIR [RUN …]    # after it, on the same machine

`record` trains short seeded runs and writes, for each, `metrics.jsonl` without timings, a digest of
the weights of both checkpoints, and the JSON of `evaluate` and, for three of them, of `diagnose
--quick`. `check` does the same with the package as it stands now and compares bit for bit. It also
evaluates the recorded run folders, which older code wrote. The record is not committed: platforms
round differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]

# Name → flags of `train`. The data of "table" are written beside the runs.
RUNS: dict[str, list[str]] = {
    "default": ["--epochs", "4"],
    "conv": ["--architecture", "conv", "--hidden", "8", "16", "--epochs", "2", "--patience", "1"],
    "autoencoder": ["--model", "ae", "--epochs", "3"],
    "dreg": ["--objective", "dreg", "--num-particles", "5", "--epochs", "2", "--latent-dim", "2"],
    "beta": ["--objective", "beta", "--beta", "2", "--kl-warmup", "0.5", "--epochs", "3"],
    "captured": ["--batch-size", "20", "--epochs", "8", "--kl-warmup", "0.2"],
    "compiled": ["--compile", "on", "--kl-warmup", "0.2", "--epochs", "3"],
    "table": ["--data", "table.npy", "--latent-dim", "3", "--hidden", "32", "--epochs", "20"],
    "resumed": ["--batch-size", "20", "--epochs", "6"],
}
DIAGNOSED = ("default", "dreg", "table")
TIMINGS = ("seconds", "images_per_second")
PROSE = ("effect", "meaning", "advice")  # sentences of a finding, not compared


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("record", "check"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("runs", nargs="*", default=list(RUNS), metavar="RUN")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if arguments.action == "record":
        folder.mkdir(parents=True)
        for name in arguments.runs:
            record = measure(name, folder)
            (folder / f"{name}.json").write_text(json.dumps(record, indent=1))
            print(f"{name}: recorded", flush=True)
        return 0
    different = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name in arguments.runs:
            before = json.loads((folder / f"{name}.json").read_text())
            found = differences(before, measure(name, Path(scratch)))
            old = command(folder, "evaluate", name, "--num-samples", "100", "--json")
            found += differences(before["evaluate"], json.loads(old), "evaluate of the old folder")
            print("\n  ".join([f"{name}: {'different' if found else 'equal'}", *found]), flush=True)
            different += bool(found)
    return int(different > 0)


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Train a run in `folder`, and return all that must not change."""
    rows = np.random.default_rng(0).normal(size=(400, 3)) @ [
        [1, 2, 0, 1],
        [0, 1, 1, 0],
        [2, 0, 1, 1],
    ]
    np.save(folder / "table.npy", rows)
    if name == "resumed":
        interrupted(folder, ["--out", name, *RUNS[name]], folder / name)
        command(folder, "train", "--resume", name)
    else:
        command(folder, "train", "--out", name, *RUNS[name])
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    result = {
        "metrics": [
            {k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines
        ],
        "weights": {
            which: digest(folder / name / "checkpoints" / which) for which in ("best.pt", "last.pt")
        },
        "evaluate": json.loads(command(folder, "evaluate", name, "--num-samples", "100", "--json")),
    }
    if name in DIAGNOSED:
        result["diagnose"] = json.loads(command(folder, "diagnose", name, "--quick", "--json"))
    return result


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(folder: Path, name: str, *flags: str) -> str:
    """Standard output of a command of the package beside this file."""
    process = subprocess.run(
        [sys.executable, "-m", f"pyro_vae.{name}", *flags],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise SystemExit(f"{name} {' '.join(flags)} failed:\n{process.stdout}{process.stderr}")
    return process.stdout


def interrupted(folder: Path, flags: list[str], run: Path) -> None:
    """Start a training and stop it by SIGINT after its second epoch."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pyro_vae.train", *flags],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    metrics = run / "metrics.jsonl"
    while process.poll() is None:
        if metrics.is_file() and metrics.read_text().count("\n") >= 2:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.05)
    status = process.wait()
    if status != 128 + signal.SIGINT:
        raise SystemExit(f"the interrupted training ended with status {status}")


def digest(checkpoint: Path) -> str:
    """Of a checkpoint's weights, by name."""
    import torch

    weights = torch.load(checkpoint, map_location="cpu", weights_only=True)["weights"]
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(name.encode() + weights[name].numpy().tobytes())
    return total.hexdigest()


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """Where two JSON values differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted((before.keys() | after.keys()) - set(PROSE))
        pairs = [(before.get(k, "missing"), after.get(k, "missing"), f"{where}.{k}") for k in keys]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [
            (b, a, f"{where}[{i}]") for i, (b, a) in enumerate(zip(before, after, strict=True))
        ]
    else:
        return [] if before == after else [f"{where}: {before!r} before, {after!r} now"]
    return [difference for pair in pairs for difference in differences(*pair)]


if __name__ == "__main__":
    sys.exit(main())
