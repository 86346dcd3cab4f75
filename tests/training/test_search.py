"""The search: trials with known values, interruptions, pruning, and the training of a trial.

Most tests have a trainer whose ELBOs are a known function of the settings, so that the course of a
search is known exactly.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Generator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import example_values

import pyro_vae
from pyro_vae import Config, DataConfig, FitConfig, InputError, ModelConfig, train
from pyro_vae.config import resolve
from pyro_vae.config.space import Search, check_space
from pyro_vae.evidence.evaluation import elbo_terms
from pyro_vae.training import search as searching
from pyro_vae.training import trials as training
from pyro_vae.training.checkpoint import load_checkpoint
from pyro_vae.training.records import Diverged
from pyro_vae.training.search import (
    best_first,
    check_buildable,
    ended,
    open_study,
    prune_from,
    run_search,
)
from pyro_vae.training.trials import LostWorker, Workers, load_without_test, train_trial

pytest.importorskip("optuna", reason="needs pip install '.[tune]'")


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """A journal waits for the disk after each of its lines."""
    monkeypatch.setattr("os.fsync", lambda file: None)


EPOCHS = 8
SPACE = {
    "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
    "latent_dim": {"low": 2, "high": 64, "log": True},
    "activation": {"choices": ["SiLU", "ReLU", "Tanh"]},
}
BASE = Config(fit=FitConfig(epochs=EPOCHS, learning_rate_warmup=0.0), seed=5)


def search_of(num_trials: int = 20, seed: int = 5, space: Any = SPACE, **fit: Any) -> Search:
    base = dataclasses.replace(BASE, seed=seed, fit=dataclasses.replace(BASE.fit, **fit))
    return Search(base, check_space(space, base), num_trials, "")


def optimum(config: Config) -> float:
    """The highest ELBO of a trial: −80 at a learning rate of 1e-2, 8 latents and Tanh."""
    rate, latents = np.log10(config.fit.learning_rate), np.log2(config.model.latent_dim)
    return float(
        -80 - 20 * (rate + 2) ** 2 - (latents - 3) ** 2 - (config.model.activation != "Tanh")
    )


def curve(config: Config) -> list[float]:
    """Rises to the optimum in the last epoch but one, and falls by a nat."""
    rising = [optimum(config) - 3 * (EPOCHS - 1 - e) for e in range(1, EPOCHS)]
    return [*rising, rising[-1] - 1]


def known(
    path: Path, config: Config, elbos: Callable[[Config], list[float]] = curve
) -> Generator[float]:
    """A trainer whose values are known. It writes its settings to the run folder."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    yield from elbos(config)


def searched(folder: Path, search: Search, trainer: Any = known, count: int = 1) -> list[Any]:
    """The trials that have ended after a search, or a continued one, in a folder."""
    study = open_study(folder, search)
    run_search(
        study, search, folder, Workers([trainer] * count, threading.Event()), lambda trial: None
    )
    return ended(study)


def course(trials: list[Any]) -> list[tuple]:
    """What is the same in equal searches."""
    return [
        (t.state, t.elbos, tuple(t.settings.items())) for t in trials if t.state != "interrupted"
    ]


# --- values, proposals, pruning -------------------------------------------------------------------


def test_a_trial_is_worth_its_best_epoch_and_the_best_run_is_kept(tmp_path):
    seen = []
    study = open_study(tmp_path, search_of(12))
    workers = Workers([known], threading.Event())
    run_search(study, search_of(12), tmp_path, workers, seen.append)
    trials = ended(study)
    assert trials == seen
    assert [trial.number for trial in trials] == [*range(12)]
    for trial in trials:
        config = searching.with_values(BASE, trial.settings)
        assert trial.elbos == tuple(curve(config)[: len(trial.elbos)])
        assert trial.elbo == max(trial.elbos)
        assert trial.elbos[trial.epoch - 1] == trial.elbo
        assert (trial.state == "complete") == (len(trial.elbos) == EPOCHS)
        if trial.state == "complete":
            assert study.trials[trial.number].value == trial.elbo
    best = max((t for t in trials if t.state == "complete"), key=lambda t: t.elbo)
    assert best_first(trials)[0] == best
    assert best.epoch == EPOCHS - 1
    kept = json.loads((tmp_path / "best" / "config.json").read_text())
    assert kept["fit"]["learning_rate"] == best.settings["learning_rate"]
    assert kept["model"]["activation"] == best.settings["activation"]
    assert not list((tmp_path / "trials").iterdir())


