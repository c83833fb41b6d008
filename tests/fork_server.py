"""Runs programs in forks of this process, which has imported JAX and torch: `models.run_python`.

A fork saves the seconds of CPU time that the imports take. No program runs in this process: it has
no JAX backend, no torch threads and no torchcall, which refuses to work in a fork.

One request per line on stdin: a JSON object with the program's `file`, `env`, `timeout` in seconds,
and the files `stdout` and `stderr`. One answer per line on stdout: the program's exit status.
"""

import gc
import importlib
import json
import os
import signal
import sys
import warnings

for name in ("jax.numpy", "torch._dynamo", "models"):  # shape inference imports _dynamo
    importlib.import_module(name)
gc.collect()
gc.freeze()

for line in sys.stdin:
    request = json.loads(line)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns about forks after its threads have started
        child = os.fork()
    if child == 0:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()

signal.alarm(request["timeout"])  # kills
# The program runs as `__main__`, and ends as a program of its own does.
for descriptor, name in enumerate((os.devnull, request["stdout"], request["stderr"])):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), descriptor)
os.environ.update(request["env"])
__file__ = request["file"]
os.chdir(os.path.dirname(__file__))
sys.argv, sys.path[0] = [__file__], os.path.dirname(__file__)
with open(__file__) as file:
    code = compile(file.read(), __file__, "exec")
exec(code)
