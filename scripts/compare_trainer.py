"""What one would do without recover=: transformers' Trainer with masks, on the same tokens for the same minutes.

scripts/compare_trainer.py OUT [--lr 1e-4,3e-4] [--seconds S] OPTIONS...       OPTIONS are those of ace-prune

    python scripts/compare_trainer.py out model=smollm2 sparsity=2:4 metric=wanda calib=text calib.path=PAGES.jsonl \\
        calib.seq_len=128 eval=text eval.path=TEXT.jsonl eval.seq_len=1024 eval.max_windows=10

The model is pruned twice: without recovery, and with recover=distill (or what recover= says). What the first run left
is then trained by Trainer on the calibration windows, language-model loss, every weight that is zero set to zero again
after each step, for as long as the recovery took (--seconds says otherwise), once for each learning rate. One table:
all perplexities under the same protocol, seconds of training, zeros in the weights that were pruned.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from ace_cli.data.generation import whole_model
from ace_cli.evaluation.dense import DenseCache
from ace_cli.evaluation.perplexity import perplexity, window_losses
from ace_cli.model.files import Checkpoint
from ace_cli.model.pruned import count_zeros, read_manifest
from ace_cli.model.source import open_model
from ace_cli.model.streamed import StreamedModel
from ace_cli.report.terminal import Terminal
from ace_cli.run.config import RunConfig, config_folder, parse, store_schemas
from ace_cli.run.pipeline import run

#: Tokens of a step, as recover.batch has them.
BATCH = 512


def main(words: list[str]) -> str:
    """Runs everything, and gives the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--lr", default="3e-4", help="learning rates of the Trainer, by commas")
    parser.add_argument("--seconds", type=float, help="of the Trainer; as long as the recovery took if not said")
    told, options = parser.parse_known_args(words)
    recovery = next((each for each in options if each.startswith("recover=")), "recover=distill")
    options = [each for each in options if each != recovery]
    unrecovered = [each for each in options if not each.startswith("recover.")]
    config = configuration([*unrecovered, "recover=none", f"output_dir={told.out / 'pruned'}"])
    pruned = ace_prune(config)
    recovered = ace_prune(configuration([*options, recovery, f"output_dir={told.out / 'recovered'}"]))
    dense, plain, trained = pruned["perplexity"]["dense"], pruned["perplexity"]["pruned"], recovered["perplexity"]
    took = recovered["phases"]["recover"]
    seconds = told.seconds or took
    rows = [row("dense", dense, 0, 0), row("pruned", plain, 0, pruned["sparsity"]["achieved"])]
    rows.append(row(recovery, trained["pruned"], took, recovered["sparsity"]["achieved"]))
    windows_NL = config.calib.windows(open_model(config.model), "cpu")
    for lr in map(float, told.lr.split(",")):
        target = told.out / f"trainer-{lr:g}"
        took = train(Path(pruned["checkpoint"]), target, windows_NL, lr, seconds)
        rows.append(row(f"Trainer with masks, lr {lr:g}", measured(config, target), took, zeros(pruned, target)))
    head = ["| | perplexity | training, s | zeros |", "|---|---|---|---|"]
    return "\n".join([*head, *rows])


def row(name: str, value: float, seconds: float, share: float) -> str:
    return f"| {name} | {value:.2f} | {seconds:.0f} | {share:.2%} |"


def ace_prune(config: RunConfig) -> dict[str, Any]:
    """Its report."""
    report = run(config, "scripts/compare_trainer.py", Terminal(), DenseCache())
    if report is None:
        sys.exit("dry_run=true leaves nothing to compare.")
    return dataclasses.asdict(report)


def configuration(options: list[str]) -> RunConfig:
    """As ace-prune reads these options."""
    store_schemas()
    with initialize_config_dir(str(config_folder().absolute()), version_base="1.3"):
        config = compose("prune", options)
    return parse(config, Path(config.output_dir).absolute())


class Masked(TrainerCallback):
    """Sets what was zero to zero again after each step, and stops after ``seconds``."""

    def __init__(self, model: Any, seconds: float) -> None:
        self._gone = {weight: weight == 0 for weight in model.parameters() if weight.dim() > 1}
        self._seconds = seconds
        self._start = math.inf

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        with torch.no_grad():
            for weight, gone in self._gone.items():
                weight.masked_fill_(gone, 0)
        control.should_training_stop = time.perf_counter() - self._start > self._seconds
        return control


def train(source: Path, target: Path, windows_NL: Tensor, lr: float, seconds: float) -> float:
    """Trainer as one would call it, with a constant rate after 10 steps, as nobody knows how many there will be."""
    model = whole_model(Checkpoint(source), torch.float32, "cpu", "The pruned model must load for Trainer.")
    arguments = TrainingArguments(
        str(target), per_device_train_batch_size=max(1, BATCH // windows_NL.shape[1]), learning_rate=lr,
        lr_scheduler_type="constant_with_warmup", warmup_steps=10, max_steps=10**6, save_strategy="no",
        report_to="none", disable_tqdm=True, logging_strategy="no", seed=0, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    text = [{"input_ids": ids_L, "labels": ids_L} for ids_L in windows_NL]
    trainer = Trainer(model, arguments, train_dataset=text, callbacks=[Masked(model, seconds)])
    start = time.perf_counter()
    trainer.train()
    took = time.perf_counter() - start
    model.save_pretrained(target)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if (source / file).is_file():
            (target / file).write_bytes((source / file).read_bytes())
    return took


def measured(config: RunConfig, folder: Path) -> float:
    """Perplexity under the protocol that ace-prune was told."""
    model = StreamedModel(Checkpoint(folder), torch.device("cpu"), torch.float32)
    windows = config.eval.windows(open_model(config.model), "cpu")  # type: ignore[union-attr]
    return perplexity(window_losses(model, windows.ids_NL))


def zeros(pruned: dict[str, Any], folder: Path) -> float:
    """Share of zeros in the weights that were pruned; of a cut model, whose weights are none, 0."""
    weights = read_manifest(Path(pruned["checkpoint"])).weights()
    sizes = [slot["shape"][0] * slot["shape"][1] for slot in pruned["slots"]]
    return sum(count_zeros(Checkpoint(folder), weights).values()) / max(1, sum(sizes))


if __name__ == "__main__":
    print(main(sys.argv[1:]))
