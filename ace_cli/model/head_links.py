"""Links of whole heads: which rows of queries, keys and values make the inputs of the output weight that a head is.

Found from the link of values (``model/links.py``) and the few ways in which models lay out queries and keys beside
them; whichever it is, it is proven with the block's own weights: heads in another order must change nothing.

Shapes: I inputs of the output weight, K groups (key-value heads) of Q query heads of D inputs each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ace_cli.model.links import Link, LinkFinder, Producer


def group_links(finder: LinkFinder, index: int) -> list[Link]:
    """Units are groups: a key-value head with all query heads that read it. Of loaded block ``index``."""
    return [found for link in _attention(finder, index) for found in _whole_groups(finder, index, link)]


def _whole_groups(finder: LinkFinder, index: int, link: Link) -> list[Link]:
    """The first layout of queries and keys beside the values of ``link`` that is proven."""
    for queries, keys in _layouts(finder, index, link):
        whole = Link(link.consumer, (*link.producers, keys, queries), link.channels_RWC.flatten(1)[None])
        if finder.proves(index, whole):
            return [whole]
    return []


def query_links(finder: LinkFinder, index: int) -> list[Link]:
    """Units are query heads, one region for each group that shares a key-value head. Of loaded block ``index``.

    Where nothing is shared, a query head goes with its keys and values.
    """
    found = []
    for link in _attention(finder, index):
        if link.channels_RWC.shape[2] == 1:
            found += _whole_groups(finder, index, link)
            continue
        for queries, _ in _layouts(finder, index, link):
            single = Link(link.consumer, (queries,), link.channels_RWC.transpose(1, 2).contiguous())
            if finder.proves(index, single):
                found.append(single)
                break
    return found


def _attention(finder: LinkFinder, index: int) -> list[Link]:
    """The links of values: whatever is exchanged in regions, or by several inputs at a time."""
    links = finder.likely(index)
    return [link for link in links if link.channels_RWC.shape[0] > 1 or link.channels_RWC.shape[2] > 1]


def _layouts(finder: LinkFinder, index: int, link: Link) -> Iterator[tuple[Producer, Producer]]:
    """Where the queries and keys of each input may be; ``rows_I`` of the values is known."""
    (values,) = link.producers[:1]
    rows = finder.rows(index)
    K, D, Q = link.channels_RWC.shape
    inputs_I, of_values, total = torch.arange(K * D * Q), K * D, rows[values.slot]
    alone = total == of_values
    if alone:
        keys = [name for name in rows if name != values.slot and rows[name] == of_values]
        queries = [name for name in rows if name not in (values.slot, link.consumer) and rows[name] == K * D * Q]
        for query in queries:
            yield from ((Producer(query, inputs_I), Producer(key, values.rows_I)) for key in keys if key != query)
        return
    head_I = torch.empty(K * D * Q, dtype=torch.int64)  # of each input, its query head within its group
    head_I[link.channels_RWC.flatten()] = torch.arange(Q).repeat(K * D)
    for queries_I, keys_I in _fused(values.rows_I, inputs_I, head_I, K, D, Q):
        if int(min(queries_I.min(), keys_I.min())) >= 0 and int(max(queries_I.max(), keys_I.max())) < total:
            yield Producer(values.slot, queries_I), Producer(values.slot, keys_I)


def _fused(
    values_I: Tensor, inputs_I: Tensor, head_I: Tensor, K: int, D: int, Q: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of queries and keys in a weight that has all three: one after the other, or group by group."""
    yield inputs_I, values_I - K * D
    yield values_I - (1 + Q - head_I) * D, values_I - D
