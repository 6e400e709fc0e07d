"""Where the statistics of the training data enter a module, and where those of two stages are compared."""

from collections.abc import Iterable, Mapping

from mmtrain.config_errors import UserError
from mmtrain.normaliser import Affine, Normaliser


def fit_normaliser(
    normaliser: Normaliser,
    affines: Mapping[str, Affine],
    one: str = "the checkpoint",
    other: str = "these training data",
) -> None:
    """Take over the data's statistics; after a resume, or with another stage's, check that they are still the same.

    Args:
        one, other: what the normaliser and the statistics are of, for the message.

    Raises:
        UserError: the normaliser holds other statistics than the data have.
    """
    keys = [key for key in normaliser.widths if key in affines]
    fresh = Normaliser({key: normaliser.widths[key] for key in keys}).to(next(normaliser.buffers()).device)
    for key in keys:
        fresh.set(key, affines[key])
    known = [key for key in keys if normaliser.is_fitted(key)]
    check_same(normaliser, fresh, known, one, other)
    for key in keys:
        if key not in known:
            normaliser.set(key, affines[key])


def check_same(first: Normaliser, second: Normaliser, keys: Iterable[str], one: str, other: str) -> None:
    """Refuse two normalisers that differ.

    Raises:
        UserError: names the keys that differ.
    """
    if different := first.differences(second, list(keys)):
        raise UserError(
            f"the normaliser of {', '.join(different)} in {one} is not that of {other}: "
            "train both stages on the same data with the same split, or start a new run"
        )
