"""Check shape comments while the code runs.

    report = check_shapes(package_dir, run)      # run() exercises the package's engine
    assert report.ok, report

A shape comment is at the end of a line and begins with a shape, which words may follow:

    q = self.q_proj(hidden).view(num_tokens, -1, self.head_dim)  # [N, H, D]
    token_ids: Tensor  # [N] all sequences end to end
    return self.lm_head(hidden)  # [R, V]

It is checked after an assignment (for each target), at a `return`, at each iteration of a `for`, for a parameter when
its function is entered, and for a class's field when an instance has been created. In a statement of several lines it is
on the first or the last line. Pointers (`q_ptr`) are not checked.

`dimensions` explains what a dimension may be.
"""
import ast
import io
import os
import re
import sys
import threading
import tokenize
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from shared.book.dimensions import Comment, Letters, known_in, parse_dims
from shared.book.units import read_units
from shared.chapters import python_files

SHAPE = re.compile(r"#\s*(\[[^\]]*\])")
BINDS = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.For, ast.Return)


@dataclass
class Report:
    """The result of checking a package's shape comments in a run."""

    comments: list[Comment] = field(default_factory=list)
    misplaced: list[str] = field(default_factory=list)

    @property
    def checked(self) -> list[str]:
        return [str(comment) for comment in self.comments if comment.checked]

    @property
    def false(self) -> list[str]:
        return [f"{comment} {comment.false}" for comment in self.comments if comment.false]

    @property
    def unreached(self) -> list[str]:
        advice = "was never reached; run code that reaches it, or remove the comment"
        return [f"{comment} {advice}" for comment in self.comments if not comment.checked] + self.misplaced

    @property
    def ok(self) -> bool:
        return not self.false and not self.unreached

    def __str__(self) -> str:
        count = f"{len(self.checked)} of {len(self.comments)} shape comments checked"
        return "\n".join([*self.false, *self.unreached, count])


@dataclass
class File:
    """A source file's shape comments, by what they are attached to."""

    statements: dict[int, list[Comment]] = field(default_factory=dict)  # by id of the statement
    statement_at: dict[int, ast.stmt] = field(default_factory=dict)  # the innermost one, by line
    parameters: dict[int, list[Comment]] = field(default_factory=dict)  # by the function's line
    fields: dict[str, list[Comment]] = field(default_factory=dict)  # by the class's qualified name


def read_file(path: Path, name: str, owners: dict[int, str], report: Report) -> File:
    """Find a file's shape comments, and the values each describes; all are added to the report."""
    source = path.read_text()
    module, lines, found = ast.parse(source), source.splitlines(), File()
    classes, parameters = {}, {}
    for node, qualified in walk(module):
        if isinstance(node, ast.stmt):
            header = node.body[0].lineno if getattr(node, "body", None) else node.end_lineno + 1
            for line in range(node.lineno, max(header, node.lineno + 1)):
                found.statement_at[line] = node
        if isinstance(node, ast.ClassDef):
            classes |= {id(child): qualified for child in node.body}
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            parameters |= {argument.end_lineno: (argument.arg, node) for argument in arguments}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        shape = SHAPE.match(token.string) if token.type == tokenize.COMMENT else None
        number, column = token.start
        if not shape or not lines[number - 1][:column].strip():
            continue
        where = f"{owners.get(number, name)} line {number}"
        text, statement = lines[number - 1].strip(), found.statement_at.get(number)
        dims = parse_dims(shape[1])
        if dims is None:
            report.misplaced.append(f"{where}: `{text}` has no shape in its brackets; start other comments with a word")
            continue
        comment = Comment(where, text, dims, [])
        if number in parameters and isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            argument, function = parameters[number]
            if argument.endswith("_ptr"):
                continue
            comment.targets = [argument]
            found.parameters.setdefault(function.lineno, []).append(comment)
        elif isinstance(statement, ast.AnnAssign) and id(statement) in classes:
            comment.targets = [ast.unparse(statement.target)]
            found.fields.setdefault(classes[id(statement)], []).append(comment)
        elif isinstance(statement, BINDS) and number in (statement.lineno, last_line(statement)):
            comment.targets = [ast.unparse(target) for target in targets_of(statement)]
            found.statements.setdefault(id(statement), []).append(comment)
        else:
            report.misplaced.append(f"{where}: `{text}` is on a line that assigns no value; move or remove the comment")
            continue
        report.comments.append(comment)
    return found


def walk(node: ast.AST, qualified: str = ""):
    """Every node, outer ones first, with the qualified name of the innermost class or function, itself included."""
    for child in ast.iter_child_nodes(node):
        name = qualified
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{qualified}.{child.name}".removeprefix(".")
        yield child, name
        inside = ".<locals>" if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else ""
        yield from walk(child, name + inside)


def last_line(statement: ast.stmt) -> int:
    return statement.iter.end_lineno if isinstance(statement, ast.For) else statement.end_lineno


