"""ace-prune: make a language model sparse in one command, without retraining, and prove what it did.

Words
-----
allocation    how much each slot must lose, so that all of them together lose what was asked for
block         one decoder layer: attention and MLP. Models are read, pruned and written block by block
calibration   the windows of text on which the inputs of slots are observed
catch up      to move a weight so that its slot makes up for what pruning changed before it
checkpoint    a folder with config.json, a tokenizer and weights in safetensors files
dense         not pruned
identity      a digest of everything that decides a run's result; a run goes on only where it is the same
journal       what a run has finished, block by block, so that it can go on after an interruption
keep          a boolean matrix (O, I): True where a weight stays. Never called a mask, which may mean either
link          a pair of slots of which one's outputs are the other's inputs, channel by channel or head by head
metric        gives each weight a score from its value and from statistics of its inputs; the higher, the better to keep
pattern       which weights may stay: a share of each row or layer, or N of every M neighbouring inputs ("2:4")
propagate     whether a block is observed on what the pruned blocks before it give out, or the dense ones
recipe        metric, patterns, repair and order of one run, as the engine gets them
repair        changes the weights that stay, or the choice of them, so that a slot's outputs remain close
row           one output of a slot: the weights that are summed up for it
slot          one weight that may be pruned, seen as a matrix (O, I) wherever model and file keep it
sparsity      the share of zeros
statistic     what is remembered of a slot's inputs; any split of the tokens into batches gives the same
survey        a look at the whole dense model before pruning, for allocations that compare blocks
window        a row of tokens of fixed length; an evaluation's windows do not overlap

Axes
----
Names of tensors end in their axes: ``weight_OI`` has shape (O, I).
B batch (windows at once), E experts, G groups, H hidden size, I inputs of a slot, K experts of a token, L length of a
window, M group size of an N:M pattern, N windows or rows (a module says which), O outputs of a slot, R rows of a piece,
T tokens (B times L), V vocabulary, W width of a channel
"""

from __future__ import annotations

__version__ = "0.1.0"

#: Public names, loaded when they are first used: a command line's help must not wait for them.
_PUBLIC = ("Result", "evaluate", "load_report", "prune")


def __getattr__(name: str) -> object:
    if name in _PUBLIC:
        from ace_cli import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
