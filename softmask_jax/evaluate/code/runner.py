"""What runs in the sandbox: a program, then its tests, then the word that they came to their end.

Standard input is a marshalled dict (to import json takes longer than all else here): "word", a secret; "program" and
"tests", source text; "site", where packages are. File 3 takes a line once everything untrusted is about to begin, and the
word when the tests have passed.

The program shares this interpreter with its tests, as it does in the benchmarks' own evaluations, so nothing can keep
one that is written to from cheating them. What does not pass by itself: ending early by any exit, printing, writing to
open files, replacing builtins or modules. The word is in no variable of any frame or module, nor among what the garbage
collector lists; only a search of the memory finds it.
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
    """What is done, one after the other, as calls that no name leads to."""
    with open(0, "rb") as file:
        given = marshal.load(file)
    # The file has the word, too.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.closerange(REPORT + 1, 64)
    sys.path.append(given["site"])
    module = sys.modules["program"] = types.ModuleType("program")
    os.write(REPORT, STARTED)
    tests = compile(given["tests"], "tests.py", "exec", dont_inherit=True)
    program = compile(given["program"], "program.py", "exec", dont_inherit=True)
    calls = [(exec, program, vars(module)), (exec, tests, vars(module))]
    calls.append((os.write, REPORT, given["word"].encode()))
    found = itertools.starmap(operator.call, calls)
    gc.collect()
    gc.freeze()
    return found


# To the first call that returns something, the last one. Of functions that go through a whole iterator this one takes it
# without a tuple of arguments, which would be listed.
if any(steps()):
    os._exit(0)
