"""Scores on disk: the folder holds what Influence gives, reads any part of it, and takes no other job for its own."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastif import CG, EKFAC, KFAC, Diagonal, ExactBlock, Identity, Influence, LiSSA, ScoreFolder
from fastif.influence import score_job
from fastif.influence.score_folder import write_manifest
from fastif.samplers import Subset
from tests.helpers.stored import BATCH, FORMS, PARTS, QUERY_GROUPS, N, Q, bits, fitted, problem, tokens, walked

pytestmark = pytest.mark.usefixtures("one_thread", "small_blocks")


@pytest.mark.parametrize("form", FORMS)
def test_the_folder_holds_the_scores(tmp_path, form):
    model, query, train = problem()
    influence, data = fitted(model, train), FORMS[form](train)
    want = influence.scores(query, data)
    got = influence.scores(query, data, out=tmp_path / "scores")
    assert got.finished
    assert got.shape == (Q, N)
    assert len(list((tmp_path / "scores").glob("*.npy"))) >= 3 * 3
    assert torch.allclose(got.load(), want, rtol=1e-12, atol=1e-18)
    assert torch.equal(ScoreFolder(tmp_path / "scores").load(), got.load())  # later and without the model
    values, indices = influence.top(query, data, 4)
    assert torch.equal(got.top(4)[1], indices)
    assert torch.allclose(got.top(4)[0], values, rtol=1e-12)
    worst = want.sort(dim=1, stable=True).indices[:, :4]
    assert torch.equal(got.top(4, largest=False)[1], worst)


@pytest.mark.parametrize("curvature", [EKFAC(separable=1e-3), Diagonal(), Identity(), {"0": KFAC(), "2": Diagonal()}])
def test_whatever_the_curvature(tmp_path, curvature):
    model, query, train = problem()
    influence = fitted(model, train, curvature)
    got = influence.scores(query, train, out=tmp_path)
    scale = float(influence.scores(query, train).abs().max())
    assert float((got.load() - influence.scores(query, train)).abs().max()) <= 1e-3 * scale


def test_checkpoints_are_averaged_within_each_block(tmp_path):
    model, query, train = problem()
    moved = {name: value * 1.1 for name, value in model.state_dict().items()}
    influence = fitted(model, train, checkpoints=[model.state_dict(), moved])
    got = influence.scores(query, train, out=tmp_path)
    assert torch.allclose(got.load(), influence.scores(query, train), rtol=1e-12, atol=1e-18)


def test_what_rank_lost_is_kept_with_the_scores(tmp_path):
    model, query, train = problem()
    influence = fitted(model, train)
    want = influence.scores(query, train, low_rank=1)
    lost = influence.low_rank_error
    assert lost > 0.01
    got = influence.scores(query, train, low_rank=1, out=tmp_path)
    assert torch.allclose(got.load(), want, rtol=1e-9, atol=1e-15)
    assert got.low_rank_error == pytest.approx(lost)
    sorted(tmp_path.glob("*.npy"))[-1].unlink()
    influence.scores(query, train, low_rank=1, out=tmp_path, resume=True)
    assert influence.low_rank_error == got.low_rank_error  # also of the blocks that were there


@pytest.mark.parametrize("checkpoints", [1, 2])
@pytest.mark.parametrize("form", ["tensors", "batches"])
@pytest.mark.parametrize("parts", PARTS)
def test_the_folder_holds_parts_of_the_scores(tmp_path, parts, form, checkpoints):
    (model, query, train), call = PARTS[parts][0](), PARTS[parts][1]
    moved = {name: value * 1.1 for name, value in model.state_dict().items()}
    influence = fitted(model, train, checkpoints=[model.state_dict(), moved][:checkpoints])
    data = FORMS[form](train)
    want = call(influence, query, data)
    want = torch.stack([*want.values()], 2) if isinstance(want, dict) else want
    got = call(influence, query, data, out=tmp_path)
    assert got.finished
    assert got.shape == want.shape
    assert len(list(tmp_path.glob("*.npy"))) >= 4
    assert torch.allclose(got.load(), want, rtol=1e-9, atol=1e-15)
    sums = want if parts == "query groups" else want.sum(2)
    scores = influence.scores(query, data)
    if parts == "query groups":
        scores = torch.stack([scores[QUERY_GROUPS == group].sum(0) for group in range(3)])
    assert torch.allclose(sums, scores, rtol=1e-9, atol=1e-15)


def test_a_layer_or_a_token_is_read_by_itself(tmp_path):
    model, query, train = problem()
    influence = fitted(model, train)
    want = influence.scores(query, train, by="layer")
    got = influence.scores(query, train, by="layer", out=tmp_path / "a")
    assert got.layers == ["0", "2"]
    assert torch.allclose(got[1:7:2, :, "2"], want["2"][1:7:2], rtol=1e-12, atol=1e-18)
    with pytest.raises(ValueError, match="no layer '1' in .*: 0, 2"):
        got[:, :, "1"]
    values, indices = influence.top(query, train, 3)
    assert torch.equal(got.top(3)[1], indices)
    assert torch.allclose(got.top(3)[0], values)
    model, query, train = tokens()
    got = fitted(model, train).scores(query, train, out=tmp_path / "b", by="token")
    whole = got.load()
    assert got.layers is None
    for index in ((3, 5, 2), (slice(2, 9), 7, slice(1, 3)), (slice(None), slice(60, 80), -1), (4,), 4, (2, 3)):
        assert torch.equal(got[index], whole[index])
    assert torch.equal(torch.cat([block.values for block in got.blocks() if block.query == 0], 1), whole[:2])
    with pytest.raises(IndexError):
        got[:, :, 4]
    with pytest.raises(ValueError, match="no layer '0' in .*: none"):
        got[:, :, "0"]


def test_parts_and_scores_do_not_share_a_folder(tmp_path):
    model, query, train = problem()
    influence = fitted(model, train)
    influence.scores(query, train, out=tmp_path)
    before = bits(tmp_path)
    for words, work in (
        ("by was None, is 'layer'; parts was None, is ", partial(influence.scores, by="layer")),
        ("by was None, is 'token'; parts was None, is 1", partial(influence.scores, by="token")),
        ("query groups was None, is ", lambda *data, **out: influence.scores(*data, query_groups=QUERY_GROUPS, **out)),
    ):
        with pytest.raises(ValueError, match="holds a job with other settings") as caught:
            work(query, train, out=tmp_path, resume=True)
        assert words in str(caught.value)
    assert bits(tmp_path) == before


def test_tokens_of_several_lengths_are_refused(tmp_path):
    model, query, (x, y) = tokens()
    influence = fitted(model, (x, y))
    uneven = [(x[:16], y[:16]), (x[16:24, :3], y[16:24])]
    with pytest.raises(
        ValueError, match=r"scores\(by='token'\): batches must have one number of positions, got 4 and 3"
    ):
        influence.scores(query, uneven, out=tmp_path, by="token")


# ------------------------------------------------------------------------------------------------------------- reading


@given(st.slices(Q), st.slices(N), st.integers(-Q, Q - 1), st.integers(-N, N - 1))
def test_parts_are_those_of_a_tensor(folder_and_scores, rows, columns, row, column):
    scores, whole = folder_and_scores
    rows, columns = (slice(s.start, s.stop, abs(s.step) if s.step else None) for s in (rows, columns))
    for index in ((rows, columns), (row, columns), (rows, column), (row, column), rows, row):
        assert torch.equal(scores[index], whole[index])


@pytest.fixture(scope="module")
def folder_and_scores(tmp_path_factory):
    model, query, train = problem()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_job, "BLOCK_BYTES", 2 * BATCH * 5 * 8)
        scores = fitted(model, train).scores(query, train, out=tmp_path_factory.mktemp("scores"))
    return scores, scores.load()


def test_blocks_cover_the_scores_once(folder_and_scores):
    scores, whole = folder_and_scores
    covered = torch.zeros(scores.shape)
    for query, train, values in scores.blocks():
        here = slice(query, query + values.shape[0]), slice(train, train + values.shape[1])
        covered[here] += 1
        assert torch.equal(whole[here], values)
    assert bool((covered == 1).all())
    assert torch.equal(torch.stack(list(scores)), whole)  # row by row, as a tensor


def test_reading_refuses(tmp_path, folder_and_scores):
    scores, _ = folder_and_scores
    with pytest.raises(IndexError):
        scores[Q]
    with pytest.raises(IndexError):
        scores[0, -N - 1]
    with pytest.raises(ValueError, match="step of a slice must be at least 1, got -1"):
        scores[::-1]
    with pytest.raises(ValueError, match=r"k must be in \[1, n=90\]|k must be an integer in \[1, n=90\], got k=91"):
        scores.top(N + 1)
    with pytest.raises(FileNotFoundError, match="holds no scores: it has no manifest.json"):
        ScoreFolder(tmp_path)
    (tmp_path / "manifest.json").write_text('{"settings": {')
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        ScoreFolder(tmp_path)
    write_manifest(tmp_path, {}, 0.0)
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        ScoreFolder(tmp_path)
    (tmp_path / "manifest.json").write_text('{"settings": {}, "rank_error": 0.0}')
    with pytest.raises(ValueError, match="was written by a fastif that kept no checksums: .*; remove the folder"):
        ScoreFolder(tmp_path)


def test_an_unfinished_folder_reads_what_it_has(tmp_path):
    model, query, train = problem()
    scores = fitted(model, train).scores(query, train, out=tmp_path)
    whole, paths = scores.load(), sorted(tmp_path.glob("*.npy"))
    paths[-1].unlink()
    assert not scores.finished
    assert f"{len(paths) - 1} of {len(paths)} blocks" in repr(scores)
    assert torch.equal(scores[: Q - 1], whole[: Q - 1])
    assert len(list(scores.blocks())) == len(paths) - 1
    with pytest.raises(ValueError, match=rf"no scores of queries 10 to 10 .* yet: {len(paths) - 1} of {len(paths)}"):
        scores.load()


# ------------------------------------------------------------------------------------------------------------ refusals


def _own_loss(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels, reduction="none")


def _moved(module):
    with torch.no_grad():
        for parameter in module.parameters(recurse=False):
            parameter.add_(1e-9)


OTHERS = [  # what the message says, without its quotes
    ("curvature was EKFAC(damping=auto, fisher=exact, separable=None) of 0, 2, is EKFAC(damping=0.01,", EKFAC(0.01)),
    ("of 0, 2, is Diagonal(damping=0.001, fisher=exact) of 0, 2; curvature state was", Diagonal()),
    ("of 0, 2, is EKFAC(damping=auto, fisher=exact, separable=None) of 2; curvature state was", {"layers": "2"}),
    ("batch_size was 8, is 4; curvature state", {"batch_size": 4}),
    ("seed was 0, is 1", {"seed": 1}),
    ("measurement was loss, is margin", {"measurement": "margin"}),
    ("loss was cross_entropy, is tests.influence.test_score_folder._own_loss (", {"loss": _own_loss}),
    ("memory was 880, is 528; rows was [0, 5, 10, 11], is [0, 3, 6, 9, 11]; columns", {"memory": 3 * 22 * 8}),
    ("checkpoints was None, is 1", {"checkpoints": [problem()[0].state_dict()]}),
    ("q was 11, is 10; query was", lambda model, query, train: (model, (query[0][:10], query[1][:10]), train)),
    ("n was 90, is 89", lambda model, query, train: (model, query, (train[0][:89], train[1][:89]))),
    ("query was ", lambda model, query, train: (model, (query[0] + 1e-9, query[1]), train)),
    ("train was ", lambda model, query, train: (model, query, (train[0], train[1].flip(0)))),
    ("model was ", lambda model, query, train: (model.apply(_moved), query, train)),
]


@pytest.mark.parametrize(("words", "change"), OTHERS, ids=[words.split(" was")[0] for words, _ in OTHERS])
def test_a_folder_of_other_settings_is_refused(tmp_path, words, change):
    model, query, train = problem()
    fitted(model, train).scores(query, train, out=tmp_path)
    before = bits(tmp_path)
    arguments = change if isinstance(change, dict) else {}
    if callable(change):
        model, query, train = change(model, query, train)
    elif not arguments:
        arguments = {"curvature": change}
    with pytest.raises(ValueError, match="holds a job with other settings and cannot be resumed") as caught:
        fitted(model, train, **arguments).scores(query, train, out=tmp_path, resume=True)
    assert words in str(caught.value).replace("'", "").replace('"', "")
    assert bits(tmp_path) == before


class _Loss:
    def __init__(self, weight):
        self.weight = weight

    def of(self, outputs, labels):
        return self.weight * _own_loss(outputs, labels)


def _net(activation):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), activation, nn.Linear(6, 3)).double()


def test_other_code_is_refused(tmp_path, monkeypatch):
    _, query, train = problem()
    how = dict(curvature=Diagonal(), loss=_Loss(1.0).of)
    fitted(_net(nn.ReLU()), train, **how).scores(query, train, out=tmp_path)
    fitted(_net(nn.ReLU()), train, **how).scores(query, train, out=tmp_path, resume=True)
    before = bits(tmp_path)
    with pytest.raises(ValueError, match=r"model code: 1 was '.*\.ReLU \(.*', is .*\.GELU \(.*approximate"):
        fitted(_net(nn.GELU()), train, **how).scores(query, train, out=tmp_path, resume=True)
    other = fitted(_net(nn.ReLU()), train, Diagonal(), loss=_Loss(3.0).of)
    with pytest.raises(ValueError, match="loss: bound to: holds: weight was 1.0, is 3.0"):
        other.scores(query, train, out=tmp_path, resume=True)
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "_own_loss", lambda outputs, labels: outputs.square().sum(1))
        with pytest.raises(ValueError, match="_own_loss was .*_own_loss .*, is .*<lambda> "):
            fitted(_net(nn.ReLU()), train, **how).scores(query, train, out=tmp_path, resume=True)
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match=r"threads was 1, is 2 \(sums round differently with another number"):
            fitted(_net(nn.ReLU()), train, **how).scores(query, train, out=tmp_path, resume=True)
    finally:
        torch.set_num_threads(1)
    assert bits(tmp_path) == before


def test_a_key_stands_for_what_cannot_be_fingerprinted(tmp_path):
    _, query, train = problem()
    model, streams = _net(nn.ReLU()), (n for n in range(9))
    model.streams = streams
    influence = fitted(model, train, Diagonal())
    with pytest.raises(ValueError, match=r"model\.itself\[0\]\.streams is a builtins\.generator, .* needs key="):
        influence.scores(query, train, out=tmp_path)
    assert list(tmp_path.iterdir()) == []
    influence.scores(query, train, out=tmp_path, key="first")
    influence.scores(query, train, out=tmp_path, key="first", resume=True)
    with pytest.raises(ValueError, match="key was 'first', is 'second'"):
        influence.scores(query, train, out=tmp_path, key="second", resume=True)


def test_other_subsets_and_ranks_are_refused(tmp_path):
    from fastif import samplers

    model, query, train = problem()
    influence = fitted(model, train)
    influence.scores(query, train, out=tmp_path)
    with pytest.raises(ValueError, match="rank was None, is 2"):
        influence.scores(query, train, out=tmp_path, resume=True, low_rank=2)
    influence.fit(train, subset=samplers.random(N, 40, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match="curvature state was '[0-9a-f]{16}', is '[0-9a-f]{16}'") as caught:
        influence.scores(query, train, out=tmp_path, resume=True)
    assert str(caught.value).count(" was ") == 1


def test_what_changes_only_the_last_bits_is_refused(tmp_path, monkeypatch):
    """The memory, by which batches are cut and forms of queries chosen, and where a factor came to stand."""
    model, query, train = problem()
    fitted(model, train, memory=1 << 27).scores(query, train, out=tmp_path / "memory")
    with pytest.raises(ValueError, match=r"settings and cannot be resumed: memory was 134217728, is 67108864$"):
        fitted(model, train, memory=1 << 26).scores(query, train, out=tmp_path / "memory", resume=True)
    fitted(model, train, curvature=ExactBlock()).scores(query, train, out=tmp_path / "factors")
    room = iter([1 << 30])  # to allocate the block, and none when its factor is made
    monkeypatch.setattr("fastif.curvature.exact.room.available_bytes", lambda _: next(room, 0))
    influence = fitted(model, train, curvature={"2": ExactBlock()}, layers="2")
    assert influence.curvature["2"].in_place_used
    with pytest.raises(ValueError, match=r"choices: 0/2 was absent, is \{'factor in place': True\}"):
        influence.scores(query, train, out=tmp_path / "factors", resume=True)


@pytest.mark.parametrize("curvature", [CG(1.0, tolerance=0.1), LiSSA(1.0, scale=5.0, tolerance=0.3)])
def test_another_subset_to_multiply_with_is_refused(tmp_path, curvature):
    """It is in no state."""
    model, query, train = problem()
    first, second = (Subset(indices, torch.full((45,), 1 / 45)) for indices in torch.arange(N).chunk(2))
    influence = fitted(model, train, curvature)
    for subset, other, folder in ((None, first, tmp_path / "all"), (first, second, tmp_path / "first")):
        influence.fit(train, subset=subset).scores(query, train, out=folder)
        want = bits(folder)
        influence.fit(train, subset=other)
        with pytest.raises(ValueError, match="curvature state was"):
            influence.scores(query, train, out=folder, resume=True)
        influence.fit(train, subset=subset).scores(query, train, out=folder, resume=True)
        assert bits(folder) == want


def test_what_cannot_be_is_refused(tmp_path):
    model, query, train = problem()
    influence = fitted(model, train)
    with pytest.raises(ValueError, match="resume=True needs out="):
        influence.scores(query, train, resume=True)
    for by in ("layer", "token"):
        with pytest.raises(ValueError, match="scores: resume=True needs out="):
            influence.scores(query, train, by=by, resume=True)
        with pytest.raises(ValueError, match="scores: key='a' needs out="):
            influence.scores(query, train, by=by, key="a")
    with pytest.raises(ValueError, match="out= and groups= exclude each other"):
        influence.scores(query, train, out=tmp_path, groups=torch.zeros(N, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"query_groups must be \[11\] numbers >= 0, got shape \[3\]"):
        influence.scores(query, train, out=tmp_path, query_groups=torch.arange(3))
    with pytest.raises(ValueError, match="got an iterator"):
        influence.scores(query, iter(walked(train)), out=tmp_path)
    with pytest.raises(ValueError, match="not fitted"):
        Influence(model, progress=False).scores(query, train, out=tmp_path)
    assert list(tmp_path.iterdir()) == []
    scores = influence.scores(query, train, out=tmp_path)
    with pytest.raises(ValueError, match="holds scores already; resume the job, or remove the folder"):
        influence.scores(query, train, out=tmp_path)
    (path, *_) = tmp_path.glob("*.npy")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"{path.name} is damaged: .*; remove it and resume the job"):
        influence.scores(query, train, out=tmp_path, resume=True)
    np.save(path, np.zeros((1, 1)))
    with pytest.raises(ValueError, match=f"{path.name} is damaged: its checksum does not fit"):
        scores.load()
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds blocks of scores but no manifest.json"):
        influence.scores(query, train, out=tmp_path, resume=True)


def test_the_manifest_says_what_determined_the_numbers(tmp_path):
    model, query, train = problem()
    fitted(model, train).scores(query, train, out=tmp_path)
    settings = json.loads((tmp_path / "manifest.json").read_text())["settings"]
    assert (settings["q"], settings["n"], settings["dtype"], settings["torch"]) == (Q, N, "float64", torch.__version__)
    assert settings["rows"] == [0, 5, 10, 11]
    assert settings["columns"] == [*range(0, 90, 16), 90]
