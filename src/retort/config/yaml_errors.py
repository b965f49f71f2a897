"""What is wrong in a text that is not YAML, in one sentence, and the text as it was probably meant.

The reader goes on with that text, so that the other mistakes of a file are found too. Lines keep their numbers.
"""

import re
from dataclasses import dataclass

import yaml

_BREAKS = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_KEY = re.compile(
    r"(?P<indent>[ ]*)(?:- +)?(?P<key>[^\s#'\"\[\]{},&*!|>%@`:-][^:#]*?)[ ]*:(?P<rest>[ \t].*|)$"
)
_NO_SPACE = re.compile(r"\s*(?:- +)?(?P<key>[A-Za-z_][\w.-]*):(?P<value>[^\s/].*)$")

Explained = tuple[int, str, str | None]  # index of the line, sentence, repaired text


@dataclass(frozen=True)
class _Line:
    """A line 'key: value' (rest is the value), or another one (key is the whole line)."""

    number: int  # in the list of lines, from 0
    indent: int
    key: str
    rest: str | None  # None: no 'key: value'

    @property
    def has_value(self) -> bool:
        rest = re.sub(r"(^|\s)#.*", "", self.rest or "").strip()
        return bool(rest) and rest[0] not in "|>&["


def split_lines(text: str) -> list[str]:
    """Return the lines of a text, as YAML counts them."""
    return _BREAKS.split(text)


def explain(text: str) -> Explained:
    """Return the line, from 0, what is wrong with it, and the text without that, or None where no repair is clear.

    `text` must not be YAML.
    """
    lines = split_lines(text)
    try:
        yaml.compose(text, Loader=yaml.SafeLoader)  # its messages say more than libyaml's
    except yaml.reader.ReaderError as error:
        number = len(split_lines(text[: error.position])) - 1
        shown = f"the character U+{ord(text[error.position]):04X}, which YAML does not allow. Delete it."
        return number, shown, text[: error.position] + " " + text[error.position + 1 :]
    except yaml.MarkedYAMLError as error:
        return _explain(lines, error)
    except RecursionError:
        return 0, "its values are nested too deeply.", None
    return 0, "it is not YAML. Check the indentation of its lines.", None


def _explain(lines: list[str], error: yaml.MarkedYAMLError) -> Explained:
    mark = error.problem_mark or error.context_mark
    assert mark is not None, error
    number, column = min(mark.line, len(lines) - 1), mark.column
    begin = error.context_mark.line if error.context_mark else number
    context, problem = error.context or "", error.problem or ""
    if any("\t" in _margin(line) for line in (lines[number], lines[begin])):
        return _replace_tabs(lines)
    if "another document" in problem or "document separator" in problem:
        sentence = (
            "'---' begins a second document. A config is one: give two files, or remove this."
        )
        return number, sentence, None
    if "flow" in context:
        return _explain_brackets(lines, error)
    if "quoted scalar" in context or "double-quoted" in context:
        return _explain_quotes(lines, begin, number, problem)
    if "mapping values" in problem:
        return _explain_colon(lines, number, column)
    if "expected ':'" in problem:
        return _explain_no_colon(lines, begin)
    if "block end" in problem or "document start" in problem:
        return _explain_indentation(lines, number, column)
    if "sequence entries" in problem:
        shown = lines[number][column:].removeprefix("-").strip()
        sentence = f"a list begins in the next line, or is written in brackets: [{shown}]."
        return number, sentence, _replace(lines, number, f"{lines[number][:column]}[{shown}]")
    return _explain_first_character(lines, number, problem)


def _replace_tabs(lines: list[str]) -> Explained:
    """Replace each tab by as many spaces as the file uses elsewhere."""
    wrong = [number for number, line in enumerate(lines) if "\t" in _margin(line)]
    margins = [
        len(_margin(line)) for n, line in enumerate(lines) if n not in wrong and line.strip()
    ]
    unit = " " * min((size for size in margins if size), default=2)
    fixed = [
        _margin(line).replace("\t", unit) + line.lstrip() if number in wrong else line
        for number, line in enumerate(lines)
    ]
    more = f", as {len(wrong) - 1} more do" if wrong[1:] else ""
    sentence = f"this line begins with a tab{more}. YAML indents with spaces only: replace each tab by spaces."
    return wrong[0], sentence, "\n".join(fixed)


