"""The house rules: imports go downward, golden files are used, configs stay plain."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "softmask_jax"

# Lower floors first; a module imports only from floors below its own.
FLOORS = (
    {"streams", "jax_settings"},
    {"row_mixtures", "vocab_chunks", "config_rules", "config_sections", "command_line", "files", "stop_signal", "models", "chart_axes", "page", "viewer_script", "viewer_style", "option_flags", "heartbeat", "markdown", "clusters"},
    {"config", "watched", "vocab_draw", "data", "charts", "answers", "stored_arrays"},
    {"run_folder", "roll_call", "peers", "vocab_head", "diffusion", "run_log", "viewer_pieces", "prompts"},
    {"soft_masking", "hosts", "curves", "wandb_rows", "patterns"},
    {"objective", "checkpoint_io", "report", "compare_page", "transparency"},
    {"samplers", "optimizer", "sharding", "dream_objective"},
    {"denoiser", "train_state", "checkpoint", "viewer", "generation", "generate_flags"},
    {"train_step", "convert", "dream_denoiser", "update_flops"},
    {"evaluation", "tracking", "dream_step"},
    {"tasks", "dream_api", "tiny_dream"},
    {"train", "api"},
    {"main", "compile", "benchmarks"},
    {"supervise", "compare", "generate", "evaluate", "plan"},
    {"notebook"},
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


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


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downward_only(path):
    own = room(path)
    assert own in FLOOR, f"give {own} a floor in {__file__}"
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "softmask_jax" and len(parts) > 1 and parts[1] in FLOOR and parts[1] != own:
            assert FLOOR[parts[1]] < FLOOR[own], f"{path.name} imports {name}"


def packages(room_name: str, **options) -> set[str]:
    return {
        name.split(".")[0] for path in MODULES if room(path) == room_name for name in imported(path, **options)
    }


def test_objective_and_below_import_neither_flax_nor_models():
    for name in ("dream_objective", "objective", "soft_masking", "diffusion", "vocab_head", "vocab_chunks", "vocab_draw", "row_mixtures"):
        assert "flax" not in packages(name)
        assert not any(m.startswith("softmask_jax.models") for p in MODULES if room(p) == name for m in imported(p))


def test_models_import_only_themselves():
    for path in MODULES:
        if room(path) == "models":
            assert all(n.startswith("softmask_jax.models") for n in imported(path) if n.startswith("softmask_jax"))


def test_data_does_not_import_jax_when_it_is_imported():
    assert not packages("data", top_level_only=True) & {"jax", "flax"}
    code = "import sys, softmask_jax.data; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_pytorch_is_never_imported():
    assert not any(name.split(".")[0] in ("torch", "transformers") for path in MODULES for name in imported(path))


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
SANDBOX = PACKAGE / "evaluation" / "code" / "enter.py"


@pytest.mark.parametrize("path", [p for p in MODULES if "__main__" in p.read_text() and p != SANDBOX], ids=str)
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
    "sys._base_executable": "the interpreter behind a virtual environment, which the sandbox has to bind",
    "os._exit": "documented, in spite of its name",
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
