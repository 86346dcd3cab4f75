"""The page of a run: what it says is so, what it shows is the decoder's, and nothing breaks it.

Runs are made by the package's own functions, of untrained models: a page shows what a model does,
not how well. The tests in a browser need Debian's chromium and playwright, and say so.
"""

# The page writes minus signs, dashes and times as a book does.
# ruff: noqa: RUF001

from __future__ import annotations

import base64
import dataclasses
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pyro_vae
from pyro_vae import report, train
from pyro_vae.config import Config, DataConfig, FitConfig, ModelConfig, resolve
from pyro_vae.data.loading import load_data
from pyro_vae.models.build import build
from pyro_vae.page import render as page_module
from pyro_vae.page import write as pages_module
from pyro_vae.page.explorer import THUMBNAIL_BYTES, explore
from pyro_vae.page.summary import EXPLORER_BYTES, Overview, overview
from pyro_vae.page.write import write_page
from pyro_vae.plots.codes import latent_codes
from pyro_vae.runtime.files import write_atomically
from pyro_vae.training.checkpoint import load_checkpoint, serialize

HOSTILE = ("</script><b>bold</b>", "<i>\"x' & $y$", "_{{ 7 * 7 }}")


# --- runs -----------------------------------------------------------------------------------------


def line(epoch: int, elbo: float | None = -50.0) -> dict[str, Any]:
    """Of metrics.jsonl, with numbers that are not found elsewhere on the page."""
    is_vae = elbo is not None
    return {
        "epoch": epoch,
        "step": 3 * epoch,
        "seconds": 61.4 * epoch,
        "train_elbo": elbo - 1 / epoch if is_vae else None,
        "validation_elbo": elbo - 2.0 / epoch if is_vae else None,
        "reconstruction": -40.0 - 1 / epoch,
        "kl": 10.0 if is_vae else None,
        "validation_reconstruction": -39.25 - 2.0 / epoch,
        "validation_kl": 10.75 if is_vae else None,
        "learning_rate": 1e-3,
        "images_per_second": 1234.4,
    }


def make_run(
    run: Path,
    values: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    epochs: int = 3,
    seed: int = 0,
    vivid: float = 3.0,
    test_size: int | None = None,
    validation_size: int | None = None,
    max_value: int | None = None,
    batch_size: int = 8,
    **model: Any,
) -> Path:
    """A run folder as training leaves it, of a model with fresh weights, its data beside it.

    The weights grow by the factor `vivid`: an untrained decoder makes the mean image of any z.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    source = run.parent / f"{run.name}.npz"
    np.savez(source, x=values, **({} if labels is None else {"labels": labels}))
    data = DataConfig(
        str(source), max_value=max_value, test_size=test_size, validation_size=validation_size
    )
    settings = {"latent_dim": 2, "hidden": (16,), **model}
    asked = Config(
        data=data,
        model=ModelConfig(**settings),
        fit=FitConfig(epochs=epochs, batch_size=batch_size),
        seed=seed,
    )
    splits = load_data(asked.data, seed)
    config = resolve(asked, splits.likelihood, len(splits.train))
    vae = build(config.model, splits, seed)
    with torch.no_grad():
        for p in vae.decoder.parameters():
            p.mul_(vivid)
        vae.encoder.layers[-1].weight.mul_(vivid)
    history = [line(i, -50.0 if config.model.kind == "vae" else None) for i in range(1, epochs + 1)]
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(asked.to_dict()))
    (run / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in history))
    best = serialize(vae, config, splits, history[:-1] or history)
    write_atomically(run / "checkpoints" / "best.pt", best)
    return run


def grey(count: int = 40, side: int = 6) -> np.ndarray:
    """Counts from 0 to 16."""
    random = np.random.default_rng(1)
    level = random.random((count, 1, 1, 1))
    return np.rint(16 * (0.7 * level + 0.3 * random.random((count, 1, side, side)))).astype(int)


def make_grey(run: Path, labels: np.ndarray | None = None, **settings: Any) -> Path:
    return make_run(run, grey(), labels, max_value=16, **settings)


def make_colour(run: Path, labels: np.ndarray | None = None, **settings: Any) -> Path:
    values = np.random.default_rng(2).random((40, 3, 5, 7)).astype(np.float32)
    return make_run(run, values, labels, **{"latent_dim": 5, **settings})


def make_table(run: Path, labels: np.ndarray | None = None, **settings: Any) -> Path:
    values = 100 * np.random.default_rng(3).standard_normal((40, 6))
    return make_run(run, values, labels, **{"latent_dim": 3, **settings})


def finding(check: str, verdict: str, **numbers: Any) -> dict[str, Any]:
    return {
        "check": check,
        "verdict": verdict,
        "effect": f"effect of {check}",
        "estimate": 0.51234,
        "low": 0.25,
        "high": -7.125,
        "ideal": 0.5,
        "limits": [0.1, 0.5],
        "meaning": f"meaning of {check}, `a<b` and <u>markup</u>",
        "advice": f"advice on {check}",
        **numbers,
    }


def diagnostics(run: Path, **changes: Any) -> dict[str, Any]:
    """Write diagnostics.json as `diagnose` does."""
    content = {
        "checkpoint": str(run / "checkpoints" / "best.pt"),
        "step": load_checkpoint(run).history[-1]["step"],
        "fingerprint": load_checkpoint(run).fingerprint,
        "data": "these",
        "held_out": 1234,
        "likelihood": "binomial",
        "binarization": "none",
        "seed": 0,
        "effort": {"quick": True},
        "complete": True,
        "findings": [
            finding("good one", "sound"),
            finding("bad one", "wrong"),
            finding("so so", "doubtful"),
        ],
        "details": {"elbo": -51.5, "log_evidence": -45.678},
        **changes,
    }
    (run / "diagnostics.json").write_text(json.dumps(content))
    return content


@pytest.fixture(scope="module", autouse=True)
def _quick_tsne() -> Iterator[None]:
    """t-SNE takes longer than all else, and where its dots lie is no part of what is tested."""
    from sklearn.decomposition import PCA

    class Quick:
        def __init__(self, **_: Any) -> None: ...

        def fit_transform(self, values: np.ndarray) -> np.ndarray:
            return PCA(n_components=2, svd_solver="full").fit_transform(values**3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sklearn.manifold.TSNE", Quick)
        yield


def view_of(run: Path, num_runs: int = 1) -> Overview:
    checkpoint = load_checkpoint(run)
    splits = load_data(checkpoint.config.data, checkpoint.config.seed)
    codes = latent_codes(checkpoint.vae, splits, checkpoint.config.seed)
    return overview(run, checkpoint, splits, codes, num_runs)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each kind; the class names are hostile."""
    folder = tmp_path_factory.mktemp("kinds")
    few = np.array(HOSTILE)[np.arange(40) % 3]
    many = np.array([f"class {i}" for i in range(12)])[np.arange(40) % 12]
    found = {
        "grey": make_grey(folder / "grey", few),
        "colour": make_colour(folder / "colour", many),
        "table": make_table(folder / "table", np.arange(40) % 2),
        "line": make_grey(folder / "line", latent_dim=1),
        "plain": make_grey(folder / "plain", kind="ae", latent_dim=3),
    }
    diagnostics(found["grey"])
    diagnostics(found["table"])
    for name in ("grey", "table"):
        (found[name] / "figures").mkdir()
        picture = Image.fromarray(np.full((40, 1500), 200, np.uint8))
        picture.save(found[name] / "figures" / "diagnose_ranks.png")
    return found


