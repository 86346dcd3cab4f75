"""Output where the encoding is poor, the stream closed or the disk full; arguments as people type
them. A mistake is one line on stderr and status 2.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyro_vae
from pyro_vae import __main__ as package
from pyro_vae import diagnose, encode, evaluate, generate, report, train, tune
from pyro_vae.cli import print_json, run_command
from pyro_vae.diagnostics import findings, suite
from pyro_vae.evidence.intervals import Interval
from pyro_vae.impute import main as impute

TINY = ["--epochs", "1", "--hidden", "8", "--latent-dim", "2"]
COMMANDS = {
    "train": train.main,
    "tune": tune.main,
    "evaluate": evaluate.main,
    "generate": generate.main,
    "encode": encode.main,
    "impute": impute,
    "diagnose": diagnose.main,
    "report": report.main,
}


def call(main: Callable[[list[str]], int], *arguments: Any) -> int:
    """Status of a command; `--help` leaves by SystemExit."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def refusal(capsys: pytest.CaptureFixture[str], main: Any, *arguments: Any) -> str:
    """The one line on stderr with which a command refuses its arguments."""
    capsys.readouterr()
    assert call(main, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert "[bold]" not in err
    assert err.rstrip("\n").isprintable()
    return err[7:-1]


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(train, "_summarize", lambda run: None)
    patch.setattr("pyro_vae.plots.from_model.draw_reconstructions", lambda *arguments: None)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on 60 rows of five values, trained by the default batch size."""
    folder = tmp_path_factory.mktemp("small")
    np.save(folder / "rows.npy", np.random.default_rng(0).random((60, 5)))
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        out = folder / "run"
        assert call(train.main, "--data", folder / "rows.npy", "--out", out, *TINY) == 0
    return out


# --- streams --------------------------------------------------------------------------------------


class Terminal(io.TextIOWrapper):
    """A stream of an encoding that refuses what it cannot represent, as Python's own do."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict")

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)

    def run(self, main: Callable[[list[str]], int], *arguments: Any) -> int:
        """`call` with this stream as stdout and stderr."""
        with contextlib.redirect_stdout(self), contextlib.redirect_stderr(self):
            return call(main, *arguments)


@pytest.fixture(params=["ascii", "cp1252"])
def terminal(request: pytest.FixtureRequest) -> Terminal:
    return Terminal(request.param)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_in_any_encoding(command, terminal):
    assert terminal.run(COMMANDS[command], "--help") == 0
    text = terminal.text()
    assert "--help" in text
    assert not re.search(r"\\u|\\x|\[/?bold\]", text)


def test_numbers_in_any_encoding(small, terminal, tmp_path):
    assert terminal.run(evaluate.main, small, "--num-samples", 3) == 0
    assert "KL(q(z|x) || p(z))  " in terminal.text()
    assert terminal.run(generate.main, small, "--num", 2, "--out", tmp_path / "é‖β.npy") == 0
    assert terminal.run(encode.main, small, "--out", tmp_path / "codes.npz") == 0
    assert terminal.run(evaluate.main, "keine‖Läufe") == 2
    assert terminal.text().splitlines()[-1].startswith("error: expected a run folder")


def test_a_training_in_any_encoding(small, terminal, tmp_path, no_pictures):
    data = tmp_path / "数‖.npy"
    shutil.copy(small.parent / "rows.npy", data)
    assert terminal.run(train.main, "--data", data, "--out", tmp_path / "run", *TINY) == 0
    assert "epoch 1/1" in terminal.text()


SIGNS = "𝑝(x) ‖ β − ½ 数"  # noqa: RUF001


def test_diagnoses_in_any_encoding(small, terminal, tmp_path, monkeypatch):
    run = shutil.copytree(small, tmp_path / "run")
    details = {"elbo": math.nan, "log_evidence": -1.0, "importance_samples": 3}
    checks = [check for check in vars(findings).values() if isinstance(check, findings.Check)]
    wrong = [
        findings.Finding(c, Interval(c.ideal + 5, c.ideal + 4, c.ideal + 6), SIGNS) for c in checks
    ]
    assert len(wrong) > 10
    study = suite.Study(wrong, details, {})
    monkeypatch.setattr(suite, "studies", lambda *arguments: iter([study]))
    monkeypatch.setattr("pyro_vae.page.write.write_report", lambda *arguments: None)
    assert terminal.run(diagnose.main, run) == 0
    assert "->" in terminal.text()
    before = len(terminal.text())
    assert terminal.run(diagnose.main, run, "--json") == 0
    assert json.loads(terminal.text()[before:])["details"]["elbo"] is None


def test_a_code_for_signs_without_a_likeness(terminal):
    terminal.run(lambda _: run_command(lambda: print(SIGNS, "\ud800")))
    known = "½" if terminal.encoding != "ascii" else "\\xbd"
    assert terminal.text() == f"p(x) || beta - {known} \\u6570 \\ud800\n"


