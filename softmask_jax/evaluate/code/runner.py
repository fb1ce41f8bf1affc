"""Runs in the sandbox: a program, then its tests, then the word that says that they came to their end.

Standard input is a marshalled dict (importing json takes longer than all else here): "word", a secret; "program" and
"tests", source text; "site", the folder of packages. File 3 takes a line before anything untrusted begins, and the word
when the tests have passed.

The program shares this interpreter with its tests, as in the benchmarks' own evaluations, so one that is written to
cheat can. What does not pass: ending early by any exit, printing, writing to open files, replacing builtins or modules.
The word is in no variable of any frame or module, nor in the garbage collector's lists; only a search of the memory
finds it.
"""
import gc
import itertools
import marshal
import operator
import os
import sys
import types

REPORT, STARTED = 3, b"started\n"


def steps():
    """The steps, one after the other, as calls that no name leads to."""
    with open(0, "rb") as file:
        content = marshal.load(file)
    # The file has the word, too.
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


# Up to the last call, the only one that returns something. Unlike others, `any` takes the iterator without a tuple of
# arguments, which would be listed.
if any(steps()):
    os._exit(0)
