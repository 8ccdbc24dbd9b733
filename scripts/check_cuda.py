"""What scripts/check_cuda.sh runs."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

#: Scores are sums in another order on a GPU: a few near ties fall the other way.
MOST_DIFFERENT = 0.005


def main() -> None:
    if not torch.cuda.is_available():
        print("No CUDA GPU here: nothing was checked.", file=sys.stderr)
        sys.exit(2)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    model = ["model=custom", f"model.path={Path(sys.argv[1]).absolute()}"] if len(sys.argv) > 1 else ["model=smollm2"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = [*model, "sparsity=2:4", "calib=text", f"calib.path={write_pages(folder)}", "eval=none"]
        failed = [check for check in (same_masks, no_waiting) if not check(folder, arguments)]
    sys.exit(1 if failed else 0)


def write_pages(folder: Path) -> Path:
    """This project's own texts, one document each."""
    root = Path(__file__).parent.parent
    files = [root / "README.md", root / "LICENSE", *sorted((root / "ace_cli").rglob("*.py"))]
    pages = folder / "pages.jsonl"
    pages.write_text("".join(json.dumps({"text": file.read_text(encoding="utf-8")}) + "\n" for file in files))
    return pages


def same_masks(folder: Path, arguments: list[str]) -> bool:
    """CPU and GPU in float32, and the GPU as it is used."""
    fine = True
    for metric in ("wanda", "varp", "ace"):
        outs = {}
        for where in ("device=cpu dtype=float32", "device=cuda dtype=float32", "device=cuda dtype=auto"):
            out = folder / f"{metric} {where}"
            command = [*arguments, f"metric={metric}", *where.split(), f"output_dir={out}"]
            subprocess.run([sys.executable, "-m", "ace_cli", *command], check=True, stdout=subprocess.DEVNULL)
            report = json.loads((out / "report.json").read_text())
            seconds = report["seconds"]["prune"] + report["seconds"]["write"]
            reached = report["efficiency"]["efficiency"]
            print(f"{metric:6} {where:28} {seconds:7.2f} s, {reached:.0%} of this machine's limit")
            outs[where] = out
        cpu, gpu, usual = outs.values()
        share = different(cpu, gpu)
        fine &= share <= MOST_DIFFERENT
        print(f"{metric:6} mask bits that differ from the CPU's: float32 {share:.4%}, auto {different(cpu, usual):.4%}")
    print("masks: " + ("equal but for near ties" if fine else "DIFFERENT"))
    return fine


def different(one: Path, other: Path) -> float:
    from ace_cli.model.files import Checkpoint

    first, second = Checkpoint(one / "checkpoint"), Checkpoint(other / "checkpoint")
    names = [slot["name"] for slot in json.loads((one / "checkpoint" / "pruning.json").read_text())["slots"]]
    pairs = [((first.read(name) == 0), (second.read(name) == 0)) for name in names if name in first.tensors]
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)


def no_waiting(folder: Path, arguments: list[str]) -> bool:
    """Inside a block nothing that scores single weights may wait for the GPU: torch raises where something does.

    ``ace`` does: its factors are looked at, whether they are finite, before masks are exchanged by them.
    """
    from hydra import compose, initialize_config_dir

    from ace_cli.evaluation.dense import DenseCache
    from ace_cli.pruning.orders import AllAtOnce, Order, Sublayer, WholeBlock
    from ace_cli.report.terminal import Terminal
    from ace_cli.run.config import config_folder, parse, store_schemas
    from ace_cli.run.pipeline import run

    def watched(run: Any) -> Any:
        def watch(order: Order) -> None:
            with no_synchronising():
                run(order)

        return watch

    for order in (AllAtOnce, WholeBlock, Sublayer):
        order.run = watched(order.run)  # type: ignore[method-assign]
    store_schemas()
    fine = True
    for metric in ("wanda", "varp", "ace"):
        with initialize_config_dir(str(config_folder().absolute()), version_base="1.3"):
            config = compose("prune", [*arguments, f"metric={metric}", "device=cuda", f"output_dir={folder / 'sync'}"])
        try:
            run(parse(config, folder / "sync" / metric), "check", Terminal(), DenseCache())
            print(f"{metric}: nothing waits for the GPU inside a block")
        except RuntimeError as fault:
            fine &= metric == "ace"
            print(f"{metric}: something WAITS for the GPU inside a block: {fault}")
    return fine


@contextlib.contextmanager
def no_synchronising() -> Any:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    main()
