"""95 % intervals of means by Student's t."""


def student(mean: float, standard_error: float, count: int) -> tuple[float, float] | tuple[None, None]:
    """Interval of the mean of `count` independent values, or of a ratio of their sums; none for a single value."""
    if count < 2:
        return None, None
    from scipy.special import stdtrit  # a fifth of a second

    half = float(stdtrit(count - 1, 0.975)) * standard_error
    return mean - half, mean + half


def bracketed(low: float | None, high: float | None, form: str = ".4f") -> str:
    """Suffix of a number such as " [0.1000, 0.2000]"; "" without an interval."""
    return "" if low is None or high is None else f" [{low:{form}}, {high:{form}}]"
