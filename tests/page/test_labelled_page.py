"""The page of a model with labels: its explorer decodes at the label that is chosen."""

from __future__ import annotations

import base64
import io
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

import pyro_vae
from pyro_vae import ModelConfig, load_data, train
from pyro_vae.models.build import build
from pyro_vae.page import explorer
from pyro_vae.page.explorer import explore, interactive, tiles
from pyro_vae.plots.codes import latent_codes
from pyro_vae.plots.from_model import class_samples, run_figures

PLENTY = 1 << 30


@cache
def model(condition, latent_dim=3):
    """A model, its data and its codes. No test may change it."""
    splits = load_data("digits", labelled=100 if condition == "partial" else None)
    config = ModelConfig(latent_dim=latent_dim, hidden=(8,), condition=condition)
    vae = build(config, splits).eval()
    with torch.no_grad():
        for p in vae.decoder.parameters():
            p.mul_(2)  # away from the mean image
    return vae, splits, latent_codes(vae, splits, 0)


@pytest.mark.parametrize("condition", ["label", "partial"])
@torch.no_grad()
def test_each_sheet_is_decoded_at_its_label(condition):
    vae, splits, codes = model(condition)
    found = explore(vae, codes, PLENTY)
    assert list(found.labels) == list(range(10))
    assert {len(key) for key in found.sheets} == {4}
    side = found.grid.shape[1]
    for label, anchor, first, second in [(0, 0, 0, 1), (7, 1, 0, 2), (9, 0, 1, 2)]:
        content = found.sheets[label, anchor, first, second]
        sheet = np.asarray(Image.open(io.BytesIO(content))).reshape(side, 8, side, 8)
        z = torch.tensor(codes.means[found.anchors[anchor]]).repeat(1, 1)
        z[0, found.latents[first]] = float(found.grid[first][2])
        z[0, found.latents[second]] = float(found.grid[second][1])
        wanted = tiles(vae, vae.given(label).likelihood(z).mean)[0].astype(float)
        assert abs(sheet[1, :, 2] - wanted).max() <= 1
    data = interactive(found, vae, splits, codes, 1)["explorer"]
    assert data["labels"] == list("0123456789")
    assert data["own"] == [int(codes.given[anchor]) for anchor in found.anchors]
    assert set(data["sheets"]) == {" ".join(map(str, key)) for key in found.sheets}


def test_a_small_budget_and_many_classes_leave_fewer_sheets(monkeypatch):
    vae, _, codes = model("label")
    small = explore(vae, codes, 60_000)
    assert sum(map(len, small.sheets.values())) <= 60_000
    monkeypatch.setattr(explorer, "MAX_LABELS", 4)
    few = explore(vae, codes, PLENTY)
    assert len(few.labels) == 4
    shares = vae.label_logits[list(few.labels)]
    assert shares.min() >= vae.label_logits.sort().values[-4]


@torch.no_grad()
def test_codes_are_those_at_the_labels():
    vae, splits, codes = model("label")
    x, y = next(splits.test.fixed_with_labels("count", 0, 5))
    assert np.allclose(codes.means[:5], vae.posterior(x, y).mean, atol=1e-5)
    assert (codes.given == codes.labels).all()
    vae, splits, codes = model("partial")  # training rows without a label are among them
    assert codes.class_names[-1] == "no label"
    assert (codes.labels == 10).any()
    assert (codes.given < 10).all()
    inferred = vae.classifier(codes.x).argmax(-1)
    assert (codes.given == inferred.numpy()).all()


def test_rows_without_a_label_have_a_colour_of_their_own():
    """In a model without labels, too."""
    x = np.random.default_rng(0).normal(size=(60, 3))
    splits = load_data((x, np.where(np.arange(60) % 3 > 0, "", np.where(x[:, 0] > 0, "a", "b"))))
    vae = pyro_vae.build(ModelConfig(latent_dim=2, hidden=(4,)), splits)
    codes = latent_codes(vae, splits, 0)
    assert codes.class_names == ("a", "b", "no label")
    assert (codes.labels == 2).sum() == 40
    assert codes.given is None


@torch.no_grad()
def test_samples_have_a_class_in_each_row():
    vae, splits, _ = model("label")
    torch.manual_seed(0)
    grid = class_samples(vae, columns=4, rows=10)
    assert grid.shape == (10, 4, 1, 8, 8)
    torch.manual_seed(0)
    z = vae.prior().sample((4,))
    wanted = vae.given(7).likelihood(z).mean / 16
    assert np.allclose(grid[7], wanted, atol=1e-5)
    history = [{"epoch": 1, "train_elbo": -1.0, "validation_elbo": -1.0, "reconstruction": -1.0}]
    history[0] |= {"kl": 0.0, "validation_reconstruction": -1.0, "validation_kl": 0.0}
    drawn = run_figures(vae, splits, history, 0)
    assert {"samples", "interpolations", "elbo"} <= set(drawn)


@pytest.mark.slow
def test_the_label_is_chosen_in_the_browser(tmp_path):
    """The canvas is the decoder's mean at the chosen label; an anchor brings its own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = shutil.which("chromium") or "/usr/bin/chromium"
    if not shutil.which(path):
        pytest.skip("needs Debian's chromium")
    flags = ["--condition", "label", "--latent-dim", "3", "--hidden", "8", "--epochs", "2"]
    assert train.main(["--out", str(tmp_path / "run"), *flags]) == 0
    vae, splits = pyro_vae.load(tmp_path / "run"), load_data("digits")
    codes = latent_codes(vae, splits, 0)
    found = explore(vae, codes, 1_500_000)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(error))
        page.goto((tmp_path / "run" / "report.html").as_uri())
        host = page.locator(".explorer")
        select = host.locator("select.given")
        for label in (4, 9):
            select.select_option(str(label))
            page.wait_for_function(
                "([h, k]) => h.dataset.given == k", arg=[host.element_handle(), label]
            )
            page.wait_for_timeout(200)
            state = host.evaluate("h => ({...h.dataset})")
            i, j, anchor, first, second = (
                int(state[name]) for name in ("i", "j", "anchor", "first", "second")
            )
            z = codes.means[found.anchors[anchor]].copy()
            z[found.latents[second]] = found.grid[second][j]
            z[found.latents[first]] = found.grid[first][i]
            mean = vae.given(label).likelihood(torch.tensor(z)[None]).mean[0, 0] / 16 * 255
            content = host.locator(".decoded > canvas").evaluate("c => c.toDataURL()")
            shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(content.split(",")[1]))))
            assert abs(shown[..., 0] - mean.detach().numpy()).max() <= 0.51
            assert f"label {label}" in host.locator("output").inner_text()
        buttons = host.locator(".anchors button")
        if buttons.count() > 1:
            buttons.nth(1).click()
            own = int(codes.given[found.anchors[1]])
            page.wait_for_function(
                "([h, k]) => h.dataset.given == k", arg=[host.element_handle(), own]
            )
            assert select.input_value() == str(own)
        assert not errors
        browser.close()
