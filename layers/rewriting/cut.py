"""The cheapest set of values from which others can be computed: a minimum cut.

Each value has a cost and is computed from others. Of the sets of values that lie on every way from the starts to the ends, one whose costs add up to
least is found by the flow from starts to ends that is largest where each value lets through no more than its cost.

Reference: Ford and Fulkerson, "Maximal Flow through a Network", 1956; Edmonds and Karp, "Theoretical Improvements in Algorithmic Efficiency for
Network Flow Problems", 1972.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence

from layers.rewriting.graph import Node, Value

UNLIMITED = 1 << 62


def least_cut(cost: Mapping[int, int], feeds: Iterable[tuple[int, int]], starts: Iterable[int], ends: Iterable[int]) -> set[int]:
    """The cheapest values on every way from the starts to the ends; of several such sets the one nearest to the ends.

    Args:
        cost: of each value; `UNLIMITED` for one that cannot be chosen.
        feeds: pairs of values of which the second is computed from the first.
        starts: values that are computed from elsewhere.
        ends: the values that are wanted.

    Raises:
        ValueError: where each way has a start and an end that cannot be chosen.
    """
    network = _Network(cost, feeds, starts, ends)
    while network.push():
        pass
    return network.cut()


def values_of(nodes: Iterable[Node]) -> list[Value]:
    """All that these operations read and make."""
    return list({id(v): v for n in nodes for v in (*n.inputs, *n.outputs)}.values())


def cheapest(
    nodes: Collection[Node],
    starts: Sequence[Value],
    ends: Sequence[Value],
    *,
    border: Sequence[Value],
    free: Collection[int],
    barred: Collection[int] = (),
) -> list[Value]:
    """The values of fewest bytes from which these operations compute the ends.

    Args:
        nodes: the operations that may be done again.
        starts: the values that come from elsewhere; what depends on none of them need not be kept.
        ends: the values that are wanted.
        border: values that are made in any case: taken before others of the same size.
        free: the ids of those that cost nothing.
        barred: the ids of those that cannot be kept.
    """
    values = {id(v): v for v in (*values_of(nodes), *starts, *ends)}
    made = {id(v) for v in border}
    cost = {i: UNLIMITED if i in barred else 0 if i in free else 2 * v.bytes + (i not in made) for i, v in values.items()}
    feeds = [(id(a), id(b)) for n in nodes for a in n.inputs for b in n.outputs]
    return [values[i] for i in least_cut(cost, feeds, map(id, starts), map(id, ends))]


class _Network:
    """Two points a value, the first before the second; an edge has its reverse beside it, at the number with the last bit flipped."""

    def __init__(self, cost: Mapping[int, int], feeds: Iterable[tuple[int, int]], starts: Iterable[int], ends: Iterable[int]):
        self.place = {v: 2 * i for i, v in enumerate(cost)}
        self.source, self.sink = 2 * len(cost), 2 * len(cost) + 1
        self.edges: list[list[int]] = [[] for _ in range(2 * len(cost) + 2)]
        self.to: list[int] = []
        self.room: list[int] = []
        for v, c in cost.items():
            self._add(self.place[v], self.place[v] + 1, c)
        for a, b in dict.fromkeys(feeds):
            self._add(self.place[a] + 1, self.place[b], UNLIMITED)
        for v in dict.fromkeys(starts):
            self._add(self.source, self.place[v], UNLIMITED)
        for v in dict.fromkeys(ends):
            self._add(self.place[v] + 1, self.sink, UNLIMITED)

    def _add(self, a: int, b: int, room: int) -> None:
        self.edges[a].append(len(self.to))
        self.edges[b].append(len(self.to) + 1)
        self.to += [b, a]
        self.room += [room, 0]

    def push(self) -> bool:
        """Lets more through along a shortest way that has room; False where none has."""
        came: dict[int, int] = {self.source: -1}
        todo = deque([self.source])
        while todo and self.sink not in came:
            a = todo.popleft()
            for e in self.edges[a]:
                if self.room[e] > 0 and self.to[e] not in came:
                    came[self.to[e]] = e
                    todo.append(self.to[e])
        if self.sink not in came:
            return False
        way, at = [], self.sink
        while (e := came[at]) >= 0:
            way.append(e)
            at = self.to[e ^ 1]
        amount = min(self.room[e] for e in way)
        if amount >= UNLIMITED:
            raise ValueError("least_cut: nothing on a way from a start to an end can be chosen")
        for e in way:
            self.room[e] -= amount
            self.room[e ^ 1] += amount
        return True

    def cut(self) -> set[int]:
        """The values between what still reaches the ends and what does not."""
        reaches, todo = {self.sink}, [self.sink]
        while todo:
            for e in self.edges[todo.pop()]:
                a = self.to[e]
                if self.room[e ^ 1] > 0 and a not in reaches:
                    reaches.add(a)
                    todo.append(a)
        return {v for v, i in self.place.items() if i not in reaches and i + 1 in reaches}
