import gc

import pytest
import torch


# The models are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _freeze_imports():
    """`Trainer.train` collects garbage, most of the time of a tiny training; what is imported by now is none."""
    gc.collect()
    gc.freeze()
