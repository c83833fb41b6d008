"""The command `torchcall`: one module per subcommand, with its options and what it runs."""
