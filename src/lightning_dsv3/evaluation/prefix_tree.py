"""Requests as a tree of tokens: what they have in common stands there once.

The sequences of a benchmark share few-shot blocks, passages and questions. In their radix tree each run of tokens that
several sequences have in common is one node, and the model computes every node once, on the latent cache of the node
before it. The number of tokens in the tree is what has to be computed; nothing less gives the same answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

import numpy as np


@dataclass(eq=False)
class Node:
    """A run of tokens, those before which are its parent's.

    Attributes:
        tokens: The run.
        depth: How many tokens come before.
        parent: The node before, None at the beginning of a sequence.
        children: The nodes behind, with different first tokens.
        ends: Numbers of the sequences that end with this run.
        logprobs: Log-probability of each token given those before, float64, nan where unknown; for scoring.
        greedy: Whether each token is the likeliest, for scoring.
    """

    tokens: Sequence[int]
    depth: int
    parent: Node | None
    children: list[Node] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0))
    greedy: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))

    @property
    def num_inputs(self) -> int:
        """How many of the tokens have one behind them: the last token of a sequence is predicted but not read."""
        return len(self.tokens) if self.children else len(self.tokens) - 1


def prefix_tree(sequences: Sequence[Sequence[int]]) -> list[Node]:
    """Build the tree of sequences, which are not empty.

    Returns:
        The nodes that sequences begin with, by their first token. Sequences that are alike end in the same node.

    Example:
        >>> roots = prefix_tree([[1, 2, 3], [1, 2, 4, 5], [1, 2], [6]])
        >>> [(list(node.tokens), node.depth, node.ends) for node in walk(roots)]
        [([1, 2], 0, [2]), ([3], 2, [0]), ([4, 5], 2, [1]), ([6], 0, [3])]
    """
    order = sorted(range(len(sequences)), key=lambda number: tuple(sequences[number]))
    ordered = [sequences[number] for number in order]
    roots: list[Node] = []
    # Sequences low to high agree on their first `depth` tokens, and belong behind `parent`.
    pending: list[tuple[int, int, int, Node | None]] = [(0, len(order), 0, None)]
    while pending:
        low, high, depth, parent = pending.pop()
        begin = low
        while begin < high:
            token = ordered[begin][depth]
            end = begin + 1
            while end < high and ordered[end][depth] == token:
                end += 1
            # In sorted order the first and the last differ earliest.
            first, last = ordered[begin], ordered[end - 1]
            stop = depth + 1
            while stop < min(len(first), len(last)) and first[stop] == last[stop]:
                stop += 1
            node = Node(first[depth:stop], depth, parent)
            (roots if parent is None else parent.children).append(node)
            rest = begin
            while rest < end and len(ordered[rest]) == stop:
                node.ends.append(order[rest])
                rest += 1
            if rest < end:
                pending.append((rest, end, stop, node))
            begin = end
    return roots


def without_short_runs(roots: Sequence[Node], least: int, most_repeated: int) -> list[Node]:
    """Put runs of fewer than ``least`` tokens in front of their continuations again, the cheapest ones first.

    A begin of sentence that all texts have, or the word that two questions begin with, is not worth a pass and a fork
    of its own: its continuations repeat it.

    Args:
        roots: The tree, which is changed.
        least: A run of as many tokens stays.
        most_repeated: Tokens that may be repeated in all.

    Returns:
        The nodes that sequences begin with now.

    Example:
        >>> roots = without_short_runs(prefix_tree([[0, 1, 2, 5], [0, 3, 4, 6]]), least=2, most_repeated=1)
        >>> [(list(node.tokens), node.depth) for node in roots]
        [([0, 1, 2, 5], 0), ([0, 3, 4, 6], 0)]
    """
    top = Node((), 0, None, children=list(roots))
    order = {node: number for number, node in enumerate(walk(roots))}
    parents = {child: node for node in (top, *order) for child in node.children}
    waiting = [(_repeated(node), order[node], node) for node in order if node.children and len(node.tokens) < least]
    heapify(waiting)
    while waiting:
        expected, _, node = heappop(waiting)
        if node.ends or len(node.tokens) >= least or not all(child.num_inputs for child in node.children):
            continue
        if (repeated := _repeated(node)) > expected:  # what came before has been put in front of it, or taken its place
            heappush(waiting, (repeated, order[node], node))
            continue
        if repeated > most_repeated:
            break
        most_repeated -= repeated
        before = parents[node]
        before.children.remove(node)
        before.children += node.children
        for child in node.children:
            child.tokens, child.depth, child.parent = [*node.tokens, *child.tokens], node.depth, node.parent
            parents[child] = before
    return top.children


def _repeated(node: Node) -> int:
    """How many tokens more have to be read if each child repeats the node's."""
    return len(node.tokens) * (len(node.children) - 1)


def walk(nodes: Sequence[Node]) -> Iterator[Node]:
    """Yield nodes and all behind them, each before those behind it."""
    pending = list(reversed(nodes))
    while pending:
        node = pending.pop()
        yield node
        pending.extend(reversed(node.children))


def path(node: Node) -> list[Node]:
    """Return the nodes from the beginning to ``node``."""
    nodes = []
    current: Node | None = node
    while current is not None:
        nodes.append(current)
        current = current.parent
    return nodes[::-1]


def count_inputs(roots: Sequence[Node]) -> int:
    """Return how many tokens the model has to read for the whole tree."""
    return sum(node.num_inputs for node in walk(roots))
