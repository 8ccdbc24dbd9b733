"""Channel permutation for N:M: reorder the inputs of a slot so that the groups of M lose less, and keep the function.

RIA (Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024,
section 3.3) reorders the columns of every slot and leaves it to a runtime to reorder activations. Here a slot is
reordered only where the slots that make its inputs can be reordered alike (``model/links.py``), so the written weights
are N:M in file order and the function is the same.

Shapes: O outputs, I inputs, R regions of W units with C inputs each, M the group of N:M, G groups, F scores of one unit
(C times O).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ace_cli.methods.patterns import NofM

#: Groups of M that are assigned among each other at once; wider slots are split, as in RIA's ``--fast``.
PART = 512


def kept_score(score_OI: Tensor, pattern: NofM) -> float:
    """Sum of the scores that ``pattern`` keeps, in float64: what a permutation should raise."""
    return float((score_OI * pattern.keep(score_OI)).sum(dtype=torch.float64))


def best_order(score_OI: Tensor, channels_RWC: Tensor, pattern: NofM, sweeps: int = 1) -> Tensor:
    """An order of the inputs, (I,), new input k = old input order_I[k]; keeps no less than the order as it is.

    Region by region: both steps of RIA, their scores being those of all C inputs of a unit together. Where they do not
    raise the sum of kept scores (float64), the region stays as it is. Cost: see ``assign``.
    """
    order_I = torch.arange(score_OI.shape[1], device=score_OI.device)
    for channels_WC in channels_RWC.to(score_OI.device):
        score_WF = score_OI[:, channels_WC].permute(1, 2, 0).flatten(1)
        start_W = serpentine(score_WF.sum(1, dtype=torch.float64), pattern.m)
        as_it_is = kept_score(score_WF.T, pattern)
        if kept_score(score_WF[start_W].T, pattern) < as_it_is:
            start_W = torch.arange(len(start_W), device=start_W.device)
        order_W = assign(score_WF, start_W, pattern, sweeps)
        if kept_score(score_WF[order_W].T, pattern) > as_it_is:
            order_I[channels_WC] = channels_WC[order_W]
    return order_I


def serpentine(importance_W: Tensor, m: int) -> Tensor:
    """RIA's heuristic channel allocation: an order (W,) in which every group of m has strong and weak channels.

    Sorted from weak to strong and cut into m equal chunks; group g takes the g-th of every chunk, every second chunk
    taken backwards (section 3.3 and the authors' code).
    """
    chunks_MG = importance_W.sort(stable=True).indices.view(m, -1)
    chunks_MG = torch.stack([chunk.flip(0) if q % 2 else chunk for q, chunk in enumerate(chunks_MG)])
    return chunks_MG.T.flatten()


def assign(score_WF: Tensor, order_W: Tensor, pattern: NofM, sweeps: int = 1) -> Tensor:
    """RIA's second step: for each position q of the groups, the best assignment of channels to groups.

    Position q of all groups is emptied and refilled. A group whose other m - 1 channels have t_f as their n-th largest
    score in row f keeps, with candidate c, sum_f (the n largest of the others) + max(0, S_cf - t_f). What depends on c
    or on the group alone does not matter to an assignment, and max(a, b) = (a + b + |a - b|) / 2: so the assignment of
    largest total distance sum_f |S_cf - t_f| is RIA's (Hungarian algorithm, scipy). No sweep lowers the kept sum.

    Groups are split into parts of at most ``PART``, every k-th group in one, so that each part has the whole range.
    Cost a sweep: W F min(W / m, PART) additions, and W assignments of a row of a part.
    """
    groups_GM = order_W.view(-1, pattern.m).clone()
    parts = -(-len(groups_GM) // PART)
    for part in range(parts):
        groups_GM[part::parts] = _assign_part(score_WF, groups_GM[part::parts].clone(), pattern.n, sweeps)
    return groups_GM.flatten()


def _assign_part(score_WF: Tensor, groups_GM: Tensor, n: int, sweeps: int) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    m = groups_GM.shape[1]
    columns = [score_WF[channels_G] for channels_G in groups_GM.unbind(1)]
    for _ in range(sweeps):
        before_GM = groups_GM.clone()
        for q in range(m):
            threshold_GF = _nth_largest([columns[p] for p in range(m) if p != q], n)
            distance_GG = torch.cdist(threshold_GF, columns[q], p=1.0)
            chosen_G = torch.as_tensor(linear_sum_assignment(distance_GG.cpu().numpy(), maximize=True)[1])
            chosen_G = chosen_G.to(groups_GM.device)
            groups_GM[:, q] = groups_GM[chosen_G, q]
            columns[q] = columns[q][chosen_G]
        if torch.equal(groups_GM, before_GM):
            break
    return groups_GM


def _nth_largest(columns: list[Tensor], n: int) -> Tensor:
    """The n-th largest of the tensors, element by element: n passes of a bubble sort."""
    left = list(columns)
    for _ in range(n):
        largest = left[0]
        for k in range(1, len(left)):
            left[k - 1], largest = torch.minimum(largest, left[k]), torch.maximum(largest, left[k])
        left.pop()
    return largest
