"""Runs in the sandbox: a program, then its tests, then a secret word that proves that they came to their end.

Standard input is a marshalled dict (json is slow to import): "word"; "program" and "tests", source text; "site", the
folder of packages. File descriptor 3 takes a line before anything untrusted begins, and the word after the tests.

A program shares this interpreter with its tests, as in the benchmarks' own evaluations, so one written to cheat can.
But exiting early, printing, writing to open files or replacing builtins or modules does not pass: only a search of the
memory finds the word, which is in no frame, module or list of the garbage collector."""
import gc
import itertools
import marshal
import operator
import os
import sys
import types

REPORT, STARTED = 3, b"started\n"


def steps():
    """Iterator over the calls that run the program, the tests and the report; no name leads to it."""
    with open(0, "rb") as file:
        content = marshal.load(file)
    # Standard input contains the word: close it to the program.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.closerange(REPORT + 1, 64)
    sys.path.append(content["site"])
    module = sys.modules["program"] = types.ModuleType("program")
    os.write(REPORT, STARTED)
    tests = compile(content["tests"], "tests.py", "exec", dont_inherit=True)
    program = compile(content["program"], "program.py", "exec", dont_inherit=True)
    calls = [(exec, program, vars(module)), (exec, tests, vars(module))]
    calls.append((os.write, REPORT, content["word"].encode()))
    results = itertools.starmap(operator.call, calls)
    gc.collect()
    gc.freeze()
    return results


# Stops after the last call, which alone returns a true value. `any` keeps no tuple of arguments, which gc would list.
if any(steps()):
    os._exit(0)
