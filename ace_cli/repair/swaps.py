"""SparseSwaps (arXiv 2512.10922): exchange a kept weight for a pruned one wherever the layer's output error falls.

Shapes: I inputs, O outputs, G groups of M inputs, K swaps tried at once, P, Q candidates to prune, to revive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ace_cli.registry import register
from ace_cli.repair.base import Repair, Repaired
from ace_cli.repair.least_squares import factors_of, finish, pull_faults, refit
from ace_cli.statistics import Gram

if TYPE_CHECKING:
    from torch import Tensor

    from ace_cli.patterns import Pattern
    from ace_cli.statistics import Seen, Statistic


@register("repair", "swaps")
@dataclass
class Swaps(Repair):
    """Greedy 1-swaps within each row, or within its groups of M for N:M; kept weights move only if `refit_steps` > 0.

    In unit coordinates V = W s, A = R + shrinkage * I, with r the pruned part of a row and c = r A, the row's error
    is L = r A r^T, and pruning p while reviving q changes it by

        D(p, q) = 2 v_p c_p + v_p^2 A_pp  -  2 v_q c_q + v_q^2 A_qq  -  2 v_p v_q A_pq.

    Counts per row and group stay as they were. Without a group the pair is sought among the `candidates` best p and
    best q by the terms of D that concern only one of them; 0 looks at all pairs, as the paper does, at (I/2)^2 a row
    and round.

    Departure, for speed: the paper makes one swap per row and round. Here a row tries `at_once` disjoint swaps
    together, takes them if their joint change d, of exact cost 2 d c^T + d A d^T, is negative, and halves its number
    for the next round if not (doubles it if so); at one swap it is the paper's rule. Either way no error ever rises.
    `at_once = 1` is the paper.
    """

    shrinkage: float | None = None
    rounds: int = 12
    at_once: int = 8
    candidates: int = 16
    refit_steps: int = 0
    tolerance: float = 0.01

    def faults(self) -> list[str]:
        """Every field out of range, in words."""
        found = pull_faults("shrinkage", self.shrinkage, self.tolerance)
        for name, least in (("rounds", 1), ("at_once", 1), ("candidates", 0), ("refit_steps", 0)):
            if getattr(self, name) < least:
                found.append(f"repair.{name} is {getattr(self, name)}: give {least} or more")
        return found

    def needs(self) -> tuple[Statistic, ...]:
        return (Gram(),)

    def repair(self, weight_OI: Tensor, keep_OI: Tensor, seen: Seen, pattern: Pattern) -> Repaired:
        """Better masks of the same counts, weights unchanged or refitted.

        Args as in SparseGPT.repair; raises nothing of its own.
        """
        shared = factors_of(seen[Gram()])
        unit_OI = weight_OI.float() * shared.scale_I
        shrinkage = shared.noise() if self.shrinkage is None else self.shrinkage
        damped_II = shared.damped(shrinkage)
        kept_OI, n_swaps = self._swap(unit_OI, keep_OI, damped_II, pattern.group_width)
        new_OI = weight_OI.float()
        if self.refit_steps:
            new_OI = refit(unit_OI, kept_OI, damped_II, self.refit_steps, self.tolerance) / shared.scale_I
        notes = [*shared.all_notes(), f"{n_swaps} swaps"]
        return finish(weight_OI, new_OI, kept_OI, keep_OI, shared.gram_II, notes)

    def _swap(self, unit_OI: Tensor, keep_OI: Tensor, damped_II: Tensor, width: int) -> tuple[Tensor, int]:
        """Rounds of swaps until no row finds a good one: (mask, number of swaps)."""
        import torch

        kept_OI, rows_O1 = keep_OI.clone(), torch.arange(unit_OI.shape[0], device=unit_OI.device)[:, None]
        pull_OI = unit_OI.masked_fill(kept_OI, 0.0) @ damped_II
        square_OI = unit_OI.square() * damped_II.diagonal()
        least_O = -1e-6 * unit_OI.square().sum(1)
        most_O = torch.full_like(rows_O1[:, 0], self.at_once)
        done = 0
        for _ in range(self.rounds):
            linear_OI = 2 * unit_OI * pull_OI
            prune_OI = (square_OI + linear_OI).masked_fill_(~kept_OI, float("inf"))
            revive_OI = (square_OI - linear_OI).masked_fill_(kept_OI, float("inf"))
            gain_OK, out_OK, back_OK = self._ranked(unit_OI, prune_OI, revive_OI, damped_II, width, most_O == 1)
            order_K = torch.arange(gain_OK.shape[1], device=gain_OK.device)
            taken_OK = (gain_OK < least_O[:, None]) & (order_K < most_O[:, None])
            delta_OI = torch.zeros_like(unit_OI).scatter_add_(1, out_OK, unit_OI.gather(1, out_OK) * taken_OK)
            delta_OI.scatter_add_(1, back_OK, -unit_OI.gather(1, back_OK) * taken_OK)
            turned_OI = delta_OI @ damped_II
            good_O = (delta_OI * (2 * pull_OI + turned_OI)).sum(1) < least_O
            if not bool(good_O.any()) and int(most_O.max()) == 1:
                break
            most_O = torch.where(good_O, 2 * most_O, most_O // 2).clamp(1, self.at_once)
            taken_OK &= good_O[:, None]
            rows_K = rows_O1.expand_as(out_OK)[taken_OK]
            kept_OI[rows_K, out_OK[taken_OK]] = False
            kept_OI[rows_K, back_OK[taken_OK]] = True
            pull_OI += turned_OI * good_O[:, None]
            done += len(rows_K)
        return kept_OI, done

    def _ranked(
        self, unit_OI: Tensor, prune_OI: Tensor, revive_OI: Tensor, damped_II: Tensor, width: int, single_O: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Disjoint swaps per row, best first: D, the kept input to prune, the pruned one to revive; each (O, K)."""
        if width:
            return _ranked_groups(unit_OI, prune_OI, revive_OI, damped_II, width, self.at_once)
        wide = min(self.at_once, unit_OI.shape[1])
        gain_OK, out_OK, back_OK = _ranked_pairs(unit_OI, prune_OI, revive_OI, damped_II, wide)
        if bool(single_O.any()):
            best = _best_pair(unit_OI[single_O], prune_OI[single_O], revive_OI[single_O], damped_II, self.candidates)
            gain_OK[single_O, 0], out_OK[single_O, 0], back_OK[single_O, 0] = best
        return gain_OK, out_OK, back_OK