@pytest.fixture
def no_figures(monkeypatch):
    """The pictures of a training are not those of the page."""
    monkeypatch.setattr("pyro_vae.plots.from_model.draw_run", lambda *_: [])
    monkeypatch.setattr("pyro_vae.plots.from_model.draw_reconstructions", lambda *_: None)


@pytest.fixture(scope="module")
def views(runs: dict[str, Path]) -> dict[str, Overview]:
    """Made once: what the pages of single runs and of several share."""
    return {name: view_of(run) for name, run in runs.items()}


@pytest.fixture(scope="module")
def pages(views, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The page of the runs of these names."""
    folder = tmp_path_factory.mktemp("pages")

    def made(*names: str) -> Path:
        out = folder / f"{'-'.join(names)}.html"
        if not out.exists():
            write_page(out, [views[name] for name in names])
        return out

    return made


# --- pages read as HTML ---------------------------------------------------------------------------

VOID = {"meta", "img", "br", "input", "link", "hr"}


@dataclasses.dataclass
class Node:
    """An element of a page."""

    tag: str
    attributes: dict[str, str | None]
    children: list[Node | str] = dataclasses.field(default_factory=list)

    def all(self, tag: str, **attributes: str) -> list[Node]:
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        found = []
        for child in self.children:
            if isinstance(child, Node):
                if child.tag == tag and wanted.items() <= child.attributes.items():
                    found.append(child)
                found += child.all(tag, **attributes)
        return found

    def one(self, tag: str, **attributes: str) -> Node:
        (found,) = self.all(tag, **attributes)
        return found

    @property
    def text(self) -> str:
        parts = [c if isinstance(c, str) else c.text for c in self.children]
        return " ".join("".join(parts).split())


class Reader(HTMLParser):
    """Builds the tree, and insists that what is opened is closed, in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open = [Node("", {})]
        self.feed(text)
        self.close()
        assert len(self.open) == 1, f"not closed: {[node.tag for node in self.open]}"

    def handle_starttag(self, tag, attributes):
        node = Node(tag, dict(attributes))
        assert len(attributes) == len(node.attributes), f"an attribute twice in {tag}"
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag, attributes):
        self.open[-1].children.append(Node(tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].children.append(data)


def read(path: Path) -> Node:
    return Reader(path.read_text(encoding="utf-8")).open[0]


def island(page: Node) -> dict[str, Any]:
    """What the page's script draws from."""

    def no_number(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = "".join(map(str, page.one("script", id="views").children))
    return json.loads(text, parse_constant=no_number)


def summary(page: Node) -> dict[str, str]:
    section = page.one("section", id="summary")
    return {card.one("dt").text: card.one("dd").text for card in section.all("div", class_="card")}


def rows_of(section: Node) -> list[list[str]]:
    return [
        [cell.text for cell in row.children if isinstance(cell, Node)]
        for row in section.one("table").all("tr")
    ]


def reported(run: Path, *more: str) -> Node:
    assert report.main([str(run), *more]) == 0
    return read(run / "report.html")


# --- what the page says ---------------------------------------------------------------------------


def test_the_page_needs_nothing_else(pages):
    """No address but data: and anchors, and a policy that would refuse any other."""
    for names in [("grey",), ("grey", "colour", "table")]:
        text = pages(*names).read_text()
        page = Reader(text).open[0]
        for node in (
            n for tag in ("img", "script", "link", "a", "image", "use") for n in page.all(tag)
        ):
            for key in ("src", "href", "xlink:href"):
                value = node.attributes.get(key)
                assert value is None or value.startswith(("data:", "#")), node
        policy = page.one("meta", **{"http-equiv": "Content-Security-Policy"})
        assert policy.attributes["content"].startswith("default-src 'none'; img-src data:;")
        outside = set(re.findall(r"(?:https?:)?//[a-z][a-z.]+\.[a-z]+[^\s\"'<]*", text))
        names = ("http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg")
        assert outside <= {*names, "https://www.w3.org/TR/SVG11"}


def test_numbers_are_those_of_the_files(runs, pages):
    page = read(pages("grey"))
    best = line(2)
    vae = pyro_vae.load(runs["grey"])
    count = sum(p.numel() for p in vae.parameters())
    numbers = {key: re.match("[−0-9.,]+", value)[0] for key, value in summary(page).items()}
    assert numbers == {
        "ELBO, validation": f"{best['validation_elbo']:.2f}".replace("-", "−"),
        "Reconstruction, validation": f"{best['validation_reconstruction']:.2f}".replace("-", "−"),
        "KL, validation": "10.75",
        "log p(x), held out": "−45.68",
        "Active latents": "2",
        "Best epoch": "2",
        "Training": "184",
        "Parameters": f"{count:,}",
    }
    assert summary(page)["Best epoch"].startswith("2 of 3")
    assert "at 1,234 rows per second" in summary(page)["Training"]
    assert page.one("title").text == page.one("h1").text == "grey"
    (lead,) = page.all("p", class_="lead")
    assert lead.text == (
        "A variational autoencoder of 2 latents (mlp 16, binomial likelihood), trained on 33 rows "
        "of grey, 1×6×6, by the objective trace; epoch chosen on 3 rows."
    )


def test_verdicts_are_those_of_the_diagnosis(pages):
    """The worst first, with their numbers; meaning and advice where there is something to do."""
    section = read(pages("grey")).one("section", id="trust")
    cards = section.all("li")
    assert [card.one("h4").text for card in cards] == [
        "✗ wrong bad one",
        "? doubtful so so",
        "✓ sound good one",
    ]
    for card, name in zip(cards, ["bad one", "so so", "good one"], strict=True):
        assert f"0.512 [0.250, −7.12] effect of {name}; ideal 0.5" in card.text
        advised = f"meaning of {name}, a<b and <u>markup</u>".capitalize() in card.text
        assert advised == (name != "good one")
        assert not card.all("u")
    assert [code.text for code in cards[0].all("code")] == ["a<b"]
    assert "with --quick, on 1,234 held-out rows of these" in section.text
    assert "1 sound, 1 doubtful, 1 wrong" in section.text
    assert not section.all("p", class_="card warning")
    (picture,) = section.all("img")
    content = base64.b64decode(picture.attributes["src"].removeprefix("data:image/webp;base64,"))
    assert Image.open(io.BytesIO(content)).size == (1400, 37)


def test_settings_are_those_of_the_config(runs, pages):
    head, *rows = rows_of(read(pages("colour")).one("section", id="settings"))
    assert head == ["setting", "value"]
    found = dict(rows)
    config = load_checkpoint(runs["colour"]).config
    assert found["--data"] == config.data.source
    assert found["--latent-dim"] == "5"
    assert found["--hidden"] == "16"
    assert found["--likelihood"] == "continuous-bernoulli"
    assert found["--batch-size"] == "8"
    marked = read(pages("colour")).one("section", id="settings").all("tr", class_="marked")
    names = {row.one("th").text for row in marked}
    assert names == {"--data", "--latent-dim", "--hidden", "--epochs", "--batch-size"}


def test_settings_are_named_by_their_flags(pages, capsys):
    rows = rows_of(read(pages("grey")).one("section", id="settings"))[1:]
    with pytest.raises(SystemExit):
        train.main(["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert {name for name, _ in rows} <= known


def test_an_autoencoder_is_called_one(pages):
    page = read(pages("plain"))
    assert page.one("p", class_="lead").text.startswith("An autoencoder of 3 latents")


def test_an_autoencoder_has_no_elbo_and_no_verdicts(pages):
    page = read(pages("plain"))
    assert set(summary(page)) == {
        "Reconstruction, validation",
        "Best epoch",
        "Training",
        "Parameters",
    }
    trust = page.one("section", id="trust")
    assert "no posterior" in trust.text
    assert "pyro_vae.diagnose" not in trust.text
    captions = [caption.text for caption in page.one("section", id="pictures").all("figcaption")]
    assert len(captions) == 2
    assert not any("prior" in caption for caption in captions)


def test_an_undiagnosed_run_says_how(runs, pages):
    trust = read(pages("colour")).one("section", id="trust")
    assert "Not tested yet" in trust.text
    assert trust.one("code").text == f"python -m pyro_vae.diagnose {runs['colour']}"


def test_the_island_holds_codes_labels_and_sheets(runs, pages):
    """As `latent_codes` computes them, to the rounding said in the page."""
    for name, latent_dim in [("grey", 2), ("colour", 5), ("table", 3), ("line", 1), ("plain", 3)]:
        view = island(read(pages(name)))["0"]
        checkpoint = load_checkpoint(runs[name])
        splits = load_data(checkpoint.config.data)
        codes = latent_codes(checkpoint.vae, splits, 0)
        data = view["explorer"]
        assert view["labels"] == (None if codes.labels is None else codes.labels.tolist())
        assert len(view["planes"]) == (1 if latent_dim < 3 else 2)
        np.testing.assert_allclose(data["codes"], codes.means[:, data["latents"]], atol=6e-4)
        assert data["more"] == (latent_dim > 2)
        for plane, wanted in zip(view["planes"], codes.planes, strict=True):
            np.testing.assert_allclose(plane["points"], wanted.points, atol=6e-4)
            assert not any("$" in text for text in plane["names"])
        assert (view["thumbnails"] is None) == (name == "table")


# --- text of users --------------------------------------------------------------------------------


def test_text_of_users_is_text(pages, views, tmp_path):
    """Class names, names of runs and data: none of them becomes markup or leaves its string."""
    name = "</script><script>alert(1)</script>\"'<i>{{x}}"
    path = Path('<b>it\'s</b> "&quot;" {{x}}'.replace("/", "|"))
    texts = dict.fromkeys(["sentence", "scatter_words", "explorer_words", "origin"], name)
    trust = dataclasses.replace(views["grey"].trust, stale=name, words=name, command=name)
    view = dataclasses.replace(views["grey"], path=path, trust=trust, **texts)
    for several in (1, 2):
        write_page(tmp_path / "a.html", [view, views["colour"]][:several])
        page = read(tmp_path / "a.html")
        assert len(page.all("script")) == 2
        assert not page.all("b")
        assert not page.all("i")
        assert view.path.name in page.one("title").text
        assert island(page)["0"]["classes"] == sorted(HOSTILE)
        raw = "".join(map(str, page.one("script", id="views").children))
        assert not set("<>&'") & set(raw)


@pytest.mark.usefixtures("no_figures")
def test_hostile_folders_and_classes_by_command(tmp_path):
    """From a folder of images, named by its folders, to a page."""
    random = np.random.default_rng(0)
    for label in ("<b>", "'a' & \"b\""):
        folder = tmp_path / "photos" / label
        folder.mkdir(parents=True)
        for i in range(8):
            pixels = random.integers(0, 256, (6, 6), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    (tmp_path / "<i>x").mkdir()
    run = tmp_path / "<i>x" / "<u>&amp;"
    arguments = ["--data", str(tmp_path / "photos"), "--out", str(run), "--hidden", "4"]
    arguments += ["--epochs", "1", "--batch-size", "4", "--latent-dim", "2"]
    assert train.main(arguments) == 0
    page = read(run / "report.html")
    assert page.one("h1").text == "<u>&amp;"
    assert not page.all("u")
    assert not page.all("b")
    assert not page.all("i")
    assert island(page)["0"]["classes"] == ["'a' & \"b\"", "<b>"]
    assert str(run) in page.one("section", id="trust").one("code").text


def test_commands_on_the_page_can_be_copied(tmp_path):
    import shlex

    run = make_grey(tmp_path / "my $(run)")
    command = reported(run).one("section", id="trust").one("code").text
    assert shlex.split(command)[-1] == str(run)


def test_a_value_that_the_page_lacks_is_an_error(views):
    """Rather than a hole in the page."""
    import jinja2

    with pytest.raises(jinja2.UndefinedError):
        page_module.render({"title": "x", "several": False, "runs": [views["grey"]]})


# --- what may be wrong with a run -----------------------------------------------------------------


@pytest.fixture
def grey_run(runs, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(runs["grey"], tmp_path / "grey"))


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures take most of a second, and are no part of what is tested."""
    monkeypatch.setattr("pyro_vae.plots.run.svg", lambda figure: "<svg></svg>")
    monkeypatch.setattr("pyro_vae.page.summary.explore", _no_explorer)


def _no_explorer(vae, codes, budget):
    from pyro_vae.page.explorer import Explorer

    return Explorer([0, 1], np.zeros((2, 2)), [0], {}, (6, 6, 1), (0.0, 1.0), False)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"findings": 3}',
        b'{"findings": [{}]}',
        json.dumps({"findings": [{"check": "a", "verdict": "sound"}]}).encode(),
    ],
)
def test_damaged_diagnostics_count_as_none(content, grey_run):
    (grey_run / "diagnostics.json").write_bytes(content)
    page = reported(grey_run)
    assert "Not tested yet" in page.one("section", id="trust").text
    assert not page.one("section", id="trust").all("li")
    assert "log p(x), held out" not in summary(page)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "change",
    [
        {"effort": {}},
        {"complete": None, "effort": None},
        {"details": []},
        {"held_out": "many"},
        {"findings": [finding("first", "wrong"), {**finding("second", "sound"), "low": "x"}]},
        {"findings": [{k: v for k, v in finding("a", "wrong").items() if k != "advice"}]},
    ],
    ids=["effort", "two", "details", "held out", "second of two", "advice"],
)
def test_diagnostics_of_another_shape_count_as_none(change, grey_run):
    """Of another version, or edited: no traceback, and no verdicts beside "not tested yet"."""
    diagnostics(grey_run, **change)
    trust = reported(grey_run).one("section", id="trust")
    assert "Not tested yet" in trust.text
    assert not trust.all("li")


@pytest.mark.usefixtures("undrawn")
def test_missing_and_partial_diagnoses(grey_run):
    content = diagnostics(
        grey_run,
        complete=False,
        findings=[finding("holes", "sound", estimate=None, low=None, high=float("nan"))],
        details={"elbo": None, "log_evidence": None},
    )
    content["findings"][0]["high"] = None
    (grey_run / "diagnostics.json").write_text(json.dumps(content))
    page = reported(grey_run)
    trust = page.one("section", id="trust").text
    assert "was interrupted" in trust
    assert "– [–, –] effect of holes" in trust
    assert "log p(x), held out" not in summary(page)
    diagnostics(grey_run, effort={"quick": False}, findings=[])
    assert "0 checks were made, on 1,234" in reported(grey_run).one("section", id="trust").text
    (grey_run / "diagnostics.json").unlink()
    assert "Not tested yet" in reported(grey_run).one("section", id="trust").text


@pytest.mark.usefixtures("undrawn")
def test_nan_in_diagnostics_is_shown_and_breaks_nothing(grey_run):
    """Python's json reads and writes it; the page's own may not hold it."""
    diagnostics(grey_run, findings=[finding("odd", "doubtful", estimate=float("nan"))])
    page = reported(grey_run)
    island(page)
    assert "nan [0.250, −7.12]" in page.one("section", id="trust").text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("step", [5, None])
def test_stale_verdicts_are_called_so(step, grey_run):
    diagnostics(grey_run, step=step)
    trust = reported(grey_run).one("section", id="trust")
    (warning,) = trust.all("p", class_="card warning")
    assert "earlier state of the run" in warning.text
    assert f"python -m pyro_vae.diagnose {grey_run}" in warning.text


@pytest.mark.usefixtures("undrawn")
def test_a_stale_density_is_not_summed_up(grey_run):
    """It is of other weights than all the other numbers there, and nothing there says so."""
    diagnostics(grey_run, step=5)
    assert "log p(x), held out" not in summary(reported(grey_run))


@pytest.mark.usefixtures("undrawn")
def test_a_density_of_other_data_is_not_summed_up(grey_run):
    """`diagnose --data other.npy` writes the same file."""
    diagnostics(grey_run, fingerprint="of others")
    page = reported(grey_run)
    assert "log p(x), held out" not in summary(page)
    assert "or other data. To test" in page.one("section", id="trust").text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("content", [None, "", "{", "nonsense\n", "NaN\n"])
def test_metrics_that_cannot_be_read_give_way_to_the_checkpoint(content, grey_run):
    path = grey_run / "metrics.jsonl"
    path.unlink() if content is None else path.write_text(content)
    assert summary(reported(grey_run))["Best epoch"].startswith("2 of 2")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("last", ["{}", "7", '{"epoch": 3}', "null"])
def test_a_foreign_line_after_the_best_epoch(last, grey_run):
    path = grey_run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], last]))
    assert summary(reported(grey_run))["Best epoch"].startswith("2 of 2")


@pytest.mark.usefixtures("undrawn")
def test_a_run_stopped_in_its_first_epoch(grey_run, capsys):
    """Its last.pt holds the fresh weights and no line of metrics."""
    checkpoint = load_checkpoint(grey_run)
    splits = load_data(checkpoint.config.data)
    (grey_run / "checkpoints" / "best.pt").unlink()
    content = serialize(checkpoint.vae, checkpoint.config, splits, [], None)
    write_atomically(grey_run / "checkpoints" / "last.pt", content)
    (grey_run / "metrics.jsonl").write_text("")
    status = report.main([str(grey_run)])
    assert status in (0, 2)
    assert "Traceback" not in capsys.readouterr().err


def refused(arguments: list[str], message: str, capsys) -> None:
    """Status 2 with one line, which says what is wrong."""
    try:
        status = report.main(arguments)
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert out == ""


def test_mistakes_are_answered_in_one_line(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there.html").write_text("mine")
    Path("empty").mkdir()
    shutil.copytree(runs["grey"], "no-config")
    Path("no-config/config.json").unlink()
    shutil.copytree(runs["grey"], "bad-config")
    Path("bad-config/config.json").write_text("{}}")
    shutil.copytree(runs["grey"], "broken")
    best = Path("broken/checkpoints/best.pt")
    best.write_bytes(best.read_bytes()[:-300])
    path = str(runs["grey"])
    for arguments, message in [
        ([], "at least one run folder"),
        (["nowhere"], "expected a run folder"),
        ([str(runs["grey"] / "checkpoints" / "best.pt")], "expected a run folder"),
        (["empty"], "holds no checkpoints/best.pt"),
        ([path, "empty"], "holds no checkpoints/best.pt"),
        (["broken"], "is not a checkpoint"),
        (["no-config"], "cannot read the config"),
        (["bad-config"], "is not a config.json"),
        ([path, "--out", "a.htm"], "ending in .html"),
        ([path, "--out", "a"], "ending in .html"),
        ([path, "--out", "there.html"], "exists; give another --out"),
        ([path, "--out", "nowhere/a.html"], "expects an existing folder"),
        ([path, path, "--out", "a.pdf"], "ending in .html"),
    ]:
        refused(arguments, message, capsys)
    assert Path("there.html").read_text() == "mine"
    Path("comparison.html").write_text("mine too")
    refused([path, path], "comparison.html exists", capsys)
    assert Path("comparison.html").read_text() == "mine too"


def test_missing_and_changed_data(tmp_path, capsys):
    run = make_grey(tmp_path / "run")
    (tmp_path / "run.npz").rename(tmp_path / "elsewhere.npz")
    refused([str(run)], "no such path exists", capsys)
    np.savez(tmp_path / "run.npz", x=grey()[::-1])
    refused([str(run)], "are not the data that", capsys)
    assert not (run / "report.html").exists()


@pytest.mark.usefixtures("undrawn")
def test_where_the_page_is_written(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(runs["grey"], "run")
    for _ in range(2):  # its own page is replaced
        assert report.main(["run"]) == 0
        assert capsys.readouterr().out == f"{Path('run', 'report.html')}\n"
    assert report.main(["run", "--out", "OTHER.HTML"]) == 0
    assert report.main(["run", "--out", "OTHER.HTML", "--overwrite"]) == 0
    shutil.copytree(run, "second")
    assert report.main(["run", "second"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "comparison.html"
    assert {p.name for p in tmp_path.iterdir()} == {
        "run",
        "second",
        "OTHER.HTML",
        "comparison.html",
    }


@pytest.mark.usefixtures("undrawn")
def test_a_runs_own_page_is_always_replaced(grey_run):
    """As the help of --overwrite says."""
    assert report.main([str(grey_run)]) == 0
    assert report.main([str(grey_run), "--out", str(grey_run / "report.html")]) == 0


@pytest.mark.usefixtures("undrawn")
def test_a_full_disk_leaves_the_old_page(grey_run, capsys, monkeypatch):
    assert report.main([str(grey_run)]) == 0
    before = (grey_run / "report.html").read_bytes()
    files = sorted(grey_run.iterdir())
    capsys.readouterr()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    diagnostics(grey_run, held_out=99)
    refused([str(grey_run)], "No space left on device", capsys)
    assert (grey_run / "report.html").read_bytes() == before
    assert sorted(grey_run.iterdir()) == files


@pytest.mark.usefixtures("no_figures")
def test_training_writes_the_page_and_the_same_again(tmp_path, capsys):
    """Training's page is the command's to the byte; a run that replaces another takes its page."""
    np.save(tmp_path / "a.npy", np.random.default_rng(0).random((40, 1, 5, 5)))
    run = tmp_path / "run"
    arguments = ["--data", str(tmp_path / "a.npy"), "--out", str(run), "--hidden", "8"]
    arguments += ["--batch-size", "8", "--epochs", "1", "--latent-dim", "3"]
    assert train.main(arguments) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    first = (run / "report.html").read_bytes()
    assert report.main([str(run)]) == 0
    assert (run / "report.html").read_bytes() == first
    diagnostics(run)
    (run / "report.html").write_text("old")

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro_vae.training.loop.iterate", stop)
        assert train.main([*arguments, "--overwrite"]) == 130
    assert not (run / "diagnostics.json").exists()
    assert not (run / "report.html").exists()


@pytest.mark.slow
def test_the_same_bytes_from_another_process(runs, tmp_path):
    """Nothing of a process, as the order of a set, an address or the time, enters the page."""
    out = [tmp_path / "here.html", tmp_path / "there.html"]
    assert report.main([str(runs["grey"]), "--out", str(out[0])]) == 0
    done = subprocess.run(
        [sys.executable, "-m", "pyro_vae", "report", str(runs["grey"]), "--out", str(out[1])],
        env={**os.environ, "PYTHONHASHSEED": "5"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{out[1]}\n", "")
    assert out[0].read_bytes() == out[1].read_bytes()


# --- odd data -------------------------------------------------------------------------------------


def test_many_classes(tmp_path):
    """As EMNIST's 62; each is in the legend, once."""
    values = np.random.default_rng(0).random((130, 1, 3, 3)).astype(np.float32)
    names = np.array([f"c{i:02}" for i in range(62)])
    page = reported(make_run(tmp_path / "run", values, names[np.arange(130) % 62]))
    view = island(page)["0"]
    assert view["classes"] == names.tolist()
    assert set(view["labels"]) == set(range(62))
    assert len(view["labels"]) == len(view["planes"][0]["points"]) == 130


def test_a_single_test_row_and_few_others(tmp_path):
    values = np.random.default_rng(0).random((8, 4)).astype(np.float32)
    settings = {"latent_dim": 4, "likelihood": "gaussian", "epochs": 1, "batch_size": 2}
    view = island(reported(make_run(tmp_path / "run", values, test_size=1, **settings)))["0"]
    assert len(view["planes"]) == 1
    assert len(view["planes"][0]["points"]) == 8


def test_collapsed_latents(tmp_path):
    """All means are equal: no t-SNE, no component, nothing that is not a number."""
    run = make_grey(tmp_path / "run", latent_dim=4, vivid=0.0)
    page = reported(run)
    assert summary(page)["Active latents"].startswith("0 of 4")
    view = island(page)["0"]
    assert len(view["planes"]) == 1
    assert not np.ptp(view["planes"][0]["points"], axis=0).any()


# --- several runs ---------------------------------------------------------------------------------


def test_several_runs_side_by_side(runs, pages):
    names = ["grey", "colour", "plain"]
    page = read(pages(*names))
    assert page.one("title").text == "grey · colour · plain"
    head, *rows = rows_of(page.one("section", id="summary"))
    assert head == ["", *names]
    found = {row[0]: row[1:] for row in rows}
    assert found["ELBO, validation"] == ["−51.00 nats per row"] * 2 + ["–"]
    assert found["log p(x), held out"] == ["−45.68 nats per row", "–", "–"]
    values = found["Reconstruction, validation"]
    assert [text.split()[0] for text in values] == ["−40.25"] * 3
    head, *rows = rows_of(page.one("section", id="trust"))
    assert head == ["check", *names]
    assert rows[0] == ["bad one", "✗ wrong 0.512 [0.250, −7.12]", "–", "–"]
    settings = rows_of(page.one("section", id="settings"))[1:]
    differ = [len(set(row[1:])) > 1 for row in settings]
    assert differ == sorted(differ, reverse=True)
    assert sum(differ) == len(page.one("section", id="settings").all("tr", class_="marked"))
    assert set(island(page)) == {"0", "1", "2"}
    (curves,) = page.one("section", id="training").all("div", role="img")
    assert all(name in curves.attributes["aria-label"] for name in names)
    assert all(name in curves.text for name in names)


def test_what_does_not_compare_is_said(pages, tmp_path, undrawn):
    def warnings(path: Path) -> str:
        section = read(path).one("section", id="summary")
        return " ".join(node.text for node in section.all("p", class_="card warning"))

    both = warnings(pages("grey", "table"))
    assert "different data" in both
    assert "likelihoods differ" in both
    same = [view_of(make_grey(tmp_path / f"{i}", seed=0, latent_dim=i)) for i in (2, 3)]
    write_page(tmp_path / "same.html", same)
    assert warnings(tmp_path / "same.html") == ""


@pytest.mark.usefixtures("undrawn")
def test_other_splits_of_the_same_data_do_not_compare(tmp_path):
    """Without a word; here the one trains on what validates the other."""
    runs = [make_grey(tmp_path / f"{i}", validation_size=i) for i in (4, 8)]
    assert pages_module._warnings([view_of(run) for run in runs])


def test_same_names_are_told_apart(views, tmp_path):
    paths = [tmp_path / folder / "digits" for folder in ("first", "second")]
    both = [dataclasses.replace(views["grey"], path=path) for path in paths]
    write_page(tmp_path / "a.html", both)
    head = rows_of(read(tmp_path / "a.html").one("section", id="summary"))[0]
    assert head == ["", *map(str, paths)]


def test_the_same_run_twice(views, tmp_path):
    """As `report runs/a runs/a`: both stand in the curves, or it is refused."""
    write_page(tmp_path / "a.html", [views["grey"], views["grey"]])
    head = rows_of(read(tmp_path / "a.html").one("section", id="summary"))[0]
    assert len(set(head)) == 3


def test_a_name_like_a_colour_stays(views, tmp_path):
    runs = [dataclasses.replace(views["grey"], path=Path("#000000")), views["plain"]]
    write_page(tmp_path / "a.html", runs)
    assert "#000000" in read(tmp_path / "a.html").one("section", id="training").text


# --- sizes ----------------------------------------------------------------------------------------


def blobs(count: int, channels: int, side: int) -> np.ndarray:
    """(N, C, H, W) bytes: smooth shapes with sharp edges and a little noise, as photographs."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0 : 1 : side * 1j, 0 : 1 : side * 1j]
    a, b, c = random.random((3, count, channels, 1, 1)) * 10
    values = 0.5 + 0.4 * np.sin(a * x + b * y + c) * np.sign(np.sin(b * x - a * y + c))
    noise = 0.02 * random.standard_normal((count, channels, side, side))
    return (255 * (values + noise).clip(0, 1)).astype(np.uint8)


@pytest.mark.slow
def test_a_page_of_mnists_size_stays_below_5_mb(tmp_path):
    settings = {"likelihood": "discretized-logistic", "latent_dim": 50, "hidden": (64,)}
    run = make_run(tmp_path / "run", blobs(1500, 1, 28), **settings)
    view = view_of(run)
    assert len(view.interactive["explorer"]["sheets"]) > 1
    write_page(tmp_path / "a.html", [view])
    assert (tmp_path / "a.html").stat().st_size < 5_000_000


@pytest.mark.slow
def test_the_pictures_of_three_runs_leave_room_for_the_rest(tmp_path, monkeypatch):
    """Of colour images of 64 pixels a side; the explorers and thumbnails take theirs of 5 MB."""
    monkeypatch.setattr("pyro_vae.page.summary.explore", _no_explorer)
    settings = {"latent_dim": 2, "architecture": "conv", "hidden": (4, 8)}
    run = make_run(
        tmp_path / "run", blobs(60, 3, 64), likelihood="discretized-logistic", **settings
    )
    view = view_of(run, 3)
    view.interactive["thumbnails"] = None
    write_page(tmp_path / "a.html", [view] * 3)
    rest = (EXPLORER_BYTES + THUMBNAIL_BYTES) * 4 // 3
    assert (tmp_path / "a.html").stat().st_size + rest < 5_000_000


# --- in a browser ---------------------------------------------------------------------------------

WAIT = 20_000  # milliseconds, on a busy machine


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = shutil.which("chromium") or "/usr/bin/chromium"
    if not Path(path).exists():
        pytest.skip("needs Debian's chromium")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def opened(browser, path: Path, width: int = 1200, **options: Any) -> Iterator[Any]:
    """The page in a window of its own; it may say nothing and ask for nothing but itself."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    context.set_offline(True)
    page = context.new_page()
    page.set_default_timeout(WAIT)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    try:
        yield page
        page.evaluate("() => new Promise((done) => setTimeout(done, 0))")
    finally:
        context.close()
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {path.as_uri()}


class Seen:
    """One explorer as it stands in the browser, beside its run's own decoder."""

    def __init__(self, page, run: Path, view: Overview, number: int = 0):
        self.page = page
        self.host = page.locator(".explorer").nth(number)
        self.plane = self.host.locator(".plane svg")
        self.data = view.interactive["explorer"]
        self.checkpoint = load_checkpoint(run)
        codes = latent_codes(self.checkpoint.vae, load_data(self.checkpoint.config.data), 0)
        self.means = codes.means
        if self.data["tile"][0] == 1:
            self.span = explore(self.checkpoint.vae, codes, EXPLORER_BYTES).span

    def state(self) -> dict[str, int]:
        return {
            key: int(value) for key, value in self.host.evaluate("h => ({...h.dataset})").items()
        }

    def wait(self, **wanted: int) -> dict[str, int]:
        self.page.wait_for_function(
            "([host, wanted]) => Object.entries(wanted).every(([k, v]) => host.dataset[k] == v)",
            arg=[self.host.element_handle(), wanted],
        )
        return self.state()

    def place(self, k: int) -> tuple[float, float, dict[str, int]]:
        """Where the k-th of the drawn codes lies, and the node of the grid that is next to it."""
        state = self.state()
        a, b = state["first"], state["second"]
        grid = np.array(self.data["grid"])
        codes = np.array(self.data["codes"])
        ends = [(a, *grid[a][[0, -1]])] + ([] if a == b else [(b, *grid[b][[0, -1]])])
        inside = np.all([(codes[:, c] > lo) & (codes[:, c] < hi) for c, lo, hi in ends], axis=0)
        code = codes[np.flatnonzero(inside)[k]]
        box = self.plane.locator("g circle").nth(k).bounding_box()
        nodes = [
            round(float((code[c] - lo) / (hi - lo) * (grid.shape[1] - 1))) for c, lo, hi in ends
        ]
        node = dict(zip("ij", [*nodes, 0], strict=False))
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, node

    def point_at(self, k: int) -> None:
        self.plane.scroll_into_view_if_needed()
        x, y, node = self.place(k)
        self.page.mouse.move(x, y)
        self.wait(**node)
        self.check()

    def z(self) -> torch.Tensor:
        state = self.state()
        z = self.means[self.data["anchors"][state["anchor"]]].copy()
        names = ["second", "first"] if state["first"] != state["second"] else ["first"]
        for name, node in (("second", "j"), ("first", "i")):
            if name in names:
                latent = self.data["latents"][state[name]]
                z[latent] = self.data["grid"][state[name]][state[node]]
        return torch.as_tensor(z)

    def words(self) -> list[tuple[str, float]]:
        state = self.state()
        names = ["first", "second"] if state["first"] != state["second"] else ["first"]
        parts = []
        for name, node in zip(names, "ij", strict=False):
            value = self.data["grid"][state[name]][state[node]]
            number = str(self.data["latents"][state[name]] + 1)
            subscript = number.translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))
            parts.append((f"z{subscript}", value))
        return parts

    def picture(self) -> np.ndarray:
        """(H, W, 4) as the canvas has it."""
        canvas = self.host.locator(".decoded > canvas")
        content = base64.b64decode(canvas.evaluate("c => c.toDataURL()").partition(",")[2])
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGBA")).astype(float)

    @torch.no_grad()
    def check(self) -> None:
        """The canvas is the decoder's mean at the point that stands below it."""
        vae = self.checkpoint.vae
        mean = vae.likelihood(self.z()[None]).mean[0]
        said = self.host.locator("output").inner_text()
        for (name, value), part in zip(self.words(), said.split(", "), strict=True):
            shown, _, number = part.partition(" = ")
            assert shown == name
            assert float(number.replace("−", "-")) == pytest.approx(value, abs=0.00501)
        if mean.ndim == 3:
            bound = vae.likelihood_module.spec.bound
            scale = bound if vae.likelihood_module.units == "count" else 1
            wanted = 255 / scale * mean.permute(1, 2, 0).numpy()
            shown = self.picture()
            assert shown.shape[:2] == wanted.shape[:2]
            assert (shown[..., 3] == 255).all()
            # half a step of 8 bits, and what rounding the grid to six digits may do
            assert np.abs(shown[..., :3] - wanted).max() <= 0.51
            return
        values = ((mean - vae.likelihood_module.mean) / vae.likelihood_module.std).numpy()
        state = self.state()
        key = " ".join(str(state[name]) for name in ("anchor", "first", "second"))
        content = base64.b64decode(self.data["sheets"][key].partition(",")[2])
        sheet = np.asarray(Image.open(io.BytesIO(content)))
        row = sheet[state["j"]].reshape(-1, len(values))[state["i"]].astype(float)
        low, high = self.span
        assert np.abs(row - 255 * (values - low) / (high - low)).max() <= 0.51
        ink = self.picture()[..., 3] > 0
        across = np.rint(np.linspace(5, 295, len(values))).astype(int)
        for x, y in zip(across, 145 - 140 * row / 255, strict=True):
            assert ink[max(round(y) - 2, 0) : round(y) + 3, x - 1 : x + 2].any()


KINDS = {  # the number of planes, and of anchors
    "grey": (1, 0),
    "colour": (6, 4),
    "table": (3, 2),
    "line": (1, 0),
    "plain": (3, 4),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in ("colour", "plain"))) for n in KINDS],
)
def test_the_explorer_shows_the_decoder(name, browser, runs, views, pages):
    """By the pointer, by the keyboard, on another plane and at another anchor."""
    with opened(browser, pages(name)) as page:
        seen = Seen(page, runs[name], views[name])
        first = seen.wait(anchor=0)
        seen.check()
        shown = set()
        for k in (0, 3, 5):
            seen.point_at(k)
            shown.add(seen.picture().tobytes())
        assert len(shown) > 1, "the pointer changed nothing"

        side = len(seen.data["grid"][0])
        single = first["first"] == first["second"]
        seen.plane.focus()
        for _ in range(10):
            page.keyboard.press("Shift+ArrowLeft")
            page.keyboard.press("Shift+ArrowDown")
        seen.wait(i=0, j=0)
        page.keyboard.press("ArrowRight")
        seen.wait(i=1)
        page.keyboard.press("ArrowUp")
        seen.wait(j=0 if single else 1)
        page.keyboard.press("Shift+ArrowUp")
        seen.wait(i=1, j=0 if single else min(6, side - 1))
        page.keyboard.press("ArrowDown")
        seen.wait(i=1, j=0 if single else min(5, side - 2))
        seen.check()

        selects = seen.host.locator("select")
        planes, anchors = KINDS[name]
        if planes > 1:
            selects.nth(1).select_option("2")
            seen.wait(first=0, second=2)
            seen.point_at(1)
            selects.nth(0).select_option("1")
            seen.wait(first=1, second=2)
            seen.point_at(2)
        else:
            assert not selects.count()
        buttons = seen.host.locator(".anchors button")
        assert buttons.count() == anchors
        for m in range(1, anchors):
            buttons.nth(m).click()
            seen.wait(anchor=m)
            assert buttons.nth(m).get_attribute("aria-pressed") == "true"
            assert seen.host.locator("button[aria-pressed=true]").count() == 1
            seen.check()


