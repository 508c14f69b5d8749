"""Two sets of detections, paired one to one."""

from __future__ import annotations

from torch import Tensor


def partners(close: Tensor) -> list[int]:
    """For each row of close (N, M) bool its own column, no column twice, for as many rows as can be; -1 for the others."""
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
    found = {row: column for column, row in holder.items()}
    return [found.get(row, -1) for row in range(len(choices))]
