"""Seconds and memory of pruning a model with the same windows: this tool, llm-compressor, Wanda's published loop.

scripts/benchmark.py MODEL --pages FILE.jsonl [--peer-python PYTHON] [--sparsity 2:4] [--repeat 3] [--only NAME ...]

Every contender runs in a process of its own, one after the other, --repeat times around; the table has medians and
their ratios to ours. Ours is the whole way from file to verified file; of the others only the pruning of a model that
is already in memory counts, in the dtype that ours computes in. --peer-python is a Python with llm-compressor:

    python -m venv peer && peer/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OURS = ("wanda", "varp", "sparsegpt")
LLMCOMPRESSOR = ("llm-compressor wanda", "llm-compressor sparsegpt")
PUBLISHED = "published wanda loop"
#: Whose time is the base of a contender's ratio.
AGAINST = {PUBLISHED: "wanda", "llm-compressor wanda": "wanda", "llm-compressor sparsegpt": "sparsegpt"}


def main() -> None:
    options = parse()
    if options.contender:
        print(json.dumps(peer(options)))
        return
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        dtype = save_windows(options, Path(folder) / "windows.json")
        names = [*OURS, PUBLISHED, *(LLMCOMPRESSOR if options.peer_python else ())]
        names = [name for name in names if not options.only or name in options.only]
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for number in range(options.repeat):
            for name in names:
                runs[name].append(contend(name, options, Path(folder), dtype))
                print(f"{number + 1}/{options.repeat} {name}: {runs[name][-1]}", file=sys.stderr)
    print(f"{options.model}, {options.n_samples} x {options.seq_len}, {options.sparsity}, {dtype}\n")
    print(table(runs))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with safetensors and a tokenizer")
    parser.add_argument("--pages", type=Path, help="JSON lines with a text column")
    parser.add_argument("--sparsity", default="2:4")
    parser.add_argument("--n-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="run these contenders alone")
    parser.add_argument("--peer-python", help="Python with llm-compressor")
    parser.add_argument("--work", type=Path, help="folder for what is written; removed again")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--windows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    return parser.parse_args()


def save_windows(options: argparse.Namespace, file: Path) -> str:
    """The windows that ours will draw, for the others; returns the dtype that ours computes in."""
    import torch

    from ace_cli.core.device import Dtype, choose_dtype
    from ace_cli.core.registry import choices
    from ace_cli.model.files import Checkpoint

    source = Checkpoint(options.model)
    calib = choices("calib")["text"](n_samples=options.n_samples, seq_len=options.seq_len, path=str(options.pages))
    file.write_text(json.dumps(calib.windows(source, "cpu").tolist()))
    return str(choose_dtype(Dtype.auto, torch.device("cpu"), source)).removeprefix("torch.")


def contend(name: str, options: argparse.Namespace, folder: Path, dtype: str) -> dict[str, float]:
    if name in OURS:
        return ours(name, options, folder / "out")
    python = options.peer_python if name in LLMCOMPRESSOR else sys.executable
    command = [python, __file__, str(options.model), "--contender", name, "--windows", str(folder / "windows.json"),
               "--dtype", dtype, "--sparsity", options.sparsity]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name}:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def ours(metric: str, options: argparse.Namespace, out: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "ace_cli", f"model.path={options.model.absolute()}", f"metric={metric}",
               f"sparsity={options.sparsity}", "calib=text", f"calib.path={options.pages.absolute()}", "device=cpu",
               f"calib.n_samples={options.n_samples}", f"calib.seq_len={options.seq_len}", "eval=none",
               "keep_checkpoint=false", "observe.tokens=0", "observe.windows=0", f"output_dir={out}"]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    report = json.loads((out / "report.json").read_text())
    return {"seconds": report["seconds"]["prune"] + report["seconds"]["write"],
            "gigabytes": report["peak_memory_bytes"]["prune"] / 1e9}  # fmt: skip


def table(runs: dict[str, list[dict[str, float]]]) -> str:
    seconds = {name: statistics.median(run["seconds"] for run in found) for name, found in runs.items()}
    lines = ["| | seconds | peak GB | times ours |", "|---|---|---|---|"]
    for name, found in runs.items():
        ratio = f"{seconds[name] / seconds[AGAINST[name]]:.1f}" if AGAINST.get(name) in seconds else ""
        peak = statistics.median(run["gigabytes"] for run in found)
        lines.append(f"| {name} | {seconds[name]:.1f} | {peak:.2f} | {ratio} |")
    return "\n".join(lines)


# --- the others, each in its own process ------------------------------------------------------------------------------


def peer(options: argparse.Namespace) -> dict[str, float]:
    import torch
    import transformers

    ids = torch.tensor(json.loads(options.windows.read_text()))
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    contest = published if options.contender == PUBLISHED else llm_compressor
    seconds = contest(model, ids, options)
    check(model, options.sparsity)
    return {"seconds": seconds, "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def check(model: Any, sparsity: str) -> None:
    """A contender that prunes less would win."""
    weights = [m.weight for m in model.model.layers.modules() if type(m).__name__ == "Linear"]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    keep, of = (int(part) for part in sparsity.split(":"))
    if abs(zeros - (1 - keep / of)) > 0.005:
        sys.exit(f"{zeros:.2%} zeros instead of {sparsity}")


def llm_compressor(model: Any, ids: Any, options: argparse.Namespace) -> float:
    """Its own entry point and sequential pipeline; block size and damping of its SparseGPT as it sets them."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    kind = SparseGPTModifier if options.contender.endswith("sparsegpt") else WandaPruningModifier
    keep, of = (int(part) for part in options.sparsity.split(":"))
    recipe = kind(sparsity=1 - keep / of, mask_structure=options.sparsity, targets=["Linear"], ignore=["re:.*lm_head"])
    rows = ids.tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    start = time.perf_counter()
    oneshot(model=model, dataset=data, recipe=[recipe], max_seq_length=ids.shape[1], num_calibration_samples=len(ids),
            shuffle_calibration_samples=False)  # fmt: skip
    return time.perf_counter() - start


