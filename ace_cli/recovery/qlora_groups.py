"""Weights of a few bits in groups, with an adapter that merges into their zero points: SAAP's fine-tuning of groups.

SAAP (arXiv 2412.15127) splits the columns of each weight into groups, "each quantised and given its low-rank update
independently"; how is not published. Our reading is QA-LoRA (Xu et al., arXiv 2309.14717). With group g of row i

    W_ij = a_ig (q_ij - z_ig), q in 0 ... 2^bits - 1, a and z from the group's least and largest weight,
    y = W x + s B A p(x), p(x)_g = sum of x_j over the group, A (R, G), B (O, R),

and since s B A p(x) adds the same number to all weights of a group, it merges exactly: z_ig <- z_ig - s (B A)_ig /
a_ig, q and a as they were. A, B are trained as ``recover=distill`` trains weights: on the dense model's predictions.

For models whose units were cut, as in the paper: a zero among weights would not stay one. A zero point that has moved
is no whole number, and compressed-tensors' formats hold none but those: what is written are the numbers a (q - z) in
the checkpoint's dtype, which every tool reads. Shapes: O outputs, I inputs, G groups of K inputs, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ace_cli.core.errors import AceError
from ace_cli.core.registry import register
from ace_cli.core.workers import ONE, Workers
from ace_cli.model.transformers_api import is_transposed
from ace_cli.recovery.adapters import adapted_paths, adapter_faults
from ace_cli.recovery.base import RecoveryFacts
from ace_cli.recovery.fit import Fit
from ace_cli.recovery.objectives import LOGITS, DensePredictions, shared_steps
from ace_cli.recovery.training import put_back
from ace_cli.recovery.whole import STATE, WholeModel, last_states, loaded, write_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from ace_cli.core.stage import Progress
    from ace_cli.model.files import Checkpoint
    from ace_cli.model.streamed import StreamedModel

#: A weight with at least this share of zeros was pruned; training alone leaves next to none.
_SPARSE = 0.05


@register("recover", "qlora_groups")
@dataclass
class QloraGroups(WholeModel):
    """Rounds what was kept to ``bits`` in groups of ``group`` inputs, and trains adapters that merge into zero points.

    ``rank`` and ``alpha`` as in ``lora``.
    """

    bits: int = 4
    group: int = 32
    rank: int = 8
    alpha: float = 16.0

    def faults(self) -> list[str]:
        faults = super().faults()
        if not 2 <= self.bits <= 8:
            faults.append(f"recover.bits={self.bits}: must be 2 to 8")
        if self.group < 1:
            faults.append(f"recover.group={self.group}: must be at least 1")
        faults += adapter_faults(self.rank, self.alpha)
        return faults

    def misfits(self, cuts: bool, zeros: bool) -> list[str]:
        if zeros:
            return [
                "recover=qlora_groups moves whole groups of weights, zeros too: cut units (unit=channel), or use lora"
            ]
        return []

    def trained_numbers(self, trained: int, shapes: Collection[tuple[int, int]]) -> int:
        return sum(self.rank * (rows + -(-columns // self.group)) for rows, columns in shapes)

    def whole_bytes(self, parameters: int, trained: int, shapes: Collection[tuple[int, int]]) -> int:
        factors = self.trained_numbers(trained, shapes)
        grids = sum(2 * 4 * rows * -(-columns // self.group) for rows, columns in shapes)
        return 4 * parameters + trained + (4 + 4 + 8 + 4) * factors + grids + 6 * LOGITS

    def recover_model(
        self, dense: StreamedModel, pruned: Checkpoint, windows_NL: Tensor, held_NL: Tensor, target: Path,
        progress: Progress, workers: Workers = ONE,
    ) -> RecoveryFacts:  # fmt: skip
        import torch

        from ace_cli.model.streamed import StreamedModel

        streamed = StreamedModel(pruned, dense.device, torch.float32)
        own_NL, steps, held = shared_steps(windows_NL, held_NL, self.batch, workers)
        states_NLH = last_states(dense, own_NL, progress)
        student = loaded(pruned, dense.device, self).requires_grad_(False)
        layers = self._layers(student, [path for block in streamed.blocks for path in adapted_paths(block)])
        weights = {f"{letter} {path}": factor for path, layer in layers.items()
                   for letter, factor in (("A", layer.down_RG), ("B", layer.up_OR))}  # fmt: skip
        predictions = DensePredictions(dense, student, own_NL, states_NLH)
        fit = Fit(self, weights, predictions, (steps, held), target / STATE, workers)
        facts = fit.run(progress)
        put_back(weights, fit.best)
        merged = {f"{path}.weight": layer.merged_into(student.get_submodule(path)) for path, layer in layers.items()}
        if workers.first:
            write_weights(streamed, pruned, merged, target)
        return facts

    def _layers(self, student: nn.Module, paths: list[str]) -> dict[str, GroupedLayer]:
        """Of every path the layer's grid and adapter; the student computes with them from now on."""
        import torch

        if not paths:
            raise AceError(f"recover=qlora_groups: {type(student).__name__} has no linear layers.", "Use recover=none.")
        generator, layers = torch.Generator().manual_seed(self.seed), {}
        for path in paths:
            module = student.get_submodule(path)
            weight_OI = _matrix(module)
            if float((weight_OI == 0).float().mean()) >= _SPARSE:
                raise AceError(
                    f"recover=qlora_groups: many weights of {path} are zero, and would not stay so.",
                    "Use recover=lora or recover=distill.",
                )
            layers[path] = GroupedLayer(
                Groups.of(weight_OI, self.bits, self.group), self.rank, self.alpha / self.rank, generator
            )
            weight_OI.copy_(layers[path].groups.values())
            module.forward = layers[path].around(module.forward)
        return layers