def _explain_colon(lines: list[str], number: int, column: int) -> Explained:
    """Explain a ': ' where no key can be: in a value, or below a key that has a value already."""
    here, above = _parse(lines, number), _above(lines, number)
    if ": " in lines[number][:column] or lines[number][:column].rstrip().endswith(":"):
        value = (here.rest or "").strip()
        if re.match(r"[a-z_]+: ", value) and here.key.isalpha():  # a section and its key
            sentence = f"a key follows another in this line. Begin a new line after '{here.key}:', indented further."
            line = lines[number].replace(value, f"{{{value}}}", 1)
            return number, sentence, _replace(lines, number, line)
        written = _cut(f"{here.key}: {_quote(value)}")
        sentence = (
            f"the value {_show(value)} has a colon and a space in it. Put it in quotes: {written}"
        )
        return number, sentence, _requote(lines, number, value)
    if above is not None and lines[above.number].lstrip().startswith("- "):
        sentence = f"{here.key!r} is indented as a part of line {above.number + 1}, {_show(above.key)}. Indent it less."
        return number, sentence, None
    if above is not None and above.rest is None:
        return _explain_no_colon(lines, above.number)
    if above is not None and above.has_value and here.indent > above.indent == 0:
        sentence = (
            f"{here.key!r} is below {above.key!r} (line {above.number + 1}), which has the value "
            f"{_show(_value(above))}. Remove that value: a section's keys are in the lines below it."
        )
        return number, sentence, _replace(lines, above.number, f"{above.key}:")
    if above is not None and above.has_value and here.indent > above.indent:
        owner = ".".join(line.key for line in [*_around(lines, above.number), above])
        sentence = (
            f"{here.key!r} is indented as a key of {owner!r} (line {above.number + 1}), which has the value "
            f"{_show(_value(above))}. Indent it by {_spaces(above.indent)}, like {above.key!r}."
        )
        return number, sentence, _indent(lines, here, above.indent)
    sentence = f"a key cannot be here: {_show(lines[number].strip())}. Check the lines around it."
    return number, sentence, None


def _explain_no_colon(lines: list[str], number: int) -> Explained:
    """Explain a line that is no 'key: value'."""
    line = lines[number]
    if found := _NO_SPACE.match(line):
        written = f"{found['key']}: {found['value']}"
        sentence = f"{_show(line.strip())} has no space after the colon. Write {_cut(written)}"
        at = found.end("key") + 1
        return number, sentence, _replace(lines, number, f"{line[:at]} {line[at:]}")
    sentence = (
        f"{_show(line.strip())} is not 'key: value'. Add the colon and a value, or remove the line."
    )
    return number, sentence, _replace(lines, number, "")


def _explain_indentation(lines: list[str], number: int, column: int) -> Explained:
    """Explain a line that is indented like none of those around it, or does not continue them."""
    here = _parse(lines, number)
    rest = lines[number][column:]
    if rest[:1] in "]})" and rest:
        sentence = f"'{rest[0]}' closes a bracket that was not opened. Remove it."
        line = lines[number][:column] + " " + lines[number][column + 1 :]
        return number, sentence, _replace(lines, number, line)
    if lines[number][:column].rstrip()[-1:] in ("'", '"'):
        sentence = f"text follows a closing quote: {_show(lines[number].strip())}. Put the whole value in quotes"
        if "'" in lines[number]:
            sentence += "; an apostrophe in single quotes is written twice, ''"
        value = (here.rest or "").strip().strip("'\"")
        return number, sentence + ".", _requote(lines, number, (here.rest or "").strip(), value)
    around = [
        line
        for line in [*_around(lines, number, here.indent), _above(lines, number)]
        if line is not None
    ]
    if rest and (above := _above(lines, number)) and lines[above.number].lstrip().startswith("- "):
        sentence = f"{_show(lines[number].strip())} is beside items of a list, which begin with '- '. Indent it less."
        return number, sentence, None
    options = {line.indent: line for line in around if line.rest is not None}
    if here.indent in options or not options or rest.startswith("- "):
        sentence = f"{_show(lines[number].strip())} does not continue the lines above it. Check its indentation."
        return number, sentence, None
    known = ", ".join(
        f"{line.key!r} (line {line.number + 1}) by {_spaces(indent)}"
        for indent, line in sorted(options.items())
    )
    sentence = (
        f"{here.key!r} is indented by {_spaces(here.indent)}, like no line above it: {known}. Indent it like one "
        "of them."
    )
    nearest = min(
        options, key=lambda n: (abs(n - here.indent), options[n].has_value != here.has_value, -n)
    )
    return number, sentence, _indent(lines, here, nearest)


