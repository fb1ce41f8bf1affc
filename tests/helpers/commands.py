"""Commands by the name that `python -m` takes."""
import importlib
from types import ModuleType


def command_module(name: str) -> ModuleType:
    """The module that holds the command's `main`: a package's is its __main__."""
    module = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(module, "__path__") else module
