"""Mutants of a source file, all in one text: each is switched on while the program runs.

`mutants_of` finds them and `instrument` writes them into the text: `a < b` becomes `(mutant(17) ? (a <= b) : (a < b))`,
so that one build serves all mutants. C++ is read token by token, as clang-format leaves it: binary operators stand
between blanks and the brackets of templates do not. Python is read by `ast`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise


@dataclass
class Mutant:
    """One change: the text [begin, end) becomes `text`."""

    begin: int
    end: int
    text: str
    what: str  # for people: "<  ->  <="
    form: str = "expression"  # how it is switched: expression, statement, negation
    file: str = ""
    line: int = 0
    source: str = ""  # the line's text, without the blanks around it
    number: int = field(default=-1)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.file, self.source, self.what


def mutants_of(file: str, source: str) -> list[Mutant]:
    """All mutants of a file, in the order of their places."""
    found = list(_python(source) if file.endswith(".py") else _cpp(source))
    found.sort(key=lambda mutant: (mutant.begin, -mutant.end))
    lines = source.splitlines()
    for mutant in found:
        mutant.file = file
        # Where the operator stands, not where its left operand begins.
        mutant.line = source.count("\n", 0, mutant.begin if mutant.line == 0 else mutant.line) + 1
        mutant.source = lines[mutant.line - 1].strip()
    return found


def instrument(source: str, mutants: list[Mutant], *, python: bool) -> str:
    """The text with a switch for each of the mutants, which may nest but not cross."""
    groups: dict[tuple[int, int], list[Mutant]] = {}
    for mutant in mutants:
        groups.setdefault((mutant.begin, mutant.end), []).append(mutant)
    spans = sorted(groups, key=lambda span: (span[0], -span[1]))
    for (begin, end), (later, last) in pairwise(spans):
        assert later >= end or last <= end, f"mutants cross: {source[begin:last]!r}"

    def write(begin: int, end: int, inner: list[tuple[int, int]]) -> str:
        text, at = "", begin
        while inner:
            first, *rest = inner
            within = [span for span in rest if span[1] <= first[1]]
            inner = [span for span in rest if span[1] > first[1]]
            text += source[at : first[0]] + _switch(write(*first, within), groups[first], python=python)
            at = first[1]
        return text + source[at:end]

    text = write(0, len(source), spans)
    return text if python else re.sub(r"constexpr (?=[\w:]+ k\w+(?:\[\])? =[^;]*\bmutant\()", "const ", text)


def _switch(text: str, mutants: list[Mutant], *, python: bool) -> str:
    for mutant in mutants:
        on = f"mutant({mutant.number})"
        if mutant.form == "negation":
            text = f"(bool({text}) != {on})" if python else f"static_cast<bool>({text}) != {on}"
        elif mutant.form == "statement" and python:
            text = f"({on} or _raise({text.removeprefix('raise ')}))"
        elif mutant.form == "statement":
            text = f"{{ if (!{on}) {{ {text} }} }}"
        elif python:
            text = f"(({mutant.text}) if {on} else ({text}))"
        else:
            text = f"({on} ? ({_one_line(mutant.text)}) : ({text}))"
    return text


def _one_line(text: str) -> str:
    """Without comments and line ends, so that a compiler's message names a line of the source."""
    return re.sub(r"\s*\n\s*", " ", re.sub(r"//[^\n]*", "", text))


# ---- C++ ------------------------------------------------------------------------------------------------------------

