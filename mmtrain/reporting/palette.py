"""Colours that the page and the static images share, told apart with any colour vision; never the only sign."""

METHODS = [  # (on light, on dark), in the order in which methods come
    ("#1f6feb", "#79b0ff"),
    ("#c2560c", "#ff9f5c"),
    ("#0b8264", "#43cfa3"),
    ("#9a3a95", "#e58fdf"),
    ("#80650a", "#dcbf55"),
    ("#b3283c", "#ff8291"),
    ("#0a7894", "#5ccbe3"),
    ("#5a6472", "#aab5c3"),
]
DASHES = ["", "7 3", "2 3", "9 3 2 3"]  # of mean curves, so that neighbours differ on grey paper as well
BETTER = ("#116b3f", "#5fd39a")
WORSE = ("#a8261f", "#ff9088")
NEUTRAL = ("#5a6472", "#a3adba")


def method_colour(place: int) -> tuple[str, str]:
    """(on light, on dark) of the method in that place; they come round again after eight.

    >>> method_colour(0) == method_colour(8)
    True
    """
    return METHODS[place % len(METHODS)]
