"""Bounds of setup.cfg, and the versions from which launchers build hosts."""
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.launch.world import ROOT

PYTHONS = ("3.11", "3.12", "3.13")
CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg")


def requirements(section: str, key: str) -> list[Requirement]:
    lines = [line.strip() for line in CONFIG[section][key].splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


CORE = requirements("options", "install_requires")
LAUNCHED = [r for extra in ("chat", "gcs", "hf", "hub", "parquet") for r in requirements("options.extras_require", extra)]


def needed(python: str, among: list[Requirement]) -> list[Requirement]:
    return [r for r in among if r.marker is None or r.marker.evaluate({"python_version": python})]


def pins(python: str) -> dict[str, str]:
    lines = (ROOT / "launch" / f"constraints-{python}.txt").read_text().splitlines()
    return dict(re.fullmatch(r"([\w.-]+)==(\S+)", line).groups() for line in lines if not line.startswith("#"))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("python", PYTHONS)
def test_tested_versions_satisfy_setup_cfg_and_name_every_package_of_the_launchers(python):
    versions = {normal(name): version for name, version in pins(python).items()}
    for requirement in needed(python, CORE + LAUNCHED):
        assert requirement.specifier.contains(versions[normal(requirement.name)]), requirement
    assert "libtpu" in versions


@pytest.mark.parametrize("python", PYTHONS)
def test_every_python_has_one_lower_bound_for_each_package(python):
    names = [r.name for r in needed(python, CORE)]
    assert len(names) == len(set(names)) >= 14
    assert all([spec.operator for spec in r.specifier] == [">="] for r in needed(python, CORE))


def test_flax_that_breaks_with_the_newest_jax_is_ruled_out():
    """flax 0.12.8 and 0.12.9 cannot be imported with jax 0.11.1 and later, which Python 3.12 can have."""
    flax = next(r for r in needed("3.12", CORE) if r.name == "flax")
    assert not any(flax.specifier.contains(version) for version in ("0.12.8", "0.12.9"))


def shell(script: str, **environment) -> str:
    command = ["bash", "-c", f"source launch/venv.sh; {script}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment).stdout.strip()


def interpreter(path: Path, version: str) -> Path:
    """A program that answers as this Python would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho {version}\n")
    path.chmod(0o755)
    return path


def test_a_host_is_built_from_the_tested_versions_of_its_own_python(tmp_path):
    path = "/usr/bin:/bin"
    for python in PYTHONS:
        own = interpreter(tmp_path / python, python)
        assert shell("tested_versions", PATH=path, PYTHON=str(own)) == f"launch/constraints-{python}.txt"
    untested = interpreter(tmp_path / "3.99", "3.99")
    assert shell("tested_versions", PATH=path, PYTHON=str(untested)) == ""


def test_the_newest_python_is_taken_wherever_it_is_installed(tmp_path):
    places = {"HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:/usr/bin:/bin", "PYTHON": sys.executable}
    interpreter(tmp_path / "bin/python3.13", "broken")
    interpreter(tmp_path / "bin/python3.12", "3.12")
    if sys.version_info < (3, 12):
        assert shell("newest_python", **places) == f"{tmp_path}/bin/python3.12"
    built = interpreter(tmp_path / ".cache/softmask_jax/python-3.13.5/bin/python3", "3.13")
    if sys.version_info < (3, 13):
        assert shell("newest_python", **places) == str(built)
    asked = interpreter(tmp_path / "mine/python", "3.13")
    assert shell("newest_python", **places | {"PYTHON": str(asked)}) == str(asked)


def test_an_environment_that_another_tool_made_is_not_cleared(tmp_path):
    (tmp_path / "environment").mkdir()
    (tmp_path / "environment" / "mine").write_text("kept")
    script = f"source {ROOT}/launch/venv.sh; make_venv environment"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "environment is not of this project and has no pip: move it away." in done.stderr
    assert (tmp_path / "environment" / "mine").read_text() == "kept"