def _explain_brackets(lines: list[str], error: yaml.MarkedYAMLError) -> Explained:
    assert error.context_mark and error.problem_mark
    number, column = error.context_mark.line, error.context_mark.column
    end = error.problem_mark.line
    bracket = lines[number][column : column + 1]
    if bracket not in ("[", "{"):
        sentence = f"the brackets of {_show(lines[end].strip())} do not match. Close each of them, in their order."
        return end, sentence, None
    close = {"[": "]", "{": "}"}[bracket]
    before = f" before line {end + 1}" if end > number else ""
    is_closed = close in lines[number][column:] and end == number
    if is_closed:
        sentence = (
            f"in {_show(lines[number][column:].strip())} a comma is missing, or a value that has one, a colon or a "
            "bracket needs quotes."
        )
        return number, sentence, None
    sentence = f"'{bracket}' is not closed{before}. Add '{close}'."
    return number, sentence, _replace(lines, number, lines[number] + close)


def _explain_quotes(lines: list[str], begin: int, number: int, problem: str) -> Explained:
    line = lines[begin]
    if "escape" in problem:
        line = lines[number]
        sentence = (
            f"in double quotes a backslash begins an escape such as \\n: {_show(line.strip())}. Use single quotes, or "
            "write the backslash twice."
        )
        return number, sentence, _replace(lines, number, line.replace('"', "'"))
    quote = "'" if line.count("'") % 2 else '"'
    sentence = (
        f"the quote that begins here is not closed: {_show(line.strip())}. Add the closing {quote}"
    )
    is_odd = line.count(quote) % 2
    return begin, sentence, _replace(lines, begin, line + quote) if is_odd else None


def _explain_first_character(lines: list[str], number: int, problem: str) -> Explained:
    here = _parse(lines, number)
    value = (here.rest or "").strip()
    if value and value[0] in "@`%*&!|>}],":
        sentence = f"a text that begins with '{value[0]}' needs quotes: {_cut(f'{here.key}: {_quote(value)}')}"
        return number, sentence, _requote(lines, number, value)
    return (
        number,
        f"{_show(lines[number].strip())} is not YAML ({problem}). Correct the line.",
        None,
    )


# ---------------------------------------------------------------------------------------------------------
# Lines


def _margin(line: str) -> str:
    return line[: len(line) - len(line.lstrip(" \t"))]


def _parse(lines: list[str], number: int) -> _Line:
    text = lines[number]
    found = _KEY.match(text)
    if found is None:
        return _Line(number, len(_margin(text)), re.sub(r":(\s.*)?$", "", text.strip()), None)
    return _Line(number, len(found["indent"]), _cut(found["key"]), found["rest"])


def _value(line: _Line) -> str:
    return (line.rest or "").strip()


def _above(lines: list[str], number: int) -> _Line | None:
    """Return the last line above that is not empty or a comment."""
    for n in reversed(range(number)):
        if lines[n].strip() and not lines[n].lstrip().startswith("#"):
            return _parse(lines, n)
    return None


def _around(lines: list[str], number: int, indent: int | None = None) -> list[_Line]:
    """Return the lines of the keys that a line is in, the outermost first.

    With `indent`, also a key that is indented further, next to which the line may have been meant.
    """
    found: list[_Line] = []
    least = len(_margin(lines[number])) if indent is None else 10_000
    for n in reversed(range(number)):
        line = _parse(lines, n)
        if line.rest is not None and line.indent < least:
            found.append(line)
            least = line.indent
    return found[::-1]


def _replace(lines: list[str], number: int, line: str) -> str:
    return "\n".join([*lines[:number], line, *lines[number + 1 :]])


def _requote(lines: list[str], number: int, value: str, content: str | None = None) -> str | None:
    begin, found, end = lines[number].rpartition(value or " ")
    line = begin + _quote(content or value) + end
    return _replace(lines, number, line) if found and value else None


def _indent(lines: list[str], line: _Line, indent: int) -> str:
    """Move a line and what is below it to another indentation."""
    moved = list(lines)
    for n in range(line.number, len(lines)):
        size = len(_margin(lines[n]))
        if lines[n].strip() and (size < line.indent or (size == indent and line.has_value)):
            break
        moved[n] = " " * max(size + indent - line.indent, 0) + lines[n].lstrip(" ")
    return "\n".join(moved)


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def _show(text: str) -> str:
    return f"'{_cut(text)}'"


def _spaces(count: int) -> str:
    return {0: "no spaces", 1: "1 space"}.get(count, f"{count} spaces")
