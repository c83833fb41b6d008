"""Plug-ins for other simulation packages. Import the one you use.

- `torchcall.integrations.jax_md`: energies and neighbour lists for jax-md.
- `torchcall.integrations.ase`: a calculator for ASE.
- `torchcall.integrations.kups`: potentials for kUPS.
"""

from torchcall import _loaded as _loaded  # first: reports what is missing
