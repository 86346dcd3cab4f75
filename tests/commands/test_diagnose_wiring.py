"""python -m pyro_vae.diagnose: which rows, seeds and efforts it uses, and what it prints.

The studies are replaced by results that are written out, so that a test takes little time and every
number of the output is known. Each row of the data has its own value, which tells its split.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from pyro_vae import diagnose, load_data, train
from pyro_vae.config import InputError
from pyro_vae.diagnostics import findings as verdicts
from pyro_vae.diagnostics import suite
from pyro_vae.diagnostics.findings import Finding
from pyro_vae.evidence.intervals import Interval
from pyro_vae.page import write as page
from pyro_vae.plots import run as figures
from pyro_vae.training.checkpoint import load_checkpoint

QUICK = dataclasses.replace(suite.QUICK, held_out=7, aggregate=13)
FULL = dataclasses.replace(suite.FULL, held_out=9, aggregate=17)
TINY = ["--epochs", "2", "--batch-size", "16", "--hidden", "8", "--latent-dim", "2", "--seed", "11"]


def numbered(first: int, count: int) -> np.ndarray:
    """Rows (count, 3), each with a value of its own."""
    return (first + np.arange(count) + 0.25)[:, None] * np.ones(3, np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, its data, and other data."""
    folder = tmp_path_factory.mktemp("numbered")
    np.save(folder / "mine.npy", numbered(0, 200))
    np.save(folder / "other.npy", numbered(300, 30))
    arguments = ["--data", str(folder / "mine.npy"), "--out", str(folder / "run")]
    with pytest.MonkeyPatch.context() as patch:  # without pictures and page, which take longest
        patch.setattr(train, "_summarize", lambda *_: None)
        assert train.main([*arguments, *TINY, "--test-size", "60"]) == 0
    return folder


def wide(low: float = 1.9) -> Finding:
    return Finding(verdicts.WIDTH, Interval(2.0, low, 2.1))


BIASED = Finding(verdicts.BIAS, Interval(-0.3, -0.4, -0.25), "z1")
FINE = Finding(verdicts.AGGREGATE, Interval(0.001, 0.0, 0.002))
DETAILS = {"elbo": -1234.567, "log_evidence": -1200.0, "importance_samples": 5000}


class Stub:
    """`studies` that record their arguments and a draw, and yield what they were given."""

    def __init__(self, *studies: suite.Study) -> None:
        self.made = studies

    def __call__(self, vae, held_out, training, effort, advance, numbers):
        self.vae, self.held_out, self.training, self.effort = vae, held_out, training, effort
        self.numbers = numbers
        self.draw, self.files, self.figures = torch.rand(3).tolist(), [], []
        for study in self.made:
            yield study
            advance(40)
            self.files.append(json.loads((self.run / "diagnostics.json").read_text()))
            self.figures.append({p.name for p in (self.run / "figures").glob("diagnose*")})


@pytest.fixture
def stub(folder, monkeypatch):
    """Put these studies in the place of the real ones."""

    def put(*studies):
        made = Stub(*(studies or [suite.Study([FINE], DETAILS, {})]))
        made.run, made.reports = folder / "run", []
        monkeypatch.setattr(suite, "studies", made)
        return made

    monkeypatch.setattr(suite, "QUICK", QUICK)
    monkeypatch.setattr(suite, "FULL", FULL)
    # The page takes most of the time.
    monkeypatch.setattr(page, "write_report", lambda *_: None)
    for old in (folder / "run").glob("**/diagnos*"):
        old.unlink()
    return put


def values(x: torch.Tensor) -> list[float]:
    return x[:, 0].tolist()


def rows_of(split) -> set[float]:
    return set(values(torch.cat(list(split.fixed("real", 0)))))


