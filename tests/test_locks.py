"""Locks between processes, and folders that two of them do not share."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ace_cli.core.errors import AceError
from ace_cli.core.locks import fresh_folder, is_locked, locked

fcntl = pytest.importorskip("fcntl")


def test_a_locked_folder_is_refused_until_it_is_left(tmp_path: Path) -> None:
    with locked(tmp_path) as alone:
        assert alone
        assert is_locked(tmp_path)
        with pytest.raises(AceError, match="Another run is working"), locked(tmp_path):
            pass
    assert not is_locked(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EIO])
def test_a_place_without_locks_is_not_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(fcntl, "flock", refused)
    with locked(tmp_path) as alone:
        assert not alone
        assert not is_locked(tmp_path)


def test_a_lock_file_of_somebody_else_keeps_its_content(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("mine")
    with locked(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == "mine"


def test_no_two_get_the_same_new_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: fresh_folder(tmp_path / "outputs" / "now"), range(16)))
    assert len(set(folders)) == 16
    assert all(folder.is_dir() for folder in folders)
    assert folders[0].parent == tmp_path / "outputs"
    assert {folder.name for folder in folders} == {"now", *(f"now-{n}" for n in range(2, 17))}