def test_utf8_is_left_alone(capsys):
    run_command(lambda: print(SIGNS))
    assert capsys.readouterr().out == f"{SIGNS}\n"


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_closed_streams(closed, small, monkeypatch, capsys):
    monkeypatch.setattr(sys, closed, None)
    assert call(evaluate.main, small, "--num-samples", 3) == 0
    assert call(evaluate.main, "--help") == 0
    assert call(evaluate.main, "nowhere") == 2
    getattr(sys, closed).close()
    out, err = capsys.readouterr()
    assert (out == "") == (closed == "stdout")
    assert (err == "") == (closed == "stderr")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_stdout(unbuffered):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "pyro_vae", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 2
    assert done.stderr == "error: No space left on device: stdout or a file is incomplete\n"


@pytest.mark.timeout(60)  # tyro's help would not end
@pytest.mark.parametrize(("columns", "width"), [("0", 80), ("1", 40), ("5", 40), ("many", 80)])
def test_narrow_terminals(columns, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    assert call(train.main, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {len(line) for line in lines if line and not line.strip("- ")} == {width}
    assert "likelihood" in refusal(capsys, train.main, "--likelihod", "gaussian")


def test_json_holds_no_nan(capsys):
    print_json({"a": math.nan, "b": [math.inf, -math.inf, 1.5, {"c": math.nan}], "d": (1, "x")})
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"a": None, "b": [None, None, 1.5, {"c": None}], "d": [1, "x"]}


# --- mistakes -------------------------------------------------------------------------------------

MISTAKES = {
    "--epochs=1e3": "--epochs expects an integer; got '1e3'",
    "--latent-dim 2.0": "--latent-dim expects an integer; got '2.0'",
    "--max-value 255.0": "--max-value expects an integer; got '255.0'",
    "--learning-rate 1,5": "--learning-rate expects a number; got '1,5'",
    "--hidden 512,256": "--hidden expects integers, as in 512 256; got '512,256'",
    "--hidden [512 256]": "--hidden expects integers, as in 512 256; got '[512 256]'",
    "--hidden 8 -1": "--hidden expects an integer of at least 1; got -1",
    "--image-size": "--image-size expects one or two integers, as in 28 or 28 32; got ''",
    "--image-size 1 2 3": "--image-size expects one or two integers, as in 28 or 28 32; got "
    "'1 2 3'",
    "--image-size 28x28": "--image-size expects one or two integers, as in 28 or 28 32; got "
    "'28x28'",
    "--image-size 0": "--image-size expects an integer of at least 1; got 0",
    "--likelihood Bernoulli": "--likelihood expects one of auto, bernoulli, continuous-bernoulli, "
    "binomial, gaussian, discretized-logistic, columns; got 'Bernoulli'",
    "--compile true": "--compile expects one of auto, on, off; got 'true'",
    "--preset vae": "--preset expects one of iwae-mnist, mnist; got 'vae'",
    "--likelihod gaussian": "Unrecognized options: --likelihod, gaussian; did you mean "
    "--likelihood?",
    "--no-overwrite": "Unrecognized options: --no-overwrite; did you mean --overwrite?",
    "--overwrite true": "Unrecognized options: true",
    "--epochs": "Missing value for argument '--epochs'. Expected 1 values.",
    "--resume": "Missing value for argument '--resume'. Expected 1 values.",
    "--config": "Missing value for argument '--config'. Expected 1 values.",
    "--preset": "Missing value for argument '--preset'. Expected 1 values.",
    "--beta inf": "--beta expects a finite number, at most 3.4e+38; got inf",
    "--beta 1e308": "--beta expects a finite number, at most 3.4e+38; got 1e+308",
    "--beta nan": "--beta expects a number above 0; got nan",
    "--beta -0.0": "--beta expects a number above 0; got -0.0",
    "--learning-rate 1e400": "--learning-rate expects a finite number, at most 3.4e+38; got inf",
    "--gradient-clip nan": "--gradient-clip expects a number above 0; got nan",
    "--kl-warmup nan": "--kl-warmup expects a fraction of the run, 0 to 1; got nan",
    "--objective free-bits --free-bits 1e308": "--objective free-bits: free_bits expects a finite "
    "number above 0, at most 3.4e+38; got 1e+308",
    "--objective mmd --mmd-weight 1e39": "--objective mmd: mmd_weight expects a finite number "
    "above 0, at most 3.4e+38; got 1e+39",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_told_on_one_line(line, capsys):
    assert refusal(capsys, train.main, *line.split(" ")) == MISTAKES[line]


INTEGERS = ["--epochs", "--batch-size", "--hidden", "--latent-dim", "--image-size", "--max-value"]
INTEGERS += ["--validation-size", "--test-size", "--seed", "--num-particles", "--patience"]


@pytest.mark.parametrize("flag", INTEGERS)
def test_integers_beyond_64_bits(flag, capsys):
    digits = 19 if flag == "--epochs" else 5000
    least = 0 if flag == "--seed" else 1
    message = refusal(capsys, train.main, flag, "9" * digits)
    assert message.startswith(f"{flag} expects an integer from {least} to 2^63 - 1; got ")
    message = refusal(capsys, train.main, flag, f"-{'9' * digits}")
    assert message.startswith(f"{flag} expects an integer of at least {least}; got ")
    assert len(message) < 120


@pytest.mark.parametrize("value", [2**63, 10**30, 10**400])
def test_integers_beyond_64_bits_in_the_other_commands(value, small, tmp_path, capsys):
    out = tmp_path / "a.npz"
    for main, flag, rest in [
        (evaluate.main, "--num-samples", []),
        (evaluate.main, "--num-images", []),
        (evaluate.main, "--seed", []),
        (diagnose.main, "--seed", []),
        (encode.main, "--seed", ["--out", out]),
        (generate.main, "--seed", ["--out", out]),
        (generate.main, "--num", ["--out", out]),
    ]:
        message = refusal(capsys, main, small, flag, value, *rest)
        assert message.startswith(f"{flag} expects an integer from ")
    assert not out.exists()


def test_sizes_beyond_the_memory_are_refused_before_any_work(small, tmp_path, capsys):
    train_on = ["--data", small.parent / "rows.npy", "--out", tmp_path / "run"]
    particles = ["--objective", "iwae", "--num-particles", 10**11]
    for main, arguments, remedy in [
        (train.main, [*train_on, *particles], "lower it, or --batch-size"),
        (
            train.main,
            [*train_on, "--latent-dim", 2**63 - 1],
            "lower --hidden or --latent-dim, or the options of --guide or --prior",
        ),
        (evaluate.main, [small, "--num-samples", 10**12], "lower --num-samples"),
        (generate.main, [small, "--num", 10**13, "--out", tmp_path / "a.npy"], "lower --num"),
    ]:
        message = refusal(capsys, main, *arguments)
        assert re.match(
            r"not enough memory: .* need [\d,]+ GiB, this machine has [\d,]+ GiB", message
        )
        assert message.endswith(f"; {remedy}")
    assert not (tmp_path / "run").exists()


HOSTILE = ["a\nb\r\x1b[31mred\x1b[0m\u202egnp\x07", "[bold]‖\udcff[/bold]"]


@pytest.mark.parametrize("text", HOSTILE)
def test_names_with_control_characters_are_escaped(text, small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for main, arguments in [
        (train.main, ["--data", text]),
        (train.main, ["--epochs", text]),
        (train.main, ["--likelihood", text]),
        (train.main, ["--device", text]),
        (train.main, ["--activation", text]),
        (train.main, ["--config", text]),
        (train.main, ["--resume", text]),
        (train.main, [f"--{text}"]),
        (train.main, [text]),
        (evaluate.main, [text]),
        (evaluate.main, [small, "--split", text]),
        (encode.main, [small, "--out", text]),
        (generate.main, [small, "--out", f"{text}.jpg"]),
        (report.main, [text]),
    ]:
        capsys.readouterr()
        assert call(main, *arguments) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert err[:-1].isprintable()


def test_the_package_as_a_command(monkeypatch, capsys):
    for arguments, status in [
        (["--version"], 0),
        ([], 0),
        (["--help"], 0),
        (["tr\nain"], 2),
        (["evaluate"], 2),
    ]:
        monkeypatch.setattr(sys, "argv", ["pyro-vae", *arguments])
        assert package.main() == status
    out, err = capsys.readouterr()
    assert out.startswith(f"{pyro_vae.__version__}\nVariational autoencoders as Pyro programs.")
    err = err.splitlines()
    assert err[0] == (f"error: expected one of {', '.join(package.COMMANDS)}; got tr\\nain")
    assert err[1].startswith("error: Missing from python -m pyro_vae.evaluate: PATH Run folder")
    assert len(err) == 2


def test_one_number_is_a_square(tmp_path, capsys, no_pictures):
    np.save(tmp_path / "flat.npy", np.random.default_rng(0).random((30, 16)))
    data = ["--data", tmp_path / "flat.npy", "--out", tmp_path / "run", *TINY]
    assert call(train.main, *data, "--image-size", 4) == 0
    assert "test rows of 1x4x4" in capsys.readouterr().out
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["image_size"] == [4, 4]


def test_small_data_train_with_the_default_batch(small, tmp_path, capsys):
    """Of 60 rows, 49 are for training: a step of all of them. The file keeps the default."""
    from pyro_vae.training.checkpoint import load_checkpoint

    assert load_checkpoint(small).config.fit.batch_size == 49
    assert len(load_checkpoint(small).history) == 1
    assert load_checkpoint(small).history[0]["step"] == 1
    assert json.loads((small / "config.json").read_text())["fit"]["batch_size"] == 256
    out = ["--data", small.parent / "rows.npy", "--out", tmp_path / "run"]
    message = refusal(capsys, train.main, *out, "--batch-size", 50)
    assert message == "--batch-size 50 is larger than the training set of 49 rows; lower it"
