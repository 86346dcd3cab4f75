"""python -m pyro_vae.diagnose RUN RUN2: which reports are made, and what is printed."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from matplotlib.figure import Figure

from pyro_vae import diagnose, train
from pyro_vae.diagnostics import findings as verdicts
from pyro_vae.diagnostics import suite
from pyro_vae.diagnostics.findings import Finding
from pyro_vae.evidence.intervals import Interval
from pyro_vae.page import write as page

TINY = ["--epochs", "2", "--batch-size", "16", "--hidden", "8", "--latent-dim", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, one with another guide on the same data, and one on other data."""
    folder = tmp_path_factory.mktemp("pairs")
    random = np.random.default_rng(0)
    np.save(folder / "mine.npy", random.normal(size=(120, 3)).astype(np.float32))
    np.save(folder / "other.npy", random.normal(size=(120, 3)).astype(np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_summarize", lambda *_: None)
        for name, data, flags in (
            ("first", "mine", []),
            ("second", "mine", ["--guide", "full"]),
            ("foreign", "other", []),
        ):
            arguments = ["--data", str(folder / f"{data}.npy"), "--out", str(folder / name)]
            assert train.main([*arguments, *TINY, *flags]) == 0
    return folder


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    """Copies of the runs, and studies that know whom they are asked about."""
    folder = shutil.copytree(trained, tmp_path / "runs")
    made = []

    def studies(vae, *_):
        full = vae.family.__class__.__name__ == "FullGaussian"
        made.append("second" if full else "first")
        width = Interval(1.1, 1.05, 1.2) if full else Interval(2.0, 1.9, 2.1)
        details = {"elbo": -10.5 if full else -12.25, "log_evidence": -9.0}
        lines = [Finding(verdicts.WIDTH, width)]
        if full:
            lines.append(Finding(verdicts.AGGREGATE, Interval(0.0, 0.0, 0.001)))
        more = {"importance_samples": 10, "latent": float("nan")}
        yield suite.Study(lines, details | more, {"one": Figure()})

    monkeypatch.setattr(suite, "studies", studies)
    monkeypatch.setattr(page, "write_report", lambda *_: None)
    return folder, made


def compare(folder, *flags: str, second: str = "second") -> int:
    return diagnose.main([str(folder / "first"), str(folder / second), "--quick", *flags])


SIDE_BY_SIDE = """\
before  {folder}/first/checkpoints/best.pt
after   {folder}/second/checkpoints/best.pt
held-out rows of mine, the same ones, and rows simulated from each model; 95% intervals

                      before                               after
ELBO                  -12.25                               -10.50
log p(x)              -9.00                                -9.00
posterior width       wrong     2.00 [1.90, 2.10]          doubtful  1.10 [1.05, 1.20]
aggregate posterior   -                                    sound     0.000 [0.000, 0.001]

                      0 sound, 0 doubtful, 1 wrong         1 sound, 1 doubtful, 0 wrong
"""


def test_missing_reports_are_made_and_printed_side_by_side(runs, capsys):
    folder, made = runs
    assert compare(folder) == 0
    output = capsys.readouterr()
    assert output.out == SIDE_BY_SIDE.format(folder=folder)
    assert made == ["first", "second"]
    notes = [line for line in output.err.splitlines() if "diagnosing" in line]
    assert [line.split(":")[1].split(";")[0] for line in notes] == [" no diagnostics.json"] * 2
    # what is there is used
    assert compare(folder) == 0
    output = capsys.readouterr()
    assert output.out == SIDE_BY_SIDE.format(folder=folder)
    assert made == ["first", "second"]
    assert "diagnosing" not in output.err


def test_the_second_is_after(runs, capsys):
    folder, _ = runs
    assert diagnose.main([str(folder / "second"), str(folder / "first"), "--quick"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("ELBO"))
    assert line.split() == ["ELBO", "-10.50", "-12.25"]


def test_json_has_both(runs, capsys):
    folder, _ = runs
    assert compare(folder, "--json") == 0
    reports = json.loads(capsys.readouterr().out)
    assert list(reports) == ["before", "after"]
    for name, report in zip(("first", "second"), reports.values(), strict=True):
        assert report == json.loads((folder / name / "diagnostics.json").read_text())


def test_strict_is_about_the_second(runs, capsys):
    folder, _ = runs
    assert compare(folder, "--strict") == 0
    assert (
        diagnose.main([str(folder / "second"), str(folder / "first"), "--quick", "--strict"]) == 1
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"digest": "0"}, "describes another checkpoint"),
        ({"complete": False}, "is incomplete"),
        ({"seed": 12345}, "other data or another seed"),
        ({"fingerprint": "0"}, "other data or another seed"),
        ({"effort": {"quick": False}}, "was made without --quick"),
        (None, "no diagnostics.json"),
    ],
    ids=["checkpoint", "incomplete", "seed", "data", "effort", "unreadable"],
)
def test_an_outdated_report_is_made_again(runs, capsys, change, reason):
    folder, made = runs
    assert compare(folder) == 0
    path = folder / "first" / "diagnostics.json"
    report = json.loads(path.read_text())
    path.write_text("{" if change is None else json.dumps(report | change))
    capsys.readouterr()
    assert compare(folder) == 0
    output = capsys.readouterr()
    assert made == ["first", "second", "first"]
    (note,) = [line for line in output.err.splitlines() if "diagnosing" in line]
    assert note.startswith(f"{folder / 'first'}: ")
    assert reason in note
    assert output.out == SIDE_BY_SIDE.format(folder=folder)


