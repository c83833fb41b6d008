"""The command `python -m torchcall`: demo, compile, doctor."""

import sys

USAGE = """usage: python -m torchcall COMMAND [OPTIONS]

commands:
  demo     argon atoms under a TorchScript potential inside one jitted loop (demo --help for more)
  compile  compile a potential (a torch.nn.Module) into an AOTInductor package (compile --help)
  doctor   report versions and devices, and test each engine
"""


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns the exit status: 1 if a check failed, 2 for wrong usage."""
    command, *options = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    try:
        import torchcall
    except ImportError as error:
        print(error, file=sys.stderr)
        return 1
    if command == "doctor":
        return int(any("FAILED" in value for value in torchcall.doctor().values()))
    if command in ("demo", "compile"):
        from torchcall._compilation_cache import use_compilation_cache

        use_compilation_cache()
    if command == "demo":
        from torchcall.demo import main as demo

        return demo(options)
    if command == "compile":
        from torchcall.mliap._compile._cli import main as compile

        return compile(options)
    print(
        f"torchcall: expected the command demo, compile or doctor, got {command!r}", file=sys.stderr
    )
    print(USAGE, end="", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
