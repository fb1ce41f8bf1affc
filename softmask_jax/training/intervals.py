"""95 % intervals of means: Student's t, whose width says how few observations there were."""
from scipy.special import stdtrit

TAIL = 0.975


def student(mean: float, standard_error: float, count: int) -> tuple[float, float] | tuple[None, None]:
    """Of the mean of `count` independent values, or a ratio of their sums, that has this standard error.

    A single value has none: nothing says how far it is from others.
    """
    if count < 2:
        return None, None
    half = float(stdtrit(count - 1, TAIL)) * standard_error
    return mean - half, mean + half


def bracketed(low: float | None, high: float | None, form: str = ".4f") -> str:
    """Such as " [0.1000, 0.2000]", to stand behind a number; "" where there is no interval."""
    return "" if low is None or high is None else f" [{low:{form}}, {high:{form}}]"