def test_side_by_side_each_has_its_own_decoder(browser, runs, views, pages):
    names = ["grey", "colour", "table", "plain"]
    with opened(browser, pages(*names)) as page:
        for number, name in enumerate(names):
            seen = Seen(page, runs[name], views[name], number)
            seen.wait(anchor=0)
            seen.point_at(2)


def test_a_chosen_latent_is_across(browser, views, pages):
    """Of z₁ across and z₂ up, z₂ is chosen across: it is there, and z₁ up."""
    with opened(browser, pages("colour")) as page:
        selects = page.locator(".axes select")
        selects.nth(0).select_option("1")
        assert [selects.nth(k).input_value() for k in (0, 1)] == ["1", "0"]


def test_profiles_follow_the_theme(browser, pages):
    """Else a table's explorer is dark on dark, its buttons for good."""
    with opened(browser, pages("table"), color_scheme="light") as page:
        page.wait_for_function("document.querySelector('.explorer').dataset.anchor == 0")
        page.locator("#theme").click()
        page.wait_for_timeout(100)
        wanted, ink = page.locator(".decoded > canvas").evaluate("""c => {
            const values = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
            let best = 0;
            for (let i = 0; i < values.length; i += 4) {
                if (values[i + 3] > values[best + 3]) best = i;
            }
            return [getComputedStyle(c).color.match(/\\d+/g).map(Number),
                    Array.from(values.slice(best, best + 3))];
        }""")
        assert np.abs(np.subtract(wanted[:3], ink)).max() < 40


