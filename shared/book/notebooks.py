"""Write and check the notebooks: Python sources with cells, committed as executed notebooks with their outputs.

    python -m shared.book.notebooks [v05 ...]      # execute in a kernel, and write notebooks/*.ipynb
    python -m shared.book.notebooks check          # run all sources; fail if one raises, or its notebook is stale
    python -m shared.book.notebooks diff v05       # compare a chapter's notebook with the one before
    python -m shared.book.notebooks nbdime         # set this clone's git up to show and merge notebooks by cells

A source is `notebooks/NAME.py`; jupytext splits it at `# %%`. A notebook is stale if its cells differ from the source's, or
if a run prints something else; numbers with a decimal point and the outputs of cells tagged `varies` may differ.

Reads: notebooks/*.py. Writes: notebooks/*.ipynb.
"""
import argparse
import contextlib
import difflib
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
    """The source as a notebook without outputs; its cells' ids are numbers, so that they do not change at random."""
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
    """An output as it is committed: of stderr only the engines' own lines, not the libraries' warnings; None if nothing is left."""
    if output.get("name") != "stderr":
        return output
    output.text = chosen(output.text)
    return output if output.text else None


def chosen(text: str) -> str:
    """The lines in which an engine reports its choices, such as device and attention."""
    return "".join(line for line in text.splitlines(keepends=True) if line.startswith("pocket: "))


# ---- checking

def run_cells(source: Path, scratch: Path) -> None:
    """Run the source's cells in its directory, in a fork; write each cell's output, or the error of one, to scratch."""
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
    """The output of each code cell; or, as a single string, how the run failed."""
    printed = ended.scratch / "printed.json"
    if printed.exists():
        return json.loads(printed.read_text())
    return f"not done after {TIMEOUT_S} s" if ended.exit_code is None else f"the process exited with {ended.exit_code}"


def run_sources(sources: list[Path]) -> dict[Path, list[str] | str]:
    """Run the sources, several at a time; each one's `printed_by`."""
    works = [Work(partial(run_cells, source), TIMEOUT_S) for source in sources]
    return {sources[ended.number]: printed_by(ended) for ended in in_forks(works, "notebooks")}


def unlike(source: Path) -> list[str]:
    """How a notebook's cells differ from its source's, without running it."""
    import nbformat

    name, path = source.name, source.with_suffix(".ipynb")
    if not source.is_file():
        return [f"{name} is missing; every chapter has a notebook"]
    if not path.is_file():
        return [f"{name} has no notebook; run `make notebooks`"]
    fresh, kept = read(source), nbformat.read(path, as_version=4)
    if [each_of(cell) for cell in fresh.cells] != [each_of(cell) for cell in kept.cells]:
        return [f"{path.name} does not have the cells of {name}; run `make notebooks`"]
    return []


def unprinted(source: Path, outputs: list[str] | str) -> list[str]:
    """How a notebook's outputs differ from those of a run of its source."""
    import nbformat

    path = source.with_suffix(".ipynb")
    if isinstance(outputs, str):
        return [f"{source.name}: {outputs}"]
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    wrong = []
    for number, (cell, output) in enumerate(zip(code, outputs, strict=True)):
        if any(each.output_type == "execute_result" for each in cell.outputs):
            wrong.append(f"{path.name}: code cell {number} ends with a value; print it, so that it is compared")
        streams = [each for each in cell.outputs if each.output_type == "stream"]
        before, after = counted("".join(each.text for each in streams)), counted(output)
        # Two streams may interleave in any order.
        if len({each.name for each in streams}) > 1:
            before, after = sorted(before), sorted(after)
        if "varies" not in cell.metadata.get("tags", []) and before != after:
            lines = "\n".join(difflib.unified_diff(before, after, "committed", "printed now", lineterm="", n=0))
            wrong.append(f"{path.name}: code cell {number} now prints different lines; run `make notebooks`, and check them\n{lines}")
    return wrong


def each_of(cell) -> tuple:
    """The parts of a cell that come from the source."""
    return cell.cell_type, cell.source, cell.metadata.get("tags", [])


def counted(text: str) -> list[str]:
    """The lines that are not empty, with measured numbers replaced.

    >>> counted("that took  1.5 ms\\nfed 11 tokens\\n")
    ['that took ? ms', 'fed 11 tokens']
    """
    lines = (MEASURED.sub("?", line) for line in text.splitlines())
    return [" ".join(line.split()) for line in lines if line.strip()]


def problems(sources: list[Path]) -> dict[Path, list[str]]:
    """How each notebook differs from its source; those whose cells match are run."""
    by_source = {source: unlike(source) for source in sources}
    for source, outputs in run_sources([source for source in sources if not by_source[source]]).items():
        by_source[source] = unprinted(source, outputs)
    return by_source


def check(book: Book) -> bool:
    """Run every source and print the problems of each notebook; whether there are none."""
    os.environ["MPLBACKEND"] = "Agg"  # matplotlib reads it when it is imported
    preload((*SLOW, "matplotlib.pyplot", "jupytext", "nbformat", "httpx", "openai", "fastapi", "uvicorn"))
    by_source = problems([chapter.notebook for chapter in book.chapters])
    for source, wrong in by_source.items():
        print(f"{source.stem:24} {'wrong' if wrong else 'runs and is up to date'}", *wrong, sep="\n", flush=True)
    failed = [source.stem for source, wrong in by_source.items() if wrong]
    but = f", but not {', '.join(failed)}" if failed else ""
    print(f"{len(by_source) - len(failed)} of {len(book.chapters)} notebooks run and are up to date{but}")
    return not failed


def diff(chapter: Chapter) -> int:
    """Show the difference from the previous chapter's notebook with nbdime; its exit code."""
    previous = chapter.previous
    if previous is None:
        raise ValueError(f"{chapter.id} is the first chapter, so there is no notebook to compare with")
    paths = [f"notebooks/{each.name}.ipynb" for each in (previous, chapter)]
    missing = [path for path in paths if not (chapter.root / path).is_file()]
    if missing:
        raise ValueError(f"{' and '.join(missing)} is not written yet; run `make notebooks`")
    return subprocess.run([Path(sys.executable).with_name("nbdiff"), "--sources", *paths], cwd=chapter.root).returncode


def use_nbdime(root: Path) -> None:
    """Set this clone's git up to show and merge notebooks by cells, with the drivers that .gitattributes names.

    Full paths are used, since git may run where this environment's programs are not on the PATH.
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
    parser.add_argument("what", nargs="*", metavar="vNN", help="chapters to write; or check, diff vNN or nbdime")
    args = parser.parse_args(argv)
    command = args.what[0] if args.what else ""
    try:
        if command in ("check", "nbdime") and len(args.what) > 1:
            parser.error(f"{command} is for all notebooks; leave out {' '.join(args.what[1:])}")
        if command == "check":
            return 0 if check(BOOK) else 1
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
