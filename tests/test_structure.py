"""The house rules: imports go downward, golden files are used, configs stay plain."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "softmask_jax"

# Rooms from the ground up: (name, what a module there may import from), the table of the package's README.md.
TABLE = re.findall(r"^\| `(\w+)/` \|.*\| (.*) \|$", (PACKAGE / "README.md").read_text(), re.MULTILINE)
ROOMS = {
    room: [above for above, _ in TABLE[:i]] if allowed == "all above" else re.findall(r"`([\w.]+)`", allowed)
    for i, (room, allowed) in enumerate(TABLE)
}
# Names of commands before they moved, for one release.
MOVED = {"compare", "evaluation", "notebook", "plan", "tiny_dream"}


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    """Modules that a file imports, as dotted names."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def test_the_root_holds_the_rooms_of_the_table_and_little_else():
    entries = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert entries - MOVED == set(ROOMS) | {"__init__", "__main__", "main", "supervise", "README.md", "py.typed"}


@pytest.mark.parametrize("path", [p for p in MODULES if room(p) in ROOMS], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_from_its_own_room_and_those_its_room_may(path):
    for name in imported(path):
        first, _, rest = name.partition(".")
        if first == "softmask_jax" and rest.split(".")[0] not in ("", room(path)):
            assert any(rest.startswith(f"{allowed}.") or rest == allowed for allowed in ROOMS[room(path)]), f"{path.name} imports {name}"


def test_a_room_imports_only_from_rooms_above_it_in_the_table():
    for i, (name, _) in enumerate(TABLE):
        assert {allowed.split(".")[0] for allowed in ROOMS[name]} <= {above for above, _ in TABLE[:i]}, name


def packages(room_name: str, **options) -> set[str]:
    return {
        name.split(".")[0] for path in MODULES if room(path) == room_name for name in imported(path, **options)
    }


def test_the_method_is_free_of_flax():
    assert "flax" not in packages("diffusion") | packages("samplers")


def test_networks_import_only_themselves():
    for path in (PACKAGE / "models" / "nn").glob("*.py"):
        assert all(n.startswith("softmask_jax.models.nn") for n in imported(path) if n.startswith("softmask_jax")), path


def test_data_does_not_import_jax_when_it_is_imported():
    assert not packages("data", top_level_only=True) & {"jax", "flax"}
    code = "import sys, softmask_jax.data; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_pytorch_is_imported_by_the_step_that_ours_is_compared_with_alone():
    users = {path for path in MODULES for name in imported(path) if name.split(".")[0] in ("torch", "transformers")}
    assert users == {(step := PACKAGE / "benchmarks" / "torch_step.py")}
    assert not any(step.stem in name for path in MODULES for name in imported(path))
    # Its process does not hold JAX.
    assert {name.split(".")[0] for name in imported(step)} & {"jax", "flax", "softmask_jax"} == {"softmask_jax"}
    assert not any(name.split(".")[0] in ("jax", "softmask_jax") for name in imported(step.with_name("in_turn.py")))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_a_config_imports_only_ml_collections_and_opens_with_its_command(path):
    assert {name.split(".")[0] for name in imported(path)} == {"ml_collections"}
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    command = "evaluate" if path.name.startswith("eval_") else "main"
    assert f"python -m softmask_jax.{command} --config=configs/{path.name}" in docstring


def test_every_golden_file_is_named_by_a_test():
    golden = ROOT / "tests" / "golden"
    sources = "\n".join(p.read_text() for p in (ROOT / "tests").rglob("*.py"))
    files = [p.relative_to(golden).as_posix() for p in golden.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    assert files
    assert not [name for name in files if f'"{name}"' not in sources]


def test_files_stay_within_one_room():
    assert not [str(p) for p in MODULES if len(p.read_text().splitlines()) > 310]


# It sandboxes a program in a process that holds the standard library alone.
SANDBOX = PACKAGE / "evaluate" / "code" / "enter.py"


@pytest.mark.parametrize("path", [p for p in MODULES if "__main__\"" in p.read_text() and p != SANDBOX and room(p) not in MOVED], ids=str)
def test_every_command_has_safe_streams_and_errors_of_one_line(path):
    tree = ast.parse(path.read_text())
    run = [node for node in tree.body if isinstance(node, ast.If) and "'__main__'" in ast.unparse(node.test)]
    for line in (line for node in run for line in node.body):
        name = ast.unparse(line).removeprefix("sys.exit(").removesuffix("())")
        (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
        assert [ast.unparse(decorator).split("(")[0] for decorator in function.decorator_list] == ["command"]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_text_is_read_and_written_with_an_encoding_whatever_the_locale(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).split(".")[-1]
        words = {keyword.arg for keyword in node.keywords}
        given = [value.value for value in (*node.args, *(k.value for k in node.keywords)) if isinstance(value, ast.Constant)]
        if name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute):
            assert "encoding" in words or {"utf-8", "ascii"} & set(given), ast.unparse(node)
        elif ast.unparse(node.func) in ("open", "os.fdopen", "tempfile.NamedTemporaryFile"):
            assert "encoding" in words or {"rb", "wb", "xb", "ab", "a+b", "r+b"} & set(given), ast.unparse(node)
        assert "encoding" in words or not {"text", "universal_newlines"} & words or name not in ("run", "Popen")


# Names that have no public equal.
PRIVATE = {
    "jax.core.Tracer": "the only type by which JAX itself tells its users to recognise a traced value",
    "jax.interpreters.partial_eval.dce_jaxpr": "what XLA leaves out must not be counted",
    "sys._base_executable": "the interpreter behind a virtual environment, which the sandbox has to bind",
    "os._exit": "documented, in spite of its name",
    "threading._register_atexit": "runs before Python ends its thread pools; `atexit` runs after them",
}


def names_of_others(path: Path) -> set[str]:
    """Dotted names of other packages that a file imports or uses."""
    tree, packages_, found = ast.parse(path.read_text()), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            packages_ |= {(alias.asname or alias.name.split(".")[0]): alias.asname and alias.name for alias in node.names}
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("softmask_jax"):
            packages_ |= {(alias.asname or alias.name): f"{node.module}.{alias.name}" for alias in node.names}
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, *more = ast.unparse(node).split(".")
            if first in packages_:
                found.add(".".join([packages_[first] or first, *more]))
    return found


def test_private_modules_of_other_packages_are_used_only_where_nothing_public_is_there():
    internal = ("jax.core", "jax.interpreters", "jax.lib", "jaxlib", "flax.core")
    used = {
        name for path in MODULES for name in names_of_others(path) - set(PRIVATE)
        if any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
        or any(name.startswith(f"{module}.") for module in internal)
    }  # fmt: skip
    assert not {name for name in used if not name.startswith(tuple(f"{known}." for known in PRIVATE))}
    assert set(PRIVATE) <= {name for path in MODULES for name in names_of_others(path)}


def test_every_key_names_its_implementation():
    made = [ast.unparse(node) for path in MODULES for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("jax.random.key", "jax.random.PRNGKey")]
    assert all("impl='threefry2x32'" in call for call in made), made