def test_hovering_shows_the_image_and_its_label(browser, runs, pages):
    """A dot's tip holds the class name as text, and the very image whose code the dot is."""
    codes = latent_codes(
        load_checkpoint(runs["grey"]).vae, load_data(load_checkpoint(runs["grey"]).config.data), 0
    )
    names = sorted(HOSTILE)
    with opened(browser, pages("grey")) as page:
        host = page.locator(".scatter")
        host.scroll_into_view_if_needed()
        tip = host.locator(".tip")
        assert tip.is_hidden()
        for k in (0, 7, 19):
            box = host.locator("g circle").nth(k).bounding_box()
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            ring = host.locator(".ring")
            chosen = ring.evaluate("r => [r.getAttribute('cx'), r.getAttribute('cy')].map(Number)")
            dots = host.locator("g circle").evaluate_all(
                "all => all.map(c => [c.getAttribute('cx'), c.getAttribute('cy')].map(Number))"
            )
            (same,) = (i for i, dot in enumerate(dots) if dot == chosen)
            assert np.hypot(*np.subtract(dots[same], dots[k])) < 1  # another may lie upon it
            wanted = np.rint(255 * codes.x[same, 0].numpy() / 16)
            page.wait_for_function(
                "wanted => { const c = document.querySelector('.tip canvas');"
                "const v = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
                "return wanted.every((w, i) => Math.abs(v[4 * i] - w) <= 1); }",
                arg=wanted.ravel().tolist(),
            )
            assert tip.inner_text() == names[codes.labels[same]]
            assert host.locator(".shown").inner_text() == names[codes.labels[same]]
        page.mouse.move(2, 2)
        assert tip.is_hidden()


