"""The notebooks: written as Python with cells, committed as notebooks with what they printed and drew.

    python -m shared.book.notebooks [v05 ...]      # write notebooks/*.ipynb anew, executed in a kernel
    python -m shared.book.notebooks check          # run all sources; fail if one raises, or its notebook is stale
    python -m shared.book.notebooks diff v05       # what a chapter's notebook changes against the one before
    python -m shared.book.notebooks nbdime         # let this clone's git show and merge notebooks by cells

A source is `notebooks/NAME.py`; jupytext splits it at `# %%`. A notebook is stale when its cells are not the source's,
or when a run prints something else than it has; numbers with a decimal point, and cells tagged `varies`, may differ.

Reads: notebooks/*.py. Writes: notebooks/*.ipynb.
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
import traceback
from functools import partial
from pathlib import Path

from shared.book.forks import SLOW, Ended, Work, in_forks, preload
from shared.chapters import BOOK, Book, Chapter
from shared.programs import run

TIMEOUT_S = 120
MEASURED = re.compile(r"\d[\d,]*\.\d+(e-?\d+)?")


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

def run_cells(source: Path, scratch: Path) -> None:
    """In a fork: run the source's cells in its directory, and leave what each printed, or how one failed, in scratch."""
    os.chdir(source.parent)
    cells = [cell.source for cell in read(source).cells if cell.cell_type == "code"]
    space, printed = {"__name__": "__main__"}, []
    try:
        for number, cell in enumerate(cells):
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                exec(compile(cell, f"{source.name}, cell {number}", "exec"), space)
            printed.append(out.getvalue() + "\n" + chosen(err.getvalue()))
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[1:] or [None]
        printed = f"{type(error).__name__} in {where[0] and where[0].filename}: {error}"
    (scratch / "printed.json").write_text(json.dumps(printed))


def printed_by(ended: Ended) -> list[str] | str:
    """What each code cell printed; or, as one text, how the run failed."""
    said = ended.scratch / "printed.json"
    if said.exists():
        return json.loads(said.read_text())
    return f"no end after {TIMEOUT_S} s" if ended.exit_code is None else f"the process ended with {ended.exit_code}"


def run_sources(sources: list[Path]) -> dict[Path, list[str] | str]:
    """What each source prints, several run at a time."""
    works = [Work(partial(run_cells, source), TIMEOUT_S) for source in sources]
    return {sources[ended.number]: printed_by(ended) for ended in in_forks(works, "notebooks")}


def unlike(source: Path) -> list[str]:
    """Why a notebook is not its source's, without running it."""
    import nbformat

    name, path = source.name, source.with_suffix(".ipynb")
    if not source.is_file():
        return [f"there is no {name}; every chapter has a notebook"]
    if not path.is_file():
        return [f"{name} has no notebook; run `make notebooks`"]
    fresh, kept = read(source), nbformat.read(path, as_version=4)
    if [each_of(cell) for cell in fresh.cells] != [each_of(cell) for cell in kept.cells]:
        return [f"{path.name} has other cells than {name}; run `make notebooks`"]
    return []


def unprinted(source: Path, outputs: list[str] | str) -> list[str]:
    """What a notebook has kept that a run of its source did not print."""
    import nbformat

    path = source.with_suffix(".ipynb")
    if isinstance(outputs, str):
        return [f"{source.name}: {outputs}"]
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
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


def problems(sources: list[Path]) -> dict[Path, list[str]]:
    """Why each notebook is not what its source says; those are run that could be."""
    found = {source: unlike(source) for source in sources}
    for source, outputs in run_sources([source for source in sources if not found[source]]).items():
        found[source] = unprinted(source, outputs)
    return found


def check(book: Book) -> list[str]:
    """Run every source; what is wrong, notebook by notebook."""
    os.environ["MPLBACKEND"] = "Agg"  # before matplotlib is imported, which reads it then
    preload((*SLOW, "matplotlib.pyplot", "jupytext", "nbformat", "httpx", "openai", "fastapi", "uvicorn"))
    found = problems([chapter.notebook for chapter in book.chapters])
    for source, wrong in found.items():
        print(f"{source.stem:24} {'wrong' if wrong else 'runs, and is what it was'}", flush=True)
    sound = sum(not wrong for wrong in found.values())
    print(f"{sound} of {len(book.chapters)} notebooks run and are what they were")
    return [each for wrong in found.values() for each in wrong]


def diff(chapter: Chapter) -> int:
    """Show what the chapter's notebook changes, by nbdime."""
    previous = chapter.previous
    if previous is None:
        raise ValueError(f"{chapter.id} is the first chapter; there is no notebook before it")
    paths = [f"notebooks/{each.name}.ipynb" for each in (previous, chapter)]
    return subprocess.run([Path(sys.executable).with_name("nbdiff"), "--sources", *paths], cwd=chapter.root).returncode


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
    command = args.what[0] if args.what else ""
    try:
        if command == "check":
            found = check(BOOK)
            print("\n".join(found), file=sys.stderr)
            return 1 if found else 0
        if command == "nbdime":
            use_nbdime(BOOK.root)
            return 0
        if command == "diff":
            if len(args.what) != 2:
                parser.error("name one chapter, as in diff v05")
            return diff(BOOK.find(args.what[1]))
        chosen = [BOOK.find(name) for name in args.what] or BOOK.chapters
    except ValueError as error:
        parser.error(str(error))
    for chapter in chosen:
        execute(chapter.notebook)
        print(f"{chapter.name:24} {chapter.notebook.with_suffix('.ipynb').stat().st_size // 1024:6} KiB", flush=True)
    return 0


if __name__ == "__main__":
    run(main)