def targets_of(statement: ast.stmt) -> list[ast.expr]:
    """The targets of an assignment or loop, with tuples flattened; none for a return."""
    if isinstance(statement, ast.Return):
        return []
    targets = list(statement.targets) if isinstance(statement, ast.Assign) else [statement.target]
    flat = []
    while targets:
        target = targets.pop(0)
        if isinstance(target, (ast.Tuple, ast.List)):
            targets = target.elts + targets
        else:
            flat.append(target.value if isinstance(target, ast.Starred) else target)
    return flat


class Tracer:
    """Traces the frames of a package's own files, and checks each comment once its value exists."""

    def __init__(self, package_dir: Path):
        self.report = Report()
        self.files = {}
        self.real_paths = {}
        units = read_units(package_dir)
        for path in python_files(package_dir):
            name = path.relative_to(package_dir).as_posix()
            owners = {}
            for unit in units.values():
                for piece in unit.pieces:
                    owners |= {piece.first_line + n: unit.address for n in range(piece.text.count("\n") + 1)
                               if unit.address.split("::")[0] == name}
            self.files[os.path.realpath(path)] = read_file(path, name, owners, self.report)

    def file_of(self, filename: str) -> File | None:
        if filename not in self.real_paths:
            self.real_paths[filename] = os.path.realpath(filename)
        return self.files.get(self.real_paths[filename])

    def on_call(self, frame, event, _):
        """The trace function of every new frame: traces those of the package, and generated constructors."""
        code = frame.f_code
        file = self.file_of(code.co_filename)
        if file is None:
            # Methods generated by dataclasses and named tuples have no file.
            return self.on_made if code.co_filename == "<string>" else None
        if code.co_name.startswith("<") and code.co_name != "<module>":
            return None  # a comprehension's lines belong to its statement
        letters = Letters(known_in(frame.f_locals))
        for comment in file.parameters.get(code.co_firstlineno, file.parameters.get(frame.f_lineno, [])):
            if frame.f_locals.get(comment.targets[0]) is not None:
                letters.check(comment, frame.f_locals[comment.targets[0]])
        return Follower(self, file, letters).on_event

    def on_made(self, frame, event, value):
        """The trace function of a generated constructor: checks the new instance's fields."""
        if event == "return":
            first = frame.f_code.co_varnames[:1]
            self.check_fields(frame.f_locals.get(*first) if frame.f_code.co_name == "__init__" else value)
        return self.on_made

    def check_fields(self, made) -> None:
        """Check the fields of a new instance against the comments in its class and its base classes."""
        letters = None
        for kind in type(made).__mro__:
            module = sys.modules.get(kind.__module__)
            file = self.file_of(getattr(module, "__file__", None) or "")
            for comment in file.fields.get(kind.__qualname__, []) if file else []:
                letters = letters or Letters(known_in({"self": made}))
                value = getattr(made, comment.targets[0], None)
                if value is not None:  # None: an optional field without a value
                    letters.check(comment, value)
        if letters:
            letters.settle()


class Follower:
    """Traces one frame of the package; a statement is complete when the next one starts."""

    def __init__(self, tracer: Tracer, file: File, letters: Letters):
        self.tracer = tracer
        self.file = file
        self.letters = letters
        self.statement = None

    def on_event(self, frame, event, value):
        if event == "line":
            statement = self.file.statement_at.get(frame.f_lineno)
            leaving = isinstance(self.statement, ast.Return) and isinstance(statement, ast.With)
            if statement is not self.statement and not leaving:
                self.finish(frame)
                self.statement = statement
        elif event == "exception":
            self.statement = None
        elif event == "return":
            self.finish(frame, value)
            self.letters.settle()
            if frame.f_code.co_name == "__init__" and "self" in frame.f_locals:
                self.tracer.check_fields(frame.f_locals["self"])
        return self.on_event

    def finish(self, frame, returned=None) -> None:
        """Check the comments of the statement that has just run against the values it assigned or returned."""
        statement, self.statement = self.statement, None
        comments = self.file.statements.get(id(statement), [])
        if comments:
            self.letters.known = known_in(frame.f_locals)
        for comment in comments:
            if isinstance(statement, ast.Return):
                self.letters.check(comment, returned)
            for target in comment.targets:
                try:
                    value = eval(target, frame.f_globals, frame.f_locals)
                except Exception:  # no value: a loop without an iteration
                    continue
                self.letters.check(comment, value)


@contextmanager
def tracing(package_dir: Path):
    """Check the package's shape comments while the block runs; yields the report, which is complete afterward."""
    tracer = Tracer(Path(package_dir))
    before, before_threads = sys.gettrace(), threading.gettrace()
    sys.settrace(tracer.on_call)
    threading.settrace(tracer.on_call)
    try:
        yield tracer.report
    finally:
        sys.settrace(before)
        threading.settrace(before_threads)


def check_shapes(package_dir: Path, run: Callable[[], object]) -> Report:
    """Call run, which exercises a package, and check the package's shape comments in it."""
    with tracing(package_dir) as report:
        run()
    return report
