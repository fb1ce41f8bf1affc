"""What a validation was taken on, in words: numbers of a run compare if they are of the same windows."""
from collections.abc import Mapping


def taken_on(row: Mapping) -> str:
    """Such as "96 of 2,607 windows"; "" for a row of a version that did not count them."""
    for unit in ("windows", "conversations"):
        scored, split = row.get(unit), row.get(f"{unit}_in_split")
        if isinstance(scored, int) and isinstance(split, int):
            return f"all {split:,} {unit}" if scored == split else f"{scored:,} of {split:,} {unit}"
    return ""
