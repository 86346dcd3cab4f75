"""`encode --draws` and `--recalibrate`: arrays, printed lines, and mistakes."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch

import pyro_vae
from pyro_vae import encode, train
from pyro_vae.diagnostics import draws as home
from pyro_vae.runtime import files
from pyro_vae.runtime.randomness import derive, random_states


def trained(folder, *flags):
    """A run on 12 rows of three columns, without figures and page."""
    path = folder / "rows.npy"
    np.save(path, np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32))
    small = ["--epochs", "2", "--hidden", "8", "--latent-dim", "2", "--batch-size", "16"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_summarize", lambda folder: None)
        assert train.main(["--data", str(path), "--out", str(folder / "run"), *small, *flags]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("draws"))


def encoded(path, *flags):
    assert encode.main([*map(str, flags), "--out", str(path)]) == 0
    with np.load(path) as file:
        return dict(file)


def test_draws_are_those_of_the_library(run, tmp_path, capsys):
    arrays = encoded(tmp_path / "codes.npz", run, "--draws", 30)
    line = "30 draws from p(z|x) for each row; rows by method: importance 40\n"
    assert capsys.readouterr().out.endswith(line)
    vae, splits = pyro_vae.load(run), pyro_vae.load_data(str(run.parent / "rows.npy"))
    x = torch.cat(list(splits.whole().fixed("real", 0)))
    with random_states(x.device, derive(0, "draws")):
        found = pyro_vae.posterior_draws(vae, x, 30)
    assert arrays["draws"].shape == (40, 30, 2)
    np.testing.assert_array_equal(arrays["draws"], found.draws.numpy().swapaxes(0, 1))
    np.testing.assert_array_equal(arrays["pareto_k"], found.pareto_k)
    np.testing.assert_array_equal(arrays["effective_draws"], found.effective_draws)
    assert arrays["method"].tolist() == ["importance"] * 40
    # what was there before is as without the flag
    plain = encoded(tmp_path / "plain.npz", run)
    assert set(plain) == {"mean", "standard_deviation", "split"}
    assert set(arrays) == set(plain) | {"draws", "method", "pareto_k", "effective_draws"}
    for name, values in plain.items():
        np.testing.assert_array_equal(arrays[name], values)
    other = encoded(tmp_path / "seed.npz", run, "--draws", 30, "--seed", 7)
    assert not np.array_equal(other["draws"], arrays["draws"])


def test_recalibrated_deviations_are_added_and_told(run, tmp_path, capsys):
    arrays = encoded(tmp_path / "codes.npz", run, "--recalibrate")
    out = capsys.readouterr().out
    vae = pyro_vae.load(run)
    with random_states(torch.device("cpu"), derive(0, "recalibrate")):
        found = pyro_vae.recalibrate(vae)
    np.testing.assert_array_equal(arrays["factors"], found.factors)
    plain = encoded(tmp_path / "plain.npz", run)
    assert set(arrays) == set(plain) | {"factors", "recalibrated_standard_deviation"}
    np.testing.assert_array_equal(arrays["standard_deviation"], plain["standard_deviation"])
    wider = arrays["recalibrated_standard_deviation"]
    assert wider.dtype == np.float32
    np.testing.assert_allclose(wider, plain["standard_deviation"] * found.factors, rtol=1e-6)
    before, after = found.mean_before, found.mean_after
    assert (
        f"recalibrated standard deviations: times {found.factors.min():.2f} to "
        f"{found.factors.max():.2f}. On simulated rows, central 90% intervals of single latents "
        f"hold the truth in a share of {before.estimate:.3f} [{before.low:.3f}, {before.high:.3f}] "
        f"before and {after.estimate:.3f} [{after.low:.3f}, {after.high:.3f}] after"
    ) in out


@pytest.mark.filterwarnings("default")
def test_rows_without_reliable_draws_and_outliers_are_named(run, tmp_path, capsys):
    x = np.load(run.parent / "rows.npy")[:6]
    x[4, 1] = 1e30
    np.save(tmp_path / "far.npy", x)
    flags = ["--data", tmp_path / "far.npy", "--draws", 5]
    arrays = encoded(tmp_path / "codes.npz", run, *flags)
    assert arrays["method"].tolist() == ["importance"] * 4 + ["unreliable", "importance"]
    assert np.isfinite(arrays["draws"]).all()
    out, notes = capsys.readouterr()
    assert "rows by method: importance 5, unreliable 1" in out
    assert "note: the draws of 1 of 6 rows are unreliable" in notes
    assert "Rows (counted from 0): 4" in notes


@pytest.mark.filterwarnings("default")
def test_rows_are_counted_by_method(run, tmp_path, capsys, monkeypatch):
    """No weights are reliable here; of each set of chains, the first row's disagree."""
    monkeypatch.setattr(home, "reliable_k", lambda _: -100.0)
    monkeypatch.setattr(home, "REFINE_STEPS", 3)

    def chains(vae, x, num_chains, num_samples, num_warmup, on_sample):
        on_sample(num_chains * (num_samples + num_warmup))
        draws = torch.randn(num_chains, num_samples, len(x), 2).double()
        draws[0] += 5 * (torch.arange(len(x)) == 0)[:, None]
        return draws, 0

    monkeypatch.setattr(home, "chains", chains)
    arrays = encoded(tmp_path / "codes.npz", run, "--draws", 10)
    # 40 rows, at most 32 in a set of chains
    assert (arrays["method"] == "not converged").sum() == 2
    out, notes = capsys.readouterr()
    assert "rows by method: nuts 38, not converged 2" in out
    assert "note: the draws of 2 of 40 rows are not converged: chains of NUTS disagree" in notes


