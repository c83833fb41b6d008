"""The digest of a model's code and weights, by which programs name the model."""

import threading

from torchcall import _bridge

# Without it, a digest could be computed for weights that another thread is replacing.
_lock = threading.Lock()


def content_of(model: _bridge.Model) -> str:
    """The digest, "" over live weights. That of a file is computed by the first call."""
    with _lock:
        if not model.content and model.file is not None:
            model.content = model.file.digest()
        return model.content


def replace(model: _bridge.Model, fresh: _bridge.Model) -> None:
    """Replaces code, weights and digest of a model by those of `fresh`.

    Raises:
        ValueError: `fresh` has other code, or other arguments or results.
    """
    with _lock:
        if model.content and fresh.file is not None:  # programs name it
            fresh.content = fresh.file.digest()
        model.replace(fresh)
