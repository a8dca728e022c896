"""The metrics by hand, the table's bookkeeping, and that an interrupted job ends as one that ran through."""

import json
import math
import sys
from contextlib import contextmanager
from itertools import pairwise
from operator import itemgetter

import numpy as np
import pytest
import torch
from torch import nn

from fastif import extract, samplers
from fastif.evaluation import class_removal
from fastif.evaluation.lissa_step import STEP_SIZES, LiSSAStep, Removed, lowest
from fastif.evaluation.metrics import DEFINITIONS, METRICS, SUMMARISED, measure, summarise
from fastif.evaluation.settings import SAMPLERS, check_budgets, check_classes, check_seeds, choose_samplers

STEPS = 3


def blobs(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four classes around four corners of the plane, three further noise dimensions."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 4
    centre = torch.stack([(y % 2) * 2.0 - 1, (y // 2) * 2.0 - 1], 1)
    return torch.cat([centre, torch.zeros(n, 3)], 1) + 0.8 * torch.randn(n, 5, generator=draw), y


TRAIN, TEST = blobs(200, 0), blobs(120, 1)


def fit(x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """A linear classifier, trained to convergence with weight decay 0.01."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 4))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        norm = sum(p.square().sum() for p in model.parameters())
        loss = nn.functional.cross_entropy(model(x), y) + 0.005 * norm
        loss.backward()
        return loss

    optimiser.step(closure)
    return model.eval()


MODEL = fit(*TRAIN)


def run(**change):
    settings = {"samplers": ["random", "prefix"], "k": ["10%", 60], "seeds": 2, "steps": STEPS, "weight_decay": 0.01}
    return class_removal(MODEL, TRAIN, TEST, progress=False, **{**settings, **change})


@pytest.fixture(scope="module")
def results():
    return run(retrain=lambda keep: fit(TRAIN[0][keep], TRAIN[1][keep]))


def without_times(rows):
    return [{key: value for key, value in row.items() if key not in ("seconds", "peak_bytes")} for row in rows]


# -------------------------------------------------------------------------------------------------------------- metrics


def test_metrics_by_hand():
    ln = math.log
    # Rows of softmax probabilities; the removed class is 2.
    p = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1], [0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    found = measure(p.log(), torch.tensor([0, 1, 1, 2, 2]), removed=2)
    assert found["EA"] == pytest.approx(2 / 3)
    assert found["EL"] == pytest.approx(-(ln(0.7) + ln(0.3) + ln(0.8)) / 3, rel=1e-6)
    assert found["SA"] == pytest.approx(1 / 2)
    assert found["SL"] == pytest.approx(-(ln(0.25) + ln(0.8)) / 2, rel=1e-6)
    assert found["F1"] == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))


def test_f1_at_its_ends():
    perfect = torch.tensor([[9.0, 0.0], [9.0, 0.0]])
    assert measure(perfect, torch.tensor([0, 1]), removed=1)["F1"] == 1
    assert measure(perfect.flip(1), torch.tensor([0, 1]), removed=1)["F1"] == 0  # 0 / 0


def test_summary_by_hand():
    rows = [
        {"sampler": s, "k": 5, "class": c, "seed": seed, "step": step, "seconds": 1.0 + (s == "x"), "peak_bytes": step}
        | {"F1": 0.1 * c + 0.01 * seed, "objective": 1.0, "excess": 0.5, "EA": 1, "EL": 1, "SA": 1, "SL": 1}
        for s in ("random", "x")
        for c in (0, 1)
        for seed in (0, 1, 2)
        for step in (1, 2)
    ]
    entry = next(e for e in summarise(rows) if e["sampler"] == "x" and e["step"] == 2)
    assert entry["runs"] == 6
    assert entry["F1_mean"] == pytest.approx(0.05 + 0.01)
    assert entry["F1_std"] == pytest.approx(0.01)  # seeds' class means 0.05, 0.06, 0.07
    assert entry["F1_std_classes"] == pytest.approx(0.1 / math.sqrt(2))
    assert entry["RTE_mean"] == 4
    assert entry["RTE_ratio"] == 2
    assert (entry["ME_mean"], entry["ME_ratio"]) == (2, 1)


def test_summary_without_random_seeds_or_memory_says_none():
    row = {"sampler": "x", "k": 1, "class": 0, "seed": 0, "step": 1, "seconds": 1.0, "peak_bytes": None}
    (entry,) = summarise([row | dict.fromkeys((*METRICS, "objective", "excess"), 1.0)])
    assert [entry[f"ME_{name}"] for name in ("mean", "std", "ratio")] == [None] * 3
    assert [entry["F1_std"], entry["F1_std_classes"], entry["RTE_ratio"]] == [None] * 3


# ---------------------------------------------------------------------------------------------------------------- table


def test_the_layout(results):
    assert list(results) == ["meta", "original", "retrained_head", "retrained", "baseline", "rows", "summary"]
    assert results["baseline"] == []
    for name in ("original", "retrained_head", "retrained"):
        assert [entry["class"] for entry in results[name]] == [0, 1, 2, 3]
        assert all(set(METRICS) <= set(entry) for entry in results[name])
    row = {"sampler", "k", "class", "seed", "step", *METRICS, "objective", "excess", "seconds", "peak_bytes", "stopped"}
    assert all(row <= set(entry) for entry in results["rows"])
    assert all({f"{m}_mean", f"{m}_std"} <= set(entry) for entry in results["summary"] for m in SUMMARISED)
    meta = results["meta"]
    assert {"versions", "device", "threads", "seeds", "command", "build", "date"} <= set(meta)
    assert (meta["k"], meta["seeds"], meta["n_train"], meta["n_test"]) == ([20, 60], [0, 1], 200, 120)
    assert meta["definitions"] == DEFINITIONS
    assert json.loads(json.dumps(results)) == results


def test_every_combination_has_every_step_and_what_draws_nothing_runs_once(results):
    found = {(r["sampler"], r["k"], r["class"], r["seed"], r["step"]) for r in results["rows"]}
    seeds = {"random": (0, 1), "prefix": (0,)}
    expected = {
        (name, k, c, seed, step)
        for name in seeds
        for k in (20, 60)
        for c in range(4)
        for seed in seeds[name]
        for step in (1, 2, 3)
    }
    assert found == expected
    assert len(results["rows"]) == len(expected)
    assert results["meta"]["draws_nothing"] == ["prefix"]
    assert all(e["F1_std"] is None for e in results["summary"] if e["sampler"] == "prefix")


def test_the_model_is_as_it_was_and_original_is_measured_on_it(results):
    with torch.no_grad():
        logits = MODEL(TEST[0])
    for entry in results["original"]:
        assert {m: entry[m] for m in METRICS} == pytest.approx(measure(logits, TEST[1], entry["class"]), rel=1e-5)


def test_the_objective_falls_from_the_original_to_the_optimum(results):
    for original, best in zip(results["original"], results["retrained_head"], strict=True):
        for k in (20, 60):
            run = [r for r in results["rows"] if (r["class"], r["k"], r["seed"]) == (original["class"], k, 0)]
            for name in ("random", "prefix"):
                values = [original["objective"], *(r["objective"] for r in run if r["sampler"] == name)]
                assert all(b <= a for a, b in pairwise(values))
                assert values[0] > values[1]
        excess = [r["excess"] for r in results["rows"] if r["class"] == original["class"]]
        assert min(excess) > -1e-6
        assert original["objective"] - best["objective"] > max(excess)


def test_for_a_linear_model_the_retrained_head_is_the_retrained_network(results):
    # The retrained objective is (1/n_retained) sum + weight decay, the head's is (1/n) sum: alike.
    for head, network in zip(results["retrained_head"], results["retrained"], strict=True):
        assert head["EA"] == pytest.approx(network["EA"], abs=0.02)
        assert head["SA"] == pytest.approx(network["SA"], abs=0.02)


def test_all_samplers_run_and_a_function_of_ones_own_does_too():
    def last(n: int, k: int) -> samplers.Subset:
        return samplers.Subset(torch.arange(n - k, n), torch.full((k,), 1 / k, dtype=torch.float64))

    found = run(samplers=[*SAMPLERS, ("last", last)], k=40, seeds=[7], classes=[2], steps=1)
    assert [e["sampler"] for e in found["summary"]] == [*SAMPLERS, "last"]
    assert {row["seed"] for row in found["rows"]} == {7}
    assert found["retrained"] == []


def test_a_run_that_stops_carries_its_last_values_on():
    rows = run(samplers=["prefix"], k="100%", seeds=1, classes=[0], steps=30)["rows"]
    assert [row["step"] for row in rows] == list(range(1, 31))
    stopped = [row for row in rows if row["stopped"]]
    assert 1 < len(stopped) < 29
    before = rows[-len(stopped) - 1]
    for row in stopped:
        assert (row["seconds"], row["peak_bytes"]) == (0, 0)
        assert [row[m] for m in (*METRICS, "objective")] == [before[m] for m in (*METRICS, "objective")]


def test_rows_depend_on_the_seed_alone():
    both, one = run(seeds=[3, 4], k=20, classes=[1, 3])["rows"], run(seeds=[4], k=20, classes=[3])["rows"]
    same = [r for r in both if (r["class"], r["seed"], r["sampler"]) == (3, 4, "random")]
    assert without_times(same) == without_times(r for r in one if r["sampler"] == "random")


# --------------------------------------------------------------------------------------------------------------- resume


class Killed(Exception): ...


@contextmanager
def dies_after(runs: int):
    """Every job, after so many runs; samplers and trainings are what they are."""
    job = sys.modules[class_removal.__module__]._Job
    run, done = job.run, 0

    def counted(*arguments):
        nonlocal done
        done += 1
        if done > runs:
            raise Killed
        return run(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "run", counted)
        with pytest.raises(Killed):
            yield


TRAININGS: list[int] = []  # examples of each


class Retrain:
    """Trains, and notes it where no fingerprint looks."""

    def __call__(self, keep):
        sys.modules[__name__].TRAININGS.append(len(keep))
        return fit(TRAIN[0][keep], TRAIN[1][keep])


def test_a_killed_job_resumes_to_the_same_rows(tmp_path, results):
    TRAININGS.clear()
    retrain = Retrain()
    with dies_after(6):
        run(retrain=retrain, out=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]
    journal = (tmp_path / "rows.jsonl").read_text()
    assert journal.count('{"rows"') >= 4
    (tmp_path / "rows.jsonl").write_text(journal + '{"rows": [{"sampler": "ran')  # killed in the middle of a line
    resumed = run(retrain=retrain, out=tmp_path, resume=True)
    assert without_times(resumed["rows"]) == without_times(results["rows"])
    assert resumed["meta"]["rows_kept_from_before"] == STEPS * journal.count('{"rows"')
    assert TRAININGS == [150] * 4  # no network is retrained twice
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json"]
    assert json.loads((tmp_path / "results.json").read_text()) == resumed
    assert run(retrain=retrain, out=tmp_path, resume=True) == resumed  # finished: nothing is left to do


def test_an_unfinished_job_is_neither_overwritten_nor_mixed_with_another(tmp_path):
    with dies_after(3):
        run(samplers=["random"], out=tmp_path)
    with pytest.raises(ValueError, match="holds an unfinished job"):
        run(out=tmp_path)
    with pytest.raises(ValueError, match="other settings") as caught:
        run(out=tmp_path, resume=True, seeds=3, damping=0.1)
    words = str(caught.value)
    assert "seeds was [0, 1], is [0, 1, 2]" in words
    assert "damping was 0.0, is 0.1" in words
    assert "steps" not in words
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    lines[1] = "damaged"
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, ""]))
    with pytest.raises(ValueError, match=r"rows\.jsonl is damaged: line 2"):
        run(samplers=["random"], out=tmp_path, resume=True)


@pytest.mark.parametrize("other", ["retrain", "sampler"])
def test_another_function_of_the_same_name_is_refused(tmp_path, other):
    def made(scale):
        def retrain(keep):
            return fit(TRAIN[0][keep] * scale, TRAIN[1][keep])

        def own(n, k):
            return samplers.Subset(torch.arange(k), torch.full((k,), scale / k))

        return dict(retrain=retrain if other == "retrain" else None, samplers=[("own", own)])

    how = dict(k=20, seeds=1, steps=1, classes=[1], out=tmp_path)
    run(**made(1.0), **how)
    assert run(**made(1.0), **how, resume=True)["meta"]["code"]
    with pytest.raises(ValueError, match=rf"code: {other}.*: closure: scale was 1.0, is 2.0"):
        run(**made(2.0), **how, resume=True)


def test_records_are_found_by_key_and_a_changed_result_is_noticed(tmp_path, results):
    with dies_after(6):
        run(out=tmp_path)
    path = tmp_path / "rows.jsonl"
    first, *lines = path.read_text().splitlines()
    path.write_text("\n".join([first, *lines[::-1], *lines[:2], ""]))  # in another order, some twice
    resumed = run(out=tmp_path, resume=True)
    by = itemgetter("sampler", "k", "class", "seed", "step")
    assert sorted(without_times(resumed["rows"]), key=by) == sorted(without_times(results["rows"]), key=by)
    assert [e["class"] for e in resumed["retrained_head"]] == [0, 1, 2, 3]
    path = tmp_path / "results.json"
    path.write_text(path.read_text().replace('"SL": 0.', '"SL": 1.', 1))
    with pytest.raises(ValueError, match=r"results\.json is damaged: its checksum does not fit"):
        run(out=tmp_path, resume=True)


def test_finished_results_of_another_job_are_not_taken_for_this_one(tmp_path):
    run(k=20, seeds=1, steps=1, out=tmp_path)
    with pytest.raises(ValueError, match="steps was 1, is 2"):
        run(k=20, seeds=1, steps=2, out=tmp_path, resume=True)
    other = fit(*blobs(80, 5))
    with pytest.raises(ValueError, match="model was"):
        class_removal(other, TRAIN, TEST, samplers=["random", "prefix"], k=20, seeds=1, steps=1, weight_decay=0.01,
                      out=tmp_path, resume=True, progress=False)  # fmt: skip
    for train, test in (((TRAIN[0] + 1, TRAIN[1]), TEST), (TRAIN, (TEST[0] + 1, TEST[1]))):
        with pytest.raises(ValueError, match="examples was"):
            class_removal(MODEL, train, test, samplers=["random", "prefix"], k=20, seeds=1, steps=1, weight_decay=0.01,
                          out=tmp_path, resume=True, progress=False)  # fmt: skip
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="is damaged: it is not a results file"):
        run(out=tmp_path, resume=True)


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samplers": ["rendom"]}, f"one of {', '.join(SAMPLERS)}, got 'rendom'"),
        ({"samplers": []}, "got none"),
        ({"samplers": ["k-center", "k_center"]}, "each name once"),
        ({"k": 0}, r"k must be in \[1, n=200\]"),
        ({"k": 201}, r"k must be in \[1, n=200\]"),
        ({"k": "0%"}, "k must be in"),
        ({"k": "nan%"}, "k must be in"),
        ({"k": "half"}, "a number of examples or a percentage"),
        ({"k": []}, "got none"),
        ({"seeds": 0}, "seeds must be"),
        ({"seeds": [1, 1]}, "seeds must be"),
        ({"classes": [0, 4]}, r"classes must be in \[0, c=4\), got 4"),
        ({"classes": []}, "got none"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"damping": -1.0}, "damping"),
        ({"damping": math.inf}, "damping must be a finite number >= 0, got inf"),
        ({"damping": "auto"}, "damping must be a finite number >= 0, got 'auto'"),
        ({"damping": None}, "damping must be"),
        ({"weight_decay": 0.0}, "weight_decay must be > 0"),
        ({"weight_decay": -1}, "weight_decay must be > 0"),
        ({"weight_decay": math.nan}, "weight_decay must be > 0 and finite, got nan"),
        ({"weight_decay": math.inf}, "weight_decay must be > 0 and finite, got inf"),
        ({"weight_decay": "0.1"}, "weight_decay must be > 0 and finite, got '0.1'"),
        ({"seeds": 10**30}, "seeds must be at most"),
        ({"seeds": [2**43]}, "seeds must be at most"),
        ({"k": 0.05}, "k must be a number of examples or a percentage .* got 0.05"),
        ({"k": [0.05]}, "k must be a number of examples or a percentage .* got 0.05"),
        ({"k": None}, "k must be .* got None"),
        ({"seeds": 1.5}, "seeds must be .* got 1.5"),
        ({"seeds": [0.5]}, "seeds must be .* got 0.5"),
        ({"seeds": "3"}, "seeds must be .* got '3'"),
        ({"classes": 1}, "classes must be a list of numbers, got 1"),
        ({"classes": "1"}, "classes must be numbers, got '1'"),
        ({"steps": 1.5}, "steps must be an integer, got 1.5"),
        ({"samplers": [samplers.random]}, "samplers must be names or pairs"),
        ({"samplers": samplers.random}, "samplers must be names or pairs"),
        ({"samplers": [("random", 3)]}, "the sampler random must be a function, got 3"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_done(tmp_path, change, words):
    with pytest.raises((ValueError, TypeError), match=words):
        run(**change, retrain=lambda _: pytest.fail("retrained first"), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_dies_before_its_first_record_leaves_no_journal(tmp_path, monkeypatch):
    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[class_removal.__module__], "optimal_head", killed)
        with pytest.raises(Killed):
            run(out=tmp_path)
    assert list(tmp_path.iterdir()) == []
    run(out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_integers_of_numpy_are_integers(tmp_path):
    found = run(k=np.int64(20), seeds=np.arange(2), classes=np.array([1, 3]), steps=np.int32(2), out=tmp_path)
    assert [found["meta"][name] for name in ("k", "seeds", "classes", "steps")] == [[20], [0, 1], [1, 3], 2]
    assert without_times(found["rows"]) == without_times(run(k=20, seeds=2, classes=[1, 3], steps=2)["rows"])
    assert check_seeds(np.int64(2)) == [0, 1]
    assert check_budgets([np.int32(3), "50%"], 10) == [3, 5]


def test_data_that_cannot_be_compared_is_refused():
    x, y = TEST
    with pytest.raises(ValueError, match="the test data has no labels"):
        class_removal(MODEL, TRAIN, x, progress=False)
    with pytest.raises(ValueError, match="class 3 has 0 of the 90 held-out examples"):
        class_removal(MODEL, TRAIN, (x[y != 3], y[y != 3]), progress=False)
    with pytest.raises(ValueError, match="class 0 has 30 of the 30 held-out examples"):
        class_removal(MODEL, TRAIN, (x[y == 0], y[y == 0]), classes=[0], progress=False)


def test_names_budgets_seeds_and_classes():
    assert [name for name, _ in choose_samplers(["k-center", " logit"])] == ["k_center", "logit"]
    assert choose_samplers("random")[0] == ("random", samplers.random)
    assert check_budgets(["0.5%", 300, "1%", "0.01%"], 60_000) == [300, 600, 6]
    assert check_budgets("0.001%", 100) == [1]
    assert check_seeds(3) == [0, 1, 2]
    assert check_classes([2, 0, 2], 3) == [0, 2]


# ------------------------------------------------------------------------------------------------------------- baseline


def lissa(**change):
    return LiSSAStep(MODEL, TRAIN, extract(MODEL, TRAIN, progress=False), 0.01, **change)


def test_the_baseline_is_one_influence_step_of_the_size_that_training_data_choose():
    removed = (TRAIN[1] == 2).nonzero()[:, 0]
    step = lissa(damping=0.1, iterations=2000)
    found = step(removed, samplers.random, 40, 3)
    kept = (TRAIN[1] != 2).nonzero()[:, 0]
    drawn = samplers.random(len(kept), 40, generator=torch.Generator().manual_seed(3))
    x = torch.cat([TRAIN[0], torch.ones(len(TRAIN[1]), 1)], 1).double()
    p = MODEL(TRAIN[0]).detach().double().softmax(1)
    rows = kept[drawn.indices]
    h = torch.diag_embed(p[rows]) - p[rows, :, None] * p[rows, None]
    weights = drawn.weights.double() * len(kept) / len(TRAIN[1])
    g = torch.einsum("i,icd,ia,ib->cadb", weights, h, x[rows], x[rows]).reshape(24, 24)
    gradient = (p - nn.functional.one_hot(TRAIN[1], 4))[removed].T @ x[removed] / len(TRAIN[1])
    change = torch.linalg.solve(g + (0.1 + 0.01) * torch.eye(24), gradient.flatten()).reshape(4, 6)
    before = torch.cat([MODEL[1].weight, MODEL[1].bias[:, None]], 1).detach()

    def objective(size):
        after = before + size * change
        losses = nn.functional.cross_entropy(x[kept] @ after.T, TRAIN[1][kept], reduction="sum")
        return float(losses) / len(TRAIN[1]) + 0.005 * float(after.square().sum())

    assert found.step_size == lowest(objective)
    moved = torch.cat([found.state["1.weight"], found.state["1.bias"][:, None]], 1)
    assert (moved - before - found.step_size * change).abs().max() < 5e-3 * found.step_size * change.abs().max()
    assert found.converged
    assert torch.equal(found.sized(0)["1.weight"], MODEL[1].weight)


def test_lowest_walks_while_the_value_falls():
    assert lowest(lambda size: abs(math.log2(size) - 3)) == 8
    assert lowest(lambda size: abs(math.log2(size) + 2)) == 0.25
    assert lowest(lambda size: -size) == STEP_SIZES[-1]


def test_the_baseline_is_kept_run_by_run(tmp_path):
    calls, before = [], []  # what a function holds is a part of it: the list is as empty when the job goes on

    def baseline(removed, k, seed):
        calls.append((len(removed), k, seed))
        if len(calls) == 6:
            raise Killed
        return Removed(MODEL.state_dict(), 0.5, 7, 1.0)

    with pytest.raises(Killed):
        run(baseline=baseline, out=tmp_path)
    before += calls
    calls.clear()
    with pytest.raises(ValueError, match="baseline"):
        run(out=tmp_path, resume=True)
    found = run(baseline=baseline, out=tmp_path, resume=True)
    assert (len(before), len(calls)) == (6, 3)  # the sixth again, the first five not
    calls += before
    assert [(row["k"], row["class"]) for row in found["baseline"]] == [(k, c) for k in (20, 60) for c in range(4)]
    assert set(calls) == {(50, 20, 0), (50, 60, 0)}
    assert [row["F1"] for row in found["baseline"]] == 2 * [entry["F1"] for entry in found["original"]]
    (small, _) = summarise(found["baseline"])
    assert (small["RTE_mean"], small["ME_mean"], small["excess_mean"]) == (0.5, 7, None)
