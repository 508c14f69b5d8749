"""One-to-one matching of two sets of detections."""

from __future__ import annotations

from torch import Tensor


def partners(close: Tensor) -> list[int]:
    """Match rows and columns of close (N, M) bool, as many as possible; return each row's column, or -1."""
    choices = [row.nonzero().flatten().tolist() for row in close]
    holder: dict[int, int] = {}

    def place(row: int, seen: set[int]) -> bool:
        for column in choices[row]:
            if column in seen:
                continue
            seen.add(column)
            if column not in holder or place(holder[column], seen):
                holder[column] = row
                return True
        return False

    for row in range(len(choices)):
        place(row, set())
    column_of = {row: column for column, row in holder.items()}
    return [column_of.get(row, -1) for row in range(len(choices))]
