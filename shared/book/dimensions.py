"""What the letters in shape comments stand for, and whether a value has the shape that a comment states.

A dimension is a number, a name, or arithmetic on them (`D / 2`, `S + 1`). If a name already has a value in this frame or
instance, that is used. Otherwise it is looked up, under its own name and under its name in VOCABULARY, among the frame's
variables, then on self, config and batch; only ints count. If it is not found, it takes its value here. `...` stands for
any dimensions. A list has one dimension; nested lists have as many as the comment has.
"""
import ast
from collections.abc import Callable
from dataclasses import dataclass

VOCABULARY = {
    "N": "num_tokens",
    "S": "num_seqs",
    "H": "num_heads",
    "KV": "num_kv_heads",
    "D": "head_dim",
    "P": "num_blocks",
    "BS": "block_size",
    "E": "hidden_size",
    "V": "vocab_size",
}

OPERATORS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
}
# Solves `x op b = r` (LEFT) and `a op x = r` (RIGHT) for x. Floor division has no unique solution, so it is left out.
LEFT = {
    ast.Add: lambda r, b: r - b,
    ast.Sub: lambda r, b: r + b,
    ast.Mult: lambda r, b: r / b,
    ast.Div: lambda r, b: r * b,
}
RIGHT = {
    ast.Add: lambda r, a: r - a,
    ast.Sub: lambda r, a: a - r,
    ast.Mult: lambda r, a: r / a,
    ast.Div: lambda r, a: a / r,
}


@dataclass
class Comment:
    """One shape comment, what it describes, and the result of checking it."""

    where: str  # file.py::Unit line 12
    line: str
    dims: list[ast.expr]
    targets: list[str]  # expressions; a field's or parameter's name; empty for a return
    checked: int = 0
    false: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: `{self.line}`"


class Letters:
    """The values of the names in one frame's, or one instance's, shape comments."""

    def __init__(self, known: Callable[[str], int | None]):
        self.known = known
        self.values = {}
        self.seen = []  # (comment, shape), checked again at the end, when every name has its value

    def value(self, dim: ast.expr):
        """A dimension's value; None while a name in it is unknown."""
        match dim:
            case ast.Constant():
                return dim.value
            case ast.Name():
                if dim.id not in self.values:
                    known = self.known(dim.id)
                    if known is None:
                        return None
                    self.values[dim.id] = known
                return self.values[dim.id]
            case ast.BinOp():
                left, right = self.value(dim.left), self.value(dim.right)
                return None if left is None or right is None else OPERATORS[type(dim.op)](left, right)

    def agree(self, dim: ast.expr, size: float) -> bool:
        """Whether a dimension can have this size; an unknown name takes its value from it."""
        value = self.value(dim)
        if value is not None:
            return value == size
        if isinstance(dim, ast.Name):
            self.values[dim.id] = size
            return size == int(size)
        left, right, operator = self.value(dim.left), self.value(dim.right), type(dim.op)
        if right is not None and operator in LEFT:
            return self.agree(dim.left, LEFT[operator](size, right))
        if left is not None and operator in RIGHT:
            return self.agree(dim.right, RIGHT[operator](size, left))
        return True

    def check(self, comment: Comment, value) -> None:
        """Check a comment against a value, and record the first time that it is false."""
        comment.checked += 1
        shape = shape_of(value, len(comment.dims))
        if shape is None:
            comment.false = comment.false or f"is {type(value).__name__}, which has no shape"
            return
        self.compare(comment, shape)
        self.seen.append((comment, shape))

    def settle(self) -> None:
        """Check all comments again, now that every name has its value."""
        for comment, shape in self.seen:
            self.compare(comment, shape)

    def compare(self, comment: Comment, shape: tuple[int, ...]) -> None:
        if not self.fits(comment.dims, shape) and not comment.false:
            known = ", ".join(f"{name} = {size:g}" for name, size in self.values.items())
            comment.false = f"is {list(shape)}" + (f" where {known}" if known else "")

    def fits(self, dims: list[ast.expr], shape: tuple[int, ...]) -> bool:
        gaps = [n for n, dim in enumerate(dims) if isinstance(dim, ast.Constant) and dim.value is ...]
        if gaps:
            gap = gaps[0]
            tail = len(dims) - gap - 1
            if len(shape) < gap + tail:
                return False
            dims, shape = dims[:gap] + dims[gap + 1:], shape[:gap] + shape[len(shape) - tail:]
        if len(dims) != len(shape):
            return False
        return all([self.agree(dim, size) for dim, size in zip(dims, shape)])


def parse_dims(text: str) -> list[ast.expr] | None:
    """The dimensions of a bracketed shape; None if it is not a shape.

    >>> parse_dims("[see below]"), len(parse_dims("[N, D / 2]"))
    (None, 2)
    """
    try:
        dims = ast.parse(text, mode="eval").body.elts
    except (SyntaxError, AttributeError):
        return None
    return dims if all(map(is_dim, dims)) else None


def is_dim(dim: ast.expr) -> bool:
    if isinstance(dim, ast.BinOp):
        return type(dim.op) in OPERATORS and is_dim(dim.left) and is_dim(dim.right)
    if isinstance(dim, ast.Constant):
        return dim.value is ... or int_of(dim.value) is not None
    return isinstance(dim, ast.Name)


def shape_of(value, rank: int) -> tuple[int, ...] | None:
    """A tensor's shape; a list's length, followed, up to this rank, by the shape its elements share; None if it has no shape."""
    if hasattr(value, "shape"):
        sizes = tuple(int_of(size) for size in value.shape)
        return None if None in sizes else sizes
    if not hasattr(value, "__len__") or isinstance(value, str):
        return None
    inner = {shape_of(element, rank - 1) for element in value} if rank > 1 and not isinstance(value, dict) else set()
    if len(inner) == 1 and None not in inner:
        return (len(value), *inner.pop())
    return (len(value),)


def int_of(value) -> int | None:
    """An int, or the int in a compile-time constant; None for anything else."""
    value = getattr(value, "value", value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def known_in(variables: dict) -> Callable[[str], int | None]:
    """A function that looks a comment's name up: among the variables, then on self, config and batch."""
    places = [variables.get(name) for name in ("self", "config", "batch")]
    places.append(getattr(variables.get("self"), "config", None))

    def known(name: str) -> int | None:
        names = [name, VOCABULARY.get(name, name)]
        names.append(names[1].upper())
        for each in names:
            if int_of(variables.get(each)) is not None:
                return int_of(variables[each])
        for place in places:
            for each in names[:2]:
                try:
                    value = int_of(getattr(place, each, None))
                except Exception:  # a property that cannot be computed yet
                    continue
                if value is not None:
                    return value
        return None

    return known
