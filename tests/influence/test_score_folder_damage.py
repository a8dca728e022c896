"""Folders of scores that are not what was written: every flipped bit, cut or exchanged file is noticed."""

import random
import shutil

import pytest

from fastif import Diagonal, ScoreFolder
from tests.helpers.stored import bits, fitted, problem

pytestmark = pytest.mark.usefixtures("one_thread", "small_blocks")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, one_thread, small_blocks):
    model, query, train = problem()
    folders = tmp_path_factory.mktemp("scores"), tmp_path_factory.mktemp("others")
    fitted(model, train, Diagonal()).scores(query, train, out=folders[0])
    fitted(model, train, Diagonal(0.1)).scores(query, train, out=folders[1])
    return folders


def flipped(path, draw):
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut(path, draw):
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def zero_filled(path, draw):
    data = path.read_bytes()
    start = draw.randrange(len(data))
    if any(data[start:]):
        path.write_bytes(data[:start] + bytes(len(data) - start))
    else:
        path.write_bytes(bytes(len(data)))


def longer(path, draw):
    path.write_bytes(path.read_bytes() + draw.randbytes(1 + draw.randrange(40)))


def header(path, draw):
    data = bytearray(path.read_bytes())
    data[draw.randrange(min(128, len(data)))] = draw.randrange(256) ^ 0x80
    if bytes(data) == path.read_bytes():
        data[0] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [flipped, cut, zero_filled, longer, header])
def test_damage_is_noticed(tmp_path, finished, damage):
    names, draw = sorted(bits(finished[0])), random.Random(0)
    for number in range(60):
        folder = tmp_path / str(number)
        shutil.copytree(finished[0], folder)
        path = folder / draw.choice(names if number % 3 else ["manifest.json"])
        damage(path, draw)
        with pytest.raises(
            ValueError, match=r"is damaged: .*; remove (it and resume the job|the folder and)"
        ) as caught:
            ScoreFolder(folder).load()
        assert str(caught.value).startswith(str(path))


def test_blocks_that_change_places_are_noticed(tmp_path, finished):
    first, second, *_ = sorted(path.name for path in finished[0].glob("*.npy"))
    folder = shutil.copytree(finished[0], tmp_path / "a")
    (folder / first).rename(folder / "aside")
    (folder / second).rename(folder / first)
    (folder / "aside").rename(folder / second)
    with pytest.raises(ValueError, match=f"{first} is damaged: .* the file of other values; remove it and resume"):
        ScoreFolder(folder).load()
    folder = shutil.copytree(finished[0], tmp_path / "b")
    shutil.copy(finished[1] / first, folder / first)  # of the same place, of another job
    with pytest.raises(ValueError, match=f"{first} is damaged"):
        ScoreFolder(folder).load()


def test_a_damaged_block_is_computed_again_once_it_is_removed(tmp_path, finished):
    model, query, train = problem()
    influence = fitted(model, train, Diagonal())
    folder = shutil.copytree(finished[0], tmp_path / "a")
    path = sorted(folder.glob("*.npy"))[3]
    flipped(path, random.Random(1))
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        influence.scores(query, train, out=folder, resume=True)
    path.unlink()
    influence.scores(query, train, out=folder, resume=True)
    assert bits(folder) == bits(finished[0])


def test_a_block_is_verified_once_and_again_when_its_file_changes(tmp_path, finished, monkeypatch):
    from fastif.influence import score_folder

    seen, load = [], score_folder.load_array

    def noted(path, *arguments, verify):
        seen.append(verify)
        return load(path, *arguments, verify=verify)

    monkeypatch.setattr(score_folder, "load_array", noted)
    folder = shutil.copytree(finished[0], tmp_path / "a")
    scores = ScoreFolder(folder)
    for _ in range(3):
        _ = scores[0, 0]
    assert seen == [True, False, False]
    flipped(sorted(folder.glob("*.npy"))[0], random.Random(2))
    with pytest.raises(ValueError, match="is damaged"):
        _ = scores[0, 0]
