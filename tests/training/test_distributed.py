"""Training by several processes: the numbers of one process, one set of files, and no hang.

Two processes of the gloo backend go through the checks of `_checks` once, this file being their
program, and the tests read what they found. The command is run under torchrun, or with the
variables that torchrun sets where a test has to kill one of the processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pytest
import torch
import torch.distributed as dist
from conftest import batch, example_splits, example_vae, wait_for_epoch
from forks import Forks
from pyro.distributions import Normal
from pyro.infer import SVI
from torch import Tensor

import pyro_vae
from pyro_vae import FitConfig, InputError, train
from pyro_vae.capture.captured import Observer, capture
from pyro_vae.capture.optimizer import OneOptimizer
from pyro_vae.cli import choose_device
from pyro_vae.models.interface import register
from pyro_vae.models.vae import VAE
from pyro_vae.objectives.registry import objective
from pyro_vae.training import distributed, modes
from pyro_vae.training import loop as svi
from pyro_vae.training.checkpoint import load_checkpoint
from pyro_vae.training.loop import fit, iterate
from pyro_vae.training.records import Diverged
from pyro_vae.training.run import RunFolder

TIMINGS = ("seconds", "images_per_second")
BATCH = 7  # of two parts of different sizes
# 81 training rows in batches of 5: parts of 3 and 2, and in the last batch of 1 a rank without any
ODD = {"batch_size": 5, "learning_rate": 1e-2, "compile": "off"}
# For conftest.py, and the package that this process has imported.
PATHS = os.pathsep.join(str(Path(f).parents[1]) for f in (__file__, pyro_vae.__file__))
WAIT = 120  # seconds, after which a process that should have ended is a hang


# --- what is computed by one process and by two ---------------------------------------------------


class Nothing(Observer):
    """Makes the loss a tuple, as in training."""

    def observed(self) -> tuple[Tensor, ...]:
        return ()


class Drawn(Normal):
    """A normal distribution whose draw is given in units of its scale, as `noise`."""

    noise: Tensor

    def expand(self, batch_shape: Any, _instance: Any = None) -> Drawn:
        assert batch_shape == self.batch_shape  # a plate expands whatever is sampled in it
        return self

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.loc + self.scale * self.noise


class Given(VAE):
    """A VAE whose programs take the noise of z beside x, so that no process draws any."""

    def model(self, x: Tensor, noise: Tensor) -> None:
        super().model(x)

    def guide(self, x: Tensor, noise: Tensor) -> None:
        register("encoder", self.encoder)
        q = self.posterior(x).base_dist
        drawn = Drawn(q.loc, q.scale)
        drawn.noise = noise
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", drawn.to_event(1))


def gradient(folder: Path, name: str, mode: str, is_summed: bool = True) -> dict[str, Tensor]:
    """Of the loss of a batch of which each rank takes its part, with the noise of its own rows."""
    vae, splits = example_vae("gaussian", folder)
    vae = Given(vae.prior_module, vae.encoder, vae.decoder, vae.likelihood_module)
    x = batch(splits, "gaussian", BATCH)
    noise = torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(0)).double()
    options = {}
    if name == "free-bits":
        # So many that a part has more, the whole has fewer: the mean over all counts.
        kl = torch.distributions.kl_divergence(vae.posterior(x).base_dist, Normal(0, 1))
        means = torch.stack([kl[:4].mean(0), kl[4:].mean(0)])
        options = {"free_bits": (0.75 * means.max(0).values + 0.25 * means.min(0).values)[0].item()}
    # Plain gradient descent of rate 1: the step is the gradient.
    optimizer = OneOptimizer(torch.optim.SGD(vae.parameters(), lr=1.0))
    loss = capture(objective(name, max_plate_nesting=1, **options), mode, Nothing())
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    rows = distributed.part(torch.arange(BATCH))
    svi = SVI(vae.model, vae.guide, optimizer, loss=loss)
    if distributed.world() > 1 and is_summed:
        distributed.step(svi, (x[rows],), False, noise=noise[rows])
    else:
        svi.step(x[rows], noise=noise[rows])
    assert loss.captures == (mode == "graph")
    pyro.clear_param_store()
    return {key: before[key] - value for key, value in vae.state_dict().items()}


def small(folder: Path, name: str = "binomial", **settings: Any) -> tuple[Any, Any]:
    splits = example_splits(name, folder, count=100)
    config = pyro_vae.ModelConfig(**{"latent_dim": 2, "hidden": (16,), **settings})
    return pyro_vae.build(config, splits), splits


def outcome(vae: Any, records: Any) -> dict[str, Any]:
    """What a training has come to: records, or the message of its divergence, and weights."""
    lines, error = [], None
    try:
        for record in records:
            line = {k: v for k, v in record.metrics().items() if k not in TIMINGS}
            lines.append({**line, "is_best": record.is_best})
    except Diverged as diverged:
        error = str(diverged)
    return {"records": lines, "error": error, "weights": vae.state_dict()}


def autoencoder(folder: Path, capture_from: int) -> dict[str, Any]:
    """A whole training in which nothing is drawn."""
    vae, splits = small(folder, kind="ae")
    before, modes.CAPTURE_FROM = modes.CAPTURE_FROM, capture_from
    try:
        config = FitConfig(**{**ODD, "epochs": 4, "compile": "auto"})
        assert modes.run_mode(config, splits.train) == ("graph" if capture_from == 0 else "eager")
        return outcome(vae, iterate(vae, splits, config))
    finally:
        modes.CAPTURE_FROM = before


# --- the checks by two processes ------------------------------------------------------------------


def _checks(folder: Path, rank: int) -> dict[str, Any]:
    """What one of the ranks finds, by name."""
    found: dict[str, Any] = {}
    for name in ("trace", "mean-field", "free-bits", "beta-tc"):
        found[f"gradient {name} eager"] = gradient(folder, name, "eager")
    found["gradient trace graph"] = gradient(folder, "trace", "graph")
    found["gradient of a part"] = gradient(folder, "trace", "eager", is_summed=False)

    taken: list[list[int]] = []
    take = pyro_vae.Split.take

    def watched(self: Any, index: Tensor, *arguments: Any) -> Tensor:
        taken.append(index.tolist())
        return take(self, index, *arguments)

    pyro_vae.Split.take = watched
    found["autoencoder eager"] = autoencoder(folder, 10**9)
    pyro_vae.Split.take = take
    found["taken"] = taken
    found["autoencoder graph"] = autoencoder(folder, 0)

    vae, splits = small(folder, "bernoulli")
    config = FitConfig(**ODD, epochs=3)
    found["vae"] = outcome(vae, iterate(vae, splits, config))

    # Stopped half-way, then resumed in this group: each rank draws on as if nothing had been.
    vae, splits = small(folder, "bernoulli")
    states, steps = [], []

    def stop_in_one(progress: Any) -> bool:
        steps.append(progress.step)
        wish = rank == 1 and progress.step == 20
        if progress.step == 21:
            states.append({"step": progress.step, **progress.state()})
        return wish

    head = outcome(vae, iterate(vae, splits, config, on_step=stop_in_one))
    found["steps until one rank stops"] = steps
    tail = outcome(vae, iterate(vae, splits, config, state=states[0]))
    found["resumed"] = {**tail, "records": head["records"] + tail["records"]}
    # Asked for after the very last step, at which nobody is left to hear of it.
    vae, splits = small(folder)
    asked = iterate(vae, splits, config, on_step=lambda p: rank == 1 and p.step == 3 * 17)
    found["stopped at the end"] = outcome(vae, asked)

    # Rows that are all the same: what the decoder sees differs by the noise of z alone.
    folder_same = folder / "same"
    folder_same.mkdir()
    values = np.tile(np.arange(20, dtype=np.uint8).reshape(1, 1, 4, 5) % 17, (100, 1, 1, 1))
    np.save(folder_same / "same.npy", values)
    splits = pyro_vae.load_data(pyro_vae.DataConfig(str(folder_same / "same.npy"), max_value=16))
    vae = pyro_vae.build(pyro_vae.ModelConfig(latent_dim=2, hidden=(16,)), splits)
    seen: list[Tensor] = []
    hook = vae.decoder.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    fit(vae, splits, FitConfig(epochs=1, batch_size=80, compile="off"))
    hook.remove()
    found["z"] = seen[2].detach()  # two are of the checks before the first step

    vae, splits = small(folder)
    config = FitConfig(
        epochs=400,
        batch_size=81,
        learning_rate=0.05,
        patience=2,
        compile="off",
        schedule="constant",
    )
    found["patience"] = outcome(vae, iterate(vae, splits, config))

    # Values that turn into NaN in one rank's memory.
    vae, splits = small(folder, "gaussian")
    values = splits.train.values.clone()
    planted = pyro_vae.Split(values, splits.train.rows, splits.train.spec)
    splits = splits.__class__(**{**vars(splits), "train": planted})

    def plant(progress: Any) -> None:
        if rank == 1 and progress.step == 3:
            values.fill_(torch.nan)

    config = FitConfig(epochs=2, batch_size=16, compile="off")
    found["nan in one rank"] = outcome(vae, iterate(vae, splits, config, on_step=plant))

    vae, splits = small(folder, "gaussian")
    config = FitConfig(
        epochs=50,
        batch_size=16,
        learning_rate=1e4,
        gradient_clip=float("inf"),
        learning_rate_warmup=0,
        compile="off",
    )
    found["too fast"] = outcome(vae, iterate(vae, splits, config))
    found["agreed"] = distributed.agree({"rank": rank})
    return found


def _other_data(folder: Path, rank: int) -> dict[str, Any]:
    """The command on data that differ between the machines. Its failure may end the group."""
    path = folder.parent / f"data{rank}.npy"
    np.save(path, np.random.default_rng(rank).random((60, 4)))
    arguments = ["--data", str(path), "--batch-size", "8", "--hidden", "8", "--epochs", "1"]
    run = folder.parent / "old"
    if rank == 0:
        (run / "checkpoints").mkdir(parents=True)
        (run / "config.json").write_text("{}")
        (run / "metrics.jsonl").write_text("old")
    dist.barrier()
    status = train.main([*arguments, "--out", str(run), "--overwrite"])
    return {"status": status, "metrics": (run / "metrics.jsonl").read_text()}


def _main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    own = folder / f"rank{rank}"
    own.mkdir()
    found = _checks(own, rank)
    found["other data"] = _other_data(own, rank)
    torch.save(found, folder / f"{rank}.pt")


def ended(*processes: subprocess.Popen) -> list[tuple[str, str]]:
    """Standard output and error of processes that must end by themselves."""
    until = time.monotonic() + WAIT
    try:
        return [p.communicate(timeout=max(0, until - time.monotonic())) for p in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.kill()
        outputs = [process.communicate() for process in processes]
        raise TimeoutError(outputs) from None


def launched(*arguments: str, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", **variables},
        start_new_session=True,  # signals to its group are none to pytest
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [launched(__file__, str(folder), str(rank)) for rank in (0, 1)]
    outputs = ended(*ranks)
    if any(process.returncode for process in ranks):  # not an assertion, which may be expected
        raise RuntimeError("\n".join(err for _, err in outputs))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of any tensor, relative to its largest element."""
    assert one.keys() == other.keys()
    return max(
        ((one[k] - v).abs().max() / v.abs().max()).item() for k, v in other.items() if v.any()
    )


