import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

torch.set_num_threads(1)  # tiny tensors: a second thread mostly waits


@pytest.fixture(scope="module", autouse=True)
def without_cuda(request):
    """Only the kernels are tested on a GPU. Elsewhere tests compare fp32 bits, and ranks would share it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "test_kernels_triton":
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes that a test starts
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder, tokenizer and random model of the embedded world."""
    from alchemy.demonstrations import write_folder
    from lib.tokenizer import Tokenizer
    from model import Transformer
    folder = tmp_path_factory.mktemp("world")
    write_folder(folder)
    return folder, Tokenizer.from_pretrained(folder), Transformer.from_scratch(folder, seed=5)


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Folder of a start model after 20 supervised steps: a third of its rollouts have an answer, while a
    random model's have none, so that all advantages would be 0."""
    import warmstart
    from alchemy.demonstrations import demonstrations, write_folder
    from lib.tokenizer import Tokenizer
    from model import Transformer
    folder = tmp_path_factory.mktemp("start")
    write_folder(folder)
    tokenizer, model = Tokenizer.from_pretrained(folder), Transformer.from_scratch(folder, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(20):
        optimizer.zero_grad()
        warmstart.imitate(model, *demonstrations(4, tokenizer, 5, 0.3, 1, step))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_guard(tmp_path_factory):
    """Folder of a tiny guard laid out like Qwen3Guard-Gen; training it takes seconds."""
    from judge_helpers import write_guard
    return write_guard(tmp_path_factory.mktemp("guard") / "qwen")