def test_moments_of_a_flow_are_said_to_be_sampled(tmp_path, capsys):
    run = trained(tmp_path, "--guide", "flow")
    capsys.readouterr()
    encoded(tmp_path / "codes.npz", run)
    assert capsys.readouterr().out == (
        f"{tmp_path / 'codes.npz'}: posterior means and standard deviations of 40 rows, 2 latents; "
        f"a flow has none in closed form, they are those of 512 even draws\n"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--draws", "0"], "--draws expects an integer of at least 1; got 0"),
        (["--draws", "-3"], "--draws expects an integer of at least 1; got -3"),
        (["--draws", "1.5"], "--draws expects an integer; got '1.5'"),
        (["--draws", "9" * 30], "--draws expects an integer from 1 to 2^63 - 1; got"),
        (["--draws", str(2**62)], "not enough memory: 4,611,686,018,427,387,904 draws for each"),
        (["--draws"], "--draws"),
        (["--recalibrate", "yes"], "yes"),
    ],
)
def test_mistakes_are_one_line(run, flags, message, tmp_path, capsys):
    capsys.readouterr()
    assert encode.main([str(run), *flags, "--out", str(tmp_path / "codes.npz")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "codes.npz").exists()


@pytest.mark.parametrize("flags", [["--draws", "3"], ["--recalibrate"]])
def test_an_autoencoder_has_no_draws(flags, tmp_path, capsys):
    run = trained(tmp_path, "--model", "ae")
    capsys.readouterr()
    assert encode.main([str(run), *flags, "--out", str(tmp_path / "codes.npz")]) == 2
    error = capsys.readouterr().err
    assert "is an autoencoder, whose codes have no distribution: leave out --draws" in error
    assert error.count("\n") == 1


def test_a_full_disk_leaves_the_earlier_file(run, tmp_path, capsys, monkeypatch):
    path = tmp_path / "codes.npz"
    before = encoded(path, run)

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(files, "write_atomically", full)
    capsys.readouterr()
    assert encode.main([str(run), "--draws", "3", "--out", str(path), "--overwrite"]) == 2
    assert capsys.readouterr().err == f"error: {os.strerror(errno.ENOSPC)}: {path}\n"
    with np.load(path) as file:
        assert set(file) == set(before)
