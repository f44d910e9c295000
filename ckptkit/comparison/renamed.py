"""Find evidence that one prefix replaces another: many missing and unexpected keys that end alike, of one shape."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from itertools import compress, product

from ckptkit.core.patterns import literal

__all__ = ["count_common_shapes", "count_replaced_prefixes", "least_of_many"]

_MOST_SEGMENTS = 4  # of a prefix
_MOST_OWNERS = 4  # of one ending; an ending that more keys have says nothing
_MOST_ASKED = 2000  # found keys, evenly spread; a prefix that most keys have is seen among them
_SHARE = 4  # a new head is less than a quarter of a model
Shapes = Mapping[str, tuple[int, ...]]


def least_of_many(expected: int) -> int:
    """Return how many of the expected keys are evidence of other names, and not only of a new head.

    Example:
        >>> least_of_many(43)
        11
    """
    return max(-(-expected // _SHARE), 2)


def count_common_shapes(expected: Shapes, found: Shapes) -> int:
    """Return how many expected keys can get a found tensor of their shape, each found tensor once."""
    return (Counter(expected.values()) & Counter(found.values())).total()


def count_replaced_prefixes(expected: Shapes, found: Shapes) -> Counter[tuple[str, str]]:
    """Return how many found keys become expected keys when a prefix, the first name, is replaced by the second.

    Only tensors of the same shape count, and only prefixes without special characters of the pattern language. Of many
    found keys, 2,000 count.

    Example:
        >>> shapes = {"blocks.0.weight": (2, 2)}, {"layers.0.weight": (2, 2)}
        >>> count_replaced_prefixes(*shapes).most_common(1)
        [(('layers.', 'blocks.'), 1)]
    """
    asked = list(found.items())[:: -(-len(found) // _MOST_ASKED) or 1]
    prefixes: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for key, shape in asked:
        for prefix, tail in _cuts(key):
            prefixes.setdefault((tail, shape), []).append(prefix)
    owners: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    keys, tails, shapes = list(expected), list(expected), list(expected.values())
    for _ in range(_MOST_SEGMENTS):  # the keys of a large model are cut together, one segment more each time
        tails = [tail.partition(".")[2] for tail in tails]
        endings = list(zip(tails, shapes, strict=True))
        for key, ending in compress(zip(keys, endings, strict=True), map(prefixes.__contains__, endings)):
            owners[ending].append(key[: len(key) - len(ending[0])])
            if len(owners[ending]) > _MOST_OWNERS:
                del prefixes[ending], owners[ending]
    counts = Counter[tuple[str, str]]()
    for ending, wanted in owners.items():
        pairs = product(prefixes[ending], wanted)
        counts.update(pair for pair in pairs if not _end_alike(*pair))
    plain = {name for pair in counts for name in pair if literal(name) == name and "=" not in name}
    return Counter({pair: count for pair, count in counts.items() if plain.issuperset(pair)})


def _cuts(key: str) -> Iterator[tuple[str, str]]:
    """Yield the beginnings of a key that end with a dot, each with the rest of the key, which is not empty."""
    at = 0
    for _ in range(_MOST_SEGMENTS):
        at = key.find(".", at) + 1
        if not 0 < at < len(key):
            return
        yield key[:at], key[at:]


def _end_alike(first: str, second: str) -> bool:
    """Return whether the prefixes have the same last segment, so that shorter ones say the same."""
    return first.split(".")[-2] == second.split(".")[-2]
