"""Small faults put into the sources, one at a time: which of them do the tests catch?

    python benchmarks/mutants.py FILE [FILE ...] --n 30 --seed 1 --tests "PYTEST ARGUMENTS"

A mutant changes one place of one line, drawn with the seed, every kind of fault as often as the
others: a comparison, + and -, `and` and `or`, a number or a truth value, a negated condition, a
keyword or a statement left out. It is tested in a temporary copy of the tree. Those that survive
show where a test is missing, unless the change has no effect. `--save` writes the mutants;
`--replay` puts the same ones into another version of the tree, wherever their lines are now in the
given files.
"""

import argparse
import ast
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = (".git", ".venv", "__pycache__", "demo", "runs", "shared")
COMPARISONS = {"<": "<=", ">": ">=", "==": "!=", "is": "is not", "in": "not in"}
SWAPPED = {"+": "-", "and": "or", **COMPARISONS}
SWAPPED |= {after: before for before, after in SWAPPED.items()}


@dataclass(frozen=True)
class Mutant:
    source: str  # the line as it is, without indentation
    mutated: str
    function: str  # the function around it, "" outside of one


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help="from the root of the tree")
    parser.add_argument("--n", type=int, default=30, help="number of mutants")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tests", required=True, help="what pytest is to run")
    parser.add_argument("--limit", type=float, default=120, help="seconds for the tests of one")
    parser.add_argument("--save", metavar="JSON", help="write the mutants")
    parser.add_argument("--replay", metavar="JSON", help="take the mutants from here")
    args = parser.parse_args()
    lines = [line for file in args.files for line in lines_of(file)]
    if args.replay:
        mutants = [Mutant(**fields) for fields in json.loads(Path(args.replay).read_text())]
    else:
        mutants = draw(args.files, lines, args.n, args.seed)
    if args.save:
        Path(args.save).write_text(json.dumps([asdict(mutant) for mutant in mutants], indent=1))
    test_all(mutants, lines, args.tests, args.limit)


# -------------------------------------------------------------------------------------- drawing


def lines_of(file):
    """(file, index, text without indentation, function around it) of every line."""
    text = (ROOT / file).read_text()
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    around = {i: f.name for f in functions for i in range(f.lineno - 1, f.end_lineno)}
    return [(file, i, s.strip(), around.get(i, "")) for i, s in enumerate(text.split("\n"))]


def find(mutant, lines):
    """The places of a mutant's line; if there are several, those in its function."""
    hits = [line for line in lines if line[2] == mutant.source]
    return hits if len(hits) < 2 else [line for line in hits if line[3] == mutant.function]


def draw(files, lines, n, seed):
    """n mutants, each kind of fault in turn; only in lines that a replay can find."""
    rng, by_kind = random.Random(seed), {}
    for file in files:
        text = (ROOT / file).read_text()
        function_of = {i: name for f, i, _, name in lines if f == file}
        for kind, (row, begin), (last_row, end), new in faults(ast.parse(text)):
            source = text.split("\n")[row - 1]
            mutated = changed(source, begin, end, new) if row == last_row else source
            mutant = Mutant(source.strip(), mutated.strip(), function_of[row - 1])
            if mutated != source and len(find(mutant, lines)) == 1:
                by_kind.setdefault(kind, []).append(mutant)
    pools = [rng.sample(by_kind[kind], len(by_kind[kind])) for kind in sorted(by_kind)]
    turns = [pool[i] for i in range(n) for pool in pools if i < len(pool)]
    return list(dict.fromkeys(turns))[:n]


def faults(tree):
    """(kind, begin, end, change) of every possible fault; change: text between -> text, or ""."""
    in_text = {id(c) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for c in ast.walk(n)}
    for node in ast.walk(tree):
        if id(node) in in_text:
            continue  # places inside of an f-string aren't known
        for kind, one, other in operators(node):
            yield kind, (one.end_lineno, one.end_col_offset), (other.lineno, other.col_offset), swap
        for kind, part, new in parts(node):
            yield kind, (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset), new


