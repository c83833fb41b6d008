"""Names of JAX and torch that their documentation does not promise.

The rest of torchcall uses them through these modules, so a new JAX or torch that lacks one is a
change here. `tests/test_undocumented_names.py` lists the missing ones.
"""