def published(model: Any, ids: Any, options: argparse.Namespace) -> float:
    """Wanda as its paper describes it (arXiv 2306.11695, Algorithm 1 and Section 3): every window by itself, two
    forwards a block, scores |W| ||X||, N:M chosen group of columns by group of columns.
    """
    import torch

    start = time.perf_counter()
    with torch.no_grad():
        hidden, calls = first_inputs(model, ids)
        for block, call in zip(model.model.layers, calls, strict=True):
            linears = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
            squares = {module: torch.zeros(module.in_features) for module in linears}

            def observe(module: Any, args: Any, _out: Any, squares: Any = squares) -> None:
                squares[module] += args[0].reshape(-1, module.in_features).float().square().sum(0)

            handles = [module.register_forward_hook(observe) for module in linears]
            for window in hidden:
                block(window, **call)
            for handle in handles:
                handle.remove()
            for module in linears:
                drop_groups(module.weight, squares[module].sqrt(), options.sparsity)
            hidden = [block(window, **call) for window in hidden]
    return time.perf_counter() - start


def first_inputs(model: Any, ids: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    """What goes into the first block, window by window, and each block's keyword arguments."""
    hidden: list[Any] = []
    calls: list[dict[str, Any]] = []

    def catch(_module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        hidden.append(args[0])
        calls.append({**kwargs, "use_cache": False, "past_key_values": None})
        raise StopIteration

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for row in ids:
        try:
            model(row[None], use_cache=False)
        except StopIteration:
            continue
    handle.remove()
    return hidden, [calls[0]] * len(model.model.layers)


def drop_groups(weight: Any, norm: Any, sparsity: str) -> None:
    import torch

    keep, of = (int(part) for part in sparsity.split(":"))
    score = weight.abs().float() * norm
    drop = torch.zeros_like(score, dtype=torch.bool)
    for column in range(0, score.shape[1], of):
        worst = score[:, column : column + of].topk(of - keep, dim=1, largest=False).indices
        drop.scatter_(1, column + worst, True)
    weight[drop] = 0


if __name__ == "__main__":
    main()
