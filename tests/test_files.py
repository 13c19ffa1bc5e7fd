"""Files are whole or not there."""

from __future__ import annotations

import pytest

from kd import files


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        files.write_json(path, {"a": 2})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_not_a_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", float("nan"))


def test_a_folder_is_replaced_whole_and_the_one_before_is_kept(tmp_path):
    for text in ("one", "two", "three"):
        files.write_folder(
            tmp_path / "last", lambda part, text=text: (part / "x").write_text(text), tmp_path / "previous"
        )
    assert (tmp_path / "last" / "x").read_text() == "three"
    assert (tmp_path / "previous" / "x").read_text() == "two"
    assert files.broken_files(tmp_path / "last") == []
    (tmp_path / "last" / "x").write_text("torn")
    assert files.broken_files(tmp_path / "last") == ["x"]
    assert files.broken_files(tmp_path) == ["sha256.json"]


def test_a_folder_that_cannot_be_filled_leaves_the_old_one(tmp_path):
    files.write_folder(tmp_path / "best", lambda part: (part / "x").write_text("one"))

    def fail(part):
        (part / "x").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        files.write_folder(tmp_path / "best", fail)
    assert (tmp_path / "best" / "x").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
