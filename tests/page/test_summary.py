"""The values of a page, by its functions: each number and picture under its own name."""

# The page writes minus signs, dashes and times as a book does.
# ruff: noqa: RUF001

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pyro_vae.models.autoencoder import Autoencoder
from pyro_vae.models.vae import VAE
from pyro_vae.page import summary, verdicts, write
from pyro_vae.page.explorer import Explorer
from pyro_vae.plots.run import new_figure


def line(epoch: int, **changes: Any) -> dict[str, Any]:
    """Of metrics.jsonl; every number differs."""
    names = ("elbo", "reconstruction", "kl")
    values = {"train_elbo": -31.0, "reconstruction": -21.0, "kl": 11.0}
    values |= {f"validation_{name}": -10.0 * k - epoch for k, name in enumerate(names, 3)}
    times = {"seconds": 100.0 * epoch, "images_per_second": 1000.0 * epoch, "step": 7 * epoch}
    return {"epoch": epoch, **values, **times, **changes}


def checkpoint(kind: type = VAE, **changes: Any) -> Any:
    vae = kind.__new__(kind)
    nn.Module.__init__(vae)
    vae.weight = nn.Parameter(torch.zeros(1234))
    fields = {"vae": vae, "history": [line(1), line(2)], "fingerprint": "abc"}
    return SimpleNamespace(**fields | changes)


def figure(mark: str):
    made = new_figure(2, 2)
    made.text(0.5, 0.5, mark)
    return made


def test_every_picture_stands_under_its_caption():
    names = ("samples", "elbo", "interpolations", "reconstructions")
    found = summary._pictures({name: figure(f"mark-{name}") for name in names}, "thing", 1)
    order = ("reconstructions", "samples", "interpolations")
    for picture, name in zip(found, order, strict=True):
        assert f"mark-{name}" in picture.svg
        assert picture.src == ""
    starts = ("Validation things and their rec", "Samples: ", "Interpolations: ")
    assert [p.caption.startswith(s) for p, s in zip(found, starts, strict=True)] == [True] * 3
    assert found[2].caption.endswith("pairs of test things")
    assert len(summary._pictures({"samples": figure("a")}, "row", 1)) == 1


def test_a_picture_of_much_text_is_an_image_and_runs_share_the_limit(monkeypatch):
    size = len(summary._pictures({"samples": figure("a")}, "row", 1)[0].svg)
    monkeypatch.setattr(summary, "PICTURE_BYTES", 2 * size)
    assert summary._pictures({"samples": figure("a")}, "row", 1)[0].svg
    (picture,) = summary._pictures({"samples": figure("a")}, "row", 3)
    assert picture.svg == ""
    assert picture.src.startswith("data:image/webp;base64,")


def test_curves_name_the_best_epoch_and_its_value():
    history = [line(1), line(2), line(3)]
    picture = summary._curves(figure("curve"), history, line(2), "row")
    assert picture.alt == "Curves over 3 epochs; best epoch 2, ELBO -32.00 nats per row"
    assert "curve" in picture.svg
    autoencoder = summary._curves(figure("c"), history, line(2, kl=None), "image")
    assert autoencoder.alt.endswith("best epoch 2, reconstruction -42.00 nats per image")


def test_numbers_are_of_the_best_epoch_and_times_of_the_last():
    means = np.array([[0.0, 1.0, 5.0], [0.0, 1.1, 9.0], [0.0, 1.2, 1.0]])
    codes = SimpleNamespace(means=means)
    history = [line(1), line(2), line(3)]
    trust = verdicts.Trust("", log_evidence=-77.25)
    found = summary._numbers(checkpoint(), history, codes, trust)
    assert found == {
        "ELBO, validation": ("−32.00", "nats per row"),
        "Reconstruction, validation": ("−42.00", "nats per row"),
        "KL, validation": ("−52.00", "nats per row"),
        "log p(x), held out": ("−77.25", "nats per row"),
        "Active latents": ("1 of 3", "whose means vary"),
        "Best epoch": ("2 of 3", "by validation"),
        "Training": ("5 min", "at 3,000 rows per second"),
        "Parameters": ("1,234", "encoder and decoder"),
    }
    plain = checkpoint(history=[line(1, kl=None, validation_elbo=None, validation_kl=None)])
    found = summary._numbers(plain, [line(1)], codes, verdicts.Trust(""))
    assert list(found) == ["Reconstruction, validation", "Best epoch", "Training", "Parameters"]
    assert found["Training"][0] == "100 s"


def test_active_latents_are_counted_by_their_variance():
    """The limit is 0.01: variances just above and below it, unbiased."""
    for factor, count in ((1.02, 1), (0.98, 0)):
        means = np.sqrt(0.01 * factor) * np.array([[-1.0], [1.0]]) / np.sqrt(2)
        found = summary._numbers(
            checkpoint(), [line(1)], SimpleNamespace(means=means), verdicts.Trust("")
        )
        assert found["Active latents"][0] == f"{count} of 1"


