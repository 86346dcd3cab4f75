"""Random settings on random data: a finished run of finite numbers, or one line that says why not.

By default a few examples, the same each time. `FUZZ_EXAMPLES=1000 pytest -n0 tests/test_fuzz.py`
draws others, as many as asked for.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import pyro_vae
from pyro_vae import encode, evaluate, generate, train
from pyro_vae.config.options import OBJECTIVE_OPTIONS, Objective
from pyro_vae.training.records import Diverged

EXAMPLES = os.environ.get("FUZZ_EXAMPLES")
pytestmark = pytest.mark.timeout(0 if EXAMPLES else 120)
bounded = settings(
    max_examples=int(EXAMPLES or 16),
    derandomize=EXAMPLES is None,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

# Settings by section and name: valid values, and values that are refused.
INTEGERS = [0, -1, 2**63, 10**400, True, 1.5, "2", []]
NUMBERS = [0.0, -0.0, -1.0, 1e308, 1e400, float("nan"), 10**400, False, "x"]
SETTINGS: dict[tuple[str, str], tuple[list[Any], list[Any]]] = {
    ("model", "kind"): (["vae", "ae"], ["gan", 1]),
    ("model", "architecture"): (["mlp", "conv"], ["rnn", None]),
    ("model", "latent_dim"): ([1, 2, 7], [*INTEGERS, 2**62]),
    ("model", "hidden"): ([[1], [4, 3], [2, 2, 2], []], [[0], [4, -1], [2**63], [True], [2**62]]),
    ("model", "guide"): (
        ["full", "flow transforms=1 hidden=3", "mixture components=2", "mixture", "diagonal"],
        ["fulll", "", "flow transforms=0", "mixture components=1e9", "full x=1", "mixture 3"],
    ),
    ("model", "prior"): (
        [
            *("mixture components=3 covariance=full", "vamp components=2", "vamp"),
            *("flow transforms=1 hidden=3", "normal"),
        ],
        ["none", "flow hidden=2000", "vamp components=-1", "mixture covariance=1", "flow =", "="],
    ),
    ("model", "encoder_hidden"): ([[1], [4, 3], []], [[0], [4, -1], [True]]),
    ("model", "activation"): (["ReLU", "Tanh", "Softplus", "ELU"], ["", "Linear", "a\nb", "RNN"]),
    ("model", "likelihood"): (
        [
            "bernoulli",
            "continuous-bernoulli",
            "binomial",
            "gaussian",
            "discretized-logistic",
            "auto",
        ],
        ["poisson", 3],
    ),
    ("data", "image_size"): ([2, [2, 2], [2, 3], [1, 4]], [0, [0, 1], [1, 2, 3], 2**63, "2"]),
    ("data", "max_value"): ([1, 2, 16, 255, 4095, 2**62], INTEGERS),
    ("data", "validation_size"): ([1, 2, 5], [*INTEGERS, 10**9]),
    ("data", "test_size"): ([1, 2, 5], [*INTEGERS, 10**9]),
    ("fit", "num_particles"): ([1, 2, 8], [*INTEGERS, 10**11]),
    ("fit", "batch_size"): ([1, 2, 5, 256], [*INTEGERS, 10**6]),
    ("fit", "learning_rate"): ([1e-3, 5e-324, 1e-2], [*NUMBERS, float("inf")]),
    ("fit", "schedule"): (["cosine", "constant"], ["step"]),
    ("fit", "learning_rate_warmup"): ([0.0, -0.0, 0.5, 1.0], [-0.1, 1.5, float("nan"), True]),
    ("fit", "gradient_clip"): ([5e-324, 1.0, 3e38, float("inf")], NUMBERS[:3]),
    ("fit", "kl_warmup"): ([0.0, 0.5, 1.0], [-0.1, 1.5, float("nan")]),
    ("fit", "patience"): ([1, 2**63 - 1], INTEGERS),
    ("fit", "precision"): (["highest", "high", "medium", "bf16"], ["low"]),
    ("fit", "beta"): ([5e-324, 0.5, 1e3, 1e38], NUMBERS),
    ("", "seed"): ([0, 1, 2**63 - 1], [-1, 2**63, True, 1.5]),
    ("", "device"): (["cpu"], ["tpu", "cuda:99", "a\x1b[1m", ""]),
}
OPTIONS = {
    "alpha": ([0.0, -2.0, 3e38], [1.0, float("inf"), float("nan"), 1e39]),
    "beta": ([5e-324, 0.5, 1e3], NUMBERS),
    "groups": ([1, 2, 8], [0, 3, -1, 2**63]),
    "elbo_weight": ([0.0, 0.5, 1.0], [-0.1, 1.1, float("nan")]),
    "free_bits": ([5e-324, 1.0, 1e38], NUMBERS),
    "mmd_weight": ([5e-324, 1.0, 1e38], NUMBERS),
}
OBJECTIVES = get_args(Objective)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """Settings as in config.json, at most one in three of them with an invalid value."""
    config: dict[str, dict[str, Any]] = {"": {}, "data": {}, "model": {}, "fit": {}}
    config["model"] |= {"hidden": [4], "latent_dim": 2}
    config["fit"] |= {"epochs": draw(st.sampled_from([1, 2]))}
    wrong = draw(st.integers(0, 2)) == 0
    for part, name in draw(st.lists(st.sampled_from(sorted(SETTINGS)), max_size=4, unique=True)):
        valid, invalid = SETTINGS[part, name]
        pool = valid + invalid if wrong else valid
        config[part][name] = draw(st.sampled_from(pool))
    if draw(st.booleans()):
        objective = draw(st.sampled_from(OBJECTIVES))
        config["fit"] |= {"objective": objective, "num_particles": 8}
        config["fit"].pop("beta", None)
        for option in OBJECTIVE_OPTIONS.get(objective, {}):
            valid, invalid = OPTIONS[option]
            if draw(st.booleans()):
                config["fit"][option] = draw(st.sampled_from(valid + invalid if wrong else valid))
    return config


NAMES = {"source": "data", "root": "data-root", "kind": "model"}


def nested_settings(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """As in config.json, where a family is a dictionary of its name and options."""
    model = dict(config["model"])
    for role in {"guide", "prior"} & model.keys():
        name, *words = model[role].split() or [""]
        options = dict(word.partition("=")[::2] for word in words)
        numbers = {k: int(v) if v.lstrip("-").isdigit() else v for k, v in options.items()}
        model[role] = {"family": name, **numbers}
    return {**config[""], "data": config["data"], "model": model, "fit": config["fit"]}


def as_arguments(config: dict[str, dict[str, Any]], folder: Path, as_flags: bool) -> list[str]:
    """The settings as flags, or in a config.json."""
    if not as_flags:
        nested = nested_settings(config)
        (folder / "config.json").write_text(json.dumps(nested))
        return ["--config", str(folder / "config.json")]
    arguments = []
    for values in config.values():
        for name, value in values.items():
            if name in ("guide", "prior"):
                value = value.split()
            items = value if isinstance(value, list) else [value]
            arguments += [f"--{NAMES.get(name, name.replace('_', '-'))}", *map(str, items)]
    return arguments


SHAPES = [(1,), (2,), (4,), (6,), (2, 2), (4, 4), (4, 4, 1), (2, 3, 3), (4, 4, 3), (2, 2, 2, 2)]
DTYPES = ["bool", "uint8", "int8", "int16", "uint16", "int64", "uint64", "float16", "float32"]
DTYPES += [*["float64"] * 6, *["uint8"] * 3, "complex64", "U3", ">f4"]
LABELS = [*["none"] * 5, "integers", "text", "floats", "one-hot", "column", "one short", "nan"]


@st.composite
def arrays(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray | None]:
    """Values (N, ...) and labels, of many types, scales and faults."""
    rows = draw(st.sampled_from([*[24] * 8, 40, 40, 12, 5, 4, 3, 2, 1, 0]))
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["normal", "unit", "counts", "binary", "constant", "repeated"]))
    values = {
        "normal": random.standard_normal,
        "unit": random.random,
        "counts": lambda size: random.integers(0, draw(st.sampled_from([3, 17, 256])), size) * 1.0,
        "binary": lambda size: random.integers(0, 2, size) * 1.0,
        "constant": lambda size: np.full(size, draw(st.sampled_from([0.0, 1.0, -3.5]))),
        "repeated": lambda size: np.broadcast_to(random.random(shape), size).copy(),
    }[kind]((rows, *shape))
    if dtype.startswith("float") or dtype == ">f4":
        scale = draw(st.sampled_from([1, 1, 1, 1e-300, 1e-30, 1e-6, 1e6, 1e18, 1e30, 1e300]))
        offset = draw(st.sampled_from([0, 0, 0, -1, 1e3, 1e9, -1e15]))
        values = values * scale + offset
    if rows and draw(st.integers(0, 3)) == 0:
        outlier = draw(st.sampled_from([1e3, -1e5, 1e12, 1e20, 3e38, 1e40, np.nan, -np.inf]))
        values[draw(st.integers(0, rows - 1))] = outlier
    with np.errstate(all="ignore"):
        cast = np.char.mod("%g", values) if dtype == "U3" else values.astype(dtype)
    labels = {
        "none": lambda: None,
        "integers": lambda: np.arange(rows) % 11,
        "text": lambda: np.array(["b", "a\n", "<i>", "é"] * rows)[:rows],
        "floats": lambda: random.random(rows),
        "one-hot": lambda: np.eye(3)[np.arange(rows) % 3],
        "column": lambda: np.arange(rows)[:, None] % 2,
        "one short": lambda: np.arange(rows)[1:],
        "nan": lambda: np.full(rows, np.nan),
    }[draw(st.sampled_from(LABELS))]()
    return cast, labels


def write(folder: Path, values: np.ndarray, labels: np.ndarray | None, form: str) -> Path:
    """The data as a file that the commands read; csv holds rows of one axis only."""
    if form == "csv" and values.ndim == 2:
        lines = [",".join(f"c{i}" for i in range(values.shape[1]))]
        lines += [",".join(map(str, row)) for row in values.tolist()]
        if labels is not None and labels.shape == (len(values),):
            lines[0] += ",label"
            kept = [str(label).strip() for label in labels]
            lines[1:] = [f"{line},{label}" for line, label in zip(lines[1:], kept, strict=True)]
        (folder / "data.csv").write_text("\n".join(lines), encoding="utf-8")
        return folder / "data.csv"
    if labels is None or form == "npy":
        np.save(folder / "data.npy", values)
        return folder / "data.npy"
    np.savez(folder / "data.npz", x=values, y=labels)
    return folder / "data.npz"


def call(main: Any, *arguments: Any) -> tuple[int, str]:
    """Status and stdout of a command that keeps to the contract; refused or diverged otherwise."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("always")  # a command prints them; those of this package as notes
        status = main([str(argument) for argument in arguments])
    lines = err.getvalue().splitlines(keepends=True)
    text = "".join(line for line in lines if not line.startswith("note: "))
    assert status in (0, 1, 2)
    if status == 0:
        assert text == ""
        assert not re.search(r"\bnan\b", out.getvalue().lower())  # a folder's name may hold "nan"
    else:
        assert text.startswith("error: ")
        assert text.count("\n") == 1
        assert (status == 1) == ("is not finite in epoch" in text)
    return status, out.getvalue() or text