@pytest.mark.parametrize(("flags", "effort"), [(["--quick"], QUICK), ([], FULL)])
def test_held_out_rows_are_test_rows_and_training_rows_are_training_rows(
    folder, stub, capsys, flags, effort
):
    made = stub()
    splits = load_data(str(folder / "mine.npy"), seed=11, test_size=60)
    assert diagnose.main([str(folder / "run"), *flags]) == 0
    held_out, training = values(made.held_out), values(made.training)
    assert len(set(held_out)) == len(held_out) == effort.held_out
    assert len(set(training)) == len(training) == effort.aggregate
    assert set(held_out) <= rows_of(splits.test)
    assert set(training) <= rows_of(splits.train)
    # The value of a row is its number in the data and a quarter.
    assert made.numbers.tolist() == [int(value) for value in held_out]
    assert made.effort == effort
    report = json.loads((folder / "run" / "diagnostics.json").read_text())
    assert report["effort"] == {"quick": flags != [], **dataclasses.asdict(effort)}
    assert report["held_out"] == effort.held_out
    best = load_checkpoint(folder / "run")
    assert report["step"] == best.history[-1]["step"] != best.history[0]["step"]
    assert (report["data"], report["likelihood"]) == ("mine", "gaussian")
    assert report["fingerprint"] == splits.fingerprint
    assert report["binarization"] == "none"
    assert report["checkpoint"].endswith("best.pt")
    for name, value in made.vae.state_dict().items():
        assert torch.equal(value, best.vae.state_dict()[name])


def test_the_seed_chooses_rows_and_draws(folder, stub, capsys):
    """The run's own by default; 0 is a seed like any other."""
    found = {}
    for flags in ([], ["--seed", "11"], ["--seed", "0"], ["--seed", "5"], ["--seed", "0"]):
        made = stub()
        torch.manual_seed(99)
        assert diagnose.main([str(folder / "run"), "--quick", "--json", *flags]) == 0
        assert torch.rand(1).item() == pytest.approx(torch_draw(99)), "the state is restored"
        seed = json.loads(capsys.readouterr().out)["seed"]
        assert seed == int((flags or [0, 11])[1])
        now = (values(made.held_out), values(made.training), made.draw)
        assert found.setdefault(seed, now) == now
    assert len(found) == 3
    for i in range(3):  # held-out rows, training rows, draws
        assert len({tuple(run[i]) for run in found.values()}) == 3


def torch_draw(seed: int) -> float:
    return torch.rand(1, generator=torch.Generator().manual_seed(seed)).item()


def test_other_data_are_held_out_and_leave_the_report_alone(folder, stub, capsys, monkeypatch):
    """Other data have no training rows, and the page shows the run's own."""
    written = []
    made = stub()
    monkeypatch.setattr(page, "write_report", lambda *_: written.append(1))
    assert diagnose.main([str(folder / "run"), "--quick", "--data", str(folder / "other.npy")]) == 0
    assert set(values(made.held_out)) | set(values(made.training)) <= set(
        values(torch.tensor(numbered(300, 30)))
    )
    assert (len(made.held_out), len(made.training)) == (7, 13)
    report = json.loads((folder / "run" / "diagnostics.json").read_text())
    assert report["data"] == "other"
    assert report["fingerprint"] != load_checkpoint(folder / "run").fingerprint
    assert written == []
    assert diagnose.main([str(folder / "run"), "--quick"]) == 0
    assert written == [1]