def diagnosed(run: Path, verdicts: tuple[str, ...], **changes: Any) -> None:
    findings = [
        {
            "check": f"check of {verdict}",
            "verdict": verdict,
            "effect": "e",
            "estimate": 1.5,
            "low": 0.5,
            "high": 2.5,
            "ideal": 1.0,
            "meaning": "m",
            "advice": "a",
        }
        for verdict in verdicts
    ]
    report = {
        "findings": findings,
        "details": {"log_evidence": -5.0},
        "step": 14,
        "fingerprint": "abc",
        "effort": {"quick": False},
        "held_out": 12,
        "data": "digits",
        "complete": True,
        **changes,
    }
    (run / "diagnostics.json").write_text(json.dumps(report))


def test_verdicts_in_words(tmp_path):
    diagnosed(tmp_path, ("sound", "wrong", "doubtful", "sound"))
    trust = verdicts.trust_of(tmp_path, checkpoint())
    assert [f.verdict for f in trust.findings] == ["wrong", "doubtful", "sound", "sound"]
    assert trust.findings[0].numbers == "1.50 [0.500, 2.50]"
    assert "4 checks were made, on 12 held-out rows of digits" in trust.words
    assert "2 sound, 1 doubtful, 1 wrong. Errors shown to be large: check of wrong." in trust.words
    assert (trust.command, trust.stale, trust.log_evidence) == ("", "", -5.0)
    diagnosed(tmp_path, ("sound",), complete=False, effort={"quick": True})
    words = verdicts.trust_of(tmp_path, checkpoint()).words
    assert "with --quick, on 12" in words
    assert "All errors are shown to be small." in words
    assert "interrupted" in words
    diagnosed(tmp_path, ("doubtful",))
    words = verdicts.trust_of(tmp_path, checkpoint()).words
    assert "small" not in words
    assert "interrupted" not in words
    autoencoder = verdicts.trust_of(tmp_path, checkpoint(Autoencoder))
    assert (autoencoder.findings, autoencoder.command) == ((), "")


@pytest.mark.parametrize("changes", [{"step": 7}, {"fingerprint": "other"}])
def test_verdicts_on_another_state_are_stale(changes, tmp_path):
    diagnosed(tmp_path, ("wrong",), **changes)
    trust = verdicts.trust_of(tmp_path, checkpoint())
    assert trust.stale
    assert trust.command.startswith("python -m pyro_vae.diagnose")
    assert trust.log_evidence is None


def test_pictures_that_cannot_be_read_are_named(tmp_path):
    """A missing picture costs the page no more than itself."""
    diagnosed(tmp_path, ("sound",))
    folder = tmp_path / "figures"
    folder.mkdir()
    figure("a").savefig(folder / "diagnose_weights.png")
    whole = (folder / "diagnose_weights.png").read_bytes()
    (folder / "diagnose_gaps.png").write_bytes(whole[: len(whole) // 2])
    (folder / "diagnose_ranks.png").write_bytes(b"")
    (folder / "diagnose_own.png").write_bytes(whole)
    found = {p.caption.split(" (")[0]: p for p in summary._diagnostic_pictures(tmp_path)}
    assert set(found) == {"own", *(summary.CAPTIONS[name] for name in ("weights", "gaps", "ranks"))}
    for name, there in (("weights", True), ("gaps", False), ("ranks", False)):
        picture = found[summary.CAPTIONS[name]]
        assert picture.src.startswith("data:image/webp") == there
        assert (f"missing: diagnose_{name}.png cannot be read" in picture.caption) != there


def test_lines_after_the_best_epoch_are_kept_only_of_the_same_run(tmp_path):
    best, rest = [line(1), line(2)], [line(3)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in best + rest))
    assert summary._history(tmp_path, best) == best + rest
    path.write_text("".join(json.dumps(one) + "\n" for one in [line(1, kl=0.0), line(2), *rest]))
    assert summary._history(tmp_path, best) == best


def test_the_explorer_is_described():
    found = Explorer([3, 1], np.zeros((2, 9)), [0], {}, (32, 64, 1), (0, 1), True)
    images = SimpleNamespace(means=np.zeros((5, 4)), x=torch.zeros(5, 1, 2, 2))
    words = summary._explorer_words(found, checkpoint().vae, images)
    assert words == (
        "Means of p(x|z), decoded in advance at 9 values of each latent, for the 2 latents whose "
        "means vary most; reduced to 64 × 32 pixels."
    )
    whole = Explorer([0, 1], np.zeros((2, 9)), [0], {}, (1, 4, 1), (0, 1), False)
    table = SimpleNamespace(means=np.zeros((5, 2)), x=torch.zeros(5, 4))
    words = summary._explorer_words(whole, checkpoint(Autoencoder).vae, table)
    assert words == (
        "Decoded in advance at 9 values of each latent, over the middle 98% of codes; standardized "
        "columns from left to right."
    )


def test_control_characters_in_names_are_escaped():
    names = write.distinct_names(
        [Path("/tmp/a\x1b[2J"), Path("/tmp/caf\udce9"), Path("/tmp/plain")]
    )
    assert names == ["a\\x1b[2J", "caf\\xe9", "plain"]
