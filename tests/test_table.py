"""scripts/table.py: the README's table from reports."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "table.py"


def leave_report(
    folder: Path, metric: str, pattern: str, seed: int, perplexity: float, fingerprint: str = "same"
) -> None:
    folder.mkdir(parents=True)
    report = {
        "command": f"ace-prune model=smollm2 calib=text 'calib.path=/some where/x.jsonl' eval.seq_len=8 "
        f"calib.seed={seed} metric={metric} sparsity={pattern} calib.seq_len=128 output_dir={folder}",
        "method": {"pattern": pattern},
        "perplexity": {"dense": 20.0, "pruned": perplexity, "protocol": {"fingerprint": fingerprint}},
        "seconds": {"import": 9.0, "calibrate": 2.0 + seed, "prune": 3.0, "write": 1.0, "evaluate": 50.0},
    }
    (folder / "report.json").write_text(json.dumps(report))


def table(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, folder], capture_output=True, text=True, check=False)


def test_mean_spread_best_and_the_fastest_run(tmp_path: Path) -> None:
    leave_report(tmp_path / "a" / "0", "wanda", "0.5", 0, 40.0)
    leave_report(tmp_path / "a" / "1", "wanda", "0.5", 1, 42.0)
    leave_report(tmp_path / "b" / "0", "varp", "0.5", 0, 40.0)
    leave_report(tmp_path / "b" / "1", "varp", "2:4", 0, 90.0)
    lines = table(tmp_path).stdout.splitlines()
    assert lines[0] == "Dense 20.00."
    assert lines[2] == "| recipe | 0.5 | 2:4 | seeds | seconds |"
    assert "| `metric=wanda calib.seq_len=128` | 41.0 ± 1.4 |  | 2 | 6 |" in lines
    assert "| `metric=varp calib.seq_len=128` | **40.0** | **90.0** | 1 | 6 |" in lines


def test_different_protocols_stand_in_tables_of_their_own(tmp_path: Path) -> None:
    leave_report(tmp_path / "a" / "0", "wanda", "0.5", 0, 40.0)
    leave_report(tmp_path / "a" / "1", "wanda", "0.5", 0, 80.0, "another")
    lines = table(tmp_path).stdout.splitlines()
    assert lines.count("Dense 20.00.") == 2
    assert "| `metric=wanda calib.seq_len=128` | **40.0** | 1 | 6 |" in lines
    assert "| `metric=wanda calib.seq_len=128` | **80.0** | 1 | 6 |" in lines


def test_differences_are_paired_and_carry_their_noise(tmp_path: Path) -> None:
    """Each seed is 10 % better but for little: beyond two standard errors, although the spread over seeds is larger."""
    wanda, better, tie = (40.0, 60.0, 50.0), (36.0, 54.6, 44.5), (36.0, 66.0, 50.0)
    for seed in range(3):
        leave_report(tmp_path / "a" / str(seed), "wanda", "0.5", seed, wanda[seed])
        leave_report(tmp_path / "b" / str(seed), "ace", "0.5", seed, better[seed])
        leave_report(tmp_path / "c" / str(seed), "ria", "0.5", seed, tie[seed])
    lines = table(tmp_path).stdout.splitlines()
    logs = [math.log(b / w) for b, w in zip(better, wanda, strict=True)]
    mean, error = sum(logs) / 3, statistics.stdev(logs) / math.sqrt(3)
    assert f"| `metric=ace calib.seq_len=128` | **<** {100 * math.expm1(mean):+.1f} ± {100 * error:.1f} | 3 |" in lines
    (row,) = [line for line in lines if line.startswith("| `metric=ria") and line.endswith("| 3 |")]
    assert "<" not in row
    assert ">" not in row


def test_an_unknown_recipe_is_refused(tmp_path: Path) -> None:
    leave_report(tmp_path / "a" / "0", "wanda", "0.5", 0, 40.0)
    done = subprocess.run([sys.executable, SCRIPT, tmp_path, "metric=x"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no recipe 'metric=x'" in done.stderr