def _ranked_pairs(
    unit_OI: Tensor, prune_OI: Tensor, revive_OI: Tensor, damped_II: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The i-th cheapest input to prune with the i-th best to revive, i < n, and the D of each pair."""
    prune_OK, out_OK = prune_OI.topk(n, dim=1, largest=False)
    revive_OK, back_OK = revive_OI.topk(n, dim=1, largest=False)
    cross_OK = unit_OI.gather(1, out_OK) * unit_OI.gather(1, back_OK) * damped_II[out_OK, back_OK]
    return prune_OK + revive_OK - 2 * cross_OK, out_OK, back_OK


def _best_pair(
    unit_OI: Tensor, prune_OI: Tensor, revive_OI: Tensor, damped_II: Tensor, candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best pair of the `candidates` smallest of either side (0: of all), anywhere in the row; each (O,)."""
    n = min(candidates or unit_OI.shape[1], unit_OI.shape[1])
    prune_OP, out_OP = prune_OI.topk(n, dim=1, largest=False)
    revive_OQ, back_OQ = revive_OI.topk(n, dim=1, largest=False)
    v_OP, v_OQ = unit_OI.gather(1, out_OP), unit_OI.gather(1, back_OQ)
    cross_OPQ = v_OP[:, :, None] * v_OQ[:, None, :] * damped_II[out_OP[:, :, None], back_OQ[:, None, :]]
    gain_O, pair_O = (prune_OP[:, :, None] + revive_OQ[:, None, :] - 2 * cross_OPQ).flatten(1).min(1)
    out_O = out_OP.gather(1, (pair_O // n)[:, None])[:, 0]
    return gain_O, out_O, back_OQ.gather(1, (pair_O % n)[:, None])[:, 0]


def _ranked_groups(
    unit_OI: Tensor, prune_OI: Tensor, revive_OI: Tensor, damped_II: Tensor, width: int, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best pair of every group of `width` inputs, then the n best groups; a shorter last group takes no part."""
    import torch

    n_groups = unit_OI.shape[1] // width
    first_G = torch.arange(n_groups, device=unit_OI.device) * width
    gain_OG = unit_OI.new_full((unit_OI.shape[0], n_groups), float("inf"))
    pair_OG = torch.zeros_like(gain_OG, dtype=torch.long)
    whole = n_groups * width
    by_place = [
        x[:, :whole].reshape(-1, n_groups, width).permute(2, 0, 1).contiguous() for x in (unit_OI, prune_OI, revive_OI)
    ]
    for p in range(width):
        for q in range(width):
            if p == q:
                continue
            twice_G = 2 * damped_II[first_G + p, first_G + q]
            change_OG = by_place[1][p] + by_place[2][q] - by_place[0][p] * by_place[0][q] * twice_G
            pair_OG.masked_fill_(change_OG < gain_OG, p * width + q)
            gain_OG = torch.minimum(gain_OG, change_OG)
    gain_OK, group_OK = gain_OG.topk(min(n, n_groups), dim=1, largest=False)
    pair_OK = pair_OG.gather(1, group_OK)
    return gain_OK, group_OK * width + pair_OK // width, group_OK * width + pair_OK % width