def test_binarization_is_told_with_its_seed(tmp_path, stub, capsys, monkeypatch):
    grey = np.random.default_rng(0).integers(0, 256, (200, 1, 4, 4)).astype(np.uint8)
    np.save(tmp_path / "grey.npy", grey)
    arguments = ["--data", str(tmp_path / "grey.npy"), "--likelihood", "bernoulli"]
    monkeypatch.setattr(train, "_summarize", lambda *_: None)
    assert train.main([*arguments, "--out", str(tmp_path / "run"), *TINY]) == 0
    found = []
    for seed in ("3", "3", "4"):
        made = stub()
        made.run = tmp_path / "run"
        flags = ["--quick", "--json", "--seed", seed]
        capsys.readouterr()
        assert diagnose.main([str(tmp_path / "run"), *flags]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["binarization"] == f"fixed, seed {seed}"
        assert set(made.held_out.unique().tolist()) == {0.0, 1.0}
        found.append(made.held_out)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


TABLE = """\
{run}/checkpoints/best.pt
7 held-out rows of mine, and rows simulated from the model; likelihood gaussian; 95% intervals
ELBO -1234.57, log p(x) -1200.00 nats per row (5,000 importance samples)

wrong     posterior width       2.00 [1.90, 2.10]
          factor by which posterior sds are too small (root mean square z-score); ideal 1
          intervals of q(z|x) are too narrow: the guide is overconfident
          → multiply the standard deviations by this factor before you use them as error bars:
              python -m pyro_vae.encode {run} --recalibrate --out codes.npz
            or fit the guide to each row, the model held fixed:
              python -m pyro_vae.refit {run}
doubtful  posterior bias        -0.300 [-0.400, -0.250]
          mean z-score of z1, the worst latent, in posterior sds; ideal 0
          on simulated rows, the posterior mean of this latent is too high by this much
          → fit the guide to each row, the model held fixed:
              python -m pyro_vae.refit {run}
            or train longer, with a learning rate that falls (--schedule cosine)
sound     aggregate posterior   0.001 [0.000, 0.002]
          energy coefficient between it and the prior, on simulated rows, 0 to 1; ideal 0

1 sound, 1 doubtful, 1 wrong; numbers in {run}/diagnostics.json, figures in {run}/figures
"""


def test_the_table(folder, stub, capsys):
    """Meaning and advice of all that is not sound, nothing else; the file has the same numbers."""
    other = {"elbo of others": 1.0}
    made = stub(
        suite.Study([wide(), BIASED], DETAILS, {"one": Figure()}),
        suite.Study([FINE], other, {"two": Figure(), "three": Figure()}),
    )
    assert diagnose.main([str(folder / "run"), "--quick"]) == 0
    assert capsys.readouterr().out == TABLE.format(run=folder / "run")
    # written after each study, and complete at the end
    names = [[f["check"] for f in file["findings"]] for file in made.files]
    assert names == [
        ["posterior width", "posterior bias"],
        ["posterior width", "posterior bias", "aggregate posterior"],
    ]
    assert [file["details"] for file in made.files] == [DETAILS, DETAILS | other]
    assert [file["complete"] for file in made.files] == [False, False]
    assert made.figures[0] == {"diagnose_one.png"}
    assert made.figures[1] == {"diagnose_one.png", "diagnose_two.png", "diagnose_three.png"}
    report = json.loads((folder / "run" / "diagnostics.json").read_text())
    assert report == made.files[-1] | {"complete": True}
    assert diagnose.main([str(folder / "run"), "--quick", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report, "and nothing but JSON"


def test_an_interrupted_table_says_so(folder, stub, capsys, monkeypatch):
    made = stub()

    def interrupted(*arguments):
        yield from Stub.__call__(made, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "studies", interrupted)
    assert diagnose.main([str(folder / "run"), "--quick"]) == 130
    out = capsys.readouterr().out
    assert out.endswith("\ninterrupted: the remaining studies were not run\n")
    assert json.loads((folder / "run" / "diagnostics.json").read_text())["complete"] is False


@pytest.mark.parametrize(
    ("findings", "status"),
    [([FINE], 0), ([FINE, BIASED], 0), ([FINE, wide(1.4)], 0), ([FINE, wide()], 1), ([wide()], 1)],
)
def test_strict_is_about_wrong_findings_only(folder, stub, capsys, findings, status):
    for flags, expected in ((["--strict"], status), (["--strict", "--json"], status), ([], 0)):
        stub(suite.Study(findings, DETAILS, {}))
        assert diagnose.main([str(folder / "run"), "--quick", *flags]) == expected


def no_token(name: str):
    raise ValueError(f"JSON has no {name}")


def test_numbers_that_are_not_finite_are_null(folder, stub, capsys):
    """In the file, in --json and deep within; the table says nan, and no verdict is sound."""
    details = DETAILS | {"elbo": -math.inf, "log_evidence": math.nan, "deep": [{"x": (math.inf,)}]}
    nothing = Interval(math.nan, math.nan, math.nan)
    bad = [Finding(verdicts.WIDTH, nothing), Finding(verdicts.BIAS, Interval(0.0, 0.0, math.inf))]
    stub(suite.Study(bad, details, {}))
    assert diagnose.main([str(folder / "run"), "--quick", "--json", "--strict"]) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=no_token)
    text = (folder / "run" / "diagnostics.json").read_text()
    assert json.loads(text, parse_constant=no_token) == printed
    assert printed["details"]["elbo"] is printed["details"]["log_evidence"] is None
    assert printed["details"]["deep"] == [{"x": [None]}]
    assert [f["verdict"] for f in printed["findings"]] == ["doubtful", "doubtful"]
    assert [printed["findings"][0][key] for key in ("estimate", "low", "high")] == [None] * 3
    assert [printed["findings"][1][key] for key in ("estimate", "low", "high")] == [0, 0, None]
    stub(suite.Study(bad, details, {}))
    assert diagnose.main([str(folder / "run"), "--quick"]) == 0
    out = capsys.readouterr().out
    assert "ELBO -inf, log p(x) nan nats per row" in out
    assert "doubtful  posterior width       nan [nan, nan]" in out
    assert "this size is not a finite number: densities or draws overflow" in out


# Mistakes, and data that leave little to see


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_few_rows_are_refused_with_their_number(folder, stub, capsys, tmp_path, count):
    np.save(tmp_path / "few.npy", numbered(0, count))
    made = stub()
    status = diagnose.main([str(folder / "run"), "--quick", "--data", str(tmp_path / "few.npy")])
    output = capsys.readouterr()
    if count == 5:
        assert (status, len(made.held_out), len(made.training)) == (0, 5, 5)
        assert made.files[-1]["held_out"] == 5
    else:
        assert status == 2
        (line,) = output.err.strip().splitlines()
        assert line == (
            f"error: expected at least 5 held-out rows; few has {count}: give more rows by --data"
        )


def test_few_training_rows_are_refused():
    split = load_data(numbered(0, 30), test_size=20, validation_size=5)
    few = dataclasses.replace(split.train, rows=split.train.rows[:4])
    units = types.SimpleNamespace(likelihood_module=types.SimpleNamespace(units="real"))
    run = types.SimpleNamespace(
        splits=dataclasses.replace(split, train=few), vae=units, seed=0, checkpoint=None
    )
    with pytest.raises(InputError, match=r"at least 5 training rows; .* has 4: give"):
        diagnose._rows(run, QUICK)


def test_mistaken_flags(folder, stub, capsys):
    """One message, status 2, no traceback, no file."""
    stub()
    for flags in (
        ["--seed", "-1"],
        ["--seed", str(2**63)],
        ["--seed", "9" * 400],
        ["--seed", "1.5"],
        ["--seed", "nan"],
        ["--device", "nothing"],
        ["--num-samples", "10"],
        ["--quick", "yes"],
        ["--data", ""],
        ["--data", "no/such.npy"],
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            status = diagnose.main(["run", *flags])
        output = capsys.readouterr()
        assert status == 2, flags
        assert "Traceback" not in output.err + output.out
        assert output.err
        assert not (folder / "run" / "diagnostics.json").exists()


LITTLE = dataclasses.replace(
    suite.QUICK,
    held_out=12,
    importance_samples=40,
    refined=5,
    refine_steps=5,
    simulations=40,
    draws=19,
    annealed=3,
    anneal_steps=4,
    chain_rows=2,
    chain_warmup=4,
    chain_draws=4,
    aggregate=30,
)
FAST = "one column, one latent"
ODD = {
    FAST: (lambda r: r.normal(size=(60, 1)), ["--latent-dim", "1"]),
    "constant": (lambda r: np.full((60, 3), 7.25), []),
    "a constant column": (lambda r: np.c_[r.normal(size=(60, 2)), np.full(60, 5e5)], []),
    "black": (lambda r: np.zeros((60, 1, 3, 3), np.uint8), ["--likelihood", "bernoulli"]),
    "one pixel": (lambda r: r.integers(0, 256, (60, 1, 1, 1)).astype(np.uint8), []),
    "one line": (lambda r: r.integers(0, 256, (60, 1, 1, 9)).astype(np.uint8), []),
    "no active unit": (lambda r: r.normal(size=(60, 3)), ["--objective", "beta", "--beta", "999"]),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == FAST else [pytest.mark.slow]) for n in ODD],
)
def test_odd_data_give_numbers(name, tmp_path, capsys, monkeypatch):
    """Every size is a number, none is passed over for another that is none."""
    monkeypatch.setattr(suite, "QUICK", LITTLE)
    if name == FAST:  # drawing takes most of the time
        monkeypatch.setattr(train, "_summarize", lambda *_: None)
        monkeypatch.setattr(figures, "save", lambda figure, path: None)
    make, flags = ODD[name]
    np.save(tmp_path / "odd.npy", make(np.random.default_rng(0)))
    out = str(tmp_path / "run")
    arguments = ["--data", str(tmp_path / "odd.npy"), "--out", out, "--test-size", "12"]
    assert train.main([*arguments, *TINY, *flags, "--epochs", "1"]) == 0
    capsys.readouterr()
    assert diagnose.main([out, "--quick", "--json"]) == 0
    output = capsys.readouterr()
    report = json.loads(output.out, parse_constant=no_token)
    assert report["complete"] is True
    assert len(report["findings"]) == 16
    for finding in report["findings"]:
        assert None not in [finding[key] for key in ("estimate", "low", "high")], finding["check"]
    assert "note" not in output.err
