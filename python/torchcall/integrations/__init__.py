"""Plug-ins for other simulation packages. Nothing is imported here; import the one you use.

- `torchcall.integrations.jax_md`: energies and neighbour lists for jax-md.
- `torchcall.integrations.ase`: a calculator for ASE.
- `torchcall.integrations.kups`: potentials for kUPS.
"""