def operators(node):
    """(kind, operand before, operand after) of the operators that can be swapped."""
    match node:
        case ast.Compare():
            for pair in zip([node.left, *node.comparators], node.comparators, strict=False):
                yield "comparison", *pair
        case ast.BinOp(op=ast.Add() | ast.Sub()):
            yield "sum", node.left, node.right
        case ast.AugAssign(op=ast.Add() | ast.Sub()):
            yield "sum", node.target, node.value
        case ast.BoolOp():
            for pair in zip(node.values, node.values[1:], strict=False):
                yield "and/or", *pair


def parts(node):
    """(kind, node that is replaced, by what) of the other faults."""
    match node:
        case ast.Constant(value=bool()):
            yield "constant", node, lambda text: str(text != "True")
        case ast.Constant(value=int() | float()):
            yield "constant", node, lambda text: str(ast.literal_eval(text) + 1)
        case ast.If() | ast.While() | ast.IfExp():
            yield "condition", node.test, lambda text: f"not ({text})"
        case ast.keyword(arg=str()):
            yield "keyword", node, lambda _: ""
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise() | ast.Continue():
            yield "statement", node, lambda _: "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield "statement", node, lambda _: "pass"


def swap(between):
    names = sorted(SWAPPED, key=len, reverse=True)
    pattern = "|".join(rf"\b{name}\b" if name.isalpha() else re.escape(name) for name in names)
    return re.sub(pattern, lambda found: SWAPPED[found[0]], between, count=1)


def changed(line, begin, end, new):
    """The line with the text between two of its bytes replaced; removes a comma left alone."""
    raw = line.encode()
    before, between, after = (part.decode() for part in (raw[:begin], raw[begin:end], raw[end:]))
    between = new(between)
    if not between and after.startswith(","):
        after = after[1:].lstrip()
    elif not between:
        before = before.rstrip(" ,")
    return before + between + after


# -------------------------------------------------------------------------------------- testing


def test_all(mutants, lines, tests, limit):
    results = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        tree = Path(directory, "tree")
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
        if (ROOT.parent / "shared").exists():  # golden values, real speech
            Path(directory, "shared").symlink_to(ROOT.parent / "shared")
        start = time.perf_counter()
        if outcome(tree, tests, limit) != "survived":
            sys.exit(f"without a mutant, these tests don't pass within {limit:g} s: {tests}")
        print(f"tests take {time.perf_counter() - start:.0f} s: {tests}")
        for mutant in mutants:
            places = find(mutant, lines)
            where, result = mutant.function, f"not placed: {len(places)} such lines"
            if len(places) == 1:
                where = f"{places[0][0]}:{places[0][1] + 1}"
                result = test_one(mutant, places[0], tree, tests, limit)
            results.append(result.split(":")[0])
            print(f"{where}: {mutant.source}  ->  {mutant.mutated or '(nothing)'}  {result}")
            sys.stdout.flush()
    print(", ".join(f"{results.count(result)} {result}" for result in sorted(set(results))))


def test_one(mutant, place, tree, tests, limit):
    path, number = tree / place[0], place[1]
    text = path.read_text()
    rows = text.split("\n")
    rows[number] = rows[number].replace(mutant.source, mutant.mutated)
    path.write_text("\n".join(rows))
    try:
        return outcome(tree, tests, limit)
    finally:
        path.write_text(text)


def outcome(tree, tests, limit):
    """The outcome of the tests: a fault was "caught", "survived", or they "timed out"."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", *shlex.split(tests)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # old byte code hides a change
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=tree, env=environment, start_new_session=True, **silent)
    try:
        return "caught" if process.wait(limit) else "survived"
    except subprocess.TimeoutExpired:
        return "timed out"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that the tests started
            process.wait()


if __name__ == "__main__":
    main()
