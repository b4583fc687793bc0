import gc
import logging

import datasets
import pytest
import torch


# The models are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _freeze_imports():
    """`Trainer.train` collects garbage, most of the time of a tiny training; what is imported by now is none."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _restore_log_levels():
    """The commands set the levels of some loggers, for the whole process."""
    loggers = [logging.getLogger(name) for name in ("lpg_hf.commands", "lpg_hf.data", "lpg_hf.trainer")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="module")
def fresh_datasets_cache(tmp_path_factory):
    """What one module leaves in the cache of `datasets` is not found by another one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