def test_proposals_improve(tmp_path):
    """A search that minimized, or one at random, would not."""
    trials = searched(tmp_path, search_of(40), lambda p, c: known(p, c, lambda c: [optimum(c)]))
    first, last = ([t.elbo for t in part] for part in (trials[1:11], trials[-10:]))
    assert np.median(last) > np.median(first) + 5
    assert best_first(trials)[0].elbo > -83


def test_the_first_trial_has_the_base_settings_that_are_in_the_space(tmp_path):
    (first,) = searched(tmp_path / "a", search_of(1), folder_made(tmp_path / "a"))
    assert first.settings == {"learning_rate": 2e-3, "latent_dim": 20, "activation": "SiLU"}
    hidden = {"hidden": {"choices": [[9], [512, 256]]}, "latent_dim": {"low": 21, "high": 22}}
    (first,) = searched(tmp_path / "b", search_of(1, space=hidden), folder_made(tmp_path / "b"))
    assert first.settings["hidden"] == [512, 256]
    assert first.settings["latent_dim"] in (21, 22)


def test_settings_are_proposed_from_their_space(tmp_path):
    study, search = open_study(tmp_path, search_of(1)), search_of(1)
    run_search(study, search, tmp_path, Workers([known], threading.Event()), lambda trial: None)
    rate, latents, activation = study.trials[0].distributions.values()
    assert (type(rate).__name__, type(latents).__name__) == ("FloatDistribution", "IntDistribution")
    assert (rate.low, rate.high, rate.log) == (1e-4, 1e-1, True)
    assert (latents.low, latents.high, latents.log) == (2, 64, True)
    assert [json.loads(text) for text in activation.choices] == ["SiLU", "ReLU", "Tanh"]


def folder_made(folder: Path) -> Any:
    folder.mkdir()
    return known


def median_rule(trials: list[Any], start: int) -> list[tuple[str, int]]:
    """State and number of epochs of each trial by the median rule, from the whole curves."""
    complete, expected = [], []
    for trial in trials:
        values, state, end = curve(searching.with_values(BASE, trial.settings)), "complete", EPOCHS
        for epoch in range(max(1, start), EPOCHS):
            if len(complete) >= 5 and max(values[:epoch]) < np.median(
                [c[epoch - 1] for c in complete]
            ):
                state, end = "pruned", epoch
                break
        if state == "complete":
            complete.append(values)
        expected.append((state, end))
    return expected


@pytest.mark.parametrize("warmup", [0.0, 0.3])
def test_trials_are_pruned_by_the_median_after_the_warm_up(tmp_path, warmup):
    search = search_of(20, kl_warmup=warmup)
    assert prune_from(search) == (5 if warmup else 2)
    trials = searched(tmp_path, search)
    found = [(trial.state, len(trial.elbos)) for trial in trials]
    assert found == median_rule(trials, prune_from(search))
    assert 4 <= sum(state == "pruned" for state, _ in found) <= 16


def test_no_trial_is_pruned_in_its_last_epoch(tmp_path):
    """There is nothing to save; it counts as complete."""
    trials = searched(tmp_path, search_of(20, kl_warmup=0.75))
    assert {trial.state for trial in trials} == {"complete"}


def test_pruning_waits_for_the_longest_warm_up_of_any_trial():
    for space, fit, expected in [
        ({}, {}, 5),
        ({}, {"learning_rate_warmup": 0.05}, 6),
        ({}, {"kl_warmup": 0.3}, 11),
        ({"kl_warmup": {"low": 0.0, "high": 0.5}}, {}, 15),
        ({"learning_rate_warmup": {"choices": [0.4, 0.1]}}, {"kl_warmup": 0.1}, 13),
    ]:
        assert prune_from(search_of(space={**SPACE, **space}, epochs=20, **fit)) == expected


def test_trials_that_fail_are_counted_with_their_reason(tmp_path):
    def trainer(path: Path, config: Config) -> Generator[float]:
        if config.model.activation == "ReLU":
            raise InputError("no such thing")
        yield from known(path, config)
        if config.fit.learning_rate > 1e-2:
            raise Diverged("not finite")

    trials = searched(tmp_path, search_of(12), trainer)
    assert len(trials) == 12
    reasons = {"": 0, "no such thing": 0, "not finite": 0}
    for trial in trials:
        reasons[trial.reason] += 1
        assert (trial.state == "failed") == bool(trial.reason)
        if trial.settings["activation"] == "ReLU":
            assert (trial.reason, trial.elbo, trial.epoch) == ("no such thing", None, None)
    assert min(reasons.values()) > 0
    assert all(t.settings["learning_rate"] <= 1e-2 for t in best_first(trials))
    assert not list((tmp_path / "trials").iterdir())