def finite_json(text: str) -> Any:
    return json.loads(text, parse_constant=pytest.fail)


def check_run(run: Path, seed: int) -> None:
    """Metrics, evaluation, codes and new data of a finished run are finite."""
    lines = [finite_json(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines
    is_vae = lines[0]["kl"] is not None
    split = ["test", "validation", "train"][seed % 3]
    status, out = call(evaluate.main, run, "--num-samples", 5, "--json", "--split", split)
    assert status == 0, out
    result = finite_json(out)
    assert all(result[key] is not None for key in ["reconstruction", "elbo"][: 1 + is_vae])
    status, out = call(encode.main, run, "--out", run / "codes.npz")
    assert status == 0, out
    with np.load(run / "codes.npz") as codes:
        assert np.isfinite(codes["mean"]).all()
        assert np.isfinite(codes["standard_deviation"]).all()
    draw = ["--draw"] * (seed % 2)
    status, out = call(generate.main, run, "--num", 5, *draw, "--out", run / "new.npy")
    assert status == (0 if is_vae else 2), out
    if is_vae:
        assert np.isfinite(np.load(run / "new.npy")).all()


@pytest.fixture(scope="module", autouse=True)
def _no_pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_summarize", lambda run: None)
        patch.setattr("pyro_vae.plots.from_model.draw_reconstructions", lambda *arguments: None)
        yield


@bounded
@given(
    config=configs(),
    data=arrays(),
    form=st.sampled_from(["npy", "npz", "csv"]),
    as_flags=st.booleans(),
    seed=st.integers(0, 5),
)
def test_commands_finish_or_refuse(config, data, form, as_flags, seed):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write(folder, *data, form)
        run = folder / "run"
        arguments = as_arguments(config, folder, as_flags)
        status, _ = call(train.main, *arguments, "--data", path, "--out", run)
        event(f"status {status}")
        if status == 0:
            check_run(run, seed)


def held(values: np.ndarray, holder: str) -> Any:
    """The values as a tensor or a DataFrame, where these have such a type and shape."""
    if holder == "tensor" and values.dtype.kind in "biuf" and values.dtype.isnative:
        return torch.from_numpy(values)
    return pandas.DataFrame(values) if holder == "frame" and values.ndim == 2 else values


@bounded
@given(
    config=configs(),
    data=arrays(),
    holder=st.sampled_from(["array", "tensor", "frame"]),
    seed=st.integers(0, 5),
)
def test_the_library_finishes_or_refuses(config, data, holder, seed):
    values, labels = held(data[0], holder), data[1]
    try:
        settings = pyro_vae.Config.from_dict(nested_settings(config))
        options = {k: v for k, v in config["data"].items() if k != "source"}
        with warnings.catch_warnings():
            for note in ("decides? the (mean|standard)", "varies by rounding errors", "left out"):
                warnings.filterwarnings("ignore", message=f"(?s).*{note}")
            splits = pyro_vae.load_data(
                values if labels is None else (values, labels), seed, **options
            )
            vae = pyro_vae.build(settings.model, splits)
            (*_, last) = pyro_vae.fit(vae, splits, settings.fit, seed)
    except (pyro_vae.InputError, Diverged) as error:
        event(type(error).__name__)
        assert "\n" not in str(error)  # noqa: PT017
        return
    event("finished")
    for value in last.metrics().values():
        assert value is None or np.isfinite(value)