ALONG = {"ArrowRight": (1, 0), "ArrowLeft": (-1, 0), "ArrowUp": (0, 1), "ArrowDown": (0, -1)}


def test_the_scatter_is_walked_by_keyboard(browser, pages):
    """Each key goes to a dot on its side, or stays where there is none; Escape hides."""
    with opened(browser, pages("colour")) as page:
        host = page.locator(".scatter")
        ring = host.locator(".ring")
        host.locator(".plane svg").focus()
        assert ring.get_attribute("visibility") == "hidden"
        moves = 0
        places = [None]
        for key in ["ArrowUp", *(3 * [*ALONG, "ArrowRight", "ArrowUp"])]:
            page.keyboard.press(key)
            place = np.array([float(ring.get_attribute(name)) for name in ("cx", "cy")])
            assert ring.get_attribute("visibility") == "visible"
            assert host.locator(".tip").is_visible()
            if places[-1] is not None:
                step = (place - places[-1]) * (1, -1)
                if step.any():
                    moves += 1
                    along = step @ ALONG[key]
                    assert along > 0
                    assert along >= np.abs(step).min()
            places.append(place)
        assert moves > 6
        page.keyboard.press("Escape")
        assert host.locator(".tip").is_hidden()
        assert ring.get_attribute("visibility") == "hidden"


