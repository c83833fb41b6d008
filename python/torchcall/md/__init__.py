"""What `torchcall md` runs: molecular dynamics that can be killed at any moment and continued."""
