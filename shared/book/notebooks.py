"""The notebooks: written as Python with cells, committed as notebooks with what they printed and drew.

    python -m shared.book.notebooks [v05 ...]      # write notebooks/*.ipynb anew, executed in a kernel
    python -m shared.book.notebooks check          # run all sources; fail if one raises, or its notebook is stale
    python -m shared.book.notebooks diff v05       # what a chapter's notebook changes against the one before
    python -m shared.book.notebooks nbdime         # let this clone's git show and merge notebooks by cells

A source is `notebooks/NAME.py`; jupytext splits it at `# %%`. A notebook is stale when its cells are not the source's,
or when a run prints something else than it has; numbers with a decimal point, and cells tagged `varies`, may differ.
"""
import argparse
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from shared.book.forks import SLOW, preload, wait
from shared.book.tree import Tree, short, this_repository

TIMEOUT_S = 120
MEASURED = re.compile(r"\d[\d,]*\.\d+(e-?\d+)?")


def sources(tree: Tree) -> list[Path]:
    """One for each chapter, in order."""
    return [tree.root / "notebooks" / f"{chapter.name}.py" for chapter in tree.chapters]


def read(source: Path):
    """The source as a notebook without outputs; its cells are numbered, so that nothing in it is due to chance."""
    import jupytext

    notebook = jupytext.read(source, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


# ---- writing

def execute(source: Path) -> None:
    """Run a source in a kernel of this Python, and write the notebook beside it."""
    import nbformat
    from nbclient import NotebookClient

    notebook = read(source)
    where = {"metadata": {"path": str(source.parent)}}
    client = NotebookClient(notebook, kernel_name="python3", timeout=TIMEOUT_S, resources=where)
    client.extra_arguments = ["--log-level=ERROR"]
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            cell.outputs = [output for output in map(without_noise, cell.outputs) if output]
    nbformat.write(notebook, source.with_suffix(".ipynb"))


def without_noise(output):
    """An output as it may be committed: of stderr only what engines say they chose, not what libraries think."""
    if output.get("name") != "stderr":
        return output
    output.text = chosen(output.text)
    return output if output.text else None


def chosen(text: str) -> str:
    """The lines in which an engine says what it chose."""
    return "".join(line for line in text.splitlines(keepends=True) if line.startswith("pocket: "))


# ---- checking

def printed(source: Path) -> list[str] | str:
    """What each code cell prints, run in a fork; or, as one text, how it failed."""
    cells = [cell.source for cell in read(source).cells if cell.cell_type == "code"]
    with tempfile.TemporaryDirectory() as scratch:
        said = Path(scratch) / "printed.json"
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            be_child(source, cells, said)
        exit_code = wait(child, TIMEOUT_S)
        if said.exists():
            return json.loads(said.read_text())
        return f"no end after {TIMEOUT_S} s" if exit_code is None else f"the process ended with {exit_code}"


def be_child(source: Path, cells: list[str], said: Path) -> None:
    """In the fork: run the cells in the notebook's directory, leave what they printed, and end without returning."""
    try:
        os.setsid()
        os.chdir(source.parent)
        os.environ["MPLBACKEND"] = "Agg"
        space, outputs = {"__name__": "__main__"}, []
        for number, cell in enumerate(cells):
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                exec(compile(cell, f"{source.name}, cell {number}", "exec"), space)
            outputs.append(out.getvalue() + "\n" + chosen(err.getvalue()))
        said.write_text(json.dumps(outputs))
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[1:] or [None]
        said.write_text(json.dumps(f"{type(error).__name__} in {where[0] and where[0].filename}: {error}"))
    finally:
        os._exit(0)


def problems(source: Path) -> list[str]:
    """Why a notebook is not what its source says."""
    import nbformat

    name, path = source.name, source.with_suffix(".ipynb")
    if not source.is_file():
        return [f"there is no {name}; every chapter has a notebook"]
    if not path.is_file():
        return [f"{name} has no notebook; run `make notebooks`"]
    fresh, kept = read(source), nbformat.read(path, as_version=4)
    if [each_of(cell) for cell in fresh.cells] != [each_of(cell) for cell in kept.cells]:
        return [f"{path.name} has other cells than {name}; run `make notebooks`"]
    outputs = printed(source)
    if isinstance(outputs, str):
        return [f"{name}: {outputs}"]
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    found = []
    for number, (cell, output) in enumerate(zip(code, outputs, strict=True)):
        if any(each.output_type == "execute_result" for each in cell.outputs):
            found.append(f"{path.name}: code cell {number} ends with a value; print it, so that it is compared")
        before = "".join(each.text for each in cell.outputs if each.output_type == "stream")
        if "varies" not in cell.metadata.get("tags", []) and counted(before) != counted(output):
            found.append(f"{path.name}: code cell {number} prints other lines now; run `make notebooks`, and look at them")
    return found


def each_of(cell) -> tuple:
    """What of a cell is the source's."""
    return cell.cell_type, cell.source, cell.metadata.get("tags", [])


def counted(text: str) -> list[str]:
    """The lines in any order of the two streams, without what is measured.

    >>> counted("that took  1.5 ms\\nfed 11 tokens\\n")
    ['fed 11 tokens', 'that took ? ms']
    """
    lines = (MEASURED.sub("?", line) for line in text.splitlines())
    return sorted(" ".join(line.split()) for line in lines if line.strip())


def check(tree: Tree) -> list[str]:
    """Run every source; what is wrong, notebook by notebook."""
    preload((*SLOW, "matplotlib.pyplot", "jupytext", "nbformat", "httpx", "openai", "fastapi", "uvicorn"))
    found, sound = [], 0
    for source in sources(tree):
        wrong = problems(source)
        print(f"{source.stem:24} {'wrong' if wrong else 'runs, and is what it was'}", flush=True)
        found += wrong
        sound += not wrong
    print(f"{sound} of {len(tree.chapters)} notebooks run and are what they were")
    return found


def diff(tree: Tree, chapter: Path) -> int:
    """Show what the chapter's notebook changes, by nbdime."""
    previous = tree.previous(chapter)
    if previous is None:
        raise ValueError(f"{short(chapter)} is the first chapter; there is no notebook before it")
    paths = [f"notebooks/{each.name}.ipynb" for each in (previous, chapter)]
    return subprocess.run([Path(sys.executable).with_name("nbdiff"), "--sources", *paths], cwd=tree.root).returncode


def use_nbdime(root: Path) -> None:
    """Have this clone's git show and merge notebooks by cells; .gitattributes names the drivers, and this says what they are.

    By their whole paths: git may be called where this environment's programs are not found.
    """
    programs = Path(sys.executable).parent
    diff, merge = (shlex.quote(str(programs / name)) for name in ("git-nbdiffdriver", "git-nbmergedriver"))
    settings = {
        "diff.jupyternotebook.command": f"{diff} diff",
        "merge.jupyternotebook.driver": f"{merge} merge %O %A %B %L %P",
        "merge.jupyternotebook.name": "notebooks, by cells",
    }
    for key, value in settings.items():
        subprocess.run(["git", "config", key, value], cwd=root, check=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m shared.book.notebooks", description="Write, check and compare the notebooks.")
    parser.add_argument("what", nargs="*", metavar="vNN", help="chapters to write; or check, or diff vNN, or nbdime")
    args = parser.parse_args(argv)
    tree = this_repository()
    command = args.what[0] if args.what else ""
    try:
        if command == "check":
            found = check(tree)
            print("\n".join(found), file=sys.stderr)
            return 1 if found else 0
        if command == "nbdime":
            use_nbdime(tree.root)
            return 0
        if command == "diff":
            if len(args.what) != 2:
                parser.error("name one chapter, as in diff v05")
            return diff(tree, tree.chapter(args.what[1]))
        chosen = {tree.chapter(name).name for name in args.what}
    except ValueError as error:
        parser.error(str(error))
    for source in sources(tree):
        if not chosen or source.stem in chosen:
            execute(source)
            print(f"{source.stem:24} {source.with_suffix('.ipynb').stat().st_size // 1024:6} KiB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
