"""scripts/compare_trainer.py: what one would do without recover=, on the same tokens."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ace_cli.api import load_report

SCRIPT = Path(__file__).parents[1] / "scripts" / "compare_trainer.py"


def test_one_table_of_perplexities(llama: Path, documents: Path, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("compare_trainer", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    options = (
        "model=custom", f"model.path={llama}", "sparsity=2:4", "metric=wanda", "calib=text", f"calib.path={documents}",
        "calib.n_samples=16", "calib.seq_len=16", "eval=text", f"eval.path={documents}", "eval.seq_len=16",
        "eval.max_windows=4", "device=cpu", "samples.prompts=[]", "html=false",
    )  # fmt: skip
    shown = script.main(
        [str(tmp_path / "out"), "--seconds", "0.1", "--lr", "1e-2", "recover=distill", "recover.epochs=1", *options]
    )
    rows = [line.strip("| ").split(" | ") for line in shown.splitlines()[2:]]
    found = {name: (float(value), share) for name, value, _, share in rows}
    pruned = load_report(tmp_path / "out" / "pruned")
    trainer = found["Trainer with masks, lr 0.01"]
    assert found.keys() == {"dense", "pruned", "recover=distill", "Trainer with masks, lr 0.01"}
    assert found["pruned"][0] == round(pruned.perplexity.pruned or 0, 2)
    assert trainer[1] == found["pruned"][1] == f"{pruned.sparsity.achieved:.2%}"
    assert trainer[0] != found["pruned"][0]
