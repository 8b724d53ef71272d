import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

torch.set_num_threads(1)  # tiny tensors: a second thread mostly waits, on a busy machine for long


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder, tokenizer and random model of the embedded world."""
    import alchemy
    from data import Tokenizer
    from model import Transformer
    folder = tmp_path_factory.mktemp("world")
    alchemy.write_folder(folder)
    return folder, Tokenizer.from_pretrained(folder), Transformer.from_scratch(folder, seed=5)
