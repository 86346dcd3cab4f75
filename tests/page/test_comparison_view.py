"""A comparison in words: numbers, verdicts, rankings, and what limits them."""

from __future__ import annotations

from dataclasses import replace

from pyro_vae.evidence.comparison import Comparison, Measure
from pyro_vae.evidence.differences import Difference
from pyro_vae.page.comparison import notes, protocol, view

ROWS = [
    Difference("a", "b", 1.25, 0.5, 2.0, 1000),
    Difference("a", "c", -0.25, -1.0, 0.5, 1000),
    Difference("b", "c", -1.5, -2.0, -1.0, 1000),
]
SEEDS = [Difference("method 1", "method 2", 0.5, -3.0, 4.0, 2)]
MEANS = {"a": -10.0, "b": -11.25, "c": -9.75}
FOUND = Comparison(
    measures={
        "elbo": Measure(MEANS, ROWS, [["c", "a"], ["b"]], SEEDS),
        "log_evidence": Measure(MEANS, ROWS, [["c", "a"]], []),
        "kl": Measure(MEANS, ROWS[:1], [], []),
        "accuracy": Measure({"a": 0.75}, [], [["a"]], []),
    },
    methods={"method 1": {0: "a", 1: "b"}, "method 2": {0: "c"}},
    num_rows=dict.fromkeys("abc", 1000),
    common=1000,
    num_samples=5000,
    binarization="fixed, seed 7",
    given_labels=True,
    monte_carlo_error=dict.fromkeys("abc", 0.01),
    unreliable_weights={"a": 0.05, "b": 0.25, "c": 0.0},
    underestimated=["b"],
    notes=["row 3 decides"],
)


def plain(text: str) -> str:
    return text.replace("\N{MINUS SIGN}", "-")


def test_lines_have_the_numbers_and_the_verdict_of_their_intervals():
    shown = view(FOUND)
    lines = [(x.measure, plain(x.pair), plain(x.numbers), x.basis, x.verdict) for x in shown.rows]
    assert lines[:3] == [
        ("ELBO", "a - b", "+1.250 [0.500, 2.000]", "1,000 rows", "a is higher"),
        ("ELBO", "a - c", "-0.250 [-1.000, 0.500]", "1,000 rows", "not distinguished"),
        ("ELBO", "b - c", "-1.500 [-2.000, -1.000]", "1,000 rows", "c is higher"),
    ]
    # the lower of a pair may only look lower
    assert [line[-1] for line in lines[3:6]] == [
        "a is higher, unless b is underestimated",
        "not distinguished",
        "c is higher, unless b is underestimated",
    ]
    assert len(lines) == 7
    (seed,) = shown.seeds
    assert (plain(seed.pair), seed.basis) == ("method 1 - method 2", "2 seeds")
    assert shown.methods == ["method 1: a, b (seeds 0, 1)"]
    assert shown.picture is not None
    assert shown.picture.svg.startswith("<svg")


def test_rankings_are_the_tiers_of_measures_that_two_runs_have():
    assert view(FOUND).rankings == [
        ("ELBO", "1. c, a; 2. b"),
        ("log p(x)", "no ranking: the intervals do not separate the runs"),
    ]
    alone = replace(FOUND.measures["log_evidence"], tiers=[["a"]])
    found = replace(FOUND, measures={"log_evidence": alone})
    reason = "no ranking: fewer than two runs have a reliable value"
    assert view(found).rankings == [("log p(x)", reason)]


def test_the_protocol_and_the_limits_are_said():
    assert protocol(FOUND) == (
        "1,000 test rows of each run, 1,000 of them test rows of all; 5,000 samples of z per row; "
        "binarized once (fixed, seed 7); densities given the label of each row, as log p(x|y); 95% "
        "intervals, simultaneous for all pairs of a measure"
    )
    quick = replace(FOUND, num_samples=None, num_rows={"a": 900, "b": 1000}, common=850)
    assert protocol(quick).startswith(
        "900 to 1,000 test rows of each run, 850 of them test rows of all; one draw of z per row"
    )
    first, second, third = notes(FOUND)
    assert first == "row 3 decides"
    assert second.startswith("log p(x) of b is a lower bound and has no rank: 25% of its rows")
    assert third == "2 seeds are few: intervals over so few are wide"
    few = {"elbo": replace(FOUND.measures["elbo"], differences=ROWS[:1], over_seeds=[])}
    assert notes(replace(FOUND, measures=few))[2].startswith("2 of 3 pairs of runs have fewer than")
