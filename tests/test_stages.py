from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ace_cli.core.errors import AceError
from ace_cli.core.stage import Progress, Stage
from ace_cli.report.terminal import Terminal
from ace_cli.run.stages import run_stage


class Shout(Stage):
    """A stage that writes what it reads in capitals."""

    name = "shouted"

    def __init__(self, mark: str = "!", good: bool = True) -> None:
        self.mark, self.good, self.runs = mark, good, 0

    def identity(self) -> dict[str, Any]:
        return {"mark": self.mark}

    def run(self, source: Path, target: Path, progress: Progress) -> dict[str, Any]:
        self.runs += 1
        with progress("shouting", 1) as step:
            (target / "text").write_text((source / "text").read_text().upper() + self.mark)
            step()
        return {"letters": 5}

    def verify(self, source: Path, target: Path) -> None:
        if not self.good:
            raise AceError("not loud enough")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "text").write_text("hello")
    return tmp_path / "source"


def test_folder_in_folder_out_and_not_twice(source: Path, tmp_path: Path) -> None:
    stage, progress = Shout(), Terminal().progress
    facts = run_stage(stage, source, "a", tmp_path, progress)
    assert (tmp_path / "shouted" / "text").read_text() == "HELLO!"
    assert (facts["letters"], facts["made"]) == (5, True)
    again = run_stage(stage, source, "a", tmp_path, progress)
    assert (again["letters"], again["made"], stage.runs) == (5, False, 1)
    run_stage(stage, source, "another source", tmp_path, progress)
    run_stage(Shout("?"), source, "another source", tmp_path, progress)
    assert (stage.runs, (tmp_path / "shouted" / "text").read_text()) == (2, "HELLO?")


def test_a_result_that_does_not_verify_leaves_nothing_and_what_was_there_stays(source: Path, tmp_path: Path) -> None:
    run_stage(Shout(), source, "a", tmp_path, Terminal().progress)
    with pytest.raises(AceError, match="loud"):
        run_stage(Shout("?", good=False), source, "a", tmp_path, Terminal().progress)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "shouted"}
    assert (tmp_path / "shouted" / "text").read_text() == "HELLO!"


def test_a_folder_of_others_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "shouted").mkdir()
    (tmp_path / "shouted" / "mine").write_text("mine")
    with pytest.raises(AceError, match="not made by ace-prune"):
        run_stage(Shout(), source, "a", tmp_path, Terminal().progress)
    assert (tmp_path / "shouted" / "mine").exists()


@pytest.mark.parametrize("place", ["shouted", "shouted.partial"])
def test_a_file_of_others_in_a_stage_s_folder_stays(source: Path, tmp_path: Path, place: str) -> None:
    run_stage(Shout(), source, "a", tmp_path, Terminal().progress)
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "mine").write_text("mine")
    with pytest.raises(AceError, match="not written by ace-prune"):
        run_stage(Shout("?"), source, "a", tmp_path, Terminal().progress)
    assert (tmp_path / place / "mine").read_text() == "mine"
    assert (tmp_path / "shouted" / "text").read_text() == "HELLO!"
