"""Which blocks of the prior hear the music.

Concept   cross-attention in every block costs much and harms the prior; a third of the blocks is enough, if it is the
          right third.
Paper     arXiv 2503.14505v2, Sec. 4.1, Fig. 5 (b)-(c); rows "All", "Evenly Distributed", "First", "Middle" and "Last
          Layers" of Tables 1 and 5.
"""

from config import UserError

STRATEGIES = ("all", "even", "first", "middle", "last")


def select_layers(strategy: str, depth: int, count: int) -> list[int]:
    """`count` of the blocks 0 ... depth - 1, ascending, by one of STRATEGIES (`all` takes all and ignores `count`).

    even     floor(i depth / count): the first block of each of `count` equal parts
    middle   the same number of blocks is left out at both ends; one more at the end if that is not possible
    raises   UserError if there is no such strategy, or no such number of blocks
    """
    if strategy not in STRATEGIES or not 1 <= count <= depth:
        raise UserError(f"{count} of {depth} layers by {strategy!r}: expected 1 to {depth} by {', '.join(STRATEGIES)}")
    start = {"first": 0, "middle": (depth - count) // 2, "last": depth - count}
    if strategy == "all":
        return list(range(depth))
    if strategy == "even":
        return [i * depth // count for i in range(count)]
    return list(range(start[strategy], start[strategy] + count))