def test_settings_that_do_not_work_together_fail_alone(tmp_path):
    space = {"guide": {"choices": ["diagonal", "flow"]}, "prior": {"choices": ["normal", "vamp"]}}
    trials = searched(tmp_path, search_of(15, space=space))
    for trial in trials:
        pair = tuple(trial.settings[name]["family"] for name in ("guide", "prior"))
        assert (trial.state == "failed") == (pair == ("flow", "vamp"))
        assert not trial.reason or "--prior vamp expects" in trial.reason
    assert {trial.state for trial in trials} >= {"failed", "complete"}


# --- the same search again ------------------------------------------------------------------------


def test_a_seed_makes_one_search(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
    first, again = (course(searched(tmp_path / name, search_of())) for name in "ab")
    other = course(searched(tmp_path / "c", search_of(seed=6)))
    assert first == again
    assert first[0] == other[0], "the base settings"
    assert not {settings for *_, settings in first[1:]} & {settings for *_, settings in other[1:]}


@pytest.mark.timeout(25)  # less than Optuna waits for the lock of a writer that was killed
@pytest.mark.parametrize("kind", ["stopped", "killed"])
@pytest.mark.parametrize("at", [0, 1, 13])
def test_an_interrupted_search_continues_as_if_it_had_not_been(tmp_path, kind, at):
    for name in "ab":
        (tmp_path / name).mkdir()
    whole = searched(tmp_path / "a", search_of(18))
    stop, folder = threading.Event(), tmp_path / "b"

    def interrupted(path: Path, config: Config) -> Generator[float]:
        values = known(path, config)
        yield next(values)
        if int(path.name) == at:
            if kind == "killed":
                raise KeyboardInterrupt
            stop.set()
            return
        yield from values

    study = open_study(folder, search_of(18))
    try:
        run_search(study, search_of(18), folder, Workers([interrupted], stop), lambda trial: None)
    except KeyboardInterrupt:
        with (folder / "journal.log").open("a") as file:
            file.write('{"op_code":5,"trial_')  # a line without its end
        (folder / "journal.log.lock").touch()
    assert len(course(ended(study))) == at
    resumed = searched(folder, search_of(18))
    assert course(resumed) == course(whole)
    assert [t.number for t in resumed if t.state == "interrupted"] == [at]
    assert len(resumed) == 19
    assert not list((folder / "trials").iterdir())
    assert (folder / "best" / "config.json").read_text() == (
        tmp_path / "a" / "best" / "config.json"
    ).read_text()


def test_more_trials_continue_a_search(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    first = searched(tmp_path / "a", search_of(7))
    assert searched(tmp_path / "a", search_of(7)) == first, "nothing is left to do"
    assert course(searched(tmp_path / "a", search_of(12))) == course(
        searched(tmp_path / "b", search_of(12))
    )


def test_the_best_run_survives_a_kill_while_it_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    rename, count = Path.rename, []

    def killed(self: Path, target: Path) -> Path:
        count.append(self)
        if len(count) == 2:  # the former best has been removed
            assert not target.exists()
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        searched(tmp_path / "b", search_of(10))
    monkeypatch.setattr(Path, "rename", rename)
    trials = ended(open_study(tmp_path / "b", search_of(len(count))))
    searched(tmp_path / "b", search_of(len(trials)))
    kept = json.loads((tmp_path / "b" / "best" / "config.json").read_text())
    assert kept["fit"]["learning_rate"] == best_first(trials)[0].settings["learning_rate"]


def test_a_journal_is_never_unpickled(tmp_path, monkeypatch):
    searched(tmp_path, search_of(3))
    lines = (tmp_path / "journal.log").read_text().splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)

    def refused(*arguments: Any) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr("pickle.loads", refused)
    monkeypatch.setattr("pickle.load", refused)
    assert len(searched(tmp_path, search_of(4))) == 4


@pytest.mark.parametrize("line", [b"nothing\n{}\n", b'{"op_code": 99}\n', b"\xff\n{}\n", b"[1]\n"])
def test_a_damaged_journal_is_refused(tmp_path, line):
    searched(tmp_path, search_of(2))
    with (tmp_path / "journal.log").open("ab") as file:
        file.write(line)
    with pytest.raises(InputError, match=r"the journal .* is damaged"):
        open_study(tmp_path, search_of(2))


# --- several trials at a time ---------------------------------------------------------------------


def test_several_trainers_share_the_trials(tmp_path):
    barrier, seen = threading.Barrier(3, timeout=20), []

    def trainer(path: Path, config: Config) -> Generator[float]:
        seen.append((int(path.name), threading.get_ident()))
        if int(path.name) < 3:
            barrier.wait()  # passed only if three trials run at a time
        yield from known(path, config)

    trials = searched(tmp_path, search_of(11), trainer, count=3)
    assert sorted(number for number, _ in seen) == [*range(11)]
    assert len({thread for _, thread in seen}) == 3
    assert len(trials) == 11
    kept = json.loads((tmp_path / "best" / "config.json").read_text())
    assert kept["fit"]["learning_rate"] == best_first(trials)[0].settings["learning_rate"]
    assert not list((tmp_path / "trials").iterdir())


def test_an_error_in_one_trainer_stops_all(tmp_path):
    def trainer(path: Path, config: Config) -> Generator[float]:
        if int(path.name) == 2:
            raise OSError(28, "No space left on device", "a file")
        yield from known(path, config)

    with pytest.raises(OSError, match="No space left"):
        searched(tmp_path, search_of(150), trainer, count=2)
    assert len(ended(open_study(tmp_path, search_of()))) < 100


def served(trainer: Callable[..., Generator[float]]) -> tuple[Any, threading.Thread]:
    """The end of a pipe, at whose other end a thread serves one trial."""
    here, there = Pipe()

    def work() -> None:
        training._serve(there, trainer(*there.recv()))
        there.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return here, thread


def test_a_remote_trial_has_the_values_of_a_local_one(tmp_path):
    pipe, _ = served(known)
    values = list(training._remote(pipe, threading.Event(), tmp_path / "0", BASE))
    assert values == curve(BASE)


def test_a_remote_trial_that_is_pruned_has_closed_its_files(tmp_path):
    closed, slow = [], threading.Event()

    def trainer(path: Path, config: Config) -> Generator[float]:
        try:
            yield from known(path, config)
        finally:
            slow.wait(0.2)
            closed.append(path)

    pipe, _ = served(trainer)
    elbos = training._remote(pipe, threading.Event(), tmp_path / "0", BASE)
    assert next(elbos) == curve(BASE)[0]
    elbos.close()
    assert closed == [tmp_path / "0"]


@pytest.mark.parametrize(
    "error", [InputError("a"), Diverged("b"), OSError(28, "No space left on device")]
)
def test_errors_of_a_remote_trial_are_raised_here(tmp_path, error):
    def trainer(path: Path, config: Config) -> Generator[float]:
        yield 1.0
        raise error

    pipe, _ = served(trainer)
    elbos = training._remote(pipe, threading.Event(), tmp_path / "0", BASE)
    assert next(elbos) == 1.0
    with pytest.raises(type(error), match=str(error).replace("[", r"\[")):
        next(elbos)


def test_the_end_of_a_worker_is_noticed(tmp_path):
    for stopped in (False, True):
        here, there = Pipe()
        there.close()
        stop = threading.Event()
        if stopped:
            stop.set()
            assert list(training._remote(here, stop, tmp_path / "7", BASE)) == []
        else:
            with pytest.raises(LostWorker, match="of trial 7 has ended"):
                list(training._remote(here, stop, tmp_path / "7", BASE))


# --- the training of a trial ----------------------------------------------------------------------

SMALL = ModelConfig(latent_dim=2, hidden=(8,))


def config_of(path: Path, **fit: Any) -> Config:
    fit = {"epochs": 3, "batch_size": 32, **fit}
    source = DataConfig(str(path), root=path.parent, max_value=16)
    return Config(source, SMALL, FitConfig(**fit), seed=3, refit="off")


def data(folder: Path, name: str, change: Any = None) -> Path:
    """60 rows of counts in a file, some of them replaced by others of the same range."""
    values, path = example_values("binomial", 60), folder / f"{name}.npy"
    if change is not None:
        values[change] = np.random.default_rng(1).integers(0, 17, values[change].shape)
    np.save(path, values)
    return path


def trial_of(folder: Path, config: Config) -> list[float]:
    splits = load_without_test(config, torch.device("cpu"))
    return list(train_trial(folder, config, splits, threading.Event()))


def test_a_trial_is_the_run_that_train_makes(tmp_path):
    config = config_of(data(tmp_path, "x"))
    values = trial_of(tmp_path / "trial", config)
    arguments = train.TrainArguments(**vars(config), out=tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_summarize", lambda run: None)
        patch.setattr("pyro_vae.plots.from_model.draw_reconstructions", lambda *arguments: None)
        assert train.train(arguments) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert values == [json.loads(line)["validation_elbo"] for line in lines]
    assert (tmp_path / "trial" / "config.json").read_text() == (
        tmp_path / "run" / "config.json"
    ).read_text()
    for which in ("best", "last"):
        a, b = (load_checkpoint(tmp_path / name, which) for name in ("trial", "run"))
        assert a.config == b.config
        assert len(a.history) == len(b.history)
        assert all(torch.equal(a.vae.state_dict()[k], v) for k, v in b.vae.state_dict().items())


@pytest.mark.parametrize(
    "fit",
    [
        {},
        {"kl_warmup": 1.0},
        {"objective": "beta", "beta": 8.0},
        {"objective": "iwae", "num_particles": 3},
        {"objective": "free-bits", "free_bits": 2.0},
    ],
    ids=lambda fit: "-".join(map(str, fit.values())) or "trace",
)
def test_the_value_is_the_plain_elbo_whatever_is_trained(tmp_path, fit):
    """Reconstruction − KL on the validation rows, at weight 1 and with one particle."""
    config = config_of(data(tmp_path, "x"), **fit)
    values = trial_of(tmp_path / "trial", config)
    vae = pyro_vae.load(tmp_path / "trial")
    splits = pyro_vae.load_data(config.data, config.seed)
    reconstruction, kl = elbo_terms(vae, splits.validation, config.seed)
    assert max(values) == reconstruction - kl
    assert kl > 0.001


def test_the_test_split_has_no_influence(tmp_path):
    """Its rows are replaced by noise of the same range; power: those of another split."""
    config = config_of(data(tmp_path, "x"))
    splits = pyro_vae.load_data(config.data, config.seed)
    results = {}
    for name in ("x", "train", "validation", "test"):
        change = None if name == "x" else getattr(splits, name).rows.numpy()
        path = data(tmp_path, name, change)
        values = trial_of(tmp_path / f"run-{name}", config_of(path))
        weights = pyro_vae.load(tmp_path / f"run-{name}").state_dict()
        results[name] = values, torch.cat([w.flatten() for w in weights.values()])
    for name, same in (("test", True), ("validation", False), ("train", False)):
        assert (results[name][0] == results["x"][0]) is same, name
    assert torch.equal(results["test"][1], results["x"][1])
    assert not torch.equal(results["train"][1], results["x"][1])


def test_the_data_of_a_search_have_no_test_rows(tmp_path):
    config = config_of(data(tmp_path, "x"))
    whole, cut = pyro_vae.load_data(config.data, 3), load_without_test(config, torch.device("cpu"))
    assert (len(whole.test), len(cut.test)) == (6, 0)
    assert torch.equal(whole.train.rows, cut.train.rows)
    assert torch.equal(whole.validation.rows, cut.validation.rows)
    assert whole.fingerprint == cut.fingerprint
    digits = Config(model=ModelConfig(condition="label"))
    cut = load_without_test(digits, torch.device("cpu"))
    assert len(cut.test.labels) == len(cut.test) == 0
    assert cut.spec.classes


def test_a_request_to_stop_ends_a_trial_within_its_epoch(tmp_path, monkeypatch):
    config, stop, asked = config_of(data(tmp_path, "x")), threading.Event(), []
    splits = load_without_test(config, torch.device("cpu"))
    monkeypatch.setattr(training, "requested", lambda: asked.append(1) or len(asked) > 3)
    assert len(list(train_trial(tmp_path / "t", config, splits, stop))) == 1  # two steps each
    assert stop.is_set()


def test_models_that_cannot_be_built_are_refused_before_the_search(tmp_path):
    config = config_of(data(tmp_path, "x"))
    splits = load_without_test(config, torch.device("cpu"))
    check_buildable(Search(config, check_space(SPACE, config), 3, ""), splits)
    for space, message in [
        ({"activation": {"choices": ["SiLU", "SiLUU"]}}, "activation = SiLUU: "),
        ({"batch_size": {"low": 4, "high": 55}}, "batch_size = 55: --batch-size 55 is larger"),
    ]:
        with pytest.raises(InputError, match=message):
            check_buildable(Search(config, check_space(space, config), 3, ""), splits)
    assert resolve(config, splits.likelihood, len(splits.train)).fit.epochs == 3
