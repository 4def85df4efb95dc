"""Kept shares of each KV head at 99 budgets, as LU-KV calibrates them (arXiv 2602.08585).

Row r is for a mean REMOVED share of r + 1 percent, as in the published files, but holds KEPT shares.
"""

from dataclasses import dataclass

from trt_kv.errors import RecipeError

N_ROWS = 99
LEAST_KEPT = 1e-6
"""Of the tokens, a head keeps at least this share: so much that a share is never 0."""
Shares = tuple[tuple[float, ...], ...]
"""By layer, then by KV head."""


@dataclass(frozen=True, kw_only=True)
class HeadShares:
    """``rows[r][l][k]``: the share in (0, 1] that KV head k of layer l keeps when 99 - r percent are kept in the mean.

    ``RecipeError`` for another number of rows, lists of unequal lengths and values that are no shares. A layer with an
    attention window, which has no budget, has 1 in every row.
    """

    rows: tuple[Shares, ...]

    def __post_init__(self) -> None:
        if len(self.rows) != N_ROWS:
            raise RecipeError("the heads' shares are not of all budgets", got=f"{len(self.rows)} rows", expected=N_ROWS)
        sizes = {(len(row), len(layer)) for row in self.rows for layer in row} | {(len(row), 1) for row in self.rows if not row}
        if len(sizes) != 1 or 0 in next(iter(sizes)):
            raise RecipeError(
                "the heads' shares are not a table", got=f"(layers, KV heads) {sorted(sizes)}", expected="the same in every row"
            )
        for index, row in enumerate(self.rows):
            bad = [share for layer in row for share in layer if not 0.0 < share <= 1.0]
            if bad:
                raise RecipeError(
                    f"row {index} of the heads' shares has no kept share", got=bad[0], expected="numbers in (0, 1]"
                )

    @property
    def n_layers(self) -> int:
        return len(self.rows[0])

    @property
    def n_kv_heads(self) -> int:
        return len(self.rows[0][0])

    def at(self, kept: float) -> Shares:
        """The heads' shares for the mean kept share ``kept`` in (0, 1]: those of its row, and between two rows in proportion.

        Above 99 % they go on to 1, below 1 % they fall with ``kept`` to a millionth.
        """
        if not 0.0 < kept <= 1.0:
            raise RecipeError("the budget is out of range", got=kept, expected="a number in (0, 1]")
        removed = round(100.0 * (1.0 - kept), 9)
        if removed > N_ROWS:
            return tuple(tuple(max(LEAST_KEPT, share * 100.0 * kept) for share in layer) for layer in self.rows[-1])
        above, weight = int(removed), removed % 1.0
        high = self._row_of(above)
        if not weight:
            return high
        pairs = zip(high, self._row_of(above + 1), strict=True)
        return tuple(tuple(a + weight * (b - a) for a, b in zip(high_K, low_K, strict=True)) for high_K, low_K in pairs)

    def _row_of(self, removed: int) -> Shares:
        """The row of a whole percentage; of 0, ones."""
        return self.rows[removed - 1] if removed else ((1.0,) * self.n_kv_heads,) * self.n_layers


def means(shares: Shares) -> tuple[float, ...]:
    """Each layer's share: the mean over its KV heads."""
    return tuple(round(sum(layer) / len(layer), 6) for layer in shares)
