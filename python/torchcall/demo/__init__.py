"""What `torchcall demo` adds to `torchcall md`: the same step through JAX's own callbacks."""
