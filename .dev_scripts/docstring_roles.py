"""Extension of griffe for the site: turns the Sphinx markup of docstrings, such as :func:`name`, into Markdown."""

import re

import griffe

ROLE = re.compile(r':(?:attr|class|data|func|meth|mod):`(~?)([\w.]+)`')
# `::` announces a literal block, for which Markdown needs only the indentation.
BLOCK = re.compile(r'^::\n', re.MULTILINE)


class DocstringRoles(griffe.Extension):
    """Translate every docstring of a package."""

    def on_package(self, *, pkg, loader, **kwargs):
        for obj in objects(pkg):
            if obj.docstring:
                obj.docstring.value = translate(obj, obj.docstring.value)


def objects(obj):
    """Yield an object and everything that it defines. Imported names are left out."""
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from objects(member)


def translate(obj, text):
    """Translate the docstring of an object."""
    return ROLE.sub(lambda match: link(obj, *match.groups()), BLOCK.sub('', text))


def link(obj, short, name):
    """Return a link to the object that a docstring names. A name that is on no page becomes plain code."""
    text = name.rpartition('.')[2] if short else name
    first, dot, rest = name.partition('.')
    try:
        target = obj.resolve(first) + dot + rest
    except griffe.NameResolutionError:
        target = name
    return f'<autoref optional identifier="{target}"><code>{text}</code></autoref>'