TOKEN = re.compile(
    r"""(?P<skip>//[^\n]*|/\*.*?\*/|^[ \t]*\#(?:[^\n\\]|\\.)*|\s+)
      | (?P<text>"(?:[^"\\\n]|\\.)*"|(?<![0-9a-fA-F])'(?:[^'\\\n]|\\.)*')
      | (?P<number>(?:0[xX][0-9a-fA-F']+(?:\.?p-?\d+)?|\d[\d']*(?:\.\d*)?(?:[eE][+-]?\d+)?)[uUlLfF]*)
      | (?P<name>[A-Za-z_]\w*)
      | (?P<mark><=>|<<=|>>=|->|::|\+\+|--|<<|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|.)""",
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
COMPARED = {"<": ("<=", ">="), ">": (">=", "<="), "<=": ("<", ">"), ">=": (">", "<"), "==": ("!=",), "!=": ("==",)}
CALCULATED = {"+": "-", "-": "+", "*": "/", "/": "*", "%": "*"}
JOINED = {"&&": "||", "||": "&&"}
# What ends an operand, by how tightly the operator binds.
LOOSEST = {",", ";", "?", ":", "=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "<<=", ">>=", "return", "throw"}
STRENGTHS = [
    {"||"},
    {"&&"},
    {"|"},
    {"^"},
    {"&"},
    {"==", "!="},
    {"<", ">", "<=", ">="},
    {"<<", ">>"},
    {"+", "-"},
    {"*", "/", "%"},
]
OPEN, CLOSE = "([{", ")]}"


@dataclass
class Token:
    kind: str
    text: str
    begin: int
    end: int
    spaced: bool = False  # a blank on either side: a binary operator
    partner: int = -1  # of a bracket
    within: int = -1  # the bracket it stands in


def _tokens(source: str) -> list[Token]:
    tokens = [
        Token(match.lastgroup or "", match.group(), match.start(), match.end())
        for match in TOKEN.finditer(source)
        if match.lastgroup != "skip"
    ]
    stack: list[int] = []
    for i, token in enumerate(tokens):
        token.spaced = source[token.begin - 1 : token.begin].isspace() and source[token.end : token.end + 1].isspace()
        token.within = stack[-1] if stack else -1
        if token.kind == "mark" and token.text in OPEN:
            stack.append(i)
        elif token.kind == "mark" and token.text in CLOSE:
            start = stack.pop()
            tokens[start].partner, token.partner, token.within = i, start, tokens[start].within
    return tokens


def _operand(tokens: list[Token], at: int, step: int, stop: set[str]) -> int:
    """The last token of the operand that begins beside `at`."""
    i = at + step
    while 0 <= i < len(tokens):
        token = tokens[i]
        bracket = CLOSE if step < 0 else OPEN
        if token.kind == "mark" and token.text in bracket:
            # A block is no operand, unless a type or a lambda's head stands before it.
            if (
                step < 0
                and token.text == "}"
                and tokens[i + 1].text not in (".", ")", ",", ";")
                and not tokens[i + 1].spaced
            ):
                break
            i = token.partner
        elif (
            (token.text in OPEN + CLOSE and token.kind == "mark")
            or token.text in LOOSEST
            or (token.text in stop and token.spaced)
        ):
            break
        i += step
    return i - step


def _binary(tokens: list[Token], at: int) -> tuple[int, int, int]:
    """Begin of the left operand, end of the right one, and of the operator."""
    level = next(i for i, marks in enumerate(STRENGTHS) if tokens[at].text in marks)
    weaker = set().union(*STRENGTHS[:level])
    left = _operand(tokens, at, -1, weaker)
    right = _operand(tokens, at, 1, weaker | STRENGTHS[level])
    return tokens[left].begin, tokens[right].end, tokens[at].begin


def _cpp(source: str) -> Iterator[Mutant]:
    tokens = _tokens(source)
    fixed = _constant_expressions(tokens)
    for i, token in enumerate(tokens):
        if any(begin <= i < end for begin, end in fixed):
            continue
        if token.kind == "mark" and token.spaced:
            yield from _changed_operator(source, tokens, i)
        elif token.kind == "number":
            yield Mutant(token.begin, token.end, f"{token.text} + 1", f"{token.text} -> {token.text} + 1")
        elif token.text in ("true", "false"):
            other = "false" if token.text == "true" else "true"
            yield Mutant(token.begin, token.end, other, f"{token.text} -> {other}")
        elif token.text in ("if", "while") and tokens[i + 1].text == "(":
            yield from _negated(source, tokens, i + 1)
        if i == 0 or (tokens[i - 1].text in (";", "{", "}", ")", "else") and tokens[i - 1].kind in ("mark", "name")):
            yield from _deleted(source, tokens, i)


def _constant_expressions(tokens: list[Token]) -> list[tuple[int, int]]:
    """Ranges of tokens in which a choice made at run time cannot stand."""
    ranges = []
    for i, token in enumerate(tokens):
        if token.text == "constexpr" and _named_constant(tokens, i):
            continue
        if token.text in ("static_assert", "constexpr", "case", "template", "using", "enum"):
            end = i
            while tokens[end].text not in (";", "{", ":") or tokens[end].within != token.within:
                end = tokens[end].partner if tokens[end].text in OPEN and tokens[end].partner > end else end
                end += 1
                if end >= len(tokens):
                    break
            ranges.append((i, end))
    return ranges


def _named_constant(tokens: list[Token], i: int) -> bool:
    """constexpr TYPE kName = ...; or TYPE kName[] = ...; which `instrument` makes a const."""
    while tokens[i].text not in ("=", ";", "{", "(", "<"):
        i += 1
    name = i - 3 if tokens[i - 1].text == "]" else i - 1
    return tokens[i].text == "=" and re.fullmatch(r"k[A-Z]\w*", tokens[name].text) is not None


def _changed_operator(source: str, tokens: list[Token], i: int) -> Iterator[Mutant]:
    mark = tokens[i].text
    if mark in COMPARED:
        others: tuple[str, ...] = COMPARED[mark]
    elif mark in CALCULATED:
        others = (CALCULATED[mark],)
    elif mark in JOINED:
        others = (JOINED[mark],)
    else:
        return
    begin, end, place = _binary(tokens, i)
    for other in others:
        left, right = source[begin:place], source[tokens[i].end : end]
        if mark == "+" and '"' in left + right:  # of texts, which nothing else can be done with
            return
        if mark in JOINED:  # which bind differently
            left, right = f"({left})", f"({right})"
        yield Mutant(begin, end, f"{left}{other}{right}", f"{mark} -> {other}", line=place)


def _negated(source: str, tokens: list[Token], bracket: int) -> Iterator[Mutant]:
    """if (a) -> if (!a), where no comparison says the same already."""
    inside = range(bracket + 1, tokens[bracket].partner)
    plain = [tokens[k] for k in inside if tokens[k].within == bracket]
    if any(token.text == ";" or (token.text == "=" and token.spaced) for token in plain):
        return
    marks = [token.text for token in plain if token.spaced]
    if any(mark in JOINED or mark in COMPARED for mark in marks):
        return
    begin, end = tokens[inside[0]].begin, tokens[inside[-1]].end
    yield Mutant(begin, end, "", "if (a) -> if (!a)", form="negation")


def _deleted(source: str, tokens: list[Token], i: int) -> Iterator[Mutant]:
    """A call, a throw, a plain return or an assignment that is a statement of its own."""
    token = tokens[i]
    if token.within >= 0 and tokens[token.within].text != "{":
        return
    if token.kind != "name" and token.text not in ("++", "--", "::"):
        return
    if token.within < 0 or _is_type_or_namespace(tokens, token.within):
        return
    end = i
    while tokens[end].text != ";" or tokens[end].within != token.within:
        if (
            tokens[end].text == "{"
            and tokens[end].within == token.within
            and tokens[end - 1].text in (")", "const", "override")
        ):
            return  # a function or a block
        end = tokens[end].partner if tokens[end].text in OPEN and tokens[end].partner > end else end
        end += 1
        if end >= len(tokens):
            return
    words = tokens[i:end]
    level = [word for word in words if word.within == token.within]
    if token.text in ("throw", "continue", "break") or [word.text for word in words] == ["return"]:
        shown = token.text
    elif token.text in (
        "return",
        "using",
        "case",
        "default",
        "if",
        "else",
        "for",
        "while",
        "do",
        "try",
        "static",
        "const",
        "constexpr",
    ):
        return
    elif any(a.kind == "name" and b.kind == "name" for a, b in pairwise(level)):
        return  # a declaration
    elif any(word.text in ("&", "*", ">") and not word.spaced for word in level) or "(" not in [
        word.text for word in level
    ] + ["(" if any(word.text in ("=", "+=", "-=", "++", "--") for word in level) else ""]:
        return
    else:
        shown = source[token.begin : tokens[end].end].split("(")[0].split("\n")[0]
    if tokens[end + 1].text == "}" and _must_not_end(tokens, token.within):
        return
    yield Mutant(token.begin, tokens[end].end, "", f"without {shown}", form="statement")


def _must_not_end(tokens: list[Token], bracket: int) -> bool:
    """Whether the block is a function's that has a value to return, or does not return: a compiler may take it for
    granted that its end is not reached, and with it the statement before that."""
    if tokens[bracket - 1].text not in (")", "const", "override", "noexcept"):
        return False
    head, i = set(), bracket - 1
    while i >= 0 and (tokens[i].text not in (";", "{", "}", "=") or tokens[i].kind != "mark"):
        i = tokens[i].partner if tokens[i].text == ")" else i
        head.add(tokens[i].text)
        i -= 1
    # A block of another kind, a constructor with members to initialize, a destructor, a lambda.
    other = head & {"if", "for", "while", "switch", "catch", ":", "~", "]"}
    return "noreturn" in head or not (other or "void" in head)


def _is_type_or_namespace(tokens: list[Token], bracket: int) -> bool:
    """Whether the block is a type's or a namespace's, which holds no statements."""
    i = bracket - 1
    while i >= 0 and tokens[i].text not in (";", "{", "}", ")"):
        if tokens[i].text in ("class", "struct", "namespace", "union", "enum"):
            return True
        i -= 1
    return False


# ---- Python ---------------------------------------------------------------------------------------------------------

PYTHON_COMPARED = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}  # fmt: skip
PYTHON_CALCULATED = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "//"), ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
}  # fmt: skip


