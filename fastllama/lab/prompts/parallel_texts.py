"""What the parallel run asks: one system prompt, and requests that stand behind it. Written for a model of Python."""

SYSTEM = '''"""Small functions, one for each request.

Every function stands alone and uses the standard library only. Its documentation string says
what it returns, in one line, and what it raises where that is not plain. Names are words, and
a word means the same everywhere:

    path      where a file lies, as a str or a pathlib.Path
    line      a str without its newline
    lines     an iterable of such lines, read once
    items     any sequence; it is not changed
    key       a function of one item, or None
    default   what is returned where nothing is found

A function that cannot do what it was asked for raises ValueError with a message that names
the argument and its value. Nothing is printed, and no file is left open.
"""

import os
import re
import sys


def first_line(path, default=None):
    """Return the first line of a file, or default where the file is empty."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            return line.rstrip("\\n")
    return default


'''

REQUESTS = (
    "def count_lines(path):\n",
    "def longest(items, key=None):\n",
    "def is_blank(line):\n",
    "def read_words(path):\n",
    "def without_comments(lines):\n",
    "def split_pairs(line, sep='='):\n",
    "def file_size(path):\n",
    "def unique(items):\n",
    "def chunks(items, size):\n",
    "def find(items, key, default=None):\n",
    "def parent_folder(path):\n",
    "def join_lines(lines):\n",
    "class Counter:\n    def __init__(self, items=()):\n",
    "def parse_number(line, default=None):\n",
    "def sorted_by_length(items):\n",
    "def write_lines(path, lines):\n",
)
