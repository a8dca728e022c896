"""Indexes of parts of the data, put together: the scores of one that was built at once, or a reason why not."""

import pytest
import torch

from fastif import EKFAC, Index, Influence
from fastif.files import Damaged
from fastif.index import building
from tests.helpers.indexed import BATCH, N, bits, fitted, language, linear

pytestmark = pytest.mark.usefixtures("one_thread")
CUT = 24  # where the data are cut in two, a border of batches


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Folders of two parts and of the whole, the Influence, and queries; blocks of a batch each."""
    monkeypatch.setattr(building, "BLOCK_BYTES", 1)
    model, train, query, loss = language()
    influence = fitted(model, train, loss)
    whole = Index.build(influence, train, tmp_path / "whole", share=0.3, ids=torch.arange(N), self_influence=True)
    for name, rows in {"a": slice(0, CUT), "b": slice(CUT, None)}.items():
        part, ids = tuple(x[rows] for x in train), torch.arange(N)[rows]
        how = {"share": 0.3, "threshold": whole.threshold, "self_influence": True}
        Index.build(influence, part, tmp_path / name, ids=ids, **how)
    return tmp_path, influence, query


def blocks(folder):
    return {name: data for name, data in bits(folder).items() if name.startswith("block")}


def test_parts_are_the_whole(parts):
    folder, influence, query = parts
    merged = Index.merge([folder / "a", folder / "b"], folder / "merged", influence)
    assert blocks(folder / "merged") == blocks(folder / "whole")
    whole = Index(folder / "whole", influence)
    assert torch.equal(merged.scores(query), whole.scores(query))
    assert torch.equal(merged.ids(), torch.arange(N))
    assert torch.equal(merged.self_influence(), whole.self_influence())
    assert merged.measured == min((Index(folder / name).measured for name in "ab"), key=lambda one: one.r)
    model, loss = influence.model, influence.passes.loss
    later = Influence(model, loss, EKFAC(1e-2, fisher="empirical"), batch_size=BATCH, progress=False)
    assert torch.equal(Index(folder / "merged", later).scores(query), whole.scores(query))  # with the state of a part
    a, b = (blocks(folder / name) for name in "ab")
    merged.remove(torch.tensor([1, CUT]))
    assert (blocks(folder / "a"), blocks(folder / "b")) == (a, b)


def test_what_was_removed_from_a_part_stays_removed(parts):
    folder, influence, query = parts
    Index(folder / "a").remove(torch.tensor([5]))
    Index(folder / "b").remove(torch.tensor([0, 7]))
    merged = Index.merge([folder / "b", folder / "a"], folder / "merged", influence)
    assert merged.total == N
    gone = torch.tensor([0, 7, N - CUT + 5])
    left = torch.tensor([i for i in range(N) if i not in gone.tolist()])
    assert torch.equal(merged.examples, left)
    order = torch.cat([torch.arange(CUT, N), torch.arange(CUT)])  # of the whole, as the parts stand
    scores = Index(folder / "whole", influence).scores(query)[:, order][:, left]
    assert torch.allclose(merged.scores(query), scores, rtol=0, atol=1e-6 * float(scores.abs().max()))
    assert torch.equal(merged.ids(), order[left])


def test_a_merging_that_was_cut_off_goes_on(parts, monkeypatch):
    folder, _, _ = parts
    asked = [folder / "a", folder / "b"], folder / "merged"
    Index.merge(*asked)
    want = bits(folder / "merged")
    for name in ("block-000000008.safetensors", "block-000000048.safetensors"):
        (folder / "merged" / name).unlink()
    with pytest.raises(ValueError, match="holds an index already; resume the merging"):
        Index.merge(*asked)
    with pytest.raises(ValueError, match="holds an index of other parts"):
        Index.merge([folder / "b", folder / "a"], folder / "merged", resume=True)
    Index.merge(*asked, resume=True)
    assert bits(folder / "merged") == want


def test_what_does_not_go_together_is_refused(parts):
    folder, influence, _ = parts
    model, train, _, loss = language()
    part = tuple(x[CUT:] for x in train)

    def build(name, of=influence, **how):
        options = {"share": 0.3, "threshold": Index(folder / "a").threshold, "self_influence": True, **how}
        options.setdefault("ids", torch.arange(CUT, N))
        return Index.build(of, part, folder / name, **options).path

    others = {
        "has another threshold than .*; build it with threshold=": build("found", threshold=None),
        "has another share than .*: 0.2 and 0.3": build("share", share=0.2),
        "has another dtype than .*: 'float16' and 'int8'": build("type", dtype="float16"),
        "has another self_influence than .*: False and True": build("own", self_influence=False),
        "has another curvature than .*": build("curvature", fitted(model, train, loss, EKFAC(0.3, fisher="empirical"))),
        "has another curvature state than .*": build("state", fitted(model, part, loss)),
        "ids must be distinct, 24 is there twice": folder / "b",
    }
    for said, other in others.items():
        first = folder / ("a" if other.name != "b" else "whole")
        with pytest.raises(ValueError, match=said):
            Index.merge([first, other], folder / "merged")
        assert not (folder / "merged" / "manifest.json").exists()
    with pytest.raises(TypeError, match="ids of all parts must be of one kind, got NoneType, Tensor"):
        Index.merge([folder / "a", build("nameless", ids=None)], folder / "merged")
    for paths in ([folder / "a"], [folder / "a"] * 2):
        with pytest.raises(ValueError, match="at least two distinct folders"):
            Index.merge(paths, folder / "merged")
    (folder / "b" / "block-000000008.safetensors").unlink()
    with pytest.raises(ValueError, match="unfinished: 1 of"):
        Index.merge([folder / "a", folder / "b"], folder / "merged")


def test_another_model_is_refused(parts, tmp_path):
    folder, _, _ = parts
    model, train, _, loss = linear()
    other = Index.build(fitted(model, train, loss), train, tmp_path / "other", share=0.3).path
    with pytest.raises(ValueError, match="has another loss than .*: 'cross_entropy' and 'causal_lm'"):
        Index.merge([folder / "a", other], tmp_path / "merged")


def test_a_damaged_part_is_noticed(parts):
    folder, _, _ = parts
    path = folder / "b" / "block-000000008.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(Damaged, match="block-000000008"):
        Index.merge([folder / "a", folder / "b"], folder / "merged")


def test_a_threshold_that_is_given_is_kept(tmp_path):
    model, train, _, loss = language()
    influence = fitted(model, train, loss)
    index = Index.build(influence, train, tmp_path / "index", share=0.3, threshold=1e-9)
    assert index.threshold == 1e-9
    with pytest.raises(ValueError, match="index with the threshold 1e-09, got 1e-08"):
        Index.build(influence, train, tmp_path / "index", share=0.3, threshold=1e-8, resume=True)
    with pytest.raises(ValueError, match="threshold must be a finite number >= 0, got -1"):
        Index.build(influence, train, tmp_path / "other", threshold=-1)