def _python(source: str) -> Iterator[Mutant]:
    tree = ast.parse(source)
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    assert source.isascii(), "positions of ast are bytes"

    def span(node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    left_out: set[ast.AST] = set()  # annotations, defaults that nobody evaluates anew, and text
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            left_out.update(part for part in ast.walk(node) if part is not node)
        elif isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
            left_out.update(ast.walk(node.annotation))
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            left_out.update(ast.walk(node.returns))
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.Compare):
            yield from _changed_comparison(source, node, span)
        elif isinstance(node, ast.BoolOp):
            mark, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            text = f" {other} ".join(f"({source[slice(*span(value))]})" for value in node.values)
            yield Mutant(*span(node), text, f"{mark} -> {other}")
        elif isinstance(node, ast.BinOp) and type(node.op) in PYTHON_CALCULATED:
            mark, other = PYTHON_CALCULATED[type(node.op)]
            left, right = (source[slice(*span(side))] for side in (node.left, node.right))
            yield Mutant(*span(node), f"({left}) {other} ({right})", f"{mark} -> {other}")
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield Mutant(*span(node), f"{node.value} + 1", f"{node.value} -> {node.value} + 1")
        elif isinstance(node, ast.Constant) and type(node.value) is bool:
            yield Mutant(*span(node), str(not node.value), f"{node.value} -> {not node.value}")
        elif isinstance(node, (ast.If, ast.IfExp)) and not isinstance(
            node.test, (ast.Compare, ast.BoolOp, ast.NamedExpr)
        ):
            yield Mutant(*span(node.test), "", "if a -> if not a", form="negation")
        elif isinstance(node, ast.Raise) and node.exc is not None and node.cause is None:
            yield Mutant(*span(node), "", "without raise", form="statement")


def _changed_comparison(source: str, node: ast.Compare, span) -> Iterator[Mutant]:
    sides = [node.left, *node.comparators]
    for k, operator in enumerate(node.ops):
        mark, other = PYTHON_COMPARED[type(operator)]
        text = source[slice(*span(sides[0]))]
        for j, side in enumerate(sides[1:]):
            text += f" {other if j == k else PYTHON_COMPARED[type(node.ops[j])][0]} {source[slice(*span(side))]}"
        yield Mutant(*span(node), text, f"{mark} -> {other}" + (f" (the {k + 1}.)" if len(node.ops) > 1 else ""))
