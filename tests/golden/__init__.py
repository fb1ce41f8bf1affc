"""Arrays recorded from the PyTorch references; every file here is named by a test (see `tests/test_structure.py`)."""
import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent


def load(name: str) -> dict[str, np.ndarray]:
    """All arrays of one recorded `.npz`, without its `meta_json`."""
    with np.load(FOLDER / name) as z:
        return {key: z[key] for key in z.files if key != "meta_json"}


def meta(name: str) -> dict:
    """The configuration stored beside the arrays of one recorded `.npz`."""
    with np.load(FOLDER / name) as z:
        return json.loads(str(z["meta_json"]))
