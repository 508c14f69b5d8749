"""What a check of a dataset has noticed, in a form that can be listed, counted and summarized."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One thing that a check has noticed.

    Attributes:
        severity: "error", which would stop a training, or "warning".
        message: The sentence about it, with counts.
        kind: What it is, without counts: findings of one kind are summarized together.
        count: How many annotations, images or files it concerns.
        example: One file that it concerns.
        advice: What to do.
        is_harmless: Whether it is usually as it should be.
    """

    severity: Literal["error", "warning"]
    message: str
    kind: str
    count: int = 1
    example: str = ""
    advice: str = ""
    is_harmless: bool = False


def summarize_findings(
    by_split: Mapping[str, Sequence[Finding]], between: Sequence[Finding], most: int
) -> list[Finding]:
    """Merge the findings of one kind, and return at most `most` of them, the worst first.

    Args:
        by_split: The findings of each split.
        between: Those that concern several splits.
        most: How many are returned; the last one then counts the others.

    Returns:
        Findings whose message holds the kind, the count, an example and what to do. Errors come first, then what
        concerns most annotations, images or files.
    """
    groups: dict[tuple[str, str], list[tuple[str, Finding]]] = {}
    for split, findings in [*by_split.items(), ("", between)]:
        for finding in findings:
            groups.setdefault((finding.severity, finding.kind), []).append((split, finding))
    merged = []
    for own in groups.values():
        first = own[0][1]
        count = sum(finding.count for _, finding in own)
        names = [name for name in dict.fromkeys(split for split, _ in own) if name]
        where = f" ({', '.join(names)})" if names else ""
        example = f", such as {first.example}" if first.example else ""
        message = f"{first.kind}{where}: {count}{example}{f'; {first.advice}' if first.advice else ''}"
        merged.append(replace(first, message=message, count=count))
    merged.sort(key=lambda finding: (finding.severity != "error", finding.is_harmless, -finding.count))
    if len(merged) > most:
        rest = merged[most - 1 :]
        last = Finding(rest[0].severity, f"and {len(rest)} other kinds of findings, listed above", "others", len(rest))
        merged = [*merged[: most - 1], last]
    return merged
