import datasets
import pytest


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    """What one test leaves in the cache of `datasets` is not found by another module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
