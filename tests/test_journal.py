"""Journals: damage is noticed, duplicates are one; files appear whole, under names that nobody could have planted."""

import errno
import json
import os
import random

import pytest

from fastif.files import Damaged, whole, write_whole
from fastif.journal import Journal

SETTINGS = {"a": 1, "b": {"c": [1.0, None]}}


def written(path, records=4):
    journal = Journal(path, SETTINGS, resume=False)
    for number in range(records):
        journal.append("run", {"value": number / 3}, (number, "x"))
    return path


def test_records_are_found_by_key_and_duplicates_are_one(tmp_path):
    path = written(tmp_path / "rows.jsonl")
    first, *lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first, *lines[::-1], lines[2], lines[0][:30]]))  # and one that is torn
    journal = Journal(path, SETTINGS, resume=True)
    assert journal.found("run") == {(number, "x"): {"value": number / 3} for number in range(4)}
    assert len(list(journal.of_kind("run"))) == 4
    assert path.read_text() == "".join([first, *lines[::-1]])
    journal.append("run", {"value": 9}, (1, "x"))
    assert Journal(path, SETTINGS, resume=True).found("run")[1, "x"] == {"value": 1 / 3}


def test_every_flipped_bit_is_noticed_or_costs_a_record(tmp_path):
    """A line end that is none any more makes a torn line of the last: what it held is computed again."""
    path, draw = written(tmp_path / "rows.jsonl"), random.Random(0)
    whole_text = path.read_bytes()
    want = Journal(path, SETTINGS, resume=True).found("run")
    for place in range(len(whole_text)):
        data = bytearray(whole_text)
        data[place] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            found = Journal(path, SETTINGS, resume=True).found("run")
        except ValueError as error:
            assert "rows.jsonl is damaged: line" in str(error)  # noqa: PT017
        else:
            assert place == len(whole_text) - 1
            assert found == {key: value for key, value in want.items() if key != (3, "x")}


@pytest.mark.parametrize("text", ["", "\0" * 400, "{}\n", "[]\n"])
def test_a_file_that_is_no_journal_is_refused(tmp_path, text):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(
        Damaged, match=r"rows\.jsonl is damaged: line 1, the settings: .*; remove it, and the job begins"
    ):
        Journal(tmp_path / "rows.jsonl", SETTINGS, resume=True)


def test_lines_of_another_job_are_noticed(tmp_path):
    path = written(tmp_path / "rows.jsonl")
    other = tmp_path / "other.jsonl"
    Journal(other, {"a": 2}, resume=False).append("run", {"value": 5}, (7, "x"))
    path.write_text(path.read_text() + other.read_text().splitlines()[1] + "\n")
    with pytest.raises(Damaged, match="line 6: its checksum does not fit"):
        Journal(path, SETTINGS, resume=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"a": True, "b": {"c": [1.0, None]}}, "a was 1, is True$"),
        ({"a": 1, "b": {"c": [1, None]}}, r"b: c was \[1.0, None\], is \[1, None\]$"),
        ({"a": 1, "b": {"d": 2}}, r"b: c was \[1.0, None\], is absent; b: d was absent, is 2$"),
    ],
)
def test_differences_are_named_as_deep_as_they_are(tmp_path, settings, words):
    path = written(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=words):
        Journal(path, settings, resume=True)


def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    monkeypatch.setattr("secrets.token_hex", lambda _: "0" * 16)
    with whole(tmp_path / "a") as unfinished:
        name = unfinished.name
    (tmp_path / name).symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "a", "new")
    (tmp_path / "b").symlink_to(victim)  # what stands in the file's own place is replaced, not written to
    write_whole(tmp_path / "b", "new")
    assert (victim.read_text(), (tmp_path / "b").read_text()) == ("as it was", "new")


def test_a_file_that_is_replaced_meanwhile_is_refused(tmp_path):
    def write():
        with whole(tmp_path / "a") as unfinished:
            unfinished.unlink()
            unfinished.write_text("somebody else's")

    with pytest.raises(OSError, match="was replaced by another file"):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["first", "later"])
def test_a_full_disk_names_the_bytes_and_keeps_what_is_finished(tmp_path, monkeypatch, when):
    path = tmp_path / "rows.jsonl"
    journal = Journal(written(path, 2) if when == "later" else path, SETTINGS, resume=True)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            OSError, match=r"No space left on device: .*rows.jsonl needs \d+ bytes and finds [\d,]+ free"
        ):
            journal.append("run", {"value": 2}, (2, "x"))
    if when == "later":
        assert {(0, "x"), (1, "x")} <= set(Journal(path, SETTINGS, resume=True).found("run"))
    assert [p.name for p in tmp_path.iterdir()] == (["rows.jsonl"] if when == "later" else [])


def test_lines_are_json(tmp_path):
    first, line, *_ = map(json.loads, written(tmp_path / "rows.jsonl").read_text().splitlines())
    assert first["settings"] == SETTINGS
    assert (line["run"], line["key"]) == ({"value": 0.0}, [0, "x"])
