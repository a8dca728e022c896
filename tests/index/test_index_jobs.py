"""A job that was cut off, wherever, ends with the bits of one that was not; files that are not right are refused."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastif import EKFAC, Index, Influence
from fastif.files import Damaged
from fastif.folder_lock import FolderInUse, locked
from fastif.index import building
from fastif.index.sampling import draw_pairs
from tests.helpers.indexed import BATCH, N, bits, fitted, language, linear

pytestmark = pytest.mark.usefixtures("one_thread")

REPOSITORY = Path(__file__).parents[2]

_JOB = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)  # nothing runs in parallel before the process forks
from fastif import Index
from fastif.index import building
from tests.helpers.indexed import fitted, language

building.BLOCK_BYTES = 1
folder = Path(sys.argv[1])
model, train, _, loss = language()
first, second = (tuple(x[rows] for x in train) for rows in (slice(0, 32), slice(32, None)))

def job():
    influence = fitted(model, first, loss)
    index = Index.build(influence, first, folder, share=0.3, resume=True)
    index.append(second, resume=True)

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def nth(function, number, before):
    calls = 0
    def counted(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == number and before:
            die()
        made = function(*arguments, **keywords)
        if calls == number:
            die()
        return made
    return counted

def killed(prepare):
    pid = os.fork()
    if pid == 0:
        prepare()
        job()
        os._exit(0)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])

def patched(owner, name, number, before):
    return lambda: setattr(owner, name, nth(getattr(owner, name), number, before))

moments = [(os, "fsync", n) for n in (1, 2, 3, 4)] + [(Path, "replace", n) for n in range(1, 5)]
moments += [(building, "_walked", 1), (building, "_write", 1), (building, "_write", 2), (building, "measure", 1)]
dead = 0
for owner, name, number in moments:
    for before in (True, False):
        dead += killed(patched(owner, name, number, before)) == signal.SIGKILL
        print(len(list(folder.glob("block-*"))) if folder.exists() else 0)
assert dead >= 16, dead
while killed(patched(Path, "replace", 3, False)) == signal.SIGKILL:  # a file further each time
    print(len(list(folder.glob("block-*"))))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_every_turn_it_ends_with_the_same_bits(tmp_path, monkeypatch):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _JOB, str(tmp_path / "killed")],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts = [int(line) for line in done.stdout.split()]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert len({*counts}) >= 6
    monkeypatch.setattr(building, "BLOCK_BYTES", 1)
    model, train, query, loss = language()
    first, second = (tuple(x[rows] for x in train) for rows in (slice(0, 32), slice(32, None)))
    influence = fitted(model, first, loss)
    whole = Index.build(influence, first, tmp_path / "whole", share=0.3).append(second)
    assert bits(tmp_path / "killed") == bits(tmp_path / "whole")
    assert torch.equal(Index(tmp_path / "killed", influence).scores(query), whole.scores(query))


@pytest.fixture
def built(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "BLOCK_BYTES", 1)
    model, train, query, loss = linear()
    influence = fitted(model, train, loss)
    return Index.build(influence, train, tmp_path / "index", share=0.5), influence, train, query


def test_only_missing_blocks_are_computed_again(built):
    index, influence, train, _ = built
    before = bits(index.path)
    (index.path / "block-000000016.safetensors").unlink()
    assert not index.finished
    with pytest.raises(ValueError, match="unfinished: 1 of 8 blocks are not there, examples 16 to 23 first"):
        index.self_influence()
    seen = []
    hook = influence.model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    with pytest.raises(ValueError, match="holds an index already"):
        Index.build(influence, train, index.path, share=0.5)
    with pytest.raises(ValueError, match="share was 0.5, is 0.4"):
        Index.build(influence, train, index.path, share=0.4, resume=True)
    hook.remove()
    assert seen == []
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: seen.append(len(inputs[0])) if module is influence.model else None
    )
    Index.build(influence, train, index.path, share=0.5, resume=True)
    handle.remove()
    assert sum(seen) == BATCH
    assert bits(index.path) == before


def test_what_was_removed_does_not_come_back(built):
    index, influence, train, _ = built
    index.remove(torch.tensor([9, 12]))
    before = bits(index.path)
    (index.path / "block-000000008.safetensors").unlink()
    Index.build(influence, train, index.path, share=0.5, resume=True)
    assert bits(index.path) == before


@pytest.mark.parametrize("name", ["manifest.json", "curvature.safetensors", "block-000000008.safetensors"])
@pytest.mark.parametrize("where", [0.3, 0.99])
def test_a_changed_bit_is_noticed(built, name, where):
    index, influence, _, query = built
    path = index.path / name
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1
    path.write_bytes(data)
    model = influence.model
    with pytest.raises(Damaged, match=name):
        Index(index.path, Influence(model, "cross_entropy", EKFAC(1e-2, "empirical"), progress=False)).scores(query)


def test_a_block_of_another_place_or_another_index_is_refused(built, tmp_path):
    index, influence, train, query = built
    other = Index.build(influence, train, tmp_path / "other", share=0.9)
    block = index.path / "block-000000008.safetensors"
    own = block.read_bytes()
    for source in (other.path / block.name, index.path / "block-000000016.safetensors"):
        block.write_bytes(source.read_bytes())
        with pytest.raises(Damaged, match="of another index, or of another place"):
            Index(index.path, influence).scores(query)
    block.write_bytes(own)
    Index(index.path, influence).scores(query)


def test_another_model_and_another_curvature_are_refused(built):
    index, influence, train, query = built
    with pytest.raises(ValueError, match="an index of another curvature"):
        Index(index.path, fitted(influence.model, train, "cross_entropy", EKFAC(0.3, fisher="monte_carlo")))
    with pytest.raises(ValueError, match="of another model, or with other arguments"):
        Index(index.path, Influence(nn.Linear(5, 3).double(), "cross_entropy", EKFAC(1e-2), progress=False))
    model, _, _, _ = linear()
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(ValueError, match="weights are not those of the fit"):
        Index(index.path, Influence(model, "cross_entropy", EKFAC(1e-2, "empirical"), progress=False))
    with torch.no_grad():
        influence.model[0].weight[0, 0] += 1
    with pytest.raises(ValueError, match="weights are not those of the fit"):
        index.scores(query)


def test_there_is_one_writer(built):
    index, influence, train, _ = built
    code = "import sys, time; from pathlib import Path; from fastif.folder_lock import locked\n"
    code += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(index.path)], stdout=subprocess.PIPE, cwd=REPOSITORY)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        for write in (
            lambda: index.append(train),
            lambda: index.remove(torch.tensor([3])),
            lambda: Index.build(influence, train, index.path, resume=True),
        ):
            with pytest.raises(FolderInUse, match=f"process {holder.pid}"):
                write()
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    with locked(index.path):
        index.remove(torch.tensor([3]))
    assert index.n == N - 1


def test_a_full_disk_keeps_the_blocks_that_are_done(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "BLOCK_BYTES", 1)
    model, train, _, loss = linear()
    influence = fitted(model, train, loss)
    save, saved = Path.write_bytes, 0

    def full(path, data):
        nonlocal saved
        saved += "block-" in path.name
        if saved > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left.*3 of 8 blocks are kept in .* goes on from there") as caught:
            Index.build(influence, train, tmp_path / "full", share=0.5)
    assert caught.value.errno == errno.ENOSPC
    Index.build(influence, train, tmp_path / "full", share=0.5, resume=True)
    Index.build(influence, train, tmp_path / "whole", share=0.5)
    assert bits(tmp_path / "full") == bits(tmp_path / "whole")


def test_its_files_can_be_read_without_fastif(built):
    """By the description at the head of fastif/index/folder.py."""
    from safetensors.torch import load_file

    index, influence, _, _ = built
    manifest = json.loads((index.path / "manifest.json").read_text())
    tensors = load_file(index.path / "block-000000000.safetensors")
    first, shape, table = manifest["layers"][0]
    assert (first, shape, table) == ("0", [1, 8, 6], False)
    assert manifest["worth"] == {}
    left, right, scale = (tensors[f"0/{name}"] for name in ("left", "right", "scale"))
    owners = torch.arange(BATCH).repeat_interleave(tensors["0/ranks"][:, 0])
    products = scale[:, None, None] * left.float()[:, :, None] * right.float()[:, None]
    found = torch.zeros(BATCH, 8, 6).index_add_(0, owners, products)
    metric = index._encoder().metrics["0"]
    with influence.passes.running(None):
        _, _, gradients = next(influence.passes.gradients((built[2][0][:BATCH], built[2][1][:BATCH]), "x"))
    weighed = gradients["0"].formed()[:, 0] * metric.rows[0, :, None] * metric.columns[0]
    torch.testing.assert_close(found.double(), weighed, rtol=0, atol=0.02 * float(weighed.abs().max()))


def cut_off_before_measuring(influence, train, folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(building, "measure", full)
        with pytest.raises(OSError, match="no space"):
            Index.build(influence, train, folder, share=0.3)
    return Index(folder, influence)


def test_a_build_that_was_cut_off_before_its_error_was_measured_measures_it(tmp_path, monkeypatch):
    model, train, _, loss = language()
    influence = fitted(model, train, loss)
    whole = Index.build(influence, train, tmp_path / "whole", share=0.3)

    cut = cut_off_before_measuring(influence, train, tmp_path / "cut", monkeypatch)
    assert cut.finished
    assert cut.measured is None
    assert (tmp_path / "cut" / building.EXACT).exists()
    resumed = Index.build(influence, train, tmp_path / "cut", share=0.3, resume=True)
    assert resumed.measured == whole.measured is not None
    names = [sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("cut", "whole")]
    assert names[0] == names[1]


@pytest.mark.parametrize("left", [0, 1, 2])
def test_an_error_is_measured_of_what_was_left_of_its_sample(tmp_path, monkeypatch, left):
    model, train, _, loss = language()
    influence = fitted(model, train, loss)
    cut = cut_off_before_measuring(influence, train, tmp_path / "cut", monkeypatch)
    sample = draw_pairs(N, influence.setup.seed).examples
    cut.remove(sample[left:])
    resumed = Index.build(influence, train, tmp_path / "cut", share=0.3, resume=True)
    assert (resumed.measured and resumed.measured.examples) == (left if left > 1 else None)
    assert not (tmp_path / "cut" / building.EXACT).exists()


@pytest.mark.parametrize("batch", [0, 1])
def test_an_append_of_data_that_will_not_do_is_taken_back_by_the_next(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(building, "BLOCK_BYTES", 1)  # a batch each
    model, (x, y), query, loss = linear()
    influence = fitted(model, (x, y), loss)
    first, more = (x[:32], y[:32]), (x[32:], y[32:])
    for name in ("index", "whole"):
        Index.build(influence, first, tmp_path / name, ids=[str(i) for i in range(32)]).remove(torch.tensor([2]))
    index, ids = Index(tmp_path / "index", influence), [str(i) for i in range(32, N)]
    broken = more[0].clone()
    broken[batch * BATCH] = torch.nan
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        index.append((broken, more[1]), ids=ids)
    with pytest.raises(ValueError, match="with resume=True goes on, and an append without it takes their place"):
        index.scores(query)
    with pytest.raises(ValueError, match="is unfinished"):
        index.append(more, ids=ids, resume=True)
    index.append(more, ids=ids)
    Index(tmp_path / "whole", influence).append(more, ids=ids)
    assert bits(tmp_path / "index") == bits(tmp_path / "whole")
    assert index.ids() == Index(tmp_path / "whole").ids()