@dataclass(frozen=True)
class Groups:
    """A weight on a grid: ``codes_OI`` uint8, ``scale_OG`` a and ``zero_OG`` z in float32, ``width`` K inputs a group.

    The last group of a row is shorter where K does not divide I.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor
    width: int

    @classmethod
    def of(cls, weight_OI: Tensor, bits: int, width: int) -> Groups:
        """a = (max - min) / (2^bits - 1), z = -min / a, q = round(w / a + z); where all are equal, a = 1 and z = -w."""
        import torch

        columns = weight_OI.shape[1]
        groups = torch.split(weight_OI.float(), width, dim=1)
        least_OG = torch.stack([group.amin(1) for group in groups], 1)
        most_OG = torch.stack([group.amax(1) for group in groups], 1)
        scale_OG = (most_OG - least_OG) / (2**bits - 1)
        scale_OG = scale_OG.where(scale_OG > 0, torch.ones_like(scale_OG))
        zero_OG = -least_OG / scale_OG
        codes_OI = weight_OI / _spread(scale_OG, width, columns) + _spread(zero_OG, width, columns)
        return cls(codes_OI.round_().clamp_(0, 2**bits - 1).to(torch.uint8), scale_OG, zero_OG, width)

    def values(self) -> Tensor:
        """a (q - z), (O, I) float32."""
        columns = self.codes_OI.shape[1]
        shifted_OI = self.codes_OI.float().sub_(_spread(self.zero_OG, self.width, columns))
        return shifted_OI.mul_(_spread(self.scale_OG, self.width, columns))

    def moved(self, added_OG: Tensor) -> Groups:
        """With the same number added to all weights of a group: other zero points, the same codes and scales."""
        return replace(self, zero_OG=self.zero_OG - added_OG / self.scale_OG)


class GroupedLayer:
    """A grid and the adapter on pooled inputs beside it: B zero, A uniform between -1 / sqrt(G) and 1 / sqrt(G)."""

    def __init__(self, groups: Groups, rank: int, scale: float, generator: torch.Generator) -> None:
        import torch
        from torch import nn

        self.groups, self.scale = groups, scale
        rows, count = groups.scale_OG.shape
        device = groups.scale_OG.device
        drawn_RG = torch.rand(rank, count, generator=generator).mul_(2).sub_(1).div_(count**0.5)
        self.down_RG = nn.Parameter(drawn_RG.to(device))
        self.up_OR = nn.Parameter(torch.zeros(rows, rank, device=device))

    def added(self, x: Tensor) -> Tensor:
        """s B A p(x): (..., I) -> (..., O)."""
        from torch.nn.functional import linear

        return linear(linear(pooled(x, self.groups.width), self.down_RG), self.up_OR) * self.scale

    def around(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """``forward`` of the layer with the rounded weight, and what the adapter adds."""
        return lambda x: forward(x) + self.added(x)

    def merged(self) -> Groups:
        """The same layer without its adapter."""
        return self.groups.moved(self.scale * (self.up_OR @ self.down_RG).detach())

    def merged_into(self, module: nn.Module) -> Tensor:
        """The weight of ``module``, as it is stored, with its new numbers."""
        _matrix(module).copy_(self.merged().values())
        return module.get_parameter("weight").detach()


def _matrix(module: nn.Module) -> Tensor:
    """The layer's weight, (O, I), to be changed in place."""
    weight = module.get_parameter("weight").detach()
    return weight.T if is_transposed(module) else weight


def pooled(x: Tensor, width: int) -> Tensor:
    """Sums over groups of ``width`` inputs: (..., I) -> (..., G)."""
    from torch.nn.functional import pad

    padded = pad(x, (0, -x.shape[-1] % width))
    return padded.view(*x.shape[:-1], -1, width).sum(-1)


def _spread(of_groups_OG: Tensor, width: int, columns: int) -> Tensor:
    """The number of each group for all its inputs, (O, I)."""
    return of_groups_OG.repeat_interleave(width, dim=1)[:, :columns]