def test_legend_and_projection(browser, views, pages):
    """A class's button dims the others, the same again brings them back; t-SNE moves the dots."""
    labels = np.array(views["colour"].interactive["labels"])
    with opened(browser, pages("colour")) as page:
        host = page.locator(".scatter")
        buttons = host.locator(".legend button")
        assert buttons.count() == 12
        dimmed = "all => all.map(c => c.classList.contains('dim'))"
        dots = host.locator("g circle")
        for label in (3, 5):
            buttons.nth(label).click()
            assert dots.evaluate_all(dimmed) == (labels != label).tolist()
            pressed = host.locator(".legend [aria-pressed=true]")
            assert pressed.all_inner_texts() == [buttons.nth(label).inner_text()]
        host.locator(".plane svg").focus()
        page.keyboard.press("ArrowUp")
        assert host.locator(".tip").inner_text() == buttons.nth(5).inner_text()
        places = "all => all.map(c => Number(c.getAttribute('cx')))"
        before = dots.evaluate_all(places)
        host.locator(".views button").nth(1).click()
        assert dots.evaluate_all(dimmed) == (labels != 5).tolist()
        assert dots.evaluate_all(places) != before
        buttons.nth(5).click()
        assert not any(dots.evaluate_all(dimmed))


def test_the_theme_is_the_readers_until_chosen(browser, pages):
    ground = "() => getComputedStyle(document.body).backgroundColor"
    grounds = {}
    with opened(browser, pages("line")) as page:
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            grounds[scheme] = page.evaluate(ground)
        assert grounds["light"] != grounds["dark"]
        page.reload()
        for scheme in ("light", "dark", "light"):
            assert page.locator("#theme").inner_text().lower() == scheme
            page.locator("#theme").click()
            assert page.evaluate(ground) == grounds[scheme]