def test_a_report_of_other_weights_is_outdated(runs, capsys):
    """A run refitted or trained further in place has the file of its old checkpoint."""
    folder, made = runs
    assert compare(folder) == 0
    best = "checkpoints/best.pt"
    shutil.copy(folder / "second" / best, folder / "first" / best)
    assert compare(folder) == 0
    assert made == ["first", "second", "second"]
    assert "describes another checkpoint" in capsys.readouterr().err


def test_other_data_or_likelihood_are_refused(runs, capsys):
    folder, made = runs
    assert compare(folder, second="foreign") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: expected two runs of the same data and likelihood; got mine ")
    assert made == []
    for second, message in (("nothing", "run folder"), ("first/checkpoints/best.pt", "run folder")):
        assert compare(folder, second=second) == 2
        assert message in capsys.readouterr().err


def test_advice_has_the_path_and_the_guide_of_the_run(runs, capsys):
    folder, _ = runs
    assert compare(folder, "--json") == 0
    for name, report in zip(
        ("first", "second"), json.loads(capsys.readouterr().out).values(), strict=True
    ):
        (line,) = [
            x for x in report["findings"][0]["advice"].split("\n") if "refit" in x and "-m" in x
        ]
        assert line == f"python -m pyro_vae.refit {folder / name}"


def test_the_refitted_model_is_diagnosed_and_named(runs, capsys):
    folder, _ = runs
    checkpoints = folder / "second" / "checkpoints"
    for name in ("best.pt", "refitted.pt"):
        if name == "refitted.pt":
            shutil.copy(checkpoints / "best.pt", checkpoints / name)
        assert diagnose.main([str(folder / "second"), "--quick", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["checkpoint"] == str(checkpoints / name)


def test_worst_rows_are_printed_in_order():
    def row(number, k, gap, *by):
        return {"row": number, "pareto_k": k, "amortization_gap": gap, "worst_by": by}

    rows = [
        row(1203, 1.32, 2.0, "pareto_k", "amortization_gap"),
        row(7, float("nan"), None, "pareto_k"),
        row(99, 0.1, 12.25, "amortization_gap"),
    ]
    assert diagnose._worst_rows(rows) == [
        "worst rows by Pareto k: 7 (nan), 1203 (1.32)",
        "worst rows by amortization gap: 99 (12.25), 1203 (2.00)",
        "",
    ]
    assert diagnose._worst_rows(rows[2:]) == ["worst rows by amortization gap: 99 (12.25)", ""]
    assert diagnose._worst_rows([]) == []