def identical(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two ranks have come to the same end, to the last bit."""
    return (
        one["records"] == other["records"]
        and one["error"] == other["error"]
        and all(torch.equal(one["weights"][k], v) for k, v in other["weights"].items())
    )


# --- one process ----------------------------------------------------------------------------------


def test_one_process_is_the_whole_world():
    assert (distributed.rank(), distributed.world()) == (0, 1)
    index = torch.arange(5)
    assert torch.equal(distributed.part(index), index)
    value = {"a": 1}
    assert distributed.agree(value) is value
    with distributed.first_here(), distributed.processes(torch.device("cpu")):
        assert not dist.is_initialized()


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("size", [1, 2, 5, 24, 25])
def test_parts_cover_a_batch_and_are_of_like_size(world, size, monkeypatch):
    index = torch.randperm(size) + 100
    monkeypatch.setattr(distributed, "world", lambda: world)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(distributed.part(index))
    assert torch.equal(torch.cat(parts), index)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


# --- two processes, and the numbers of one --------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("trace", "eager"),
        ("trace", "graph"),
        ("mean-field", "eager"),
    ],
)
def test_gradients_add_up_to_those_of_one_process(name, mode, found, tmp_path):
    """Of the same rows and draws, in parts of 4 and 3."""
    expected = gradient(tmp_path, name, mode)
    assert max(g.abs().max() for g in expected.values()) > 1
    for rank in found:
        assert distance(rank[f"gradient {name} {mode}"], expected) < 1e-5


@pytest.mark.parametrize("name", ["free-bits", "beta-tc"])
def test_objectives_that_look_at_the_whole_batch_are_refused(name, found, tmp_path, monkeypatch):
    """The statistics of q(z) would be those of a part: the gradients do not add up."""
    expected = gradient(tmp_path, name, "eager")
    for rank in found:
        assert distance(rank[f"gradient {name} eager"], expected) > 0.1
    monkeypatch.setattr(distributed, "world", lambda: 2)
    vae, splits = example_vae("binomial", tmp_path)
    with pytest.raises(InputError, match=f"{name} needs the whole batch in one process"):
        next(iterate(vae, splits, FitConfig(objective=name, epochs=1, batch_size=10)))


def test_the_gradient_of_a_part_is_another(found, tmp_path):
    """Power: without the sum over the ranks the same comparison fails."""
    expected = gradient(tmp_path, "trace", "eager")
    for rank in found:
        assert distance(rank["gradient of a part"], expected) > 0.1
    one, other = (rank["gradient of a part"] for rank in found)
    assert distance({key: one[key] + other[key] for key in one}, expected) < 1e-5


@pytest.mark.parametrize(("mode", "capture_from"), [("eager", 10**9), ("graph", 0)])
def test_a_training_without_draws_is_that_of_one_process(mode, capture_from, found, tmp_path):
    """Parts of uneven size; in the last batch of an epoch, of one image, a rank has none."""
    expected = autoencoder(tmp_path, capture_from)
    for rank in found:
        result = rank[f"autoencoder {mode}"]
        assert distance(result["weights"], expected["weights"]) < 1e-4
        assert len(result["records"]) == 4
        for line, other in zip(result["records"], expected["records"], strict=True):
            assert line.keys() == other.keys()
            for key, value in other.items():
                assert line[key] == (None if value is None else pytest.approx(value, rel=1e-4))


def test_each_rank_reads_its_own_rows(found):
    first, second = (rank["taken"] for rank in found)
    assert [len(rows) for rows in first] == ([3] * 16 + [1]) * 4
    assert [len(rows) for rows in second] == ([2] * 16 + [0]) * 4
    for epoch in range(4):
        parts = first[17 * epoch :][:17] + second[17 * epoch :][:17]
        assert sorted(row for part in parts for row in part) == list(range(81))


# --- what the ranks share, and what they do not ---------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "autoencoder eager",
        "autoencoder graph",
        "vae",
        "resumed",
        "stopped at the end",
        "patience",
        "nan in one rank",
        "too fast",
    ],
)
def test_all_ranks_come_to_the_same_end_bit_by_bit(name, found):
    assert identical(found[0][name], found[1][name])


def test_the_ranks_draw_different_numbers(found):
    """Of equal rows under equal weights."""
    first, second = (rank["z"] for rank in found)
    assert first.shape == second.shape == (40, 2)
    assert len(torch.cat([first, second]).unique(dim=0)) == 80
    noise = torch.stack([first, second]) - torch.cat([first, second]).mean(0)
    assert abs(torch.corrcoef(noise.reshape(2, -1))[0, 1]) < 4 / 80**0.5


def test_one_rank_stops_all(found):
    """The others hear of it with the next step."""
    for rank in found:
        assert rank["steps until one rank stops"] == list(range(1, 22))
        assert len(rank["stopped at the end"]["records"]) == 3


def test_a_resumed_training_draws_as_if_it_had_not_stopped(found):
    for rank in found:
        assert identical(rank["resumed"], rank["vae"])


def test_patience_ends_all(found):
    for rank in found:
        records = rank["patience"]["records"]
        assert len(records) < 400
        assert [r["is_best"] for r in records[-3:]] == [True, False, False]


def test_divergence_of_one_rank_is_that_of_all(found):
    """And is told in the same words."""
    for rank in found:
        assert "not finite in epoch 1, step 4" in rank["nan in one rank"]["error"]
        assert "--learning-rate 10000" in rank["too fast"]["error"]
        for name in ("nan in one rank", "too fast"):
            assert all(value.isfinite().all() for value in rank[name]["weights"].values())


def test_the_first_rank_decides(found):
    assert [rank["agreed"] for rank in found] == [{"rank": 0}, {"rank": 0}]


# --- waiting --------------------------------------------------------------------------------------


class Work:
    """A message that is late by some waits, and then arrives or fails."""

    def __init__(self, late: int, fails: bool = False, completes_late: bool = False) -> None:
        self.late, self.fails, self.completes_late, self.waits = late, fails, completes_late, 0

    def is_completed(self) -> bool:
        return self.waits >= self.late if self.completes_late else self.waits > self.late

    def wait(self, timeout: Any = None) -> None:
        self.waits += 1
        if self.waits <= self.late:
            raise RuntimeError("Operation timed out!")
        if self.fails:
            raise RuntimeError("Connection closed by peer")


@pytest.fixture
def gloo(monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")


@pytest.mark.usefixtures("gloo")
def test_a_message_is_waited_for_and_its_failure_is_noticed():
    """A gradient that has not been summed is never taken for one that has."""
    for late in (0, 3):
        for completes_late in (False, True):  # in the moment in which the wait ends
            work = Work(late, completes_late=completes_late)
            distributed._wait(work, 100)
            assert work.waits == late + 1
            with pytest.raises(RuntimeError, match="closed by peer"):
                distributed._wait(Work(late, True, completes_late), 100)


@pytest.mark.usefixtures("gloo")
def test_a_message_that_does_not_come_is_given_up(monkeypatch):
    with pytest.raises(distributed.LostRank, match="does not answer"):
        distributed._wait(Work(10**9), 0.01)
    monkeypatch.setattr(distributed, "STOP_SECONDS", 0.01)
    monkeypatch.setattr(distributed.stops, "requested", lambda: True)
    with pytest.raises(distributed.LostRank, match="does not answer"):
        distributed._wait(Work(10**9), 1000)


def test_the_first_process_is_known_before_they_join(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("RANK", "1")  # of another launcher: the process is alone
    assert distributed.is_first()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert not distributed.is_first()
    monkeypatch.setenv("RANK", "0")
    assert distributed.is_first()


# --- the command ----------------------------------------------------------------------------------

NETWORK = ["--hidden", "16", "--latent-dim", "2", "--batch-size", "128", "--compile", "off"]
EPOCHS = 10


@pytest.fixture(scope="module")
def network(digits, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags: the digits as an array, so that no process imports scikit-learn, and a network."""
    path = tmp_path_factory.mktemp("data") / "digits.npy"
    np.save(path, digits.train.values.numpy())
    return ["--data", str(path), "--max-value", "16", *NETWORK]


def torchrun(*arguments: str) -> subprocess.Popen:
    """Two ranks of `arguments`: a program and its own."""
    return launched(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments
    )


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as server:
        yield server


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the timings."""
    parsed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in parsed]


def _draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of so short a run, and is no part of what is tested."""
    patch.setattr(train, "_summarize", lambda run: None)
    # Not even imported: that takes longer than the training.
    none = SimpleNamespace(draw_reconstructions=lambda *arguments: None)
    patch.setitem(sys.modules, "pyro_vae.plots.from_model", none)


@pytest.fixture
def no_pictures(monkeypatch):
    _draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def whole(network, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run by two ranks, and its output."""
    run = tmp_path_factory.mktemp("torchrun") / "run"
    process = torchrun("-m", "pyro_vae.train", "--out", str(run), *network, "--epochs", str(EPOCHS))
    ((out, err),) = ended(process)
    assert process.returncode == 0, err
    return run, out


@pytest.mark.slow
def test_torchrun_writes_one_run(whole):
    run, out = whole
    assert {p.name for p in run.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "figures",
        "report.html",
    }
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"best.pt", "last.pt"}
    assert (run / "figures" / "elbo.png").is_file()
    assert [line["epoch"] for line in metrics(run)] == list(range(1, EPOCHS + 1))
    for line in ("data   digits", "model  vae", f"run    {run}", "done   ", "next   python -m"):
        assert out.count(line) == 1
    assert max(Counter(out.splitlines()).values()) == 1
    line = metrics(run)[-1]
    assert line["train_elbo"] == pytest.approx(line["reconstruction"] - line["kl"])
    assert line["train_elbo"] > metrics(run)[0]["train_elbo"] + 5


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_one_process_goes_on_with_the_run_of_two(whole):
    run, _ = whole
    before = metrics(run)
    assert train.main(["--resume", str(run), "--epochs", str(EPOCHS + 2)]) == 0
    assert metrics(run)[:EPOCHS] == before
    assert [line["epoch"] for line in metrics(run)[EPOCHS:]] == [EPOCHS + 1, EPOCHS + 2]


@pytest.mark.slow
def test_an_interrupted_run_resumed_is_the_uninterrupted_one(network, forks, whole, tmp_path):
    """Ctrl-C that reaches the ranks twice, from the terminal and from torchrun, is one."""
    run = tmp_path / "run"
    # Long before its end, however busy the machine is.
    command = ["--out", run, *network, "--epochs", EPOCHS]
    ranks = forks.ranks(*command, logs=tmp_path, pause=2)
    wait_for_epoch(run, 2)
    for process in ranks + ranks:
        process.kill(signal.SIGINT)
    assert [rank.wait() for rank in ranks] == [128 + signal.SIGINT, 0], ranks[0].text()
    assert ranks[0].text().count("stopped; continue with") == 1
    assert "error" not in ranks[0].text() + ranks[1].text()
    assert len(metrics(run)) == 2

    (tmp_path / "again").mkdir()
    ranks = forks.ranks("--resume", run, logs=tmp_path / "again")
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text()
    assert ranks[1].text() == ""
    assert metrics(run) == metrics(whole[0])[:EPOCHS]


@pytest.mark.usefixtures("no_pictures")
def test_a_rank_that_is_killed_ends_the_run_with_its_last_step_kept(network, forks, tmp_path):
    """The run was begun by one process, and is taken to its end by one."""
    run = tmp_path / "run"
    assert train.main(["--out", str(run), *network, "--epochs", "1"]) == 0
    resume = ["--resume", run, "--epochs", 4000, "--device", "cpu"]
    first, second = forks.ranks(*resume, logs=tmp_path)
    wait_for_epoch(run, 4)
    second.kill(signal.SIGKILL)
    assert first.wait() == 1
    (line,) = [line for line in first.text().splitlines() if "error" in line]
    assert f"continue with the same command and --resume {run}" in line
    assert "Traceback" not in first.text()
    assert second.wait() == -9

    last = load_checkpoint(run, "last")
    lines = metrics(run)
    assert [line["epoch"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(last.history) == last.training["epoch"] == len(lines) >= 4
    # Not only the end of an epoch, and all 12 steps of each.
    assert lines[-1]["step"] == 12 * len(lines) <= last.training["step"] <= 12 * (len(lines) + 1)
    assert train.main(["--resume", str(run), "--epochs", str(len(lines) + 1)]) == 0
    assert metrics(run)[:-1] == lines
    assert metrics(run)[-1]["step"] == 12 * (len(lines) + 1)


@pytest.mark.usefixtures("no_pictures")
def test_torchrun_does_not_end_the_first_rank_before_the_last_step_is_kept(
    network, tmp_path, monkeypatch, capsys
):
    """Where a rank has failed, torchrun sends the others SIGTERM a tenth of a second later."""
    handlers = []
    save = RunFolder.save

    def watched(self) -> None:
        handlers.append(signal.getsignal(signal.SIGTERM))
        save(self)

    def lost(*_: Any) -> None:
        raise distributed.LostRank("another process is gone")

    monkeypatch.setattr(RunFolder, "save", watched)
    monkeypatch.setattr(svi, "_epoch", lost)
    assert train.main(["--out", str(tmp_path / "run"), *network, "--epochs", "2"]) == 1
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().err
    assert handlers
    assert signal.SIG_DFL not in handlers


@pytest.mark.usefixtures("no_pictures")
def test_a_rank_lost_at_the_end_of_an_epoch_costs_no_line(network, tmp_path, monkeypatch):
    """When validation is known to all, and before the record is."""
    run = tmp_path / "run"
    agree, seconds = distributed.agree, []

    def lost(value: Any) -> Any:
        if isinstance(value, float):
            seconds.append(value)
        if len(seconds) == 2:
            raise distributed.LostRank("another process is gone")
        return value

    monkeypatch.setattr(distributed, "agree", lost)
    train.main(["--out", str(run), *network, "--epochs", "3"])
    monkeypatch.setattr(distributed, "agree", agree)
    assert train.main(["--resume", str(run)]) == 0
    assert [line["epoch"] for line in metrics(run)] == [1, 2, 3]


def test_a_mistake_is_told_and_ends_all(network, forks, tmp_path):
    """Found by the first rank alone, while the second is about to train."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    ranks = forks.ranks("--out", folder, *network, "--epochs", 2, logs=tmp_path)
    assert [rank.wait() for rank in ranks] == [2, 1]
    (line,) = ranks[0].text().splitlines()
    assert line.startswith(f"error: --out {folder} exists and is not empty")
    assert ranks[1].text().startswith("error: rank 1: another process of this training has failed")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_data_that_differ_between_ranks_leave_an_old_run_as_it_was(found):
    for rank in found:
        assert rank["other data"] == {"status": 2, "metrics": "old"}


@pytest.mark.slow
def test_that_a_run_is_complete_is_said_once(whole, monkeypatch, capsys):
    """Here as a second rank, which is to say nothing."""
    run, _ = whole
    epochs = len(metrics(run))
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)  # which it ignores from then on
    assert train.main(["--resume", str(run), "--epochs", str(epochs)]) == 0
    assert capsys.readouterr().out == ""


def test_every_local_rank_has_a_gpu_of_its_own_when_asked_for_cuda(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch, "zeros", lambda *arguments, **options: None)  # as if there were two
    assert choose_device("cuda") == torch.device("cuda:1")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(network, tmp_path):
    run = tmp_path / "run"
    process = torchrun(
        "-m", "pyro_vae.train", "--out", str(run), *network, "--epochs", "3", "--device", "auto"
    )
    ((_, err),) = ended(process)
    assert process.returncode == 0, err
    assert [line["epoch"] for line in metrics(run)] == [1, 2, 3]


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
