"""Bits-back coding: lossless, and as short as the ELBO says."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import SIGMAS, example_values
from scipy import stats

import pyro_vae
from pyro_vae import compress, decompress, train
from pyro_vae.evidence import compression
from pyro_vae.evidence.codecs import unpack, usual_sizes
from pyro_vae.evidence.compression import SPACING, Coder, on_one_core
from pyro_vae.models.log_weights import log_weights

pytest.importorskip("constriction", reason="needs pip install '.[compression]'")

LIKELIHOODS = ("bernoulli", "binomial", "discretized-logistic")


def trained(likelihood: str, guide: str = "diagonal", epochs: int = 20) -> tuple:
    """A small model, and 1,000 rows in its units."""
    splits = pyro_vae.load_data(example_values(likelihood, 1250))
    config = pyro_vae.ModelConfig(latent_dim=2, hidden=(16,), guide=guide, likelihood=likelihood)
    vae = pyro_vae.build(config, splits)
    pyro_vae.fit(vae, splits, pyro_vae.FitConfig(epochs=epochs, learning_rate=1e-2, batch_size=64))
    x = torch.cat(list(splits.whole().fixed(vae.likelihood_module.units, 0)))
    return vae, x[:1000]


@pytest.mark.parametrize("guide", ["diagonal", "full"])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_rows_are_restored_with_any_number_of_threads(likelihood, guide):
    vae, x = trained(likelihood, guide, epochs=1)
    stack, first = Coder(vae).encode(x[:40], seed=3)
    assert len(stack) > len(first)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(Coder(vae).decode(stack, 40, 3).float(), x[:40])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("guide", ["diagonal", "full"])
@pytest.mark.parametrize(
    "likelihood", ["bernoulli", pytest.param("discretized-logistic", marks=pytest.mark.slow)]
)
def test_a_row_takes_as_many_bits_as_its_elbo(likelihood, guide):
    """On 1,000 rows, at SIGMAS standard errors of the draws of z and 0.3% for the rounding."""
    vae, x = trained(likelihood, guide)
    stack, first = Coder(vae).encode(x)
    bits = 32 * (len(stack) - len(first)) / len(x)
    with torch.no_grad():
        q = vae.posterior(x)
        log_w = log_weights(vae, q, x, q.sample((200,)))[1] / np.log(2)
    error = (log_w.var(0).sum().sqrt() / len(x)).item() + 32 / len(x)
    expected = -log_w.mean().item()
    assert abs(bits - expected) < SIGMAS * error + 0.003 * expected
    assert SIGMAS * error < 0.015 * expected  # a test of about 1%


def draws(vae, x, seed: int = 0) -> np.ndarray:
    """Φ((z − μ) / σ) of the latents that are coded, (N, Z)."""
    coder, found = Coder(vae), []
    plain = coder._draw

    def watched(stack, row):
        z = plain(stack, row)
        q = coder.vae.posterior(row).base_dist
        found.append(stats.norm.cdf((z * SPACING - q.loc[0].numpy()) / q.scale[0].numpy()))
        return z

    coder._draw = watched
    with on_one_core():
        coder.encode(x, seed)
    return np.array(found)


def test_latents_are_draws_from_the_posterior_for_any_prior(monkeypatch):
    """False alarms: 1e-4. Without the shift, the bits of one row's latents are the next row's."""
    vae, x = trained("bernoulli", epochs=2)
    with torch.no_grad():  # posteriors that are far from the prior
        vae.encoder.layers[-1].bias[:2] = 2.5
    uniform = draws(vae, x[:400]).ravel()
    assert stats.kstest(uniform, "uniform").pvalue > 1e-4
    monkeypatch.setattr(Coder, "_shift", lambda *_: None)
    uniform = draws(vae, x[:400]).ravel()
    assert stats.kstest(uniform, "uniform").pvalue < 1e-4


def test_the_bits_that_are_taken_are_given_back():
    """Otherwise a row would need the bits of z as well: more than twenty here."""
    vae, x = trained("bernoulli", epochs=2)
    coder = Coder(vae)
    one, two = (len(coder.encode(x[:n])[0]) for n in (200, 400))
    with torch.no_grad():
        plain = -vae.likelihood(vae.posterior(x[200:400]).mean).log_prob(x[200:400]).mean()
    assert 32 * (two - one) / 200 < plain / np.log(2) + 5


@pytest.mark.slow
def test_draws_far_out_are_as_rare_as_in_the_posterior(monkeypatch):
    """The coder gives every symbol of a range a share: in a wide range, they add up."""
    vae, x = trained("bernoulli", epochs=2)
    with torch.no_grad():
        vae.encoder.layers[-1].bias[2:] = -3.0
    for reach, rare in ((compression.REACH, True), (1e9, False)):
        monkeypatch.setattr(compression, "REACH", reach)
        far = (np.abs(draws(vae, x.repeat(4, 1, 1, 1)) - 0.5) > 0.5 - 1e-9).mean()
        assert bool(far == 0) is rare


# --- commands -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """A run, and its test rows in a file."""
    folder = tmp_path_factory.mktemp("coded")
    run, out = str(folder / "run"), str(folder / "x.bb")
    flags = ["--epochs", "2", "--latent-dim", "2", "--hidden", "8", "--refit", "off"]
    assert train.main([*flags, "--out", run]) == 0
    assert compress.main([run, "--out", out]) == 0
    return folder


@pytest.mark.slow
def test_another_process_restores_the_rows(coded, digits, capsys):
    command = [sys.executable, "-m", "pyro_vae.decompress", str(coded / "run"), str(coded / "x.bb")]
    subprocess.run([*command, "--out", str(coded / "x.npy")], check=True)
    x = np.load(coded / "x.npy")
    assert x.dtype == np.uint8
    np.testing.assert_array_equal(x, digits.test.values[digits.test.rows].numpy())
    assert (coded / "x.bb").stat().st_size < x.nbytes


def test_the_output_compares_the_sizes(coded, capsys):
    out = str(coded / "few.bb")
    assert compress.main([str(coded / "run"), "--num-rows", "9", "--out", out]) == 0
    text = capsys.readouterr().out
    for name in ("bits-back", "-ELBO / log 2", "gzip", "PNG", "without a code"):
        assert name in text
    assert unpack(coded / "few.bb")[0].count == 9


def edited(path, change):
    content = bytearray(path.read_bytes())
    change(content)
    bad = path.with_name("bad.bb")
    bad.write_bytes(bytes(content))
    return bad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.__setitem__(-9, c[-9] ^ 1), "damaged"),
        (lambda c: c.__setitem__(len(c) // 2, c[len(c) // 2] ^ 64), "damaged"),
        (lambda c: c.__delitem__(slice(-4, None)), "damaged"),
        (lambda c: c.__delitem__(slice(-1, None)), "damaged: its header cannot be read"),
        (lambda c: c.__delitem__(slice(30, None)), "damaged: its header cannot be read"),
        (lambda c: c.__setitem__(0, 0), "is not a file of pyro_vae.compress"),
        (
            lambda c: c.__setitem__(slice(None), c.replace(b'"count": 179', b'"count": -79')),
            "header",
        ),
        (
            lambda c: c.__setitem__(slice(None), c.replace(b'"count": 179', b'"count":10**9')),
            "header",
        ),
    ],
)
def test_damaged_files_are_one_line(coded, change, message, capsys):
    bad = edited(coded / "x.bb", change)
    assert decompress.main([str(coded / "run"), str(bad), "--out", str(coded / "b.npy")]) == 2
    assert message in capsys.readouterr().err
    assert not (coded / "b.npy").exists()


def test_a_stated_number_of_rows_is_not_trusted_with_memory(coded, capsys):
    bad = edited(coded / "x.bb", lambda c: None)
    header, stack = unpack(bad)
    from dataclasses import replace

    from pyro_vae.evidence.codecs import pack

    bad.write_bytes(pack(replace(header, count=10**15), stack))
    assert decompress.main([str(coded / "run"), str(bad), "--out", str(coded / "b.npy")]) == 2
    assert "may be damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_another_model_is_one_line(coded, run, capsys):
    arguments = [str(run), str(coded / "x.bb"), "--out", str(coded / "b.npy")]
    assert decompress.main(arguments) == 2
    assert "was made by another model" in capsys.readouterr().err


@pytest.mark.slow
def test_models_that_cannot_compress_say_why(tmp_path, capsys):
    x = np.random.default_rng(0).uniform(size=(40, 3))
    for values, flags, message in [
        (x, [], "expects a likelihood of at most 1024 discrete values"),
        (x, ["--likelihood", "bernoulli"], "--binarize codes a binarization"),
        ((x > 0.5), ["--prior", "mixture"], "expects --prior normal"),
        ((x > 0.5), ["--guide", "flow"], "expects --guide diagonal or full"),
        ((x > 0.5), ["--model", "ae"], "is an autoencoder"),
    ]:
        np.save(tmp_path / "x.npy", values)
        out = ["--data", str(tmp_path / "x.npy"), "--out", str(tmp_path / "run"), "--overwrite"]
        small = ["--epochs", "1", "--latent-dim", "2", "--hidden", "4"]
        assert train.main([*out, *small, *flags]) == 0
        capsys.readouterr()
        assert compress.main([str(tmp_path / "run"), "--out", str(tmp_path / "x.bb")]) == 2
        assert message in capsys.readouterr().err


def test_usual_compressors_are_measured_on_the_same_rows():
    noise = np.random.default_rng(0).integers(0, 256, size=(5, 1, 30, 30))
    sizes = usual_sizes(noise, 255)
    assert all(7200 < size < 9000 for size in sizes.values())  # 8 bits a pixel, and overhead
    sizes = usual_sizes(noise > 127, 1)
    assert 900 < sizes["gzip"] < 1000
    assert 900 < sizes["PNG"] < 1800
    assert set(usual_sizes(noise[:, 0, 0], 255)) == {"gzip"}
