"""The memory limit of a container or a batch job is the tightest of its groups', wherever in the tree it stands."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ace_cli.core import control_group


def group(folder: Path, limit: object, used: int, version: int = 2, cached: tuple[int, int] = (0, 0)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"), 2: ("memory.max", "memory.current", "")}
    most, current, total = names[version]
    (folder / most).write_text(f"{limit}\n")
    (folder / current).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{total}inactive_file {cached[0]}\n{total}active_file {cached[1]}\n")


def left(tmp_path: Path, *lines: str) -> float:
    (tmp_path / "cgroup").write_text("".join(f"{line}\n" for line in lines))
    return control_group.room(tmp_path / "cgroup", tmp_path / "fs")


def test_pages_of_files_are_given_back_when_asked_for(tmp_path: Path) -> None:
    group(tmp_path / "fs", 1000, 700, cached=(150, 50))
    assert left(tmp_path, "0::/") == 1000 - 700 + 200


@pytest.mark.parametrize("tight", ["slice", "slice/job", "slice/job/step"])
def test_every_group_up_to_the_root_counts(tmp_path: Path, tight: str) -> None:
    for folder in ("slice", "slice/job", "slice/job/step"):
        group(tmp_path / "fs" / folder, 500 if folder == tight else "max", 100)
    assert left(tmp_path, "0::/slice/job/step") == 400


def test_a_throttle_is_a_limit(tmp_path: Path) -> None:
    group(tmp_path / "fs" / "job", "max", 100)
    (tmp_path / "fs" / "job" / "memory.high").write_text("300\n")
    assert left(tmp_path, "0::/job") == 200


def test_version_1(tmp_path: Path) -> None:
    group(tmp_path / "fs/memory", 9223372036854771712, 5000, version=1)
    group(tmp_path / "fs/memory/slurm/uid_1/job_2", 2000, 900, version=1, cached=(50, 50))
    lines = ("12:cpu,cpuacct:/slurm", "7:memory:/slurm/uid_1/job_2/step_0", "0::/init.scope")
    assert left(tmp_path, *lines) == 2000 - 900 + 100


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    """The path in /proc is the host's, which the container cannot see."""
    group(tmp_path / "fs/memory", 800, 300, version=1)
    assert left(tmp_path, "4:memory:/docker/0123abc") == 500
    group(tmp_path / "other/fs", 800, 300)
    assert left(tmp_path / "other", "0::/../../pod") == 500


def test_no_groups_no_limit(tmp_path: Path) -> None:
    assert control_group.room(tmp_path / "none", tmp_path / "fs") == math.inf
    assert left(tmp_path, "0::/somewhere", "nonsense") == math.inf