CONTRAST = """() => {
  const parse = (text) => {
    const v = text.match(/[\\d.]+/g).map(Number);
    return [v[0], v[1], v[2], v.length > 3 ? v[3] : 1];
  };
  const over = (a, b) => [0, 1, 2].map((k) => a[k] * a[3] + b[k] * (1 - a[3])).concat(1);
  const light = (c) => {
    const [r, g, b] = c.map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const host = node.parentElement;
    if (!node.textContent.trim() || host.closest("script, style, .shown, defs")) continue;
    if (!host.checkVisibility({ visibilityProperty: true })) continue;
    const style = getComputedStyle(host);
    const ink = parse(host instanceof SVGElement ? style.fill : style.color);
    const layers = [];
    for (let e = host; e; e = e.parentElement) {
      layers.push(parse(getComputedStyle(e).backgroundColor));
      ink[3] *= Number(getComputedStyle(e).opacity);
    }
    const ground = layers.reduceRight((below, layer) => over(layer, below), [255, 255, 255, 1]);
    const [a, b] = [light(over(ink, ground)), light(ground)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    found.push([(a + 0.05) / (b + 0.05), large ? 3 : 4.5, node.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""


OPEN_ALL = "() => document.querySelectorAll('details').forEach((d) => { d.open = true; })"


@pytest.mark.parametrize("names", [("grey",), ("grey", "colour", "table")], ids=["one", "three"])
def test_all_text_is_legible(names, browser, pages):
    """WCAG 2.2, 1.4.3, in both themes, with all that can be opened open, and warnings shown."""
    with opened(browser, pages(*names)) as page:
        page.evaluate(OPEN_ALL)
        page.locator(".scatter .plane svg").first.focus()
        page.keyboard.press("ArrowUp")
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            found = page.evaluate(CONTRAST)
            assert len(found) > 120
            assert [one for one in found if one[0] < one[1]] == []


@pytest.mark.parametrize("names", [("grey",), ("colour", "table", "plain")], ids=["one", "three"])
def test_a_phone_scrolls_down_only(names, browser, pages):
    """At 360 pixels, with everything open and a tip at the edge."""
    with opened(browser, pages(*names), width=360, has_touch=True) as page:
        page.evaluate(OPEN_ALL)
        page.locator(".scatter .plane svg").first.focus()
        for key in ["ArrowUp", *["ArrowRight"] * 12]:
            page.keyboard.press(key)
            widths = "() => [document.documentElement, document.body].map((e) => e.scrollWidth)"
            assert max(page.evaluate(widths)) == 360


def test_touch_moves_the_point(browser, runs, views, pages):
    with opened(browser, pages("grey"), width=390, has_touch=True) as page:
        seen = Seen(page, runs["grey"], views["grey"])
        seen.wait(anchor=0)
        seen.plane.scroll_into_view_if_needed()
        x, y, node = seen.place(4)
        page.touchscreen.tap(x, y)
        seen.wait(**node)
        seen.check()


def test_all_can_be_reached_by_keyboard(browser, pages):
    """Tab comes by every link, button, choice and plane, in their order, and leaves again."""
    everything = "a[href], button, select, summary, [tabindex]"
    with opened(browser, pages("grey", "colour", "table")) as page:
        wanted = page.evaluate(
            """(all) => Array.from(document.querySelectorAll(all))
            .filter((e) => e.checkVisibility()).map((e, k) => { e.dataset.stop = k; return k; })""",
            everything,
        )
        reached = []
        for _ in range(3 * len(wanted)):
            page.keyboard.press("Tab")
            stop = page.evaluate("() => document.activeElement.dataset.stop")
            if stop is not None:
                reached.append(int(stop))
            if stop is None and len(reached) == len(wanted):
                break
        assert reached[: len(wanted)] == wanted


def test_everything_has_a_name(browser, pages):
    """As the browser itself tells a screen reader."""
    roles = {"button", "combobox", "link", "application", "img", "image", "graphics-document"}
    with opened(browser, pages("grey", "colour", "table")) as page:
        page.evaluate(OPEN_ALL)
        session = page.context.new_cdp_session(page)
        nodes = session.send("Accessibility.getFullAXTree")["nodes"]
        found = [n for n in nodes if not n["ignored"] and n["role"]["value"] in roles]
        kinds = {n["role"]["value"] for n in found}
        assert {"button", "link", "application"} <= kinds
        within = session.send("DOM.getDocument", {"depth": 0})  # makes the nodes known
        assert within
        for node in found:
            if node.get("name", {}).get("value", "").strip():
                continue
            handle = session.send("DOM.resolveNode", {"backendNodeId": node["backendDOMNodeId"]})
            told = session.send(
                "Runtime.callFunctionOn",
                {
                    "objectId": handle["object"]["objectId"],
                    "functionDeclaration": "function () { return this.tagName + '/' + "
                    "(this.parentElement.closest('[role=img][aria-label], button[aria-label]') "
                    "? 'named' : this.outerHTML.slice(0, 80)); }",
                    "returnByValue": True,
                },
            )
            assert told["result"]["value"].endswith("/named")
        pictures = page.evaluate("""() => Array.from(
            document.querySelectorAll("img, svg, canvas"),
            (e) => e.alt || e.closest("[role=img], [role=application], button")?.ariaLabel
              || (e.closest(".tip") ? "beside its words" : ""))""")
        assert len(pictures) > 5
        assert all(pictures)
        identifiers = page.evaluate(
            "() => Array.from(document.querySelectorAll('section[id], h2[id]'), (e) => e.id)"
        )
        assert len(set(identifiers)) == len(identifiers)
        links = page.evaluate("() => Array.from(document.querySelectorAll('nav a'), (a) => a.hash)")
        assert set(links) <= {f"#{one}" for one in identifiers}


def test_a_collapsed_autoencoder_breaks_nothing(browser, tmp_path):
    run = make_grey(tmp_path / "run", kind="ae", vivid=0.0)
    reported(run)
    with opened(browser, run / "report.html") as page:
        page.wait_for_timeout(100)


@pytest.mark.slow
def test_images_one_pixel_high_are_images(browser, tmp_path):
    values = np.random.default_rng(0).random((30, 3, 1, 9)).astype(np.float32)
    run = make_run(tmp_path / "run", values)
    reported(run)
    with opened(browser, run / "report.html") as page:
        seen = Seen(page, run, view_of(run))
        seen.wait(anchor=0)
        seen.check()
