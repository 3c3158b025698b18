"""The modules that read each flag of train.py: how far the command line reaches into the program.

    python benchmarks/flag_readers.py [--but FILE ...]

Counts `args.NAME` and `getattr(args, "NAME")` on any variable named like a namespace of flags, in
all modules but tests, benchmarks, those that declare and check the flags (`--but`), and other
commands, which have their own flags (they call `CommandLine`). If a module has a field of the same
name, that is assumed. Computed names aren't seen: the last line lists the modules that have some.
"""

import argparse
import ast
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMESPACE = ("args", "flags", "options", "kept", "explicit", "inherited")  # or ..._args


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--but",
        nargs="+",
        default=["utils/run/flags.py", "utils/run/rules.py", "utils/run/resolve.py"],
        metavar="FILE",
    )
    but = parser.parse_args().but
    flags = declared([parsed(ROOT / file) for file in but])
    readers, unseen = {flag: [] for flag in flags}, []
    for module in modules():
        tree = parsed(ROOT / module)
        if module not in but and not is_command(tree):
            found = read(tree)
            for flag in (found & flags) - own_names(tree):
                readers[flag].append(module)
            unseen += [module] * (None in found)
    for flag, names in sorted(readers.items(), key=lambda item: (-len(item[1]), item[0])):
        print(f"{flag:27} {len(names)}  {' '.join(names)}".rstrip())
    counts = [len(names) for names in readers.values()]
    print(
        f"{len(flags)} flags, {sum(counts)} readers: {sum(n > 2 for n in counts)} flags in more "
        f"than two modules, {counts.count(0)} in none; names computed in {' '.join(unseen)}"
    )


def is_command(tree):
    """Whether a module reads its own command line."""
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return any(getattr(function, "id", "") == "CommandLine" for function in calls)


def parsed(path):
    return ast.parse(path.read_text(), str(path))


def modules():
    for folder, folders, files in os.walk(ROOT):
        left_out = ("tests", "benchmarks", "demo", "runs")
        folders[:] = sorted(f for f in folders if f[0] not in "._" and f not in left_out)
        for file in sorted(files):
            if file.endswith(".py") and not file.endswith("unit_tests.py"):
                yield Path(folder, file).relative_to(ROOT).as_posix()


def declared(trees):
    """Names of the flags in calls `add("--NAME", ...)`, and in loops over names around them."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    assigned = {n.targets[0].id: n.value for n in nodes if isinstance(n, ast.Assign)
                and isinstance(n.targets[0], ast.Name)}  # fmt: skip
    flags = {str(argument.value).lstrip("-") for argument in added(nodes, ast.Constant)}
    for node in nodes:
        if isinstance(node, ast.For) and list(added(ast.walk(node), ast.JoinedStr)):
            flags |= set(names_in(node.iter, assigned))
    return flags


def own_names(tree):
    """Other names in a module's namespaces: flags of another command, fields of its classes."""
    nodes = list(ast.walk(tree))
    targets = {n.value.value for n in nodes if isinstance(n, ast.keyword) and n.arg == "dest"}
    fields = {getattr(n.target, "id", "") for n in nodes if isinstance(n, ast.AnnAssign)}
    return declared([tree]) | targets | fields


def added(nodes, kind):
    """First arguments of this type in the calls of add and add_argument among the nodes."""
    for node in nodes:
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], kind):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in ("add", "add_argument"):
                yield node.args[0]


def names_in(node, assigned):
    """The keys of a dict, or the words of a list, that a loop runs over."""
    if isinstance(node, ast.Call):  # {...}.items()
        node = getattr(node.func, "value", node)
    node = assigned.get(getattr(node, "id", ""), node)
    keys = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
    return [key.value for key in keys if isinstance(key, ast.Constant)]


def read(tree):
    """The names read from namespaces of flags; None stands for a computed name."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            names |= {node.attr} if is_namespace(node.value) else set()
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            place, name = node.args[:2]
            names |= {getattr(name, "value", None)} if is_namespace(place) else set()
    return names


def is_namespace(node):
    name = getattr(node, "id", getattr(node, "attr", ""))  # args, or self.args
    return name in NAMESPACE or name.endswith("_args")


if __name__ == "__main__":
    main()
