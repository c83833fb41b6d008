"""A cache does not retain its model."""

import gc
import pickle
import weakref

import jax
import pytest
import states
from reference import one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("x64")


def test_a_cache_does_not_retain_the_model_and_can_be_pickled():
    model = states.model()
    _, start = states.cached(model)
    cache = start.cache
    wrapper = weakref.ref(model.wrapper)
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.model is not cache.model
    del model, start, _
    jax.clear_caches()
    gc.collect()
    assert wrapper() is None
